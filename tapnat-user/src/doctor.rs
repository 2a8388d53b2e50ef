//! Looks a host and its instances over for what keeps guests from the world, and says of each thing
//! what it is, why it matters and the way out. Changes nothing. What it looks at is gathered here;
//! the judgements are functions of what was gathered.

pub mod rules;

use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::Result;
use ipnet::IpNet;
use rustix::system::uname;
use serde::Serialize;
use tapnat_common::{
    abi::{role, setting_flags},
    net::{Be32, Be128},
};

use crate::{
    config::{self, Attach, Config, overlap},
    datapath::{check_kernel, is_kernel_supported, uses_tcx},
    family::IpFamily,
    forwards::Share,
    host::{
        bpffs, capabilities,
        namespace::NetworkNamespace,
        netlink::{DefaultRoute, Link, Netlink},
        sockets,
        sysctl::Sysctl,
    },
    instance::{InstanceName, Lock},
    journal::{Change, Claim, Journal, Role},
    ports::PortSet,
    preflight::{networks_at, networks_of},
    statics,
    tables::{BothTables, PinnedTables, Unusable},
};

use self::rules::Firewall;

/// How grave a finding is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Something works, but not as one would think.
    Warning,
    /// Something does not work.
    Problem,
}

impl Level {
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    pub level: Level,
    /// What kind of thing: `kernel`, `firewall`, `forwarding` and so on.
    pub topic: &'static str,
    pub what: String,
    /// Null for what is as it should be.
    pub why: Option<String>,
    /// Null for what is as it should be, and where nothing need be done.
    pub way_out: Option<String>,
}

impl Finding {
    pub(crate) fn ok(topic: &'static str, what: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            topic,
            what: what.into(),
            why: None,
            way_out: None,
        }
    }

    pub(crate) fn new(
        level: Level,
        topic: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self {
            level,
            topic,
            what: what.into(),
            why: Some(why.into()),
            way_out: None,
        }
    }

    fn way_out(mut self, way_out: impl Into<String>) -> Self {
        self.way_out = Some(way_out.into());
        self
    }
}

/// A network with guests.
#[derive(Clone, Debug, Eq, PartialEq)]
struct InsideNetwork {
    device: String,
    network: IpNet,
}

/// Looks at this host, and at the instance if it is there. `config` is what the instance would be
/// started with, if that is known.
///
/// # Errors
///
/// When the kernel does not even list its devices.
pub async fn examine(name: &InstanceName, config: Option<&Config>) -> Result<Vec<Finding>> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let default_route = netlink.default_route().await?;
    let journal = Journal::load(name).unwrap_or(None);
    let here = NetworkNamespace::current()?;
    let is_here = journal
        .as_ref()
        .is_some_and(|journal| journal.network_namespace() == here);
    let tables = bpffs::find()
        .map(|root| name.pin_directory(&root).join("maps"))
        .and_then(|maps| BothTables::open(&maps).ok())
        .filter(|_| is_here);

    let mut findings = kernel();
    let uplink = find_uplink(&links, default_route, config, journal.as_ref());
    let networks = inside_networks(&links, tables.as_ref(), config)?;
    findings.push(judge_uplink(uplink, default_route, &networks));
    let asks = match (&tables, config) {
        (Some(tables), _) => tables.ipv4.settings()?.flags & setting_flags::ASK_FIREWALL != 0,
        (None, Some(config)) => config.firewall == config::Firewall::Ask,
        (None, None) => false,
    };
    findings.extend(judge_firewall(&Firewall::read(), &networks, asks));
    findings.extend(overlaps(&links, &networks));
    if let Some(uplink) = uplink {
        findings.extend(mtus(&links, uplink, &networks));
        findings.extend(judge_offloads(&uplink.name, &offloads(&uplink.name)));
        findings.extend(judge_reverse_path(
            &uplink.name,
            reverse_path(&uplink.name),
            default_route.is_none_or(|route| route.device_index == uplink.index),
        ));
    }
    for network in &networks {
        findings.extend(tap_header(&network.device));
    }
    findings.extend(leftovers(here)?);
    if let (Some(tables), Some(journal)) = (&tables, &journal) {
        findings.extend(instance(name, &links, tables, journal)?);
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    Ok(findings)
}

