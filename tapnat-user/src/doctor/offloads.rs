//! What devices join, cut and complete of packets.

use std::{fs, path::Path};

use super::{Finding, Level, output};

/// What `ethtool -k` says of a device, if it is there.
pub(super) fn offloads(device: &str) -> String {
    output("ethtool", &["-k", device]).unwrap_or_default()
}

pub(super) fn judge_offloads(device: &str, features: &str) -> Vec<Finding> {
    let is = |feature: &str, state: &str| {
        features.lines().any(|line| {
            line.trim()
                .strip_prefix(feature)
                .and_then(|rest| rest.strip_prefix(": "))
                .is_some_and(|rest| rest.split_whitespace().next() == Some(state))
        })
    };
    let topic = "offloads";
    let mut findings = Vec::new();
    if is("large-receive-offload", "on") {
        findings.push(
            Finding::new(
                Level::Warning,
                topic,
                format!("{device} joins received packets in hardware (LRO)"),
                "such packets cannot be sent on as they are: they arrive damaged or not at all",
            )
            .way_out(format!("ethtool -K {device} lro off")),
        );
    }
    if is("generic-receive-offload", "off") {
        findings.push(
            Finding::new(
                Level::Note,
                topic,
                format!("{device} does not join received packets (GRO)"),
                "each is translated by itself, which costs several times as much for bulk transfers",
            )
            .way_out(format!("ethtool -K {device} gro on")),
        );
    }
    if findings.is_empty() && !features.is_empty() {
        findings.push(Finding::ok(
            topic,
            format!("{device} joins packets as it should"),
        ));
    }
    findings
}

/// `IFF_VNET_HDR` of `include/uapi/linux/if_tun.h`.
const VNET_HEADER: u32 = 0x4000;

/// Whether a guest's offloads pass this tap; nothing of a device that is none.
pub(super) fn tap_header(device: &str) -> Option<Finding> {
    let path = Path::new("/sys/class/net").join(device).join("tun_flags");
    let text = fs::read_to_string(path).ok()?;
    let flags = u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()?;
    (flags & VNET_HEADER == 0).then(|| {
        Finding::new(
            Level::Note,
            "offloads",
            format!("the tap {device} has no vnet header"),
            "its guest cannot leave checksums and segmentation to the host: bulk transfers cost \
             many times as much",
        )
        .way_out("let tapnat create the tap, or create it with `ip tuntap add .. vnet_hdr`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::tests::levels;

    #[test]
    fn offloads_are_judged_by_what_ethtool_says() {
        let judge = |text: &str| levels(&judge_offloads("eth0", text));
        let fine = "generic-receive-offload: on\nlarge-receive-offload: off [fixed]\n";
        assert_eq!(judge(fine), [Level::Ok]);
        assert_eq!(judge("large-receive-offload: on\n"), [Level::Warning]);
        assert_eq!(judge("\tgeneric-receive-offload: off\n"), [Level::Note]);
        assert_eq!(judge(""), []);
    }
}
