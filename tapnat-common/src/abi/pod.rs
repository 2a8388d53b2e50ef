//! The types that user space may take for bytes.

use super::{
    Arrival, Counter, Device, EndpointKey, Family, FlowKey, Fragment, FragmentKey, Guest, Held,
    HeldKey, Mapping, Nat64, Permission, PermissionKey, Session, Settings, StandIn, Sweep,
    Unsolicited, Upkeep,
};
use crate::net::{Be32, Be128};

macro_rules! pod {
    ($($name:ty),* $(,)?) => {
        $(
            // SAFETY: `repr(C)` or `repr(transparent)`, of integers and
            // arrays of them, without padding (the asserts above).
            unsafe impl aya::Pod for $name {}
        )*
    };
}
macro_rules! pod_of_each_family {
    ($($name:ident),* $(,)?) => {
        $(
            // SAFETY: as above, of both families, and there are no more.
            unsafe impl<A: Family> aya::Pod for $name<A> {}
        )*
    };
}
pod!(
    Arrival,
    Held,
    Be32,
    Be128,
    Counter,
    Fragment,
    Guest,
    Permission,
    StandIn,
    Sweep,
    Unsolicited,
    Upkeep,
    Nat64,
    crate::nptv6::PrefixPair,
    crate::ports::PortSet,
    crate::ports::Reserved,
);
pod_of_each_family!(
    Device,
    EndpointKey,
    FlowKey,
    FragmentKey,
    HeldKey,
    Mapping,
    PermissionKey,
    Session,
    Settings,
);