fn kernel() -> Vec<Finding> {
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

fn find_uplink<'a>(
    links: &'a [Link],
    default_route: Option<DefaultRoute>,
    config: Option<&Config>,
    journal: Option<&Journal>,
) -> Option<&'a Link> {
    let claimed = journal.and_then(|journal| {
        let claim = journal.claims().iter().find(|it| it.role == Role::Uplink)?;
        links.iter().find(|it| it.index == claim.device.index)
    });
    let named = config
        .and_then(|config| config.uplink.as_ref())
        .and_then(|name| links.iter().find(|it| it.name == name.as_str()));
    let routed = || {
        let route = default_route?;
        links.iter().find(|it| it.index == route.device_index)
    };
    claimed.or(named).or_else(routed)
}

/// The IP versions that guests have: IPv4 where nothing is known of them.
fn versions(networks: &[InsideNetwork]) -> (bool, bool) {
    let ipv6 = networks.iter().any(|it| it.network.addr().is_ipv6());
    let ipv4 = networks.iter().any(|it| it.network.addr().is_ipv4());
    (ipv4 || !ipv6, ipv6)
}

fn judge_uplink(
    uplink: Option<&Link>,
    default_route: Option<DefaultRoute>,
    networks: &[InsideNetwork],
) -> Finding {
    let topic = "uplink";
    let Some(link) = uplink else {
        return Finding::new(
            Level::Problem,
            topic,
            "there is no default route, so no uplink",
            "guests' packets have no way out",
        )
        .way_out("connect the host (`ip route add default via ..`), or pass --uplink");
    };
    let name = &link.name;
    if !link.up {
        return Finding::new(
            Level::Problem,
            topic,
            format!("the uplink {name} is down"),
            "guests' packets have no way out",
        )
        .way_out(format!("ip link set {name} up"));
    }
    if !link.carrier {
        return Finding::new(
            Level::Problem,
            topic,
            format!("the uplink {name} has no carrier"),
            "its other end is not there",
        )
        .way_out("plug it in");
    }
    let (ipv4, ipv6) = if networks.is_empty() && link.primary_ipv6().is_some() {
        (link.primary_ipv4().is_some(), true)
    } else {
        versions(networks)
    };
    let ipv4 = ipv4.then(|| (Be32::NAME, link.primary_ipv4().map(IpNet::from)));
    let ipv6 = ipv6.then(|| (Be128::NAME, link.primary_ipv6().map(IpNet::from)));
    let mut addresses = Vec::new();
    for (version, address) in [ipv4, ipv6].into_iter().flatten() {
        let Some(address) = address else {
            return Finding::new(
                Level::Problem,
                topic,
                format!("the uplink {name} has no {version} address"),
                "there is nothing to translate guests' addresses to",
            )
            .way_out("give it one, or pass --outside-address");
        };
        addresses.push(address.to_string());
    }
    if default_route.is_none() {
        return Finding::new(
            Level::Warning,
            topic,
            format!("the uplink {name} has no default route"),
            "guests reach only the networks that the host has routes to",
        )
        .way_out(format!("ip route add default via .. dev {name}"));
    }
    Finding::ok(topic, format!("{name} has {}", addresses.join(" and ")))
}

/// Of the instance if it is there, else of the configuration.
fn inside_networks(
    links: &[Link],
    tables: Option<&BothTables>,
    config: Option<&Config>,
) -> Result<Vec<InsideNetwork>> {
    if let Some(BothTables { ipv4, ipv6, .. }) = tables {
        let mut networks = inside_networks_in(ipv4, links)?;
        if let Some(ipv6) = ipv6 {
            networks.extend(inside_networks_in(ipv6, links)?);
        }
        return Ok(networks);
    }
    let insides = config.map(|config| config.insides.as_slice());
    Ok(insides
        .unwrap_or_default()
        .iter()
        .flat_map(|inside| {
            let named = inside.devices.name().map(ToString::to_string);
            let included = links
                .iter()
                .filter(|link| inside.devices.include(&link.name))
                .map(|link| link.name.clone());
            named.into_iter().chain(included).flat_map(|device| {
                let link = links.iter().find(|it| it.name == device);
                let given = inside.networks_on(&device).unwrap_or_default();
                let networks = if given.is_empty() {
                    link.map(networks_of).unwrap_or_default()
                } else {
                    given
                };
                let networks: Vec<_> = networks.guests().collect();
                networks.into_iter().map(move |network| InsideNetwork {
                    device: device.clone(),
                    network,
                })
            })
        })
        .collect())
}

