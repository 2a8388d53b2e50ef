//! What the datapath tells for the NAT log (RFC 6888 section 4): which outside endpoint
//! was given to which inside one, and when it was given back. Only where the log is on
//! ([`crate::abi::globals::NAT_LOG`]); who writes it down, and how, is user space's.

use crate::{
    abi::EndpointKey,
    net::{Address, Be16, Be32, Be128},
};

/// Values of [`crate::abi::globals::NAT_LOG`].
pub mod level {
    pub const OFF: u8 = 0;
    /// Mappings, and sessions that stand on none, without their remotes.
    pub const MAPPINGS: u8 = 1;
    /// All sessions too, with their remotes.
    pub const SESSIONS: u8 = 2;
}

/// What happened: [`Record::event`].
pub mod events {
    pub const MAPPING_CREATED: u32 = 1;
    pub const MAPPING_REMOVED: u32 = 2;
    pub const SESSION_CREATED: u32 = 3;
    pub const SESSION_REMOVED: u32 = 4;
}

/// One thing that happened.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Endpoints of either family: see [`Address::mapped`].
    pub outside: EndpointKey<Be128>,
    pub inside: EndpointKey<Be128>,
    /// Of a session whose remote is to be told, else zeros.
    pub remote: EndpointKey<Be128>,
    /// [`events`].
    pub event: u32,
    pub remote_is_told: u32,
    pub zero: u32,
}

/// An endpoint of either family.
#[inline(always)]
#[must_use]
pub fn mapped<A: Address>(endpoint: &EndpointKey<A>) -> EndpointKey<Be128> {
    EndpointKey::new(endpoint.address.mapped(), endpoint.port, endpoint.protocol)
}

impl Record {
    /// The record in these bytes of the ring; `None` if they are none.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        let word = |number: usize| {
            let at = number * 4;
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let endpoint = |first: usize| {
            let address = [0, 1, 2, 3].map(|number| Be32::from_raw(word(first + number)));
            let [high, low, protocol, _] = word(first + 4).to_ne_bytes();
            let port = Be16::from_bytes([high, low]);
            EndpointKey::new(Be128::from_words(address), port, protocol)
        };
        Some(Self {
            time: u64::from_ne_bytes(*bytes.first_chunk()?),
            outside: endpoint(2),
            inside: endpoint(7),
            remote: endpoint(12),
            event: word(17),
            remote_is_told: word(18),
            zero: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_were_written() {
        let endpoint = |last, port| {
            let four = EndpointKey::new(Be32::from_bytes([10, 0, 0, last]), Be16::new(port), 17);
            mapped(&four)
        };
        let record = Record {
            time: 0x0102_0304_0506_0708,
            outside: endpoint(1, 40000),
            inside: endpoint(2, 50000),
            remote: endpoint(3, 53),
            event: events::SESSION_CREATED,
            remote_is_told: 1,
            zero: 0,
        };
        // SAFETY: `repr(C)`, of integers, without padding.
        let bytes: [u8; size_of::<Record>()] = unsafe { core::mem::transmute(record) };
        assert_eq!(Record::read(&bytes), Some(record));
        assert_eq!(Record::read(&bytes[1..]), None);
    }
}
