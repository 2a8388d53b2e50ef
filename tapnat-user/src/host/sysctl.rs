//! Kernel parameters under `/proc/sys/net`, as the calling thread's network namespace sees them.
//! Which of them tapnat changes, and to what, is decided elsewhere.

use std::{fmt, fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

const ROOT: &str = "/proc/sys/net";

/// The name of a parameter below `/proc/sys/net`, a path with slashes because device names may
/// contain dots: `ipv4/conf/eth0.100/forwarding`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sysctl(String);

impl Sysctl {
    /// Whether packets that arrive on `device` may be forwarded; without it `bpf_fib_lookup()`
    /// answers `BPF_FIB_LKUP_RET_FWD_DISABLED` (`net/core/filter.c`).
    #[must_use]
    pub fn forwarding(device: &str) -> Self {
        Self(format!("ipv4/conf/{device}/forwarding"))
    }

    /// The same for IPv6. It also makes the host answer as a router there (RFC 4861 section 4.4).
    #[must_use]
    pub fn forwarding_ipv6(device: &str) -> Self {
        Self(format!("ipv6/conf/{device}/forwarding"))
    }

    /// Whether `device` has no IPv6 at all.
    #[must_use]
    pub fn disable_ipv6(device: &str) -> Self {
        Self(format!("ipv6/conf/{device}/disable_ipv6"))
    }

    /// Whether the kernel configures `device` by what routers advertise: 0 no, 1 unless the host
    /// forwards what comes from there, 2 always.
    #[must_use]
    pub fn accept_router_advertisements(device: &str) -> Self {
        Self(format!("ipv6/conf/{device}/accept_ra"))
    }

    /// Whether the kernel asks before it uses an address of `device` whether somebody else has it.
    #[must_use]
    pub fn detect_duplicate_addresses(device: &str) -> Self {
        Self(format!("ipv6/conf/{device}/accept_dad"))
    }

    /// Whether `device` keeps its IPv6 addresses when it is set down, as it does those of IPv4.
    #[must_use]
    pub fn keep_addresses_on_down(device: &str) -> Self {
        Self(format!("ipv6/conf/{device}/keep_addr_on_down"))
    }

    /// Whether packets that arrive on `device` are dropped when their answers would leave by another
    /// one: 0 no, 1 yes, 2 only when no device would do.
    #[must_use]
    pub fn reverse_path_filter(device: &str) -> Self {
        Self(format!("ipv4/conf/{device}/rp_filter"))
    }

    /// The range that the host's own connections take their ports from: two numbers.
    #[must_use]
    pub fn local_port_range() -> Self {
        Self("ipv4/ip_local_port_range".to_owned())
    }

    /// Ports that the host's own connections leave alone: a list of ranges.
    #[must_use]
    pub fn local_reserved_ports() -> Self {
        Self("ipv4/ip_local_reserved_ports".to_owned())
    }

    /// Whether it is a parameter of this device.
    #[must_use]
    pub fn is_of(&self, device: &str) -> bool {
        let mut components = self.0.split('/').skip(1);
        components.next() == Some("conf") && components.next() == Some(device)
    }

    /// The same parameter of another device, if it is one of `device`.
    #[must_use]
    pub fn moved(&self, device: &str, other: &str) -> Option<Self> {
        let mut components: Vec<_> = self.0.split('/').collect();
        match components.as_mut_slice() {
            [_, "conf", of, _] if *of == device => *of = other,
            _ => return None,
        }
        Some(Self(components.join("/")))
    }

    /// The value, without surrounding white space.
    ///
    /// # Errors
    ///
    /// `NotFound` when the kernel, or this namespace, has no such parameter.
    pub fn read(&self) -> io::Result<String> {
        Ok(fs::read_to_string(self.path())?.trim().to_owned())
    }

    /// Sets the value.
    ///
    /// # Errors
    ///
    /// `NotFound` when the kernel, or this namespace, has no such parameter, `InvalidInput` when it
    /// refuses the value, `PermissionDenied` without `CAP_NET_ADMIN` or when `/proc/sys` is
    /// read-only, as in most containers.
    pub fn write(&self, value: &str) -> io::Result<()> {
        // An empty write does not reach the kernel's parser; a line end does.
        fs::write(self.path(), format!("{value}\n"))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(ROOT).join(&self.0)
    }
}

/// As `sysctl(8)` writes it: with dots, and with slashes for the dots of a device name.
impl fmt::Display for Sysctl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dotted: String = self
            .0
            .chars()
            .map(|letter| match letter {
                '/' => '.',
                '.' => '/',
                other => other,
            })
            .collect();
        write!(formatter, "net.{dotted}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_with_a_dot_stays_one_component() {
        let sysctl = Sysctl::forwarding("eth0.100");
        assert_eq!(
            sysctl.path(),
            PathBuf::from("/proc/sys/net/ipv4/conf/eth0.100/forwarding")
        );
        assert_eq!(sysctl.to_string(), "net.ipv4.conf.eth0/100.forwarding");
        assert!(sysctl.is_of("eth0.100") && !sysctl.is_of("eth0"));
        assert!(!Sysctl::local_port_range().is_of("ip_local_port_range"));
        assert_eq!(
            sysctl.moved("eth0.100", "eth1"),
            Some(Sysctl::forwarding("eth1"))
        );
        assert_eq!(sysctl.moved("eth0", "eth1"), None);
        assert_eq!(Sysctl::local_port_range().moved("eth0", "eth1"), None);
    }

    #[test]
    fn reads_what_the_kernel_says() {
        let range = Sysctl::local_port_range().read().unwrap();
        assert_eq!(range.split_whitespace().count(), 2, "{range}");
        assert_eq!(
            Sysctl::forwarding("no-such-device")
                .read()
                .unwrap_err()
                .kind(),
            io::ErrorKind::NotFound
        );
    }
}
