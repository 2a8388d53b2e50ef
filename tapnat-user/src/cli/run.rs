//! `tapnat run`: the life of an instance.

use std::{
    env,
    ffi::OsString,
    net::SocketAddr,
    num::NonZeroU32,
    ops::RangeInclusive,
    path::{self, Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{
    Args, CommandFactory as _, Parser as _, builder::RangedU64ValueParser, error::ErrorKind,
};
use ipnet::IpNet;
use tapnat_common::{
    abi::{Filtering, MOST_NEW_SESSIONS, MappingMode, Timeouts},
    nptv6::PrefixPair,
    time::Ticks,
};

use super::{
    Cli, Command, Instance,
    file::{self, File},
};
use crate::{
    config::{
        Attach, Choice, Config, DEFAULT_MAX_SESSIONS, DEFAULT_PORTS, DeviceName, Firewall, Inside,
        MOST_SESSIONS, Nat64Prefix, OutsideAddresses, PerProtocol, default_guest_max_ports,
        default_guest_max_sessions, parse_destinations, parse_domain, parse_duration,
        parse_endpoint, parse_filtering_choice, parse_mapping_choice, parse_prefix_pair,
    },
    daemon::{self, Reread},
    dns::Resolver,
    forwards::Forward,
    host::tap::{Owner, Queues},
    nat_log::Target,
    ports::parse_range,
    uplink_hook::UplinkHook,
};

#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub struct Arguments {
    #[command(flatten)]
    instance: Instance,

    /// Read options and forwards from this TOML file. What the command line says goes before it
    /// [default, unless --inside is given: /etc/tapnat/tapnat.toml, or of another instance
    /// /etc/tapnat/NAME.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// A device with guests behind it, and the host's address on it: tap0=10.0.0.1/24, or
    /// `tap0=10.0.0.1/24,fd00::1/64` for one of each family. A tap that does not exist is created.
    /// With a * at the end, all devices that begin so, whenever they come: tap*=10.0.0.1/24 gives each
    /// a network of its own, tap3 that of 10.0.3.1/24. Can be given several times
    #[arg(long = "inside", value_name = "DEVICE[=ADDRESS/PREFIX,..]")]
    insides: Vec<Inside>,

    /// The device to the world [default: that of the default route]
    #[arg(long, value_name = "DEVICE")]
    uplink: Option<DeviceName>,

    /// An address that stands for the guests in the world, or a prefix of such addresses; 16 at most
    /// [default: the uplink's]. Can be given several times. Those that the host does not have are put
    /// on the uplink. A guest always gets the same one
    #[arg(
        long = "outside-address",
        value_name = "ADDRESS[/PREFIX]",
        value_delimiter = ','
    )]
    outside_addresses: Vec<OutsideAddresses>,

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

    /// Sessions that one guest can have at once [default: a quarter of those that there can be, but
    /// 1024 at least]
    #[arg(long, value_name = "NUMBER")]
    guest_max_sessions: Option<NonZeroU32>,

    /// Outside ports that one guest can hold at once, those that rest among them [default: a quarter of
    /// --ports, but 1024 at least]
    #[arg(long, value_name = "NUMBER")]
    guest_max_ports: Option<NonZeroU32>,

    /// Sessions that one guest can begin in a second; as many may come at once [default: no limit]
    #[arg(
        long,
        value_name = "NUMBER",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=u64::from(MOST_NEW_SESSIONS))
    )]
    guest_new_sessions: Option<u32>,

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

    /// Leave TCP connections that nobody asked for without an answer, instead of "port unreachable"
    /// after six seconds
    #[arg(long)]
    no_unsolicited_answer: bool,

    /// Keep guests from these addresses: 192.168.0.0/16, 169.254.169.254 or `fd00::/8`. Can be
    /// given several times
    #[arg(
        long,
        value_name = "ADDRESS[/PREFIX]",
        value_delimiter = ',',
        value_parser = parse_destinations
    )]
    deny: Vec<IpNet>,

    /// Translate the first prefix, which guests have, into the second, which the world knows them by,
    /// address by address and without sessions (`NPTv6`): `fd00:1::/48=2001:db8:1::/48`. Can be given four
    /// times
    #[arg(
        long = "prefix",
        value_name = "INTERNAL=EXTERNAL",
        value_delimiter = ',',
        value_parser = parse_prefix_pair
    )]
    prefixes: Vec<PrefixPair>,

    /// Let guests reach these addresses under their own, untranslated: where the world has a route
    /// back to them. Can be given several times
    #[arg(
        long,
        value_name = "ADDRESS[/PREFIX]",
        value_delimiter = ',',
        value_parser = parse_destinations
    )]
    untranslated: Vec<IpNet>,

    /// Let guests with IPv6 only reach the world's IPv4, whose addresses they see behind this prefix:
    /// `64:ff9b::/96`, or one of your own. Give them a resolver with DNS64
    #[arg(long, value_name = "PREFIX")]
    nat64: Option<Nat64Prefix>,

    /// Keep guests from the host itself, but for DHCP and answers, and from networks that are not
    /// behind the uplink
    #[arg(long)]
    deny_host: bool,

    /// Keep guests from each other over outside addresses, too, by which they reach each other as the
    /// world does
    #[arg(long)]
    isolate: bool,

    /// Let guests reach each other under their own addresses, by the host's routing and firewall
    #[arg(long)]
    route_guests: bool,

    /// Let a guest's address move to another Ethernet address while it has sessions, as with VRRP
    #[arg(long)]
    roaming: bool,

    /// Whether the host's firewall decides about guests' packets. `ask`: a session's first packets
    /// take the way through its FORWARD chain, and only what that lets through is translated, and
    /// then goes past it (`tapnat revalidate` has it asked again)
    #[arg(long, value_enum, default_value_t)]
    firewall: Firewall,

    /// Leave guests that ask for an address without an answer
    #[arg(long)]
    no_dhcp: bool,

    /// Do not tell guests that the host is their IPv6 router
    #[arg(long)]
    no_ra: bool,

    /// Resolvers that guests are told of; `forward`: this host, which asks its own for them [default:
    /// the host's where guests reach them, else forward]
    #[arg(long, value_name = "ADDRESS|forward", value_delimiter = ',')]
    dns: Vec<Resolver>,

    /// The domain that guests are told
    #[arg(long, value_name = "NAME", value_parser = parse_domain)]
    domain: Option<String>,

    /// Count packets and bytes of each session
    #[arg(long)]
    count: bool,

    /// Write down which outside endpoint is whose, as lines of JSON: to systemd's journal, to a file,
    /// or to the standard output (-)
    #[arg(long, value_name = "journald|FILE|-")]
    nat_log: Option<Target>,

    /// Write every session there, too, with whom the guest talks to
    #[arg(long)]
    log_destinations: bool,

    /// Answer scrapes of Prometheus here, at /metrics: 127.0.0.1:9477
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_endpoint)]
    metrics: Option<SocketAddr>,

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

    /// The user whose QEMU may attach to a tap that is created, so that it need not run as root
    /// [default: every user who may open /dev/net/tun]
    #[arg(long, value_name = "USER")]
    tap_owner: Option<Owner>,

    /// How to get hold of packets
    #[arg(long, value_enum, default_value_t)]
    attach: Attach,

    /// Where packets from the world meet the first program
    #[arg(long, value_enum, default_value_t)]
    uplink_hook: UplinkHook,

    /// How long to wait between two searches for what is over [default: 10s, and longer while nothing
    /// needs the room]
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

    /// Of TCP sessions that are not open yet [default: 4m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    tcp_opening_timeout: Option<Ticks>,

    /// Of TCP sessions that one side has closed or reset [default: 4m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    tcp_closing_timeout: Option<Ticks>,

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
        let typed: Vec<_> = env::args_os().collect();
        let path = self.file()?;
        let (config, options) = read(&typed, path.as_deref())?;
        let reread = path.map(|path| Reread {
            path: path.clone(),
            read: Box::new(move || read(&typed, Some(&path)).map(|(config, _)| config)),
        });
        Box::pin(daemon::run(&config, options, reread)).await
    }

    /// The configuration file, if there is one to read.
    fn file(&self) -> Result<Option<PathBuf>> {
        let path = match &self.config {
            Some(path) => path.clone(),
            None if !self.insides.is_empty() => return Ok(None),
            None => {
                let path = file::default_path(&self.instance.name);
                if !path.exists() {
                    let message = format!(
                        "no inside device is given: pass --inside tap0=10.0.0.1/24, or write {}",
                        path.display()
                    );
                    let kind = ErrorKind::MissingRequiredArgument;
                    return Err(Cli::command().error(kind, message).into());
                }
                path
            }
        };
        // It may have to be read again from another directory.
        let path = path::absolute(&path).context("cannot tell the directory that this is")?;
        Ok(Some(path))
    }

    fn into_config(self, forwards: Vec<Forward>) -> Config {
        let ports = self.ports.unwrap_or(DEFAULT_PORTS);
        Config {
            instance: self.instance.name,
            insides: self.insides,
            uplink: self.uplink,
            outside_addresses: OutsideAddresses::all(&self.outside_addresses),
            guest_max_ports: self
                .guest_max_ports
                .unwrap_or_else(|| default_guest_max_ports(&ports, self.max_sessions)),
            ports,
            max_sessions: self.max_sessions,
            guest_max_sessions: self
                .guest_max_sessions
                .unwrap_or_else(|| default_guest_max_sessions(self.max_sessions)),
            guest_new_sessions: self.guest_new_sessions.and_then(NonZeroU32::new),
            timeouts: self.timeouts.into(),
            filtering: PerProtocol::choose(&self.filtering),
            mapping: PerProtocol::choose(&self.mapping),
            inbound_refresh: self.inbound_refresh,
            clamp_mss: self.clamp_mss,
            pass_unsolicited: self.pass_unsolicited,
            answer_unsolicited: !self.no_unsolicited_answer,
            deny: self.deny,
            untranslated: self.untranslated,
            nat64: self.nat64,
            prefixes: self.prefixes,
            deny_host: self.deny_host,
            isolate: self.isolate,
            route_guests: self.route_guests,
            roaming: self.roaming,
            firewall: self.firewall,
            dhcp: !self.no_dhcp,
            router_advertisements: !self.no_ra,
            domain: self.domain,
            dns: self.dns,
            count: self.count,
            nat_log: self.nat_log,
            log_destinations: self.log_destinations,
            metrics: self.metrics,
            verbose: self.verbose,
            tap_queues: self.tap_queues,
            tap_owner: self.tap_owner,
            attach: self.attach,
            uplink_hook: self.uplink_hook,
            forwards,
            sweep_interval: self
                .sweep_interval
                .map(|interval| Duration::from_millis(interval.milliseconds())),
        }
    }
}

