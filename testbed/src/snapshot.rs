//! What a host looks like to its administrator: addresses, routes, rules,
//! neighbours, traffic control, packet filters, settings and pinned BPF
//! objects, to compare before and after.
//!
//! What changes by itself (counters, timers, lifetimes) is left out, and so
//! is what other hosts of this machine change (pins of other instances).

use std::{
    collections::BTreeMap, fmt::Write as _, fs, io, os::unix::fs::FileTypeExt as _, path::Path,
};

use anyhow::{Context as _, Result, bail};
use similar::TextDiff;

use crate::{Namespace, process::Output, sys};

/// Settings that change by themselves: entries in conntrack, and keys that
/// the kernel draws when they are first needed; and one that belongs to the whole
/// machine, whichever namespace shows it.
const RESTLESS_SETTINGS: [&str; 5] = [
    "net.core.netdev_rss_key",
    "net.ipv4.tcp_fastopen_key",
    "net.netfilter.nf_conntrack_count",
    "net.netfilter.nf_conntrack_buckets",
    "net.netfilter.nf_conntrack_max",
];

/// Whether the word after this one changes by itself: a bridge's timers, and
/// the lifetimes that router advertisements give to routes and addresses.
fn precedes_change(word: &str) -> bool {
    word.ends_with("_timer") || word.ends_with("_lft") || word == "expires"
}

/// A host at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    sections: BTreeMap<&'static str, String>,
}

impl Snapshot {
    /// Looks at a host, and at the pins in one directory (which need not be
    /// there).
    ///
    /// # Errors
    /// One of the usual commands is missing or fails.
    pub fn take(host: &Namespace, pins: &Path) -> Result<Self> {
        let mut sections = BTreeMap::new();
        for line in [
            "ip -details address show",
            "ip -details -4 route show table all",
            "ip -details -6 route show table all",
            "ip -4 rule show",
            "ip -6 rule show",
            "ip neighbour show nud permanent",
            "tc qdisc show",
            "nft --stateless list ruleset",
            "iptables-nft-save",
            "ip6tables-nft-save",
            "iptables-legacy-save",
            "ip6tables-legacy-save",
        ] {
            let said = host.exec(line)?;
            sections.insert(line, said.lines().filter_map(settle).collect());
        }
        sections.insert("tc filter show", filters(host)?);
        sections.insert("TCX programs", tcx_programs(host)?);
        sections.insert("sysctl net", settings(host)?);
        let mut tree = String::new();
        list(pins, pins, &mut tree).with_context(|| format!("cannot list {}", pins.display()))?;
        sections.insert("pins", tree);
        Ok(Self { sections })
    }

    /// What differs in a later snapshot, as a diff by section; nothing if
    /// they are the same.
    #[must_use]
    pub fn difference(&self, later: &Self) -> Option<String> {
        let mut difference = String::new();
        for (section, before) in &self.sections {
            let after = later.sections.get(section).map_or("", String::as_str);
            if before == after {
                continue;
            }
            let diff = TextDiff::from_lines(before.as_str(), after);
            let diff = diff.unified_diff().context_radius(1).to_string();
            let _ = writeln!(difference, "{section}:\n{diff}");
        }
        (!difference.is_empty()).then_some(difference)
    }
}

/// A line without what changes by itself; none for comments, which tell the
/// time.
fn settle(line: &str) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut settled = String::new();
    let mut restless = false;
    for word in line.split_inclusive(' ') {
        let bare = word.trim_end();
        // A chain's counters, as in `:INPUT ACCEPT [12:3456]`.
        let is_counter = line.starts_with(':') && bare.starts_with('[');
        if bare.is_empty() || !(restless || is_counter) {
            settled.push_str(word);
        } else {
            settled.push_str("* ");
        }
        if !bare.is_empty() {
            restless = precedes_change(bare);
        }
    }
    // A timer of changing width is padded with spaces.
    let words: Vec<_> = settled.split_whitespace().collect();
    let indent = line.len() - line.trim_start().len();
    Some(format!("{:indent$}{}\n", "", words.join(" ")))
}