/// Those of one IP version.
fn inside_networks_in<A: IpFamily>(
    tables: &PinnedTables<A>,
    links: &[Link],
) -> Result<Vec<InsideNetwork>> {
    let devices = tables.devices()?;
    let insides = devices
        .iter()
        .filter(|(_, device)| device.role == role::INSIDE && device.address != A::UNSPECIFIED);
    Ok(insides
        .filter_map(|(index, device)| {
            let network: IpNet = A::net(device.network, A::length(device.mask))?.into();
            Some(InsideNetwork {
                device: name_of(links, *index),
                network: network.trunc(),
            })
        })
        .collect())
}

fn name_of(links: &[Link], index: u32) -> String {
    links
        .iter()
        .find(|link| link.index == index)
        .map_or_else(|| format!("#{index}"), |link| link.name.clone())
}

/// How to let in what guests ask the host for.
fn let_in(firewall: &Firewall, device: &str) -> String {
    if firewall.managers.contains(&"ufw") {
        format!(
            "ufw allow in on {device} proto udp to any port 53,67; ufw allow in on {device} proto tcp \
             to any port 53"
        )
    } else if firewall.managers.contains(&"firewalld") {
        format!("firewall-cmd --zone=trusted --change-interface={device}")
    } else {
        format!(
            "a rule before the others of INPUT: iptables -I INPUT -i {device} -p udp -m multiport \
             --dports 53,67 -j ACCEPT, and the same for tcp port 53"
        )
    }
}

/// `asks`: whether the firewall decides about guests' packets.
fn judge_firewall(firewall: &Firewall, networks: &[InsideNetwork], asks: bool) -> Vec<Finding> {
    let topic = "firewall";
    let mut findings = Vec::new();
    for rule in &firewall.masquerades {
        let covered: Vec<_> = networks
            .iter()
            .filter(|inside| rule.sources.iter().any(|it| overlap(*it, inside.network)))
            .map(|inside| inside.network.to_string())
            .collect();
        if covered.is_empty() && !networks.is_empty() {
            continue;
        }
        let (level, whom) = if covered.is_empty() {
            (Level::Note, "guests".to_owned())
        } else {
            (Level::Warning, covered.join(", "))
        };
        findings.push(
            Finding::new(
                level,
                topic,
                format!("a rule may translate {whom}, too: {}", rule.text),
                if asks {
                    "what the firewall is asked about meets it, and then goes out by the kernel's \
                     own translation instead of tapnat's"
                } else {
                    "packets that tapnat translates never meet it; but while tapnat is down guests \
                     go out by it unnoticed, and so does what tapnat leaves to the host"
                },
            )
            .way_out(rule.removal()),
        );
    }
    if firewall.drops_forwarded {
        findings.push(Finding::new(
            Level::Note,
            topic,
            "the firewall drops forwarded packets by default",
            if asks {
                "guests reach what its rules let through, as --firewall ask says"
            } else {
                "guests reach the world all the same, for tapnat's packets do not pass the \
                 firewall; where the host forwards, as for containers, it holds"
            },
        ));
    }
    if (firewall.drops_incoming || firewall.managers.contains(&"firewalld"))
        && !firewall.knows_dhcp
        && let Some(inside) = networks.first()
    {
        findings.push(
            Finding::new(
                Level::Warning,
                topic,
                "the firewall drops what is for the host by default",
                "guests ask the host for their addresses (UDP port 67), and, where it asks its \
                 resolvers for them, for names (port 53)",
            )
            .way_out(let_in(firewall, &inside.device)),
        );
    }
    for manager in &firewall.managers {
        let why = match *manager {
            "Docker" => {
                "its rules and tapnat do not touch each other; ports of containers that it \
                 publishes without a proxy (userland-proxy false) need --pass-unsolicited"
            }
            _ if asks => "its rules for forwarded packets decide about guests' sessions",
            _ => {
                "its rules for forwarded packets do not hold for guests' packets to the world, \
                 which never pass them; those for the host itself do"
            }
        };
        findings.push(Finding::new(
            Level::Note,
            topic,
            format!("{manager} manages firewall rules here"),
            why,
        ));
    }
    if !firewall.seen {
        findings.push(
            Finding::new(
                Level::Note,
                topic,
                "the firewall's rules cannot be seen",
                "neither nft nor iptables-save can be run",
            )
            .way_out("run as root, with nftables or iptables installed"),
        );
    } else if findings.is_empty() {
        findings.push(Finding::ok(topic, "no rule translates guests, too"));
    }
    findings
}

