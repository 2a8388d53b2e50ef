//! Those who are compared: how each is set up on a host. Everything but the world itself, whose
//! guests and cables are the scenario's.

use std::{
    fmt,
    net::Ipv4Addr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TcAttachType},
};
use tapnat_testbed::{
    Namespace,
    process::Process,
    setting::Setting,
    topology::{HOST_ADDRESS, Topology, UPLINK},
};
use tapnat_tests::instance::Instance;

use crate::{
    abi,
    packets::Protocol,
    rig::{self, Direction, Rig},
};

/// Connections that the kernel tracks unless told otherwise, on a machine like this.
const USUAL_CONNECTIONS: u32 = 262_144;

/// Another build of tapnat to compare this one with, if there is one.
pub static OTHER_BUILD: OnceLock<PathBuf> = OnceLock::new();

/// A way for packets from the guest to the world and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A TC program that only redirects.
    Redirect,
    /// The same once more: what differs between the two is noise.
    RedirectAgain,
    /// The kernel's router, without a translation.
    Forwarding,
    /// The same once more.
    ForwardingAgain,
    IptablesLegacy,
    IptablesNft,
    Nft,
    Tapnat,
    /// The tapnat that is [`OTHER_BUILD`].
    OtherBuild,
}

/// What is asked of a NAT.
#[derive(Clone, Debug)]
pub struct Wish {
    pub max_sessions: u32,
    /// Ports that the guests may get, or the contender's own choice.
    pub ports: Option<(Protocol, RangeInclusive<u16>)>,
    /// Outside addresses for tapnat, or the uplink's own: an endpoint-independent mapping needs a
    /// port of its own, where netfilter gives one port to flows with different remotes.
    pub outside: Vec<Ipv4Addr>,
    /// Where tapnat meets the world's packets.
    pub uplink_hook: &'static str,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            max_sessions: 131_072,
            ports: None,
            outside: Vec::new(),
            uplink_hook: "auto",
        }
    }
}

impl Contender {
    /// Whether the guest's address is translated.
    #[must_use]
    pub const fn translates(self) -> bool {
        match self {
            Self::Redirect | Self::RedirectAgain | Self::Forwarding | Self::ForwardingAgain => {
                false
            }
            Self::IptablesLegacy
            | Self::IptablesNft
            | Self::Nft
            | Self::Tapnat
            | Self::OtherBuild => true,
        }
    }

    /// These; or where there is another build to compare with, the limit and the two builds.
    #[must_use]
    pub fn among(these: &[Self]) -> Vec<Self> {
        if OTHER_BUILD.get().is_none() {
            return these.to_vec();
        }
        these
            .iter()
            .flat_map(|it| match it {
                Self::Redirect | Self::RedirectAgain => vec![*it],
                Self::Tapnat => vec![Self::OtherBuild, Self::Tapnat],
                Self::Forwarding
                | Self::ForwardingAgain
                | Self::IptablesLegacy
                | Self::IptablesNft
                | Self::Nft
                | Self::OtherBuild => vec![],
            })
            .collect()
    }

    /// Sets it up on a host between the uplink and this inside device, whose address is of a /24.
    ///
    /// # Errors
    ///
    /// When a program it is made of is missing or refuses.
    pub fn install(
        self,
        host: &Namespace,
        device: &str,
        address: Ipv4Addr,
        wish: &Wish,
    ) -> Result<Installed> {
        self.try_install(host, device, address, wish)
            .with_context(|| format!("cannot set up {self}"))
    }

