//! The kernel, and what this process may ask of it.

use std::fs;

use rustix::system::uname;

use super::{Finding, Level};
use crate::{
    config::Attach,
    datapath::{check_kernel, is_kernel_supported, uses_tcx},
    host::{bpffs, capabilities},
};

pub(super) fn kernel() -> Vec<Finding> {
    let topic = "kernel";
    let mut findings = Vec::new();
    let release = uname().release().to_string_lossy().into_owned();
    match check_kernel() {
        Ok(()) => findings.push(Finding::ok(topic, format!("Linux {release} has BTF"))),
        Err(error) => findings.push(Finding::new(
            Level::Problem,
            topic,
            format!("Linux {release} has no BTF"),
            format!("{error:#}"),
        )),
    }
    if !is_kernel_supported() {
        findings.push(
            Finding::new(
                Level::Problem,
                topic,
                format!("Linux {release} is too old"),
                "it refuses some of tapnat's programs",
            )
            .way_out("boot Linux 6.1 or later"),
        );
    }
    if uses_tcx(Attach::Auto).unwrap_or(false) {
        findings.push(Finding::ok(topic, "programs attach by TCX"));
    } else {
        findings.push(Finding::new(
            Level::Note,
            topic,
            "programs attach by clsact: this kernel has no TCX",
            "with clsact, whoever removes the queueing discipline (`tc qdisc del`) removes the \
                 programs, too; TCX came with Linux 6.6",
        ));
    }
    // Only the first network namespace has it.
    if let Ok(jit) = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable") {
        findings.push(if jit.trim() == "0" {
            Finding::new(
                Level::Warning,
                topic,
                "eBPF programs are interpreted",
                "net.core.bpf_jit_enable is 0: every packet costs several times as much",
            )
            .way_out("sysctl -w net.core.bpf_jit_enable=1")
        } else {
            Finding::ok(topic, "eBPF programs are compiled")
        });
    }
    let missing = capabilities::missing(bpffs::find().is_none()).unwrap_or_default();
    if !missing.is_empty() {
        findings.push(
            Finding::new(
                Level::Problem,
                "privileges",
                format!("this process lacks {}", missing.join(", ")),
                "without them nothing can be started, and much here cannot be looked at",
            )
            .way_out("run as root: `sudo tapnat doctor`"),
        );
    }
    findings
}
