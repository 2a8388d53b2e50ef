//! The privileges that tapnat needs, and which of them this process lacks.

use anyhow::{Context as _, Result};
use rustix::thread::{CapabilitySet, capabilities};

/// Every capability that loading, attaching and pinning needs, by its name. `CAP_SYS_ADMIN` implies
/// `CAP_BPF` and `CAP_PERFMON` (kernel: `bpf_capable()` and `perfmon_capable()` in
/// `include/linux/capability.h`).
const NEEDED: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
];

/// The names of the capabilities that this thread would need and does not have. Mounting a file
/// system needs `CAP_SYS_ADMIN` as well.
///
/// # Errors
///
/// When the kernel does not tell, which `capget(2)` never does for the calling thread.
pub fn missing(mounting: bool) -> Result<Vec<&'static str>> {
    let effective = capabilities(None)
        .context("cannot read this process's capabilities")?
        .effective;
    Ok(missing_from(effective, mounting))
}

fn missing_from(mut effective: CapabilitySet, mounting: bool) -> Vec<&'static str> {
    let administrator = effective.contains(CapabilitySet::SYS_ADMIN);
    if administrator {
        effective |= CapabilitySet::BPF | CapabilitySet::PERFMON;
    }
    let mut missing: Vec<_> = NEEDED
        .iter()
        .filter(|(capability, _)| !effective.contains(*capability))
        .map(|(_, name)| *name)
        .collect();
    if mounting && !administrator {
        missing.push("CAP_SYS_ADMIN");
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sys_admin_stands_for_bpf_and_perfmon_but_not_for_net_admin() {
        assert_eq!(
            missing_from(CapabilitySet::SYS_ADMIN, true),
            ["CAP_NET_ADMIN"]
        );
    }

    #[test]
    fn mounting_needs_sys_admin_too() {
        let granted = CapabilitySet::NET_ADMIN | CapabilitySet::BPF | CapabilitySet::PERFMON;
        assert!(missing_from(granted, false).is_empty());
        assert_eq!(missing_from(granted, true), ["CAP_SYS_ADMIN"]);
    }

    #[test]
    fn nobody_lacks_everything() {
        assert_eq!(
            missing_from(CapabilitySet::empty(), false),
            ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]
        );
    }
}
