//! The privileges that tapnat needs, which of them this process lacks, and how it gives up those that
//! it does not need any more.

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    process::geteuid,
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

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

/// What a running instance goes on using: addresses, links and kernel parameters; answers to
/// connections that nobody asked for; DHCP servers on devices that come; tables and programs, which are loaded for devices that come.
const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::PERFMON);

/// What is out of the ordinary about an instance and its host, and takes more privileges until the
/// end.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Circumstances {
    /// tapnat mounted the BPF file system, and has to unmount it.
    pub unmounts: bool,
    /// The pins are reached through the first process's root directory, as from `ip netns exec`.
    pub pins_elsewhere: bool,
}

fn kept(permitted: CapabilitySet, circumstances: Circumstances, is_root: bool) -> CapabilitySet {
    let mut kept = KEPT;
    let split = CapabilitySet::BPF | CapabilitySet::PERFMON;
    if circumstances.unmounts || circumstances.pins_elsewhere || !permitted.contains(split) {
        kept |= CapabilitySet::SYS_ADMIN;
    }
    if circumstances.pins_elsewhere {
        kept |= CapabilitySet::SYS_PTRACE | CapabilitySet::SYS_CHROOT;
    }
    if !is_root {
        // What root owns, such as pins, is out of reach otherwise.
        kept |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    }
    kept & permitted
}

/// Gives up, for good, every privilege that a running instance does not use, and the way to gain
/// new ones. `can_read`: whether all files are still within reach; where one is not, such as a
/// configuration file in somebody's home directory, the privilege to read any file stays.
///
/// Only for this thread and those that it starts from then on.
///
/// # Errors
///
/// When the kernel refuses, which it does not for giving up.
pub fn give_up(circumstances: Circumstances, can_read: impl FnOnce() -> bool) -> Result<()> {
    const WHAT: &str = "cannot give up privileges";
    let before = capabilities(None).context(WHAT)?;
    let mut kept = kept(before.permitted, circumstances, geteuid().is_root());
    let set = |permitted, effective| {
        let sets = CapabilitySets {
            effective,
            permitted,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets).context(WHAT)
    };
    set(before.permitted, kept)?;
    if !can_read() {
        kept |= CapabilitySet::DAC_READ_SEARCH & before.permitted;
    }
    // Dropping from the bounding set is a privilege, too.
    set(before.permitted, before.permitted)?;
    if before.permitted.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(kept).iter() {
            match remove_capability_from_bounding_set(capability) {
                // One that this kernel does not know is gone already.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error).context(WHAT),
            }
        }
    }
    clear_ambient_capability_set().context(WHAT)?;
    set_no_new_privs(true).context(WHAT)?;
    set(kept, kept)
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
    fn more_is_kept_only_where_it_must() {
        let everything = CapabilitySet::all();
        let usual = Circumstances::default();
        assert_eq!(kept(everything, usual, true), KEPT);
        let unmounts = Circumstances {
            unmounts: true,
            ..usual
        };
        assert_eq!(
            kept(everything, unmounts, true),
            KEPT | CapabilitySet::SYS_ADMIN
        );
        let elsewhere = Circumstances {
            pins_elsewhere: true,
            ..usual
        };
        assert!(kept(everything, elsewhere, true).contains(CapabilitySet::SYS_PTRACE));
        // Who was given that in place of the finer ones.
        let coarse = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
        assert_eq!(kept(coarse, usual, true), coarse);
        assert!(kept(everything, usual, false).contains(CapabilitySet::DAC_OVERRIDE));
    }

    #[test]
    fn nobody_lacks_everything() {
        assert_eq!(
            missing_from(CapabilitySet::empty(), false),
            ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]
        );
    }
}
