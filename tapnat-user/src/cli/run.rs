//! `tapnat run`: the life of an instance.

use std::{net::Ipv4Addr, num::NonZeroU32, ops::RangeInclusive, time::Duration};

use anyhow::Result;
use clap::{Args, builder::RangedU64ValueParser};
use tapnat_common::{
    abi::{Filtering, MappingMode, Timeouts},
    time::Ticks,
};

use super::Instance;
use crate::{
    config::{
        Attach, Choice, Config, DEFAULT_MAX_SESSIONS, DEFAULT_PORTS, DEFAULT_SWEEP_INTERVAL,
        DeviceName, Inside, MOST_SESSIONS, PerProtocol, parse_duration, parse_filtering_choice,
        parse_mapping_choice, parse_outside_address,
    },
    daemon,
    host::tap::Queues,
    ports::parse_range,
};

/// Stays in the foreground. Prints a line that begins `tapnat ready` when packets are translated,
/// and tells the service manager. SIGINT and SIGTERM take everything away and restore what was
/// changed; after SIGKILL packets go on being translated, the next `tapnat run` takes over, and
/// `tapnat down` takes everything away.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,

    /// A device with guests behind it, and the host's address on it: tap0=10.0.0.1/24. A tap that
    /// does not exist is created. Can be given several times
    #[arg(
        long = "inside",
        value_name = "DEVICE[=ADDRESS/PREFIX]",
        required = true
    )]
    insides: Vec<Inside>,

    /// The device to the world [default: that of the default route]
    #[arg(long, value_name = "DEVICE")]
    uplink: Option<DeviceName>,

    /// An address that stands for the guests in the world [default: the uplink's]. Can be given
    /// several times
    #[arg(
        long = "outside-address",
        value_name = "ADDRESS",
        value_delimiter = ',',
        value_parser = parse_outside_address
    )]
    outside_addresses: Vec<Ipv4Addr>,

    /// Ports of the outside addresses that guests may get [default: 512-65535, less what the host
    /// needs]
    #[arg(long, value_name = "LOW-HIGH", value_parser = parse_range)]
    ports: Option<RangeInclusive<u16>>,

    /// Sessions that there can be at once
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = DEFAULT_MAX_SESSIONS,
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=u64::from(MOST_SESSIONS))
    )]
    max_sessions: u32,

    /// Sessions that one guest can have at once [default: no limit]
    #[arg(long, value_name = "NUMBER")]
    guest_max_sessions: Option<NonZeroU32>,

    /// Which remotes may send to a mapping: endpoint-independent, address-dependent (the default) or
    /// address-and-port-dependent; for one protocol as tcp=.. or udp=..
    #[arg(
        long,
        value_name = "[PROTOCOL=]MODE",
        value_delimiter = ',',
        value_parser = parse_filtering_choice
    )]
    filtering: Vec<Choice<Filtering>>,

    /// Whether an inside endpoint keeps its outside endpoint for every remote:
    /// endpoint-independent (the default) or address-and-port-dependent; for one protocol as tcp=..
    /// or udp=..
    #[arg(
        long,
        value_name = "[PROTOCOL=]MODE",
        value_delimiter = ',',
        value_parser = parse_mapping_choice
    )]
    mapping: Vec<Choice<MappingMode>>,

    /// Let packets from outside keep UDP and ICMP sessions alive too
    #[arg(long)]
    inbound_refresh: bool,

    /// Lower the segment size that guests and servers announce to this many bytes, for paths that
    /// swallow "fragmentation needed": the path's MTU less 40
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(88..))]
    clamp_mss: Option<u16>,

    /// Give TCP connections that nobody asked for to the host at once, whatever their port, instead
    /// of waiting six seconds for a guest to open the same one. For hosts that publish ports of
    /// containers without a listening socket
    #[arg(long)]
    pass_unsolicited: bool,

    /// Count packets and bytes of each session
    #[arg(long)]
    count: bool,

    /// Log packets that are not just passed on in a session
    #[arg(short, long)]
    verbose: bool,

    /// Leave everything in place at the end
    #[arg(long)]
    keep: bool,

    /// End the sessions that an earlier run of this instance left, instead of going on with them
    #[arg(long)]
    fresh: bool,

    /// Queues of a tap that is created. QEMU opens a tap with several only with `queues=2` or more,
    /// and one with a single queue only without `queues=`
    #[arg(long, value_enum, default_value_t)]
    tap_queues: Queues,

    /// How to get hold of packets
    #[arg(long, value_enum, default_value_t)]
    attach: Attach,

    /// How long to wait between two searches for what is over [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration, hide = true)]
    sweep_interval: Option<Ticks>,

    #[command(flatten)]
    timeouts: TimeoutArguments,
}

/// Lengths of time without packets, such as 300, 300s, 5m or `2h 4m`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Timeouts")]
struct TimeoutArguments {
    /// Of UDP sessions [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    udp_timeout: Option<Ticks>,

    /// Of TCP sessions that are open both ways [default: 2h 4m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    tcp_established_timeout: Option<Ticks>,

    /// Of TCP sessions that open or close [default: 4m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    tcp_transitory_timeout: Option<Ticks>,

    /// Of ICMP queries [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    icmp_timeout: Option<Ticks>,

    /// Of other protocols [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    other_timeout: Option<Ticks>,

    /// How long a freed port rests before another guest gets it [default: 2m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    port_rest: Option<Ticks>,

    /// How long the rest of a fragmented packet is waited for [default: 15s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    fragment_timeout: Option<Ticks>,
}

impl Arguments {
    pub async fn execute(self) -> Result<()> {
        let options = daemon::Options {
            keep: self.keep,
            fresh: self.fresh,
        };
        daemon::run(&self.config(), options).await
    }

    fn config(self) -> Config {
        Config {
            instance: self.instance.name,
            insides: self.insides,
            uplink: self.uplink,
            outside_addresses: self.outside_addresses,
            ports: self.ports.unwrap_or(DEFAULT_PORTS),
            max_sessions: self.max_sessions,
            guest_max_sessions: self.guest_max_sessions,
            timeouts: self.timeouts.into(),
            filtering: PerProtocol::choose(&self.filtering),
            mapping: PerProtocol::choose(&self.mapping),
            inbound_refresh: self.inbound_refresh,
            clamp_mss: self.clamp_mss,
            pass_unsolicited: self.pass_unsolicited,
            count: self.count,
            verbose: self.verbose,
            tap_queues: self.tap_queues,
            attach: self.attach,
            sweep_interval: self
                .sweep_interval
                .map_or(DEFAULT_SWEEP_INTERVAL, |interval| {
                    Duration::from_millis(interval.milliseconds())
                }),
        }
    }
}

impl From<TimeoutArguments> for Timeouts {
    fn from(given: TimeoutArguments) -> Self {
        let default = Self::default();
        Self {
            udp: given.udp_timeout.unwrap_or(default.udp),
            tcp_established: given
                .tcp_established_timeout
                .unwrap_or(default.tcp_established),
            tcp_transitory: given
                .tcp_transitory_timeout
                .unwrap_or(default.tcp_transitory),
            icmp: given.icmp_timeout.unwrap_or(default.icmp),
            other: given.other_timeout.unwrap_or(default.other),
            port_rest: given.port_rest.unwrap_or(default.port_rest),
            fragment: given.fragment_timeout.unwrap_or(default.fragment),
        }
    }
}
