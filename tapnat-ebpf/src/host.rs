//! Forwards for the host itself. Its packets to its own outside address go over the loopback, which
//! no program here sees; so its sockets are led to the guest when they name the outside endpoint, and
//! told of the outside endpoint when they ask whom they talk to. Costs guests' packets nothing.
//!
//! Knows static mappings only, and no session: host and guest then talk by the inside network.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
};
use tapnat_common::{
    abi::{EndpointKey, HostSocketKey, Mapping, mapping_flags},
    net::{Be16, Be32, protocol},
};

use crate::{maps, tables::value};

/// The system call goes on. Two of the hooks know no other answer.
const GO_ON: i32 = 1;
/// `::ffff:0:0/96`, as the fields of a context hold it.
const MAPPED: [u32; 3] = [0, 0, 0xffff_u32.to_be()];

/// The address in a system call of a socket, to be read and written.
pub struct Address {
    context: *mut bpf_sock_addr,
    /// The field that holds it; of an IPv6 address the last quarter.
    field: *mut u32,
    is_v4: bool,
}

impl Address {
    #[inline(always)]
    pub fn v4(context: *mut bpf_sock_addr) -> Self {
        Self {
            context,
            // SAFETY: the context is valid while the program runs.
            field: unsafe { &raw mut (*context).user_ip4 },
            is_v4: true,
        }
    }

    /// One that may stand for an IPv4 address.
    #[inline(always)]
    pub fn v6(context: *mut bpf_sock_addr) -> Self {
        // SAFETY: as above.
        let quarters: *mut u32 = unsafe { (&raw mut (*context).user_ip6).cast() };
        let is_v4 = MAPPED.iter().enumerate().all(|(index, expected)| {
            // SAFETY: there are four.
            let quarter = unsafe { quarters.add(index) };
            load(quarter) == *expected
        });
        Self {
            context,
            // SAFETY: as above.
            field: unsafe { quarters.add(MAPPED.len()) },
            is_v4,
        }
    }

    /// TCP's or UDP's endpoint that it names.
    #[inline(always)]
    fn endpoint(&self) -> Option<EndpointKey> {
        // SAFETY: the context is valid while the program runs.
        let number = load(unsafe { &raw const (*self.context).protocol });
        if !self.is_v4 || (number != u32::from(protocol::TCP) && number != u32::from(protocol::UDP))
        {
            return None;
        }
        // SAFETY: as above.
        let port = load(unsafe { &raw const (*self.context).user_port });
        let [first, second, ..] = port.to_ne_bytes();
        Some(EndpointKey::new(
            Be32::from_raw(load(self.field)),
            Be16::from_bytes([first, second]),
            number as u8,
        ))
    }

    #[inline(always)]
    fn set(&self, endpoint: &EndpointKey) {
        store(self.field, endpoint.address.raw());
        let [first, second] = endpoint.port.bytes();
        // SAFETY: the context is valid while the program runs.
        let port = unsafe { &raw mut (*self.context).user_port };
        store(port, u32::from_ne_bytes([first, second, 0, 0]));
    }

    /// Whether the socket is in the network namespace with this cookie.
    #[inline(always)]
    fn is_in(&self, namespace: u64) -> bool {
        // SAFETY: the context is a socket's.
        unsafe { bpf_get_netns_cookie(self.context.cast()) == namespace }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is a socket's.
        unsafe { bpf_get_socket_cookie(self.context.cast()) }
    }
}

/// The verifier allows whole fields only, which the compiler would not keep to.
#[inline(always)]
fn load(field: *const u32) -> u32 {
    // SAFETY: callers pass a field of the context.
    unsafe { ptr::read_volatile(field) }
}

#[inline(always)]
fn store(field: *mut u32, value: u32) {
    // SAFETY: callers pass a field of the context.
    unsafe { ptr::write_volatile(field, value) };
}

/// Leads a socket that names a forward's outside endpoint to the guest.
#[inline(always)]
pub fn lead(address: Address, namespace: u64) -> i32 {
    let Some(outside) = address.endpoint().filter(|_| address.is_in(namespace)) else {
        return GO_ON;
    };
    let mapping = static_mapping(&outside)
        .or_else(|| static_mapping(&EndpointKey::whole(outside.address)))
        // The host comes from where it goes to.
        .filter(|mapping| mapping.lets_in(outside.address));
    let Some(mapping) = mapping else {
        return GO_ON;
    };
    let key = HostSocketKey {
        cookie: address.cookie(),
        inside: mapping.leads_to(&outside),
    };
    // Without this the socket works, too; it is told of the guest.
    let _ = maps::HOST_SOCKETS.insert(key, outside, 0);
    address.set(&key.inside);
    GO_ON
}

/// Tells a socket of the endpoint that it named.
#[inline(always)]
pub fn tell(address: Address, namespace: u64) -> i32 {
    let Some(inside) = address.endpoint().filter(|_| address.is_in(namespace)) else {
        return GO_ON;
    };
    let key = HostSocketKey {
        cookie: address.cookie(),
        inside,
    };
    if let Some(outside) = value(maps::HOST_SOCKETS.get_ptr_mut(key)) {
        address.set(outside);
    }
    GO_ON
}

#[inline(always)]
fn static_mapping(outside: &EndpointKey) -> Option<&'static Mapping> {
    value(maps::MAPPINGS.get_ptr_mut(outside))
        .map(|mapping| &*mapping)
        .filter(|mapping| mapping.flags & mapping_flags::STATIC != 0)
}
