//! What of a configuration contradicts itself, whatever the host. What contradicts the host is
//! [`crate::preflight`]'s.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use tapnat_common::{
    abi::{MAX_OUTSIDE_ADDRESSES, MAX_PREFIX_PAIRS},
    net::Be128,
};

use super::{Config, Devices, Firewall, Inside, Networks, can_be_host, overlap};
use crate::{
    dns::Resolver,
    forwards::{Forward, Share},
};

/// The size of the datapath's table.
const MOST_PREFIXES: usize = 4096;
/// An IPv6 network with a longer one has no two addresses besides the routers' and the host's.
const LONGEST_PREFIX_TO_CONFIGURE: u8 = 126;

/// What a contradiction is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum About {
    /// The option of this name.
    Option(&'static str),
    /// The forward at this place.
    Forward(usize),
}

/// Two things that cannot both be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Contradiction {
    pub about: About,
    /// What, why and the way out, in a line.
    pub message: String,
}

type Checked = Result<(), Contradiction>;

fn refuse(about: About, message: String) -> Checked {
    Err(Contradiction { about, message })
}

impl Config {
    /// Whether the configuration contradicts itself.
    ///
    /// # Errors
    ///
    /// With the first contradiction.
    pub fn check(&self) -> Checked {
        for (position, inside) in self.insides.iter().enumerate() {
            self.check_inside(inside, self.insides.get(..position).unwrap_or_default())?;
        }
        let addresses = &self.outside_addresses;
        let ipv4 = addresses.iter().filter(|it| it.is_ipv4()).count();
        for count in [ipv4, addresses.len() - ipv4] {
            if count > MAX_OUTSIDE_ADDRESSES {
                refuse(
                    About::Option("outside-address"),
                    format!(
                        "{count} outside addresses are too many: {MAX_OUTSIDE_ADDRESSES} of each IP \
                         version are the most"
                    ),
                )?;
            }
        }
        let guest = self.guest_max_sessions;
        if guest.get() > self.max_sessions {
            refuse(
                About::Option("guest-max-sessions"),
                format!(
                    "{guest} sessions for one guest are more than the {} that there can be at all: \
                     lower guest-max-sessions, or raise max-sessions",
                    self.max_sessions
                ),
            )?;
        }
        for (option, prefixes) in [("deny", &self.deny), ("untranslated", &self.untranslated)] {
            if prefixes.len() > MOST_PREFIXES {
                refuse(
                    About::Option(option),
                    format!(
                        "{} prefixes are too many: {MOST_PREFIXES} are the most",
                        prefixes.len()
                    ),
                )?;
            }
        }
        self.check_use_of_ipv6()?;
        if self.nat64.is_some() && self.firewall == Firewall::Ask {
            refuse(
                About::Option("nat64"),
                "the firewall cannot be asked about guests without IPv4, whom no rule of its can \
                 name: leave out nat64, or set firewall = \"bypass\""
                    .to_owned(),
            )?;
        }
        if self.nat64.is_some() && !self.has_ipv6_networks() {
            refuse(
                About::Option("nat64"),
                "no guest has IPv6: give an inside device an IPv6 network, such as \
                 tap0=fd00:7a70::1/64, or leave out nat64"
                    .to_owned(),
            )?;
        }
        self.check_dns()?;
        if self.isolate && self.route_guests {
            refuse(
                About::Option("route-guests"),
                "guests cannot be isolated and reach each other: leave out isolate, or \
                 route-guests"
                    .to_owned(),
            )?;
        }
        if self.log_destinations && self.nat_log.is_none() {
            refuse(
                About::Option("log-destinations"),
                "destinations are written into the NAT log, and there is none: set nat-log to a \
                 file, journald or -, or leave out log-destinations"
                    .to_owned(),
            )?;
        }
        self.check_domain()?;
        self.check_prefixes()?;
        for (position, forward) in self.forwards.iter().enumerate() {
            self.check_forward(position, forward)?;
        }
        Ok(())
    }

    /// Whether what is said of IPv6 has any effect.
    fn check_use_of_ipv6(&self) -> Checked {
        let prefixes = |nets: &[IpNet]| {
            nets.iter()
                .copied()
                .filter(|it| it.addr().is_ipv6())
                .collect()
        };
        let outside = self.outside_addresses.iter().filter(|it| it.is_ipv6());
        let said: [(&str, Vec<IpNet>); 3] = [
            (
                "outside-address",
                outside.map(|it| IpNet::from(*it)).collect(),
            ),
            ("deny", prefixes(&self.deny)),
            ("untranslated", prefixes(&self.untranslated)),
        ];
        for (option, nets) in said {
            if let Some(net) = nets.first()
                && !self.has_ipv6_networks()
            {
                refuse(
                    About::Option(option),
                    format!(
                        "{option} names {net}, and no guest has IPv6 here, so that tapnat leaves theirs \
                         to the host: give an inside device an IPv6 network, such as \
                         tap0=10.0.0.1/24,fd00:7a70::1/64, or leave out what is IPv6"
                    ),
                )?;
            }
            if let Some(nat64) = self.nat64
                && let Some(net) = nets
                    .iter()
                    .find(|net| IpNet::from(nat64.net).contains(*net))
            {
                refuse(
                    About::Option(option),
                    format!(
                        "{option} names {net} of the prefix that stands for IPv4, {}: name the IPv4 \
                         addresses",
                        nat64.net
                    ),
                )?;
            }
        }
        Ok(())
    }

