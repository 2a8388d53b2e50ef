//! `tapnat status`: one instance as a whole.

use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;

use super::{Shown, print};
use crate::{
    activity,
    config::{Firewall, PerProtocol},
    view::{Label, PolicyView, Status, TablesView, UsageView},
};

/// At most so many guests are shown to people: those that were refused the most.
const MOST_GUESTS: usize = 5;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    shown: Shown,
}

impl Arguments {
    pub fn execute(self) -> Result<()> {
        let status = activity::status(&self.shown.instance.name, &self.shown.tables()?)?;
        if self.shown.format.json {
            print::json(&status)
        } else {
            print::text(&describe(&status)?)
        }
    }
}

/// What guests are kept from, if there is anything.
fn describe_policy(policy: &PolicyView, text: &mut String) -> Result<()> {
    let mut denied: Vec<_> = policy.deny.iter().map(ToString::to_string).collect();
    if policy.isolate {
        denied.push("each other".to_owned());
    }
    if policy.deny_host {
        denied.push("the host".to_owned());
    }
    if !denied.is_empty() {
        writeln!(text, "guests are kept from: {}", denied.join(", "))?;
    }
    if policy.route_guests {
        writeln!(text, "guests reach each other through the host")?;
    }
    if policy.firewall == Firewall::Ask {
        writeln!(text, "the host's firewall is asked about new sessions")?;
    }
    let untranslated: Vec<_> = policy
        .untranslated
        .iter()
        .map(ToString::to_string)
        .collect();
    if !untranslated.is_empty() {
        writeln!(text, "not translated: to {}", untranslated.join(", "))?;
    }
    Ok(())
}

fn describe_prefixes(status: &Status, text: &mut String) -> Result<()> {
    if let Some(prefix) = status.nat64 {
        writeln!(text, "nat64: IPv4 is behind {prefix}")?;
    }
    for pair in &status.prefixes {
        writeln!(
            text,
            "prefix: {} is {} outside, without sessions",
            pair.internal, pair.external
        )?;
    }
    Ok(())
}

fn modes<T: Label + PartialEq>(modes: PerProtocol<T>) -> String {
    let (tcp, udp) = (modes.tcp.label(), modes.udp.label());
    if modes.tcp == modes.udp {
        tcp.to_owned()
    } else {
        format!("tcp {tcp}, others {udp}")
    }
}

fn describe(status: &Status) -> Result<String> {
    let mut text = String::new();
    let process = match status.process {
        Some(process) => format!("running (process {process})"),
        None => "translating without a process".to_owned(),
    };
    writeln!(text, "instance {}: {process}", status.instance)?;
    for device in &status.devices {
        let fallback = format!("#{}", device.index);
        let networks: Vec<_> = device.written().map(|it| it.to_string()).collect();
        writeln!(
            text,
            "  {:<8} {:<15} {} mtu {}",
            device.role.label(),
            device.name.as_ref().unwrap_or(&fallback),
            networks.join(", "),
            device.mtu
        )?;
    }
    let outside: Vec<_> = status
        .outside_addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    let outside = if outside.is_empty() {
        "none".to_owned()
    } else {
        outside.join(", ")
    };
    writeln!(text, "  outside  {outside}")?;
    let hook = &status.uplink_hook;
    writeln!(text, "uplink hook: {} ({})", hook.hook, hook.reason)?;
    writeln!(text, "mapping: {}", modes(status.mapping))?;
    writeln!(text, "filtering: {}", modes(status.filtering))?;
    let timeouts = &status.timeouts;
    writeln!(
        text,
        "timeouts: tcp {}s (opening {}s, closing {}s), udp {}s, icmp {}s, others {}s",
        timeouts.tcp_established,
        timeouts.tcp_opening,
        timeouts.tcp_closing,
        timeouts.udp,
        timeouts.icmp,
        timeouts.other
    )?;
    describe_policy(&status.policy, &mut text)?;
    describe_prefixes(status, &mut text)?;
    let one_of = |it: UsageView| format!("{} of {}", it.used, it.capacity);
    let families = status.families;
    let parts = |it: TablesView| {
        [
            ("sessions", it.sessions),
            ("mappings", it.mappings),
            ("guests", it.guests),
        ]
    };
    let mut with_ipv6 = families.ipv6.into_iter().flat_map(parts);
    for (name, ipv4) in parts(families.ipv4) {
        write!(text, "{name}: {}", one_of(ipv4))?;
        if let Some((_, ipv6)) = with_ipv6.next() {
            write!(text, "; {} with IPv6", one_of(ipv6))?;
        }
        writeln!(text)?;
    }
    let scope = if status.counted {
        ""
    } else {
        " (those of steady sessions are not counted; `run --count` counts them)"
    };
    let refused = status.guests.iter().filter(|guest| guest.refused != 0);
    for guest in refused.take(MOST_GUESTS) {
        writeln!(
            text,
            "guest {}: {} sessions, {} refused",
            guest.title(),
            guest.sessions,
            guest.refused
        )?;
    }
    writeln!(text, "packets{scope}:")?;
    for reason in status.reasons.iter().filter(|reason| reason.packets > 0) {
        writeln!(
            text,
            "  {:<8} {:<26} {:>12} packet{:1} {:>15} bytes",
            reason.outcome.label(),
            reason.reason.label(),
            reason.packets,
            print::plural(reason.packets),
            reason.bytes
        )?;
    }
    Ok(text)
}