fn devices(host: &Namespace) -> Result<Vec<String>> {
    let links = host.ip("-json link show")?;
    let links: serde_json::Value =
        serde_json::from_str(&links).context("`ip -json` printed something else")?;
    let names = links.as_array().into_iter().flatten();
    Ok(names
        .filter_map(|link| Some(link.get("ifname")?.as_str()?.to_owned()))
        .collect())
}

fn filters(host: &Namespace) -> Result<String> {
    let mut text = String::new();
    for device in devices(host)? {
        for hook in ["ingress", "egress"] {
            // Without clsact `tc` prints nothing, or an error on old kernels.
            let Output { stdout, .. } = host
                .command("tc")
                .args(["filter", "show", "dev", &device, hook])
                .output()?;
            for line in stdout.lines() {
                let _ = writeln!(text, "{device} {hook}: {line}");
            }
        }
    }
    Ok(text)
}

fn tcx_programs(host: &Namespace) -> Result<String> {
    let devices = devices(host)?;
    host.run(|| {
        let mut text = String::new();
        for device in devices {
            let index = nix::net::if_::if_nametoindex(device.as_str())?;
            let [ingress, egress] = [sys::TCX_INGRESS, sys::TCX_EGRESS]
                .map(|hook| sys::count_tcx_programs(index, hook));
            let _ = writeln!(text, "{device}: {} in, {} out", ingress?, egress?);
        }
        Ok(text)
    })
}

fn settings(host: &Namespace) -> Result<String> {
    // Some settings can only be written, about which `sysctl` complains.
    let Output { stdout, stderr, .. } = host
        .command("sysctl")
        .args(["--all", "--pattern", "^net\\."])
        .output()?;
    if stdout.is_empty() {
        bail!("sysctl shows no settings: {}", stderr.trim());
    }
    let is_restless = |line: &str| {
        line.split(" = ")
            .next()
            .is_some_and(|key| RESTLESS_SETTINGS.contains(&key))
    };
    let settings: Vec<_> = stdout.lines().filter(|line| !is_restless(line)).collect();
    Ok(settings.join("\n"))
}

fn list(root: &Path, directory: &Path, text: &mut String) -> io::Result<()> {
    let mut entries = match fs::read_dir(directory) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>()?,
        // Another process may be removing what is here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let _ = writeln!(
        text,
        "{}/",
        directory.strip_prefix(root).unwrap_or(directory).display()
    );
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            list(root, &path, text)?;
        } else {
            let special = if kind.is_file() || kind.is_fifo() {
                ""
            } else {
                " (special)"
            };
            let name = path.strip_prefix(root).unwrap_or(&path).display();
            let _ = writeln!(text, "{name}{special}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_by_itself_is_settled() {
        let settled = |line| settle(line).unwrap();
        assert_eq!(
            settled("    bridge tcn_timer    0.00 gc_timer  214.33 group_fwd_mask 0"),
            settled("    bridge tcn_timer   10.00 gc_timer    0.10 group_fwd_mask 0"),
        );
        assert_eq!(
            settled(":INPUT ACCEPT [12:3456]"),
            settled(":INPUT ACCEPT [0:0]")
        );
        assert_ne!(settled(":INPUT ACCEPT [0:0]"), settled(":INPUT DROP [0:0]"));
        assert_eq!(settle("# Generated by iptables-save on Monday"), None);
        assert_eq!(settled("  -A FORWARD -j DROP"), "  -A FORWARD -j DROP\n");
    }

    #[test]
    fn differences_are_told_by_section() {
        let snapshot = |routes: &str| Snapshot {
            sections: BTreeMap::from([("routes", routes.to_owned()), ("rules", "1\n".to_owned())]),
        };
        let before = snapshot("a\nb\nc\n");
        assert_eq!(before.difference(&before), None);
        let difference = before.difference(&snapshot("a\nx\nc\n")).unwrap();
        assert!(difference.starts_with("routes:\n"), "{difference}");
        assert!(difference.contains("\n-b\n+x\n"), "{difference}");
        assert!(!difference.contains("rules"), "{difference}");
    }
}
