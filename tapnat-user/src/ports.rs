//! Which ports of the outside addresses are the guests' and which stay the host's. Pure arithmetic
//! on sets of ports; reading and writing the kernel's parameters is done elsewhere.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use anyhow::{Context as _, Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// How many ports of its ephemeral range the host keeps for its own connections.
const HOST_SHARE: usize = 4096;

const WORDS: usize = 1 << 16 >> u64::BITS.trailing_zeros();

/// A set of ports, in host byte order. Written as the kernel writes
/// `net.ipv4.ip_local_reserved_ports`: `53,8000-8080`.
#[derive(Clone, Eq, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PortSet(Box<[u64; WORDS]>);

impl PortSet {
    /// A set without ports.
    #[must_use]
    pub fn empty() -> Self {
        Self(Box::new([0; WORDS]))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// How many ports are in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        let (word, bit) = place(port);
        self.0[word] & bit != 0
    }

    pub fn insert(&mut self, port: u16) {
        let (word, bit) = place(port);
        self.0[word] |= bit;
    }

    /// The ports that are in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours | theirs)
    }

    /// The ports of this set that are not in the other.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours & !theirs)
    }

    fn combine(&self, other: &Self, combine: fn(u64, u64) -> u64) -> Self {
        let mut combined = self.clone();
        for (ours, theirs) in combined.0.iter_mut().zip(other.0.iter()) {
            *ours = combine(*ours, *theirs);
        }
        combined
    }

    /// The ports in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0..=u16::MAX).filter(|port| self.contains(*port))
    }

    /// The runs of neighbouring ports in ascending order.
    #[must_use]
    pub fn ranges(&self) -> Vec<RangeInclusive<u16>> {
        let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
        for port in self.iter() {
            match ranges.last_mut() {
                Some(last) if last.end().checked_add(1) == Some(port) => {
                    *last = *last.start()..=port;
                }
                _ => ranges.push(port..=port),
            }
        }
        ranges
    }

    /// One bit a port, lowest port first: bit 0 of word 0 is port 0.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        self.0.as_slice()
    }
}

fn place(port: u16) -> (usize, u64) {
    (
        usize::from(port) / u64::BITS as usize,
        1 << (u32::from(port) % u64::BITS),
    )
}

impl Extend<u16> for PortSet {
    fn extend<T: IntoIterator<Item = u16>>(&mut self, ports: T) {
        for port in ports {
            self.insert(port);
        }
    }
}

impl FromIterator<u16> for PortSet {
    fn from_iter<T: IntoIterator<Item = u16>>(ports: T) -> Self {
        let mut set = Self::empty();
        set.extend(ports);
        set
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, range) in self.ranges().into_iter().enumerate() {
            let separator = if position == 0 { "" } else { "," };
            if range.start() == range.end() {
                write!(formatter, "{separator}{}", range.start())?;
            } else {
                write!(formatter, "{separator}{}-{}", range.start(), range.end())?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for PortSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PortSet({self})")
    }
}

impl FromStr for PortSet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut set = Self::empty();
        for part in text
            .split([',', '\n'])
            .map(str::trim)
            .filter(|part| !part.is_empty())
        {
            set.extend(parse_range(part)?);
        }
        Ok(set)
    }
}

impl From<PortSet> for String {
    fn from(set: PortSet) -> Self {
        set.to_string()
    }
}

impl TryFrom<String> for PortSet {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

/// Reads `LOW-HIGH` or a single port.
///
/// # Errors
///
/// When it is neither, or when the range is upside down.
pub fn parse_range(text: &str) -> Result<RangeInclusive<u16>> {
    let number = |text: &str| {
        text.trim()
            .parse::<u16>()
            .with_context(|| format!("'{text}' is not a port from 0 to 65535"))
    };
    let (low, high) = match text.split_once('-') {
        Some((low, high)) => (number(low)?, number(high)?),
        None => (number(text)?, number(text)?),
    };
    ensure!(
        low <= high,
        "the port range {text} is upside down: write {high}-{low}"
    );
    Ok(low..=high)
}

/// Reads `net.ipv4.ip_local_port_range`: two numbers.
///
/// # Errors
///
/// When the kernel's answer is anything else.
pub fn parse_ephemeral(text: &str) -> Result<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(low)), Some(Ok(high)), None) => Ok(low..=high),
        _ => bail!("the kernel's range of ephemeral ports is '{text}', not two numbers"),
    }
}

/// How the ports are divided between the host and the guests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Division {
    /// Ports that the host keeps, whether or not they are in the NAT's range.
    pub host: PortSet,
    /// Ports that the host's own connections have to stop using, because guests may get them.
    pub reserve: PortSet,
}