fn overlaps(links: &[Link], networks: &[InsideNetwork]) -> Vec<Finding> {
    let topic = "networks";
    let mut findings = Vec::new();
    for inside in networks {
        for link in links.iter().filter(|it| it.name != inside.device) {
            let other = networks_at(link).find(|net| overlap(*net, inside.network));
            if let Some(other) = other {
                findings.push(
                    Finding::new(
                        Level::Warning,
                        topic,
                        format!(
                            "the inside network {} of {} overlaps {} of {}",
                            inside.network,
                            inside.device,
                            other.trunc(),
                            link.name
                        ),
                        "the host reaches only one of them, and packets to guests may go the wrong \
                         way",
                    )
                    .way_out(format!("give {} another network", inside.device)),
                );
            }
        }
    }
    if findings.is_empty() && !networks.is_empty() {
        findings.push(Finding::ok(topic, "no inside network overlaps another one"));
    }
    findings
}

fn mtus(links: &[Link], uplink: &Link, networks: &[InsideNetwork]) -> Vec<Finding> {
    let topic = "mtu";
    let inside = |name: &str| links.iter().find(|link| link.name == name);
    let mut findings: Vec<_> = networks
        .iter()
        .filter_map(|network| inside(&network.device))
        .filter(|link| link.mtu > uplink.mtu)
        .map(|link| {
            Finding::new(
                Level::Note,
                topic,
                format!(
                    "{} carries {} bytes, the uplink {} only {}",
                    link.name, link.mtu, uplink.name, uplink.mtu
                ),
                "longer packets are fragmented, or their senders told by ICMP, which costs time; \
                 some networks swallow such ICMP",
            )
            .way_out(format!(
                "set the guests' MTU to {0}, or run with --clamp-mss {1}",
                uplink.mtu,
                uplink.mtu.saturating_sub(40)
            ))
        })
        .collect();
    if findings.is_empty() && !networks.is_empty() {
        findings.push(Finding::ok(
            topic,
            "no inside device carries more than the uplink",
        ));
    }
    findings
}

/// What `ethtool -k` says of a device, if it is there.
fn offloads(device: &str) -> String {
    output("ethtool", &["-k", device]).unwrap_or_default()
}