    fn check_prefixes(&self) -> Checked {
        let about = About::Option("prefix");
        let most = MAX_PREFIX_PAIRS as usize;
        if self.prefixes.len() > most {
            refuse(
                about,
                format!(
                    "{} pairs of prefixes are too many: {most} are the most",
                    self.prefixes.len()
                ),
            )?;
        }
        let mut earlier: Vec<Ipv6Net> = Vec::new();
        for pair in &self.prefixes {
            let both = [prefix(pair.internal()), prefix(pair.external())];
            for net in both {
                if let Some(other) = earlier
                    .iter()
                    .find(|other| other.contains(&net) || net.contains(*other))
                {
                    refuse(
                        about,
                        format!(
                            "the prefix {net} overlaps {other} of another pair: an address must be \
                             of one pair at most"
                        ),
                    )?;
                }
            }
            let [_, external] = both;
            if let Some(nat64) = &self.nat64
                && (nat64.net.contains(&external) || external.contains(&nat64.net))
            {
                refuse(
                    about,
                    format!(
                        "the external prefix {external} overlaps that of nat64, {}: an address is \
                         either a guest's or stands for one of IPv4",
                        nat64.net
                    ),
                )?;
            }
            earlier.extend(both);
        }
        if self.prefixes.is_empty() {
            return Ok(());
        }
        if self.firewall == Firewall::Ask {
            refuse(
                about,
                "with firewall = ask the host's firewall decides about sessions, and the translation \
                 of prefixes has none: leave out one of the two"
                    .to_owned(),
            )?;
        }
        // Where a device has its address already only the host knows.
        if self.insides.iter().any(|it| it.networks.is_empty()) {
            return Ok(());
        }
        let networks = self.insides.iter().filter_map(|it| it.networks.ipv6);
        let networks: Vec<_> = networks.map(|net| net.trunc()).collect();
        for pair in &self.prefixes {
            let internal = prefix(pair.internal());
            if !networks.iter().any(|network| internal.contains(network)) {
                refuse(
                    about,
                    format!(
                        "no inside network lies in the prefix {internal}: give an inside device an \
                         address there, as in --inside tap0={}/64",
                        Ipv6Addr::from(u128::from(internal.network()) + 1)
                    ),
                )?;
            }
        }
        Ok(())
    }

    fn check_dns(&self) -> Checked {
        let host = self.dns.contains(&Resolver::Host);
        let others = self.dns.iter().any(|it| *it != Resolver::Host);
        let message = if host && others {
            "guests ask either the host (forward) or these addresses: give dns one or the other"
        } else if host && self.deny_host {
            "with deny-host guests do not reach the host, which dns = forward has them ask: give \
             dns the address of a resolver, or leave out deny-host"
        } else if others && !self.tells_guests() {
            "with no-dhcp nobody tells guests of these resolvers: leave out no-dhcp, or dns"
        } else {
            return Ok(());
        };
        refuse(About::Option("dns"), message.to_owned())
    }

    fn check_domain(&self) -> Checked {
        if self.domain.is_none() || self.tells_guests() {
            return Ok(());
        }
        let message = "with no-dhcp nobody tells guests the domain: leave out no-dhcp, or domain";
        refuse(About::Option("domain"), message.to_owned())
    }

    /// Whether guests are told anything.
    fn tells_guests(&self) -> bool {
        self.dhcp || self.router_advertisements && self.has_ipv6_networks()
    }

