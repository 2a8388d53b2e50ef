//! What the kernel tells of devices' drivers and XDP, over the generic netlink family `netdev`
//! (Linux 6.3, `Documentation/netlink/specs/netdev.yaml`). Decides nothing.

use std::{fmt, io};

use anyhow::{Context as _, Result, anyhow, bail};
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{
        GenlCtrl, GenlCtrlCmd,
        nlas::{GenlCtrlAttrs, McastGrpAttrs},
    },
};
use rtnetlink::{
    packet_core::{
        DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable,
        NetlinkMessage, NetlinkPayload, NetlinkSerializable, Nla as _, NlaBuffer, NlasIterator,
        Parseable, ParseableParametrized,
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC},
};

use super::multicast::Listener;

const FAMILY: &str = "netdev";
/// The group that is told of changes.
const GROUP: &str = "mgmt";
/// `NETDEV_CMD_DEV_GET`
const DEV_GET: u8 = 1;
/// `NETDEV_A_DEV_IFINDEX`, of 4 bytes
const IFINDEX: u16 = 1;
/// `NETDEV_A_DEV_XDP_FEATURES`, of 8 bytes
const XDP_FEATURES: u16 = 3;

/// `enum netdev_xdp_act` of `include/uapi/linux/netdev.h`: what a device's driver can do now.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Features(u64);

impl Features {
    const BASIC: u64 = 1;
    const REDIRECT: u64 = 1 << 1;
    const NDO_XMIT: u64 = 1 << 2;

    /// With these bits of the kernel's.
    #[must_use]
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// Whether programs can run in its driver, and redirect from there.
    #[must_use]
    pub const fn is_native(self) -> bool {
        self.0 & (Self::BASIC | Self::REDIRECT) == Self::BASIC | Self::REDIRECT
    }

    /// Whether frames can be redirected to it.
    #[must_use]
    pub const fn takes_frames(self) -> bool {
        self.0 & Self::NDO_XMIT != 0
    }
}

/// A message of the family: the attributes, not told apart.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Netdev(Vec<DefaultNla>);

impl GenlFamily for Netdev {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Netdev {
    fn buffer_len(&self) -> usize {
        self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Netdev {
    fn parse_with_param(bytes: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        NlasIterator::new(bytes)
            .map(|attribute| DefaultNla::parse(&NlaBuffer::new_checked(attribute?.into_inner())?))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// A connection to the kernel, for the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Drivers {
    socket: Socket,
    family: u16,
    group: u32,
}

impl Drivers {
    /// Opens a connection. `None` where the kernel does not tell (before Linux 6.3).
    ///
    /// # Errors
    ///
    /// When the kernel gives no netlink socket, or no answer.
    pub fn open() -> Result<Option<Self>> {
        let socket = socket().context("cannot open a socket for generic netlink")?;
        let request = GenlMessage::from_payload(GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())],
        });
        let Some(answer) = ask(&socket, request).context("cannot ask for drivers' features")?
        else {
            return Ok(None);
        };
        let (mut family, mut group) = (None, None);
        for attribute in answer.payload.nlas {
            match attribute {
                GenlCtrlAttrs::FamilyId(number) => family = Some(number),
                GenlCtrlAttrs::McastGroups(groups) => {
                    group = groups.iter().find_map(|group| group_number(group));
                }
                _ => {}
            }
        }
        let Some((family, group)) = family.zip(group) else {
            return Ok(None);
        };
        Ok(Some(Self {
            socket,
            family,
            group,
        }))
    }

    /// What the driver of a device can do. Nothing when the device is gone.
    ///
    /// # Errors
    ///
    /// When the kernel gives no answer.
    pub fn features(&self, index: u32) -> Result<Features> {
        let which = DefaultNla::new(IFINDEX, index.to_ne_bytes().to_vec());
        let mut request = GenlMessage::from_payload(Netdev(vec![which]));
        request.set_resolved_family_id(self.family);
        let answer =
            ask(&self.socket, request).with_context(|| format!("cannot ask for device {index}"))?;
        let attributes = answer.map(|answer| answer.payload.0).unwrap_or_default();
        Ok(attributes
            .iter()
            .find(|attribute| attribute.kind() == XDP_FEATURES)
            .and_then(|attribute| {
                let mut value = [0; size_of::<u64>()];
                (attribute.value_len() == value.len()).then(|| {
                    attribute.emit_value(&mut value);
                    Features::new(u64::from_ne_bytes(value))
                })
            })
            .unwrap_or_default())
    }
}

/// The number of the group that is told of changes, if it is this one.
fn group_number(group: &[McastGrpAttrs]) -> Option<u32> {
    let is_it = group
        .iter()
        .any(|attribute| matches!(attribute, McastGrpAttrs::Name(name) if name == GROUP));
    group.iter().find_map(|attribute| match attribute {
        McastGrpAttrs::Id(number) if is_it => Some(*number),
        _ => None,
    })
}

/// Listens for drivers that can do something else than before. `None` where the kernel does not tell.
/// What is heard is in the family's own words; that there was something is enough. Must be called
/// within a tokio runtime.
///
/// # Errors
///
/// When the kernel gives no netlink socket.
pub fn listen() -> Result<Option<Listener>> {
    let Some(drivers) = Drivers::open()? else {
        return Ok(None);
    };
    Listener::new(NETLINK_GENERIC, [drivers.group])
        .map(Some)
        .context("cannot listen for changes of drivers' features")
}

fn socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Asks and waits for the answer. `None` when there is no such thing.
fn ask<F>(socket: &Socket, request: GenlMessage<F>) -> Result<Option<GenlMessage<F>>>
where
    GenlMessage<F>:
        NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<GenlMessage<F>>>,
    F: fmt::Debug,
{
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut answer = None;
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = received.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<GenlMessage<F>>::deserialize(rest)
                .map_err(|error| anyhow!("{error}"))?;
            let length = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::InnerMessage(it) => answer = Some(it),
                // The acknowledgement, after the answer.
                NetlinkPayload::Error(error) => match error.code.map_or(0, |code| -code.get()) {
                    0 => return Ok(answer),
                    libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP => return Ok(None),
                    code => bail!(io::Error::from_raw_os_error(code)),
                },
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}