fn judge_offloads(device: &str, features: &str) -> Vec<Finding> {
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
fn tap_header(device: &str) -> Option<Finding> {
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

/// `net.ipv4.conf.*.rp_filter` as it holds for a device: the larger of its own and that of all
/// (`Documentation/networking/ip-sysctl.rst`).
fn reverse_path(device: &str) -> u8 {
    let read = |name: &str| {
        let value = Sysctl::reverse_path_filter(name).read();
        value.ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    read("all").max(read(device))
}

fn judge_reverse_path(device: &str, filter: u8, has_default_route: bool) -> Option<Finding> {
    const STRICT: u8 = 1;
    (filter == STRICT && !has_default_route).then(|| {
        Finding::new(
            Level::Warning,
            "rp-filter",
            format!("{device} drops packets whose answers would leave by another device"),
            "the default route is another device's, so what the world sends to this host over \
             the uplink is dropped (guests' packets are not)",
        )
        .way_out(format!("sysctl -w net.ipv4.conf.{device}.rp_filter=2"))
    })
}

/// What instances left.
fn leftovers(here: NetworkNamespace) -> Result<Vec<Finding>> {
    let topic = "instances";
    let mut findings = Vec::new();
    let pinned = match bpffs::find() {
        Some(root) => InstanceName::all_pinned(&root).unwrap_or_default(),
        None => Vec::new(),
    };
    let names: BTreeSet<_> = InstanceName::all()
        .unwrap_or_default()
        .into_iter()
        .chain(pinned.iter().cloned())
        .collect();
    for name in names {
        let is_pinned = pinned.contains(&name);
        let down = format!("tapnat down --instance {name}");
        let process = Lock::holder(&name).and_then(|holder| holder.0);
        let journal = match Journal::load(&name) {
            Ok(journal) => journal,
            Err(error) => {
                findings.push(
                    Finding::new(
                        Level::Warning,
                        topic,
                        format!("the instance '{name}' cannot be looked at"),
                        format!("{error:#}"),
                    )
                    .way_out("run as root, with the version of tapnat that started it"),
                );
                continue;
            }
        };
        let elsewhere = match &journal {
            Some(journal) if journal.network_namespace() != here => {
                Some(journal.network_namespace().find()?)
            }
            _ => None,
        };
        findings.push(match (process, elsewhere) {
            (_, Some(None)) => Finding::new(
                Level::Warning,
                topic,
                format!("the instance '{name}' is left from a network namespace that is gone"),
                if is_pinned {
                    "its tables take memory"
                } else {
                    "only its record of changes is left, and they went with the namespace"
                },
            )
            .way_out(down),
            (_, Some(Some(path))) => Finding::ok(
                topic,
                format!(
                    "'{name}' belongs to the network namespace {}",
                    path.display()
                ),
            ),
            (Some(process), None) => {
                Finding::ok(topic, format!("'{name}' runs (process {process})"))
            }
            (None, None) => state_without_process(&name, &down),
        });
    }
    Ok(findings)
}

fn state_without_process(name: &InstanceName, down: &str) -> Finding {
    let topic = "instances";
    let maps = bpffs::find().map(|root| name.pin_directory(&root).join("maps"));
    let opened = maps.map_or(Err(Unusable::Missing), |maps| <PinnedTables>::open(&maps));
    match opened {
        Ok(_) => Finding::new(
            Level::Warning,
            topic,
            format!("the instance '{name}' translates without a process"),
            "packets go on, but nothing follows changes of addresses and devices",
        )
        .way_out(format!(
            "start `tapnat run --instance {name}` again with its options, or end it: {down}"
        )),
        Err(Unusable::OtherVersion) => Finding::new(
            Level::Warning,
            topic,
            format!("the instance '{name}' was left by another version of tapnat"),
            "its tables are not of this version's layout",
        )
        .way_out(format!(
            "`tapnat run --instance {name} --fresh` with its options, or {down}"
        )),
        Err(Unusable::Missing | Unusable::Unfinished | Unusable::Refused(_)) => Finding::new(
            Level::Warning,
            topic,
            format!("a start of the instance '{name}' was cut short"),
            "what it changed on the host is still changed",
        )
        .way_out(down),
    }
}

/// What is wrong around an instance that translates.
fn instance(
    name: &InstanceName,
    links: &[Link],
    tables: &BothTables,
    journal: &Journal,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let networks = inside_networks(links, Some(tables), None)?;
    for claim in journal.claims() {
        findings.extend(judge_device(name, claim, links, &networks));
    }
    let (ipv4, ipv6) = versions(&networks);
    if ipv4 {
        findings.extend(outside_addresses(links, &tables.ipv4, journal)?);
    }
    if let Some(tables) = tables.ipv6.as_ref().filter(|_| ipv6) {
        findings.extend(outside_addresses(links, tables, journal)?);
    }
    findings.extend(reservation(journal));
    findings.extend(forwards(tables)?);
    Ok(findings)
}

fn judge_device(
    name: &InstanceName,
    claim: &Claim,
    links: &[Link],
    networks: &[InsideNetwork],
) -> Vec<Finding> {
    let device = &claim.device.name;
    let Some(link) = links.iter().find(|it| it.index == claim.device.index) else {
        let level = match claim.role {
            Role::Inside => Level::Warning,
            Role::Uplink => Level::Problem,
        };
        let gone = Finding::new(
            level,
            "devices",
            format!("{device}, a device of the instance '{name}', is gone"),
            "what is attached to a device goes with it, also if another of the same name comes",
        );
        return vec![gone.way_out(format!(
            "start `tapnat run --instance {name}` again when it is back"
        ))];
    };
    let device = &link.name;
    if !link.up {
        let down = Finding::new(
            Level::Problem,
            "devices",
            format!("{device} is down"),
            "no packet passes it",
        );
        return vec![down.way_out(format!("ip link set {device} up"))];
    }
    if claim.role == Role::Uplink {
        return vec![Finding::ok("devices", format!("{device} is up"))];
    }
    let own = networks.iter().filter(|it| it.device == *device);
    own.map(|it| match it.network {
        IpNet::V4(_) => Sysctl::forwarding(device),
        IpNet::V6(_) => Sysctl::forwarding_ipv6(device),
    })
    .map(|sysctl| judge_forwarding(&sysctl))
    .collect()
}

/// Whether the host forwards what arrives on a device.
fn judge_forwarding(sysctl: &Sysctl) -> Finding {
    match sysctl.read() {
        Ok(value) if value == "0" => Finding::new(
            Level::Problem,
            "forwarding",
            format!("{sysctl} is 0"),
            "the kernel then finds no route for guests' packets; something set it back since \
             tapnat set it to 1 (network managers do so when they reload)",
        )
        .way_out(format!("sysctl -w {sysctl}=1")),
        Ok(_) => Finding::ok("forwarding", format!("{sysctl} is on")),
        Err(error) => Finding::new(
            Level::Warning,
            "forwarding",
            format!("{sysctl} cannot be read"),
            error.to_string(),
        ),
    }
}

/// Those of one IP version.
fn outside_addresses<A: IpFamily>(
    links: &[Link],
    tables: &PinnedTables<A>,
    journal: &Journal,
) -> Result<Vec<Finding>> {
    let topic = "outside-address";
    let pool = tables.outside_addresses()?;
    if pool.is_empty() {
        let none = Finding::new(
            Level::Problem,
            topic,
            format!("there is no outside address of {}", A::NAME),
            "new sessions are refused: the uplink has none, or lost it",
        );
        return Ok(vec![
            none.way_out(format!("give the uplink an {} address", A::NAME)),
        ]);
    }
    let claim = journal.claims().iter().find(|it| it.role == Role::Uplink);
    let uplink = claim.and_then(|it| links.iter().find(|link| link.index == it.device.index));
    let findings = pool
        .into_iter()
        .map(|address| {
            let has = |link: &Link| link.addresses.iter().any(|it| it.net.addr() == address);
            if uplink.is_some_and(has) {
                Finding::ok(topic, format!("the uplink has {address}"))
            } else {
                Finding::new(
                    Level::Warning,
                    topic,
                    format!("the uplink does not have the outside address {address}"),
                    "unless a router sends its packets here, no answer comes back",
                )
                .way_out(format!(
                    "put it there: `ip address add {} dev ..`",
                    IpNet::from(address)
                ))
            }
        })
        .collect();
    Ok(findings)
}

/// Whether the guests' ports are still kept from the host's own connections.
fn reservation(journal: &Journal) -> Option<Finding> {
    let topic = "ports";
    let ours = journal.changes().find_map(Change::reserved_ports)?;
    let sysctl = Sysctl::local_reserved_ports();
    let now: PortSet = sysctl.read().ok()?.parse().ok()?;
    let lost = ours.without(&now);
    Some(if lost.is_empty() {
        Finding::ok(topic, format!("the host leaves guests the ports {ours}"))
    } else {
        Finding::new(
            Level::Problem,
            topic,
            format!("{sysctl} no longer has {lost}"),
            "the host's own connections may take ports that guests have, and then both break; \
             something set it back since tapnat set it",
        )
        .way_out(format!("sysctl -w {sysctl}={}", now.union(ours)))
    })
}

/// Forwards that a program of the host hides.
fn forwards(tables: &BothTables) -> Result<Vec<Finding>> {
    let topic = "forwards";
    let listeners = sockets::listeners()?;
    let standing = statics::list(tables)?;
    let mut findings = Vec::new();
    for it in &standing {
        let Share::Ports {
            protocol, outside, ..
        } = it.forward.share
        else {
            continue;
        };
        let taken = outside.iter().find_map(|port| {
            let taker = listeners
                .iter()
                .find(|listener| listener.takes(protocol, it.outside_address, port))?;
            Some((port, taker))
        });
        if let Some((port, taker)) = taken {
            findings.push(
                Finding::new(
                    Level::Problem,
                    topic,
                    format!(
                        "{protocol} port {port} leads to {}, but {} listens there",
                        it.forward.inside_address,
                        taker.owner()
                    ),
                    "the host's own sockets go first",
                )
                .way_out("stop it, or forward another port"),
            );
        }
    }
    if findings.is_empty() && !standing.is_empty() {
        findings.push(Finding::ok(topic, "no program of the host hides a forward"));
    }
    Ok(findings)
}

/// What a program prints, in English.
///
/// # Errors
///
/// When it is not there or fails.
fn output(program: &str, arguments: &[&str]) -> io::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{program} failed")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks() -> Vec<InsideNetwork> {
        vec![InsideNetwork {
            device: "tap0".to_owned(),
            network: "10.0.0.0/24".parse().unwrap(),
        }]
    }

    fn levels(findings: &[Finding]) -> Vec<Level> {
        for finding in findings {
            assert_eq!(finding.why.is_none(), finding.level == Level::Ok);
        }
        findings.iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn rules_that_translate_guests_too_are_found() {
        let judge = |text: &str, networks: &[InsideNetwork]| {
            let firewall = Firewall::of_texts(&[("iptables", text)]);
            levels(&judge_firewall(&firewall, networks, false))
        };
        let all = "-A POSTROUTING -o eth0 -j MASQUERADE\n";
        assert_eq!(judge(all, &networks()), [Level::Warning]);
        assert_eq!(judge(all, &[]), [Level::Note]);
        let closed = ":INPUT DROP [0:0]\n";
        assert_eq!(judge(closed, &networks()), [Level::Warning]);
        assert_eq!(judge(closed, &[]), [Level::Ok]);
        let open = ":INPUT DROP [0:0]\n-A INPUT -p udp --dport 67 -j ACCEPT\n";
        assert_eq!(judge(open, &networks()), [Level::Ok]);
        let docker = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n";
        assert_eq!(judge(docker, &networks()), [Level::Ok]);
        let guests = "-A POSTROUTING -s 10.0.0.0/8 -j SNAT --to-source 192.0.2.1\n";
        assert_eq!(judge(guests, &networks()), [Level::Warning]);
        assert_eq!(judge("", &networks()), [Level::Ok]);
    }

    #[test]
    fn offloads_are_judged_by_what_ethtool_says() {
        let judge = |text: &str| levels(&judge_offloads("eth0", text));
        let fine = "generic-receive-offload: on\nlarge-receive-offload: off [fixed]\n";
        assert_eq!(judge(fine), [Level::Ok]);
        assert_eq!(judge("large-receive-offload: on\n"), [Level::Warning]);
        assert_eq!(judge("\tgeneric-receive-offload: off\n"), [Level::Note]);
        assert_eq!(judge(""), []);
    }

    #[test]
    fn a_strict_reverse_path_matters_only_beside_the_default_route() {
        assert!(judge_reverse_path("eth1", 1, true).is_none());
        assert!(judge_reverse_path("eth1", 2, false).is_none());
        assert!(judge_reverse_path("eth1", 1, false).is_some());
    }
}