/// What a command line asks for together with a configuration file.
pub(super) fn read(typed: &[OsString], file: Option<&Path>) -> Result<(Config, daemon::Options)> {
    let file = file.map(File::read).transpose()?;
    let mut all = typed.to_vec();
    if let Some(file) = &file {
        let matches = Cli::command().try_get_matches_from(typed)?;
        if let Some((_, given)) = matches.subcommand() {
            all.extend(file.arguments(given));
        }
    }
    let Command::Run(arguments) = Cli::try_parse_from(all)?.command else {
        bail!("only `tapnat run` has a configuration");
    };
    let options = daemon::Options {
        keep: arguments.keep,
        fresh: arguments.fresh,
    };
    let forwards = file.as_ref().map(File::forwards).unwrap_or_default();
    let config = arguments.into_config(forwards);
    match &file {
        Some(file) => file.check(&config)?,
        None => config.check().map_err(|wrong| anyhow!(wrong.message))?,
    }
    Ok((config, options))
}

impl From<TimeoutArguments> for Timeouts {
    fn from(given: TimeoutArguments) -> Self {
        let default = Self::default();
        Self {
            udp: given.udp_timeout.unwrap_or(default.udp),
            tcp_established: given
                .tcp_established_timeout
                .unwrap_or(default.tcp_established),
            tcp_opening: given.tcp_opening_timeout.unwrap_or(default.tcp_opening),
            tcp_closing: given.tcp_closing_timeout.unwrap_or(default.tcp_closing),
            icmp: given.icmp_timeout.unwrap_or(default.icmp),
            other: given.other_timeout.unwrap_or(default.other),
            port_rest: given.port_rest.unwrap_or(default.port_rest),
            fragment: given.fragment_timeout.unwrap_or(default.fragment),
            unanswered: default.unanswered,
        }
    }
}