    fn try_install(
        self,
        host: &Namespace,
        device: &str,
        address: Ipv4Addr,
        wish: &Wish,
    ) -> Result<Installed> {
        let mut installed = Installed::default();
        let program = match self {
            Self::Tapnat => Some(None),
            Self::OtherBuild => Some(OTHER_BUILD.get()),
            _ => None,
        };
        if let Some(program) = program {
            let mut instance = Instance::new(host);
            if let Some(program) = program {
                instance.use_program(program);
            }
            installed.tapnat = Some(Tapnat::start(instance, device, address, wish)?);
            return Ok(installed);
        }
        host.ip(&format!("link set {device} up"))?;
        host.ip(&format!("address add {address}/24 dev {device}"))?;
        match self {
            Self::Redirect | Self::RedirectAgain => {
                installed.redirect = Some(redirect(host, device)?);
            }
            Self::Forwarding | Self::ForwardingAgain => {
                host.sysctl("net.ipv4.ip_forward", "1")?;
            }
            Self::IptablesLegacy | Self::IptablesNft | Self::Nft => {
                host.sysctl("net.ipv4.ip_forward", "1")?;
                self.add_rule(host, wish)?;
                for timeout in ["udp_timeout", "udp_timeout_stream"] {
                    host.sysctl(&format!("net.netfilter.nf_conntrack_{timeout}"), "7200")?;
                }
                if wish.max_sessions > USUAL_CONNECTIONS {
                    installed.settings = more_connections(wish.max_sessions)?;
                }
            }
            Self::Tapnat | Self::OtherBuild => {}
        }
        Ok(installed)
    }

    fn add_rule(self, host: &Namespace, wish: &Wish) -> Result<()> {
        let iptables = match self {
            Self::IptablesLegacy => "iptables-legacy",
            _ => "iptables-nft",
        };
        let (mut matches, mut to_ports, mut nft) = (String::new(), String::new(), String::new());
        if let Some((protocol, ports)) = &wish.ports {
            let (name, low, high) = (protocol.name(), ports.start(), ports.end());
            matches = format!("-p {name}");
            to_ports = format!("--to-ports {low}-{high}");
            nft = format!("ip protocol {name} masquerade to :{low}-{high}");
        }
        if self != Self::Nft {
            return host
                .exec(&format!(
                    "{iptables} -t nat -A POSTROUTING {matches} -o {UPLINK} -j MASQUERADE {to_ports}"
                ))
                .map(drop);
        }
        if nft.is_empty() {
            "masquerade".clone_into(&mut nft);
        }
        // nft 1.0.6 refuses a closing brace right after `masquerade`.
        let rules = format!(
            "table ip nat {{\n\
             chain postrouting {{\n\
             type nat hook postrouting priority srcnat; policy accept;\n\
             oifname \"{UPLINK}\" {nft}\n\
             }}\n\
             }}\n"
        );
        host.command("nft")
            .args(["-f", "-"])
            .stdin(rules)
            .run()
            .map(drop)
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Redirect => "bare redirect",
            Self::RedirectAgain => "bare redirect again",
            Self::Forwarding => "plain forwarding",
            Self::ForwardingAgain => "plain forwarding again",
            Self::IptablesLegacy => "iptables (legacy)",
            Self::IptablesNft => "iptables (nft)",
            Self::Nft => "nft masquerade",
            Self::Tapnat => "tapnat",
            Self::OtherBuild => "tapnat, other build",
        })
    }
}

/// The programs that only redirect, attached.
fn redirect(host: &Namespace, device: &str) -> Result<Ebpf> {
    let index = |device| -> Result<u32> {
        host.device_index(device)?
            .with_context(|| format!("no device {device}"))
    };
    let (inside, uplink) = (index(device)?, index(UPLINK)?);
    let mut ebpf = EbpfLoader::new()
        .override_global(abi::INSIDE, &inside, true)
        .override_global(abi::UPLINK, &uplink, true)
        .load(rig::PROGRAMS)
        .context("cannot load the benchmarks' eBPF programs")?;
    for (name, entrance) in [("redirect_outward", device), ("redirect_inward", UPLINK)] {
        let program: &mut SchedClassifier = ebpf
            .program_mut(name)
            .with_context(|| format!("no program {name}"))?
            .try_into()?;
        program.load()?;
        host.run(|| {
            program.attach(entrance, TcAttachType::Ingress)?;
            Ok(())
        })?;
    }
    Ok(ebpf)
}

/// Lets the kernel track more connections, in as many buckets: a limit of the whole machine.
fn more_connections(count: u32) -> Result<Vec<Setting>> {
    let count = count.next_power_of_two().to_string();
    ["nf_conntrack_buckets", "nf_conntrack_max"]
        .iter()
        .map(|name| Setting::raise(&Path::new("/proc/sys/net/netfilter").join(name), &count))
        .collect()
}