    fn check_inside(&self, inside: &Inside, earlier: &[Inside]) -> Checked {
        let about = About::Option("inside");
        let name = &inside.devices;
        if self.uplink.is_some() && self.uplink.as_ref() == name.name() {
            refuse(
                about,
                format!("{name} is both the uplink and an inside device: guests need their own"),
            )?;
        }
        if earlier.iter().any(|other| other.devices == *name) {
            refuse(
                about,
                format!("{name} is given twice as an inside device: it has one network"),
            )?;
        }
        if let Devices::Beginning(prefix) = name
            && let Some(other) = earlier.iter().find(|other| match &other.devices {
                Devices::Beginning(other) => {
                    other.as_str().starts_with(prefix.as_str())
                        || prefix.as_str().starts_with(other.as_str())
                }
                Devices::Named(_) => false,
            })
        {
            refuse(
                about,
                format!(
                    "a device can be meant by both {} and {name}: it has one network",
                    other.devices
                ),
            )?;
        }
        if let Some(ipv6) = inside.networks.ipv6
            && ipv6.prefix_len() > LONGEST_PREFIX_TO_CONFIGURE
            && (self.dhcp || self.router_advertisements)
        {
            refuse(
                about,
                format!(
                    "in the inside network {ipv6} of {name} no guest can configure itself: write \
                     {}/64, or give guests their addresses yourself, with no-ra and no-dhcp",
                    ipv6.addr()
                ),
            )?;
        }
        for network in inside.networks.guests() {
            if let Some(nat64) = self.nat64.filter(|nat64| overlap(nat64.net, network)) {
                refuse(
                    About::Option("nat64"),
                    format!(
                        "the inside network {network} of {name} overlaps {}, which stands for IPv4 \
                         addresses: give nat64 another prefix",
                        nat64.net
                    ),
                )?;
            }
            let other = earlier.iter().find_map(|other| {
                let network = inside.networks.overlapping(&other.networks)?;
                Some((other, network))
            });
            if let Some((other, network)) = other {
                refuse(
                    about,
                    format!(
                        "the inside network {network} of {name} overlaps that of {}: give each \
                         inside device a network of its own, or join them with a bridge",
                        other.devices
                    ),
                )?;
            }
            if let Some(address) = self
                .outside_addresses
                .iter()
                .find(|it| network.contains(*it))
            {
                refuse(
                    About::Option("outside-address"),
                    format!(
                        "the outside address {address} is in the inside network {network} of {name}"
                    ),
                )?;
            }
        }
        Ok(())
    }

    fn check_forward(&self, position: usize, forward: &Forward) -> Checked {
        let about = About::Forward(position);
        let (name, inside) = (forward.name(), forward.inside_address);
        let earlier = self.forwards.iter().take(position);
        if let Some(message) = forward.conflict(earlier, &self.outside_addresses) {
            return refuse(about, message);
        }
        if forward.share == Share::Everything
            && let Some(outside) = forward.outside_address
            && self.outside_addresses.contains(&outside)
        {
            return refuse(
                about,
                format!(
                    "{outside} cannot be {inside}'s alone: it is an outside-address, which all \
                     guests are translated to"
                ),
            );
        }
        if let Some(message) = forward.in_vain(&self.prefixes) {
            return refuse(about, message);
        }
        // Which of several devices there are, and where one has its address already, only the host
        // knows.
        if self
            .insides
            .iter()
            .any(|it| it.networks.is_empty() || it.devices.name().is_none())
        {
            return Ok(());
        }
        let mut insides = self.insides.iter().map(|it| it.networks);
        let has = |it: &Networks| it.guests().any(|it| it.contains(&inside));
        let Some(networks) = insides.find(has) else {
            return refuse(
                about,
                format!("{name} cannot lead to {inside}: no inside network has that address"),
            );
        };
        let is_hosts = |own: IpNet| own.contains(&inside) && !is_guest(own, inside);
        if networks.iter().any(is_hosts) {
            return refuse(
                about,
                format!("{name} cannot lead to {inside}: no guest can have that address"),
            );
        }
        Ok(())
    }

    /// The names of the options in which `new` differs and which only a new start can change.
    #[must_use]
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        // Every field stands here, so that none is forgotten.
        let Self {
            instance: _,
            insides,
            uplink,
            outside_addresses: _,
            ports: _,
            max_sessions,
            guest_max_sessions: _,
            guest_max_ports: _,
            guest_new_sessions: _,
            timeouts: _,
            filtering: _,
            mapping: _,
            inbound_refresh: _,
            clamp_mss: _,
            pass_unsolicited: _,
            deny: _,
            untranslated: _,
            nat64,
            prefixes,
            deny_host: _,
            isolate: _,
            route_guests: _,
            roaming: _,
            firewall,
            answer_unsolicited: _,
            dhcp: _,
            router_advertisements: _,
            domain: _,
            dns: _,
            count,
            nat_log,
            log_destinations,
            metrics: _,
            verbose,
            tap_queues,
            tap_owner,
            attach,
            uplink_hook,
            forwards: _,
            sweep_interval: _,
        } = self;
        [
            ("inside", *insides != new.insides),
            ("uplink", *uplink != new.uplink),
            ("nat64", *nat64 != new.nat64),
            ("max-sessions", *max_sessions != new.max_sessions),
            ("prefix", *prefixes != new.prefixes),
            ("firewall", *firewall != new.firewall),
            ("count", *count != new.count),
            ("nat-log", *nat_log != new.nat_log),
            (
                "log-destinations",
                *log_destinations != new.log_destinations,
            ),
            ("verbose", *verbose != new.verbose),
            ("tap-queues", *tap_queues != new.tap_queues),
            ("tap-owner", *tap_owner != new.tap_owner),
            ("attach", *attach != new.attach),
            ("uplink-hook", *uplink_hook != new.uplink_hook),
        ]
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect()
    }
}

fn prefix((address, length): (Be128, u8)) -> Ipv6Net {
    Ipv6Net::new_assert(address.into(), length)
}

fn is_guest(network: IpNet, address: IpAddr) -> bool {
    network.addr() != address && can_be_host(network, address)
}