impl Division {
    /// Divides the ports. The host keeps the first 4096 free ports of its `ephemeral` range for new
    /// connections, and everything that its operator `reserved`; the rest of the ephemeral range has
    /// to be reserved for the guests as far as it is in the NAT's range.
    #[must_use]
    pub fn new(
        nat: &RangeInclusive<u16>,
        ephemeral: &RangeInclusive<u16>,
        reserved: &PortSet,
    ) -> Self {
        let free = ephemeral.clone().filter(|port| !reserved.contains(*port));
        let share: PortSet = free.clone().take(HOST_SHARE).collect();
        let reserve = free
            .filter(|port| nat.contains(port) && !share.contains(*port))
            .collect();
        Self {
            host: share.union(reserved),
            reserve,
        }
    }

    /// Every port that no guest may get: those of the host, and those outside the NAT's range.
    ///
    /// # Errors
    ///
    /// When that is all of them.
    pub fn withheld(&self, nat: &RangeInclusive<u16>) -> Result<PortSet> {
        let outside: PortSet = (0..=u16::MAX).filter(|port| !nat.contains(port)).collect();
        let withheld = self.host.union(&outside);
        ensure!(
            nat.clone().any(|port| !withheld.contains(port)),
            "no port of {}-{} is left for the guests: the host keeps {}; pass other --ports",
            nat.start(),
            nat.end(),
            self.host
        );
        Ok(withheld)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> PortSet {
        text.parse().unwrap()
    }

    #[test]
    fn reads_and_writes_as_the_kernel_does() {
        for text in ["", "0", "65535", "53,8000-8080", "0-65535", "1,3,5-6"] {
            assert_eq!(set(text).to_string(), text);
        }
        assert_eq!(set(" 5-6, 1,2 \n").to_string(), "1-2,5-6");
        assert_eq!(set("").len(), 0);
        assert_eq!(set("0-65535").len(), 65536);
        assert!(set("").is_empty());
    }

    #[test]
    fn refuses_what_is_not_a_range() {
        for text in ["x", "1-", "-1", "65536", "9-8", "1-2-3"] {
            assert!(text.parse::<PortSet>().is_err(), "{text}");
        }
    }

    #[test]
    fn survives_json() {
        let ports = set("53,8000-8080");
        let json = serde_json::to_string(&ports).unwrap();
        assert_eq!(json, "\"53,8000-8080\"");
        assert_eq!(serde_json::from_str::<PortSet>(&json).unwrap(), ports);
    }

    #[test]
    fn words_hold_the_lowest_port_first() {
        let ports = set("0,65,65535");
        assert_eq!(ports.words()[0], 1);
        assert_eq!(ports.words()[1], 2);
        assert_eq!(ports.words()[1023], 1 << 63);
    }

    #[test]
    fn the_host_keeps_the_start_of_its_range_and_reserves_the_rest() {
        let mut division = Division::new(&(1024..=65535), &(32768..=60999), &set(""));
        assert_eq!(division.host.to_string(), "32768-36863");
        assert_eq!(division.reserve.to_string(), "36864-60999");
        division.host.extend([22, 8080]);
        let withheld = division.withheld(&(1024..=65535)).unwrap();
        assert_eq!(withheld.to_string(), "0-1023,8080,32768-36863");
    }

    #[test]
    fn what_the_operator_reserved_stays_reserved_and_does_not_shrink_the_share() {
        let reserved = set("32768-33767,5000");
        let division = Division::new(&(1024..=65535), &(32768..=60999), &reserved);
        assert_eq!(division.host.to_string(), "5000,32768-37863");
        assert_eq!(division.reserve.to_string(), "37864-60999");
    }

    #[test]
    fn a_range_apart_from_the_hosts_needs_no_reservation() {
        let division = Division::new(&(61000..=65535), &(32768..=60999), &set(""));
        assert!(division.reserve.is_empty());
        assert_eq!(
            division.withheld(&(61000..=65535)).unwrap().to_string(),
            "0-60999"
        );
    }

    #[test]
    fn a_short_ephemeral_range_stays_with_the_host_whole() {
        let division = Division::new(&(1024..=65535), &(40000..=41000), &set(""));
        assert_eq!(division.host.to_string(), "40000-41000");
        assert!(division.reserve.is_empty());
    }

    #[test]
    fn refuses_when_no_port_is_left() {
        let range = 32768..=33000;
        let division = Division::new(&range, &(32768..=60999), &set(""));
        let error = division.withheld(&range).unwrap_err().to_string();
        assert!(
            error.contains("32768-33000") && error.contains("--ports"),
            "{error}"
        );
    }
}
