//! Forwards for the host itself. Its packets to its own outside address go over the loopback, which
//! no program here sees; so its sockets are led to the guest when they name the outside endpoint, and
//! told of the outside endpoint when they ask whom they talk to. Costs guests' packets nothing.
//!
//! Knows static mappings only, and no session: host and guest then talk by the inside network.

use core::{array, ptr};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
};
use tapnat_common::{
    abi::{EndpointKey, HostSocketKey, Mapping, mapping_flags},
    net::{Be16, Be32, Be128, protocol},
};

use crate::{maps::Maps, tables::value};

/// The system call goes on. Two of the hooks know no other answer.
const GO_ON: i32 = 1;
/// `::ffff:0:0/96`, as the fields of a context hold it.
const MAPPED: [u32; 3] = [0, 0, 0xffff_u32.to_be()];
/// Where the address of IPv4 lies behind it.
const LAST: usize = MAPPED.len();

/// The address in a system call of a socket, to be read and written.
pub trait Address {
    /// Its IP version.
    type Family: Maps;

    fn get(&self) -> Self::Family;
    fn set(&self, address: Self::Family);
    fn context(&self) -> *mut bpf_sock_addr;
}

/// An IPv4 address, in a field of its own or in the last quarter of an IPv6 one.
pub struct Four {
    context: *mut bpf_sock_addr,
    field: *mut u32,
}

/// An IPv6 address.
pub struct Six {
    context: *mut bpf_sock_addr,
    quarters: *mut u32,
}

impl Four {
    #[inline(always)]
    pub fn new(context: *mut bpf_sock_addr) -> Self {
        Self {
            context,
            // SAFETY: the context is valid while the program runs.
            field: unsafe { &raw mut (*context).user_ip4 },
        }
    }
}

impl Six {
    #[inline(always)]
    pub fn new(context: *mut bpf_sock_addr) -> Self {
        Self {
            context,
            // SAFETY: the context is valid while the program runs.
            quarters: unsafe { (&raw mut (*context).user_ip6).cast() },
        }
    }

    #[inline(always)]
    fn quarter(&self, number: usize) -> *mut u32 {
        // SAFETY: there are four.
        unsafe { self.quarters.add(number) }
    }

    /// The IPv4 address that it stands for, if it does.
    #[inline(always)]
    pub fn four(&self) -> Option<Four> {
        let mut mapped = MAPPED.iter().enumerate();
        mapped
            .all(|(number, expected)| load(self.quarter(number)) == *expected)
            .then(|| Four {
                context: self.context,
                field: self.quarter(LAST),
            })
    }
}

impl Address for Four {
    type Family = Be32;

    #[inline(always)]
    fn get(&self) -> Be32 {
        Be32::from_raw(load(self.field))
    }

    #[inline(always)]
    fn set(&self, address: Be32) {
        store(self.field, address.raw());
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.context
    }
}

impl Address for Six {
    type Family = Be128;

    #[inline(always)]
    fn get(&self) -> Be128 {
        Be128::from_words(array::from_fn(|number| {
            Be32::from_raw(load(self.quarter(number)))
        }))
    }

    #[inline(always)]
    fn set(&self, address: Be128) {
        for (number, word) in address.words().into_iter().enumerate() {
            store(self.quarter(number), word.raw());
        }
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.context
    }
}

/// TCP's or UDP's endpoint that an address and the port beside it name, if the socket is
/// in the network namespace with this cookie.
#[inline(always)]
fn endpoint<T: Address>(address: &T, namespace: u64) -> Option<EndpointKey<T::Family>> {
    let context = address.context();
    // SAFETY: the context is valid while the program runs.
    let number = load(unsafe { &raw const (*context).protocol });
    if number != u32::from(protocol::TCP) && number != u32::from(protocol::UDP) {
        return None;
    }
    // SAFETY: the context is a socket's.
    if unsafe { bpf_get_netns_cookie(context.cast()) } != namespace {
        return None;
    }
    // SAFETY: the context is valid while the program runs.
    let port = load(unsafe { &raw const (*context).user_port });
    let [first, second, ..] = port.to_ne_bytes();
    let port = Be16::from_bytes([first, second]);
    Some(EndpointKey::new(address.get(), port, number as u8))
}

#[inline(always)]
fn set<T: Address>(address: &T, endpoint: &EndpointKey<T::Family>) {
    address.set(endpoint.address);
    let [first, second] = endpoint.port.bytes();
    // SAFETY: the context is valid while the program runs.
    let port = unsafe { &raw mut (*address.context()).user_port };
    store(port, u32::from_ne_bytes([first, second, 0, 0]));
}

/// The key by which a socket is told of the outside endpoint again.
#[inline(always)]
fn key_of<T: Address>(address: &T, inside: EndpointKey<T::Family>) -> HostSocketKey<T::Family> {
    // SAFETY: the context is a socket's.
    let cookie = unsafe { bpf_get_socket_cookie(address.context().cast()) };
    HostSocketKey {
        cookie: [cookie as u32, (cookie >> 32) as u32],
        inside,
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
pub fn lead<T: Address>(address: &T, namespace: u64) -> i32 {
    let Some(outside) = endpoint(address, namespace) else {
        return GO_ON;
    };
    let mapping = static_mapping(&outside)
        .or_else(|| static_mapping(&EndpointKey::whole(outside.address)))
        // The host comes from where it goes to.
        .filter(|mapping| mapping.lets_in(outside.address));
    let Some(mapping) = mapping else {
        return GO_ON;
    };
    let key = key_of(address, mapping.leads_to(&outside));
    // Without this the socket works, too; it is told of the guest.
    let _ = T::Family::host_sockets().insert(key, outside, 0);
    set(address, &key.inside);
    GO_ON
}

/// Tells a socket of the endpoint that it named.
#[inline(always)]
pub fn tell<T: Address>(address: &T, namespace: u64) -> i32 {
    let Some(inside) = endpoint(address, namespace) else {
        return GO_ON;
    };
    let key = key_of(address, inside);
    if let Some(outside) = value(T::Family::host_sockets().get_ptr_mut(key)) {
        set(address, outside);
    }
    GO_ON
}

#[inline(always)]
fn static_mapping<A: Maps>(outside: &EndpointKey<A>) -> Option<&'static Mapping<A>> {
    value(A::mappings().get_ptr_mut(outside))
        .map(|mapping| &*mapping)
        .filter(|mapping| mapping.flags & mapping_flags::STATIC != 0)
}
