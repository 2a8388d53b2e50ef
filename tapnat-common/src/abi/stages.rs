//! Places in [`super::maps::STAGES`]: the programs that others go on to. [`Family::OFFSET`]
//! is added.

use super::Family;
use crate::net::{Be32, Be128};

/// Packets that are not of an established session.
pub const EXCEPTIONAL: u32 = 0;
/// Packets without a session.
pub const START: u32 = 1;
/// Packets that open a session with a mapping.
pub const MAP: u32 = 2;
/// Packets that open a session: what it is to be.
pub const OPEN: u32 = 3;
/// First fragments, for which others wait.
pub const RELEASE: u32 = 4;
/// Packets that are too long for the way on, which are to be cut.
pub const CUT: u32 = 5;
/// Sends one piece of such a packet, and goes on to itself for the next.
pub const PIECE: u32 = 6;
/// Packets that the host's firewall is to be asked about.
pub const ASK: u32 = 7;
/// Packets that may be of an established session, of the IP version that the
/// programs at the devices do not look for themselves.
pub const ESTABLISHED: u32 = 8;
/// ICMP errors.
pub const ERROR: u32 = 9;
/// Packets of a session that is over.
pub const CLOSE: u32 = 10;
/// Packets that open a session: makes it.
pub const INSERT: u32 = 11;
/// Packets that may be of a session that is there.
pub const RESUME: u32 = 12;
/// Of IPv6: packets for the world's IPv4. Of IPv4: packets to a stand-in.
pub const TRANSLATE: u32 = 13;
/// The same, ICMP errors.
pub const TRANSLATE_ERROR: u32 = 14;
/// Of IPv6: packets whose prefix is translated, without sessions.
pub const PREFIX: u32 = 15;
/// Packets that begin a session while nobody sweeps: looks after one that is there,
/// and goes on to itself for the next.
pub const UPKEEP: u32 = 16;
/// Places in the table.
pub const COUNT: u32 = 64;

const SIX: u32 = <Be128 as Family>::OFFSET;

/// The programs, by the name they have in the object file, for IPv4.
pub const IPV4: [(u32, &str); 13] = [
    (EXCEPTIONAL, "exceptional"),
    (RESUME, "resume"),
    (INSERT, "insert"),
    (CLOSE, "close"),
    (ERROR, "error"),
    (START, "start"),
    (MAP, "map"),
    (OPEN, "open"),
    (RELEASE, "release"),
    (CUT, "cut"),
    (PIECE, "piece"),
    (ASK, "ask"),
    (UPKEEP, "upkeep"),
];
/// The same for IPv6.
pub const IPV6: [(u32, &str); 12] = [
    (SIX + ESTABLISHED, "established6"),
    (SIX + EXCEPTIONAL, "exceptional6"),
    (SIX + RESUME, "resume6"),
    (SIX + ERROR, "error6"),
    (SIX + INSERT, "insert6"),
    (SIX + CLOSE, "close6"),
    (SIX + START, "start6"),
    (SIX + MAP, "map6"),
    (SIX + OPEN, "open6"),
    (SIX + RELEASE, "release6"),
    (SIX + ASK, "ask6"),
    (SIX + UPKEEP, "upkeep6"),
];
/// The same for NAT64.
pub const NAT64: [(u32, &str); 5] = [
    (ESTABLISHED, "established4"),
    (SIX + TRANSLATE, "translate6"),
    (SIX + TRANSLATE_ERROR, "translate_error6"),
    (TRANSLATE, "translate4"),
    (TRANSLATE_ERROR, "translate_error4"),
];
/// The same for the translation of prefixes.
pub const PREFIXES: [(u32, &str); 1] = [(SIX + PREFIX, "prefix6")];
const _: () = assert!(<Be32 as Family>::OFFSET == 0);