/// What keeps a contender set up. Must go before its world does.
#[derive(Debug, Default)]
pub struct Installed {
    redirect: Option<Ebpf>,
    pub tapnat: Option<Tapnat>,
    settings: Vec<Setting>,
}

/// A running tapnat.
#[derive(Debug)]
pub struct Tapnat {
    // Goes first: its `down` ends the process.
    pub instance: Instance,
    pub process: Process,
    pub arguments: Vec<String>,
}

impl Tapnat {
    fn start(instance: Instance, device: &str, address: Ipv4Addr, wish: &Wish) -> Result<Self> {
        let mut arguments = vec![
            format!("--uplink={UPLINK}"),
            format!("--inside={device}={address}/24"),
            format!("--max-sessions={}", wish.max_sessions),
            // One guest opens them all.
            format!("--guest-max-sessions={}", wish.max_sessions),
            format!("--guest-max-ports={}", wish.max_sessions),
            "--udp-timeout=2h".to_owned(),
            format!("--uplink-hook={}", wish.uplink_hook),
        ];
        if let Some((_, ports)) = &wish.ports {
            arguments.push(format!("--ports={}-{}", ports.start(), ports.end()));
        }
        for address in &wish.outside {
            arguments.push(format!("--outside-address={address}"));
        }
        let process = start(&instance, &arguments)?;
        // What the daemon does once after its start is not to be measured.
        thread::sleep(Duration::from_millis(500));
        Ok(Self {
            instance,
            process,
            arguments,
        })
    }
}

/// Starts an instance and waits until it is ready.
///
/// # Errors
///
/// It does not become ready.
pub fn start(instance: &Instance, arguments: &[String]) -> Result<Process> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    instance.start(&arguments)
}

/// A contender on the host of a rig.
#[derive(Debug)]
pub struct Stand {
    pub contender: Contender,
    pub installed: Installed,
    pub rig: Rig,
}

impl Stand {
    /// Builds a world, and the contender in it.
    ///
    /// # Errors
    ///
    /// When a program it is made of is missing or refuses.
    pub fn build(contender: Contender, wish: &Wish) -> Result<Self> {
        Self::build_with(contender, wish, |_| Ok(()))
    }

    /// Builds a world, changes it, and builds the contender in it.
    ///
    /// # Errors
    ///
    /// As [`Self::build`], or what `change` returns.
    pub fn build_with(
        contender: Contender,
        wish: &Wish,
        change: impl FnOnce(&Rig) -> Result<()>,
    ) -> Result<Self> {
        let rig = Rig::build(contender.to_string(), contender.translates())?;
        change(&rig)?;
        let installed = install_for_guest(contender, &rig.topology, wish)?;
        rig.topology.pin_neighbours()?;
        Ok(Self {
            contender,
            installed,
            rig,
        })
    }

    /// Builds one for each contender.
    ///
    /// # Errors
    ///
    /// As [`Self::build`].
    pub fn build_all(contenders: &[Contender], wish: &Wish) -> Result<Vec<Self>> {
        contenders
            .iter()
            .map(|contender| Self::build(*contender, wish))
            .collect()
    }

    /// The TC program at the host's device where these packets arrive, if there is one.
    ///
    /// # Errors
    ///
    /// When the kernel does not tell.
    pub fn program(&self, direction: Direction) -> Result<Option<aya::programs::ProgramInfo>> {
        self.rig.topology.host.run(|| {
            let (_, programs) =
                SchedClassifier::query_tcx(direction.entrance(), TcAttachType::Ingress)?;
            Ok(programs.into_iter().next())
        })
    }
}

/// Sets a contender up on the host of a topology, for its first guest.
///
/// # Errors
///
/// As [`Contender::install`].
pub fn install_for_guest(
    contender: Contender,
    topology: &Topology,
    wish: &Wish,
) -> Result<Installed> {
    let guest = topology.guests.first().context("no guest")?;
    if !contender.translates() {
        let (peer, _) = topology.uplink_peer();
        peer.ip(&format!("route add 10.0.0.0/8 via {HOST_ADDRESS}"))?;
    }
    contender.install(&topology.host, &guest.inside_device, guest.gateway, wish)
}
