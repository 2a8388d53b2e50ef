//! Tables, routes, time and chance in memory, and packets run through them by
//! the stages of the kernel's shell (`tapnat-ebpf/src/main.rs`).
//!
//! Every run checks what must hold whatever the test is about: see
//! [`World::audit`] and [`World::check_sent`].

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    num::NonZeroU32,
    sync::OnceLock,
};

use tapnat_common::{
    abi::{
        ABI_VERSION, Device, EVERY_DEVICE, EndpointKey, Filtering, FlowKey, Fragment, FragmentKey,
        Guest, HELD_BYTES, HeldKey, Mapping, MappingMode, NextHop, Permission, PermissionKey,
        Session, Settings, Timeouts, Unsolicited, Upkeep, mapping_flags, role, session_flags,
        setting_flags,
    },
    cut::{self, MAX_PIECES},
    frame::{Frame as _, LinkAddresses},
    nat::{self, Fate, Insert, Route, Tables, firewall::Forwarded, session},
    net::{Be16, Be32, protocol},
    parse::{self, Packet, Part},
    pipeline::{self, Quick},
    ports::{CLASSES, Class, PortSet, Reserved, SETS, set_index},
    refusal::{self, Budget, Refusal},
    time::{Instant, Ticks},
    verdict::{Next, Outcome, Plan, Reason},
};
use tapnat_testbed::packet::checksum::{self, Expect, Fault};

use super::{
    frame::Bytes,
    network::{SECOND_TAP, TAP, UPLINK, UPLINK_MTU, Version, at, udp},
    table::Table,
};

/// A use of the tables by the datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Lookup,
    Insert,
    Remove,
    Count,
}

type Intruder<A> = Box<dyn FnOnce(&World<A>)>;

/// A host with tapnat, as its packets see it.
pub struct World<A: Version> {
    settings: Table<(), Settings<A>>,
    devices: Table<u32, Device<A>>,
    pub sessions: Table<FlowKey<A>, Session<A>>,
    pub mappings: Table<EndpointKey<A>, Mapping<A>>,
    pub inside: Table<EndpointKey<A>, EndpointKey<A>>,
    pub permissions: Table<PermissionKey<A>, Permission>,
    pub unsolicited: Table<FlowKey<A>, Unsolicited>,
    pub asked: Table<FlowKey<A>, EndpointKey<A>>,
    pub fragments: Table<FragmentKey<A>, Fragment>,
    pub held: RefCell<HashMap<HeldKey<A>, Bytes>>,
    /// Prefixes that guests must not reach.
    pub denied: RefCell<Vec<(A, u8)>>,
    pub untranslated: RefCell<Vec<(A, u8)>>,
    told: RefCell<HashMap<A, Budget>>,
    pub guests: Table<A, Guest>,
    pub guests_on: Table<u32, u32>,
    upkeep: Table<(), Upkeep>,
    pub looked_after: RefCell<VecDeque<FlowKey<A>>>,
    /// User space sweeps.
    pub is_attended: Cell<bool>,
    ports: Table<u32, PortSet>,
    reserved: Table<u32, Reserved>,
    /// Routes by destination, where they are not the usual ones.
    pub routes: RefCell<HashMap<A, Route>>,
    /// Sockets of the host, by local and (zero for listeners) remote endpoint.
    pub sockets: RefCell<Vec<(EndpointKey<A>, EndpointKey<A>)>>,
    now: Cell<Instant>,
    /// What [`Tables::random`] says next, before it goes on by itself.
    pub chances: RefCell<VecDeque<u32>>,
    random: Cell<u32>,
    /// What [`Tables::next_identification`] says next: always the one that packets
    /// are built with, unless there is a step to the one after.
    identification: Cell<u16>,
    pub identification_step: Cell<u16>,
    pub counts_traffic: Cell<bool>,
    /// Since the last [`World::intrude`] or [`World::refuse_insert`].
    operations: Cell<usize>,
    inserts: Cell<usize>,
    intruder: RefCell<Option<(usize, Intruder<A>)>>,
    refused_insert: Cell<Option<usize>>,
    /// Packets that are being dealt with.
    depth: Cell<u32>,
    /// Races that no table can decide have their losers mended later: a session
    /// may lack a half for half a second, or stand on a mapping that another guest
    /// took over in the very moment.
    pub is_lenient: Cell<bool>,
    /// Outside endpoints that changed hands while expired sessions stood on them,
    /// for want of a sweep. If the first owner gets one back, nobody can tell its
    /// old sessions from its new ones.
    retaken: RefCell<HashSet<EndpointKey<A>>>,
    /// The tables are used by [`World::audit`], not by a packet.
    auditing: Cell<bool>,
}

/// What became of a packet.
#[derive(Debug)]
pub struct Exit {
    pub reason: Reason,
    /// The first stage dealt with it alone.
    pub quick: bool,
    /// What leaves by a device: the packet, or an ICMP error about it.
    pub sent: Option<Sent>,
    /// What came by again because of the packet, as it leaves after it: fragments
    /// that had waited for it or were made of it, or, up to the host, as they came.
    pub released: Vec<Bytes>,
}

/// A frame that leaves.
#[derive(Debug)]
pub struct Sent {
    pub device: u32,
    /// The kernel looks the neighbour up.
    pub resolve: bool,
    pub frame: Bytes,
}

impl Exit {
    fn without_packet(reason: Reason) -> Self {
        Self {
            reason,
            quick: false,
            sent: None,
            released: Vec::new(),
        }
    }

    /// The IP packet that the host's firewall is shown.
    #[track_caller]
    pub fn asked(self) -> Vec<u8> {
        assert_eq!(self.reason, Reason::FirewallAsked);
        self.ip()
    }

    /// The IP packet that was sent on for this reason, its checksum complete.
    #[track_caller]
    pub fn forwarded(self, reason: Reason) -> Vec<u8> {
        assert_eq!(self.reason, reason);
        assert_eq!(reason.outcome(), Outcome::Forward);
        self.ip()
    }

    /// The IP packets that left because of a packet: itself, and what had waited for it.
    pub fn all(self) -> Vec<Vec<u8>> {
        let own = self.sent.map(|sent| sent.frame);
        let frames = own.iter().chain(&self.released);
        frames.map(|frame| frame.ip().to_vec()).collect()
    }

    /// The ICMP error that was sent for this reason.
    #[track_caller]
    pub fn refused(self, reason: Reason) -> Vec<u8> {
        assert_eq!(self.reason, reason);
        assert_eq!(reason.outcome(), Outcome::Refuse);
        self.ip()
    }

    /// The IP packet that was sent on, for whatever reason.
    #[track_caller]
    pub fn forwarded_any(self) -> Vec<u8> {
        let reason = self.reason;
        self.forwarded(reason)
    }

    #[track_caller]
    fn ip(self) -> Vec<u8> {
        let mut frame = self.sent.expect("something was sent").frame;
        frame.complete();
        frame.ip().to_vec()
    }
}

/// What the first stage did.
enum First<A> {
    Done(Exit),
    /// Nothing: the frame as it came, with what was read of it if it is of no session.
    Left(Bytes, Option<Packet<A>>),
}

impl<A: Version> World<A> {
    /// Before anything is set.
    pub fn unset() -> Self {
        Self {
            settings: Table::new(),
            devices: Table::new(),
            sessions: Table::new(),
            mappings: Table::new(),
            inside: Table::new(),
            permissions: Table::new(),
            unsolicited: Table::new(),
            asked: Table::new(),
            fragments: Table::new(),
            held: RefCell::default(),
            denied: RefCell::default(),
            untranslated: RefCell::default(),
            told: RefCell::default(),
            guests: Table::new(),
            guests_on: Table::new(),
            upkeep: Table::new(),
            looked_after: RefCell::default(),
            is_attended: Cell::new(true),
            ports: Table::new(),
            reserved: Table::new(),
            routes: RefCell::default(),
            sockets: RefCell::default(),
            now: Cell::new(Instant::from_nanoseconds(1 << 40)),
            chances: RefCell::default(),
            random: Cell::new(0x9e37_79b9),
            identification: Cell::new(0x1234),
            identification_step: Cell::new(0),
            counts_traffic: Cell::new(false),
            operations: Cell::new(0),
            inserts: Cell::new(0),
            intruder: RefCell::default(),
            refused_insert: Cell::new(None),
            depth: Cell::new(0),
            is_lenient: Cell::new(false),
            retaken: RefCell::default(),
            auditing: Cell::new(false),
        }
    }

    /// Two taps, an uplink, timeouts as by default, ports from 1024 on.
    #[expect(
        clippy::items_after_statements,
        reason = "it belongs to this line alone"
    )]
    pub fn new() -> Self {
        let world = Self::unset();
        let mut settings = Settings {
            abi_version: ABI_VERSION,
            outside_count: 1,
            generation: 7,
            confirm_after: Timeouts::default().confirm_after(),
            filtering_tcp: Filtering::AddressDependent as u8,
            filtering_udp: Filtering::AddressDependent as u8,
            ..Settings::default()
        };
        settings.outside[0] = A::OUTSIDE;
        world.settings.set(&(), &settings);
        let device = |address: A, mtu, role| Device {
            address,
            network: address,
            mask: A::mask(A::PREFIX),
            mtu,
            role,
            ethernet: 1,
        };
        let [first, second] = A::HOST;
        let devices = [
            (TAP, device(first, 1500, role::INSIDE)),
            (SECOND_TAP, device(second, 1500, role::INSIDE)),
            (UPLINK, device(A::OUTSIDE, UPLINK_MTU, role::UPLINK)),
        ];
        for (index, device) in devices {
            world.devices.set(&index.get(), &device);
            world.guests_on.set(&index.get(), &0);
        }
        world.guests_on.set(&EVERY_DEVICE, &0);
        // The same for every world, and long in the making.
        static LOW: OnceLock<(Reserved, [PortSet; 2])> = OnceLock::new();
        let (reserved, sets) = LOW.get_or_init(|| {
            let mut reserved = Reserved::default();
            (0..1024).for_each(|port| reserved.reserve(port));
            (reserved, reserved.sets())
        });
        world.set_reserved(reserved, sets);
        world
    }

    /// As [`World::new`], with port 30,000 alone to hand out, which a guest had long ago.
    pub fn with_one_expired_port() -> Self {
        let world = Self::new();
        world.withhold(|port| *port != 30_000);
        let packet = udp(at(A::NEIGHBOUR, 30_000), at(A::SERVER, 53)).build();
        world.guest_sends(TAP, &packet);
        world.wait_seconds(1000);
        world
    }

    /// Sets what the operator set.
    pub fn set(&self, change: impl FnOnce(&mut Settings<A>)) {
        let settings = self.settings.get(&()).unwrap();
        change(settings);
        settings.confirm_after = settings.timeouts.confirm_after();
    }

    pub fn set_filtering(&self, filtering: Filtering) {
        self.set(|settings| {
            settings.filtering_tcp = filtering as u8;
            settings.filtering_udp = filtering as u8;
        });
    }

    pub fn set_mapping(&self, mode: MappingMode) {
        self.set(|settings| {
            settings.mapping_tcp = mode as u8;
            settings.mapping_udp = mode as u8;
        });
    }

    pub fn set_inbound_refresh(&self) {
        self.set(|settings| settings.flags |= setting_flags::INBOUND_REFRESH);
    }

    pub fn set_device(&self, index: NonZeroU32, change: impl FnOnce(&mut Device<A>)) {
        change(self.devices.get(&index.get()).unwrap());
    }

    /// Keeps these ports of TCP and UDP from being handed out.
    pub fn withhold(&self, withheld: impl Fn(&u16) -> bool) {
        let mut reserved = Reserved::default();
        for port in (0..=u16::MAX).filter(withheld) {
            reserved.reserve(port);
        }
        self.set_reserved(&reserved, &reserved.sets());
    }

    fn set_reserved(&self, reserved: &Reserved, sets: &[PortSet; 2]) {
        static NOTHING: OnceLock<(Reserved, [PortSet; 2])> = OnceLock::new();
        let (nothing, none_of_its_ports) = NOTHING.get_or_init(|| {
            let nothing = Reserved::default();
            (nothing, nothing.sets())
        });
        for (class, is_reserved) in [(Class::Tcp, true), (Class::Udp, true), (Class::Icmp, false)] {
            let class = class as u32;
            let (reserved, sets) = if is_reserved {
                (reserved, sets)
            } else {
                (nothing, none_of_its_ports)
            };
            self.reserved.set(&class, reserved);
            for address in 0..SETS / CLASSES / 2 {
                for (parity, set) in (0..).zip(sets) {
                    self.ports.set(&set_index(address, class, parity), set);
                }
            }
        }
    }

    /// The sets that say which ports of the first outside address are free.
    pub fn port_set(&self, class: Class, port: u16) -> &mut PortSet {
        self.ports.get(&set_index(0, class as u32, port)).unwrap()
    }

    /// Lets the time pass by which sessions and mappings may live longer than
    /// their timeouts.
    pub fn wait_slack(&self) {
        self.wait(self.settings.copy(&()).unwrap().mapping_slack());
    }

    pub fn timeouts(&self) -> Timeouts {
        self.settings.get(&()).unwrap().timeouts
    }

    /// Lets time pass.
    pub fn wait(&self, ticks: Ticks) {
        self.now.set(self.now.get().after(ticks));
    }

    pub fn wait_seconds(&self, seconds: u32) {
        self.wait(Ticks::from_seconds(seconds));
    }

    /// Lets another CPU act just before the operation of this number that the
    /// next packet does.
    pub fn intrude(&self, operation: usize, intruder: impl FnOnce(&Self) + 'static) {
        self.operations.set(0);
        self.intruder.replace(Some((operation, Box::new(intruder))));
    }

    /// Whether the intruder came to act.
    pub fn intruded(&self) -> bool {
        self.intruder.take().is_none()
    }

    /// Makes the insert of this number that the next packet does fail for want
    /// of room.
    pub fn refuse_insert(&self, number: usize) {
        self.inserts.set(0);
        self.refused_insert.set(Some(number));
    }

    /// Whether the insert came to pass.
    pub fn insert_was_refused(&self) -> bool {
        self.refused_insert.take().is_none()
    }

    /// Does something to the tables as one act, and checks the books after it.
    #[track_caller]
    pub fn act<R>(&self, act: impl FnOnce() -> R) -> R {
        self.depth.set(self.depth.get() + 1);
        let result = act();
        self.depth.set(self.depth.get() - 1);
        self.audit();
        result
    }

    /// What the operator set.
    pub fn settings_now(&self) -> Settings<A> {
        *self.settings.get(&()).unwrap()
    }

    fn operate(&self, operation: Operation) -> bool {
        if self.auditing.get() {
            return true;
        }
        let number = self.operations.get();
        self.operations.set(number + 1);
        let due = matches!(&*self.intruder.borrow(), Some((at, _)) if *at == number);
        if due && let Some((_, intruder)) = self.intruder.take() {
            intruder(self);
        }
        if operation != Operation::Insert {
            return true;
        }
        let number = self.inserts.get();
        self.inserts.set(number + 1);
        let refused = self.refused_insert.get() == Some(number);
        if refused {
            self.refused_insert.set(None);
        }
        !refused
    }

    fn insert(&self, insert: impl FnOnce() -> Insert) -> Insert {
        if self.operate(Operation::Insert) {
            insert()
        } else {
            Insert::Full
        }
    }

    /// A packet from a guest on this tap, without a link header.
    #[track_caller]
    pub fn guest_sends(&self, device: NonZeroU32, packet: &[u8]) -> Exit {
        self.run(Some(device), Bytes::raw(packet))
    }

    /// A packet from the world, without a link header.
    #[track_caller]
    pub fn world_sends(&self, packet: &[u8]) -> Exit {
        self.run(None, Bytes::raw(packet))
    }

    /// Runs a frame through the stages.
    #[track_caller]
    pub fn run(&self, device: Option<NonZeroU32>, frame: Bytes) -> Exit {
        let (frame, new) = match self.quick(device, frame) {
            First::Done(exit) => return exit,
            First::Left(frame, new) => (frame, new),
        };
        let before = frame.clone();
        self.depth.set(self.depth.get() + 1);
        let (mut exit, again) = self.stages(device, frame, new, false);
        self.depth.set(self.depth.get() - 1);
        if self.depth.get() == 0 {
            self.audit();
        }
        self.check_sent(&before, &exit);
        for frame in again {
            let came = self.run(device, frame.clone());
            match came.sent {
                Some(sent) => exit.released.push(sent.frame),
                None if came.reason.outcome() == Outcome::Pass => exit.released.push(frame),
                None => {}
            }
            exit.released.extend(came.released);
        }
        exit
    }

    #[track_caller]
    fn quick(&self, device: Option<NonZeroU32>, mut frame: Bytes) -> First<A> {
        let before = frame.clone();
        let mut packet = Packet::default();
        let quick = pipeline::established(&mut frame, device, self, &mut packet);
        let (reason, sent) = match quick {
            Quick::Onward(next_hop, resolve) => {
                let sent = self.forward(frame, &next_hop, resolve);
                (Reason::Translated, Some(sent))
            }
            Quick::Broken => (Reason::RewriteFailed, None),
            Quick::New | Quick::Not => {
                assert_eq!(frame, before, "a packet that is not quick is left alone");
                let new = (quick == Quick::New).then_some(packet);
                return First::Left(frame, new);
            }
        };
        let exit = Exit {
            reason,
            quick: true,
            sent,
            released: Vec::new(),
        };
        self.check_sent(&before, &exit);
        First::Done(exit)
    }

    /// The host's firewall lets a packet through that it was shown, which came by the one
    /// device and leaves by the other.
    #[track_caller]
    pub fn host_forwards(&self, from: u32, out: u32, packet: &[u8]) -> Exit {
        let mut frame = Bytes::raw(&A::aged(packet, 1));
        let mut parsed = Packet::default();
        let forwarded = pipeline::forwarded(&mut frame, from, out, self, &mut parsed);
        let device = match forwarded {
            Forwarded::Leave => return Exit::without_packet(Reason::ForTheHost),
            Forwarded::Drop(reason) => return Exit::without_packet(reason),
            Forwarded::Accepted(_, device) => device,
        };
        let before = frame.clone();
        let (exit, again) = self.stages(device, frame, None, true);
        self.audit();
        self.check_sent(&before, &exit);
        assert!(
            again.is_empty(),
            "what waited was let go when it was asked about"
        );
        exit
    }

    /// What became of the frame, and the frames that come by again.
    fn stages(
        &self,
        device: Option<NonZeroU32>,
        mut frame: Bytes,
        new: Option<Packet<A>>,
        accepted: bool,
    ) -> (Exit, Vec<Bytes>) {
        let before = frame.clone();
        let mut packet = new.unwrap_or_default();
        let mut plan = Plan::default();
        // What another packet may have left.
        plan.opening.flags = u8::MAX;
        plan.halves[0].flags = u8::MAX;
        plan.rewrite.next_hop.device = u32::MAX;
        plan.identification = Be32::new(u32::MAX);
        plan.excess = u16::MAX;
        plan.accepted = accepted;
        let mut next = if new.is_some() {
            let next = pipeline::begin(&frame, &mut packet, &mut plan);
            let mut whole = Packet::default();
            assert_eq!(parse::parse(&frame, &mut whole), Ok(()));
            assert_eq!(packet, whole, "what is plain is read as anything else");
            next
        } else {
            plan.begin();
            pipeline::exceptional(&mut frame, device, self, &mut packet)
        };
        let mut stages = 0;
        let reason = loop {
            stages += 1;
            let most = if self.is_attended.get() { 7 } else { 26 };
            assert!(stages <= most, "the stages go round in circles");
            next = match next {
                Next::Leave(reason) => break reason,
                Next::Resume => pipeline::resume(&mut frame, device, self, &mut packet, &mut plan),
                Next::Error => pipeline::error(&mut frame, device, self, &packet, &mut plan),
                Next::Close => pipeline::close(device, self, &packet),
                Next::Start => pipeline::start(&frame, device, self, &packet, &mut plan),
                Next::Map => pipeline::map(self, &packet, &mut plan),
                Next::Open => pipeline::open(device, self, &packet, &mut plan),
                Next::Insert => pipeline::insert(&mut frame, device, self, &packet, &mut plan),
                Next::Upkeep => pipeline::upkeep(&packet, self, &mut plan),
            };
        };
        nat::settle(&packet, device, reason, self, &mut plan);
        let mut again = Vec::new();
        if packet.part == Part::First
            && matches!(
                reason.outcome(),
                Outcome::Forward | Outcome::Pass | Outcome::Ask
            )
        {
            again = self.release(&packet, device, &plan);
        }
        let sent = match reason.outcome() {
            Outcome::Fragment => {
                nat::forget(&packet, device, self);
                again = A::pieces(frame, &packet, plan.mtu);
                None
            }
            Outcome::Hold => {
                let datagram = nat::datagram_key(&packet, device);
                let index = plan.held;
                // Padding may make it too long, then it is lost.
                if frame.length() <= HELD_BYTES {
                    let key = HeldKey { datagram, index };
                    self.held.borrow_mut().insert(key, frame);
                }
                None
            }
            Outcome::Forward => {
                frame.segment_size -= plan.excess;
                let next_hop = plan.rewrite.next_hop;
                Some(self.forward(frame, &next_hop, plan.rewrite.resolve))
            }
            // It cannot go back where it came from.
            Outcome::Pass | Outcome::Refuse | Outcome::Ask if accepted => None,
            Outcome::Refuse => self.refuse(frame, &packet, device, reason, plan.mtu),
            Outcome::Ask => {
                pipeline::ask(&mut frame, device, self, &packet, &plan).unwrap();
                Some(Sent {
                    device: 0,
                    resolve: false,
                    frame,
                })
            }
            Outcome::Pass => {
                frame.linear = before.linear;
                assert_eq!(frame, before, "what the host gets is untouched");
                None
            }
            Outcome::Drop => None,
        };
        let exit = Exit {
            reason,
            quick: false,
            sent,
            released: Vec::new(),
        };
        (exit, again)
    }

    /// As `tapnat-ebpf/src/emit.rs` does it.
    fn release(
        &self,
        packet: &Packet<A>,
        device: Option<NonZeroU32>,
        plan: &Plan<A>,
    ) -> Vec<Bytes> {
        let datagram = nat::datagram_key(packet, device);
        (0..plan.held)
            .map_while(|index| self.held.borrow_mut().remove(&HeldKey { datagram, index }))
            .collect()
    }

    /// As `tapnat-ebpf/src/emit.rs` does it.
    fn forward(&self, mut frame: Bytes, next_hop: &NextHop, resolve: bool) -> Sent {
        assert!(
            self.devices.get(&next_hop.device).is_some(),
            "device {} is none of ours",
            next_hop.device
        );
        if frame.link_length != 0 && !resolve {
            frame.store(0, &next_hop.link).unwrap();
        }
        Sent {
            device: next_hop.device,
            resolve,
            frame,
        }
    }

    /// As `tapnat-ebpf/src/emit.rs` does it.
    fn refuse(
        &self,
        mut frame: Bytes,
        packet: &Packet<A>,
        device: Option<NonZeroU32>,
        reason: Reason,
        mtu: u16,
    ) -> Option<Sent> {
        if !refusal::may_answer(packet) {
            return None;
        }
        let complaint = reason.complaint()?;
        let from = nat::refusal_source(packet, device, self)?;
        if !self
            .told
            .borrow_mut()
            .entry(packet.source)
            .or_default()
            .take(self.now())
        {
            return None;
        }
        let refusal = Refusal {
            complaint,
            mtu,
            from,
        };
        let quoted = frame.link_length() + refusal::quoted_length(packet);
        frame.pull(quoted);
        let sum = refusal::quoted_sum(&frame, packet)?;
        let header = refusal::header(packet, &refusal, sum);
        if !frame.truncate(usize::try_from(quoted).unwrap()) {
            return None;
        }
        frame.make_room(size_of_val(&header));
        let link = frame.link_length();
        frame.store(link, &header).unwrap();
        if link != 0 {
            let addresses = frame.load::<LinkAddresses>(0).unwrap();
            frame.store(0, &addresses.swapped()).unwrap();
        }
        Some(Sent {
            device: device.unwrap_or(UPLINK).get(),
            resolve: false,
            frame,
        })
    }

    /// A packet that came with right checksums leaves with right ones.
    #[track_caller]
    fn check_sent(&self, before: &Bytes, exit: &Exit) {
        assert_ne!(
            exit.reason,
            Reason::RewriteFailed,
            "what is written lies within the packet"
        );
        let Some(sent) = &exit.sent else { return };
        if exit.reason.outcome() == Outcome::Forward {
            self.check_addresses(sent);
            self.check_written(before.ip(), sent.frame.ip());
        }
        let mut before = before.clone();
        let mut after = sent.frame.clone();
        before.complete();
        after.complete();
        let (before, after) = (before.ip(), after.ip());
        let looks_partial = checksum::verify(before, Expect::PseudoHeader).is_ok();
        if exit.reason.outcome() == Outcome::Refuse && looks_partial {
            // One in 65,536: see `partial_checksum()` in `refusal.rs`.
            return;
        }
        if checksum::verify(before, Expect::Complete).is_ok() {
            let fault = checksum::verify(after, Expect::Complete).err();
            // Nothing but zeros has two sums, and an update cannot tell which
            // one was meant; that is an echo reply without any content.
            let is_void = |fault: &Fault| {
                let Fault::Wrong {
                    found: 0,
                    expected: 0xffff,
                    ..
                } = fault
                else {
                    return false;
                };
                let header = A::shape(after).unwrap().transport;
                after[header..].iter().all(|byte| *byte == 0)
            };
            let fault = fault.filter(|fault| !is_void(fault));
            assert_eq!(
                fault, None,
                "{before:02x?} was right, and became {after:02x?}"
            );
        }
    }

    /// Nothing is written but what translating changes, and nothing moves.
    #[track_caller]
    fn check_written(&self, before: &[u8], after: &[u8]) {
        assert_eq!(before.len(), after.len());
        let changed: Vec<_> = (0..before.len())
            .filter(|place| before[*place] != after[*place])
            .collect();
        let Some(shape) = A::shape(before) else {
            panic!("{before:02x?} was sent on")
        };
        let clamps = self.settings_now().clamp_mss != 0;
        let identification = shape.identification.unwrap_or_default();
        let may_change = |place: usize| match place.checked_sub(shape.transport) {
            None => A::changes(place) || identification.contains(&place),
            Some(_) if shape.is_later => false,
            Some(place) => match (shape.protocol, place) {
                (protocol::TCP, 20..60) => clamps && before[shape.transport + 13] & 2 != 0,
                (number, 8..) if number == A::ICMP => {
                    changes_in_quoted::<A>(&before[shape.transport + 8..], place - 8)
                }
                (protocol, place) => changes_in_transport(protocol, place),
            },
        };
        for place in changed {
            assert!(
                may_change(place),
                "byte {place} of {before:02x?} became {:02x}",
                after[place]
            );
        }
    }

    /// Nothing leaves by the uplink as a guest, nor to a guest but on its device.
    #[track_caller]
    fn check_addresses(&self, sent: &Sent) {
        let ip = sent.frame.ip();
        let [source, destination] = A::ends(ip);
        let settings = self.settings.copy(&()).unwrap();
        let device = self.devices.copy(&sent.device).unwrap();
        if device.role == role::UPLINK {
            let is_guests_own = self.mappings.copy(&EndpointKey::whole(source)).is_some();
            // Without an address, sessions keep the one that they had.
            let is_former = settings.outside_count == 0
                && self
                    .devices
                    .all()
                    .iter()
                    .all(|(_, device)| device.role == role::UPLINK || !device.contains(source));
            let is_exempt = is_in(&self.untranslated.borrow(), destination);
            assert!(
                settings.is_outside(source) || is_guests_own || is_former || is_exempt,
                "{ip:02x?}"
            );
        } else {
            let is_guests = device.contains(destination);
            assert!(is_guests && destination != device.address, "{ip:02x?}");
        }
    }

    /// Makes a guest known.
    pub fn know(&self, address: A, guest: &Guest) {
        self.guests.insert(&address, guest);
        for device in [EVERY_DEVICE, guest.device] {
            *self.guests_on.get(&device).unwrap() += 1;
        }
    }

    /// Makes so many guests known on a device that nothing else is heard of.
    pub fn know_others(&self, device: NonZeroU32, count: u32) {
        let guest = Guest {
            device: device.get(),
            ..Guest::default()
        };
        for number in 0..count {
            self.know(A::of_nobody(number), &guest);
        }
    }

    /// Guests are counted on the devices that they are on.
    #[track_caller]
    fn audit_devices(&self) {
        let guests = self.guests.all();
        for (device, count) in self.guests_on.all() {
            let known = guests
                .iter()
                .filter(|(_, guest)| device == EVERY_DEVICE || guest.device == device)
                .count();
            assert_eq!(usize::try_from(count), Ok(known), "guests on {device}");
        }
    }

    /// The books are right: every session counts on its guests and mappings, no
    /// more and no less, and has two halves.
    #[track_caller]
    pub fn audit(&self) {
        let mut guests: HashMap<A, u32> = HashMap::new();
        let mut mappings: HashMap<EndpointKey<A>, u32> = HashMap::new();
        for (key, session) in self.sessions.all() {
            let twin_key = session.twin_key(&key);
            let twin = self.sessions.copy(&twin_key);
            match twin {
                Some(twin) => assert_eq!(twin.twin_key(&twin_key), key, "twins know each other"),
                None => assert!(self.is_lenient.get(), "half a session: {key:?} {session:?}"),
            }
            if key.arrival.device().is_none() {
                continue;
            }
            *guests.entry(key.source).or_default() += 1;
            let number = key.arrival.protocol();
            let outside = EndpointKey::new(session.source, session.source_port, number);
            let mapping = self.mappings.copy(&outside);
            self.auditing.set(true);
            let is_expired = session::is_expired(&key, &session, self);
            self.auditing.set(false);
            // A guest that has an address to itself needs no mapping of its ports.
            let is_whole = self
                .mappings
                .copy(&EndpointKey::whole(outside.address))
                .is_some();
            if session.flags & session_flags::UNMAPPED != 0 || is_whole {
                continue;
            }
            if mapping.is_some_and(|mapping| mapping.inside == key.source_endpoint()) {
                *mappings.entry(outside).or_default() += 1;
            } else if !self.is_lenient.get() {
                assert!(is_expired, "{session:?} has outlived its mapping");
            }
        }
        let mut ports: HashMap<A, u32> = HashMap::new();
        for (_, mapping) in self.mappings.all() {
            if mapping.flags & mapping_flags::STATIC == 0 {
                *ports.entry(mapping.inside.address).or_default() += 1;
            }
        }
        for (address, guest) in self.guests.all() {
            let sessions = guests.remove(&address).unwrap_or_default();
            assert_eq!(guest.sessions, sessions, "sessions of {address:?}");
            let ports = ports.remove(&address).unwrap_or_default();
            assert_eq!(guest.ports, ports, "ports of {address:?}");
        }
        assert_eq!(ports, HashMap::new(), "ports of unknown guests");
        self.audit_devices();
        assert_eq!(guests, HashMap::new(), "sessions of unknown guests");
        for (outside, mapping) in self.mappings.all() {
            let sessions = mappings.remove(&outside).unwrap_or_default();
            let is_right = mapping.sessions == sessions
                || self.is_lenient.get()
                || self.retaken.borrow().contains(&outside);
            assert!(is_right, "{sessions} sessions on {mapping:?}");
            let known = self.inside.copy(&mapping.inside);
            if mapping.flags & mapping_flags::STATIC == 0 && sessions != 0 {
                assert_eq!(known, Some(outside), "the way back from {mapping:?}");
            }
        }
    }

    /// The session halves, mappings and the rest, for comparing.
    pub fn sizes(&self) -> [usize; 5] {
        [
            self.sessions.len(),
            self.mappings.len(),
            self.inside.len(),
            self.permissions.len(),
            self.guests.len(),
        ]
    }

    /// The half of a session whose packets arrive so.
    pub fn half(&self, device: Option<NonZeroU32>, packet: &[u8]) -> Option<Session<A>> {
        let mut parsed = Packet::default();
        parse::parse(&Bytes::raw(packet), &mut parsed).unwrap();
        self.sessions.copy(&parsed.key(device))
    }

    /// The usual way to a destination.
    fn usual_route(&self, destination: A) -> Route {
        for (index, device) in self.devices.all() {
            if device.role != role::INSIDE {
                continue;
            }
            if device.address == destination {
                return Route::default();
            }
            if device.contains(destination) {
                return route(index, device.mtu);
            }
        }
        let uplink = self.devices.copy(&UPLINK.get()).unwrap();
        if uplink.address == destination {
            return Route::default();
        }
        route(UPLINK.get(), uplink.mtu)
    }
}

/// Whether translating may change this byte of a transport header: ports or an
/// identifier, and the checksum.
fn changes_in_transport(protocol: u8, place: usize) -> bool {
    match protocol {
        protocol::TCP => matches!(place, 0..4 | 16..18),
        protocol::UDP | protocol::UDP_LITE => matches!(place, 0..4 | 6..8),
        protocol::ICMP | protocol::ICMPV6 => matches!(place, 2..6),
        _ => false,
    }
}

/// Whether it may change this byte of a packet that an ICMP error quotes.
fn changes_in_quoted<A: Version>(quoted: &[u8], place: usize) -> bool {
    let Some(shape) = A::shape(quoted) else {
        return false;
    };
    match place.checked_sub(shape.transport) {
        None => A::changes(place) && place != A::TIME_TO_LIVE,
        Some(place) => changes_in_transport(shape.protocol, place),
    }
}

/// A route with link addresses that tell the device.
pub fn route(device: u32, mtu: u16) -> Route {
    let number = u8::try_from(device).unwrap();
    Route {
        fate: Fate::Onward,
        next_hop: NextHop {
            device,
            link: LinkAddresses::new([2, 0, 0, 0, 0, number], [4, 0, 0, 0, 0, number]),
        },
        linked: true,
        mtu,
    }
}

fn is_in<A: Version>(prefixes: &[(A, u8)], address: A) -> bool {
    prefixes
        .iter()
        .any(|(prefix, length)| address.same_network(*prefix, A::mask(*length)))
}

/// The fragments that a packet is cut into, as `tapnat-ebpf/src/emit.rs` does it.
pub fn pieces(mut frame: Bytes, packet: &Packet, mtu: u16) -> Vec<Bytes> {
    frame.complete();
    let place = |offset: u32| usize::try_from(offset).unwrap();
    let headers = place(packet.network_offset + packet.header_length);
    (0..MAX_PIECES)
        .map_while(|number| cut::piece(packet, mtu, number))
        .map(|piece| {
            let mut cut_off = frame.clone();
            let payload = headers + place(piece.start);
            cut_off.bytes.truncate(headers);
            cut_off
                .bytes
                .extend(&frame.bytes[payload..payload + place(piece.length)]);
            cut_off.linear = cut_off.bytes.len();
            cut::write_header(&mut cut_off, packet, piece).unwrap();
            cut_off
        })
        .collect()
}

impl<A: Version> Tables<A> for World<A> {
    fn settings(&self) -> Option<&Settings<A>> {
        self.settings.get(&()).map(|settings| &*settings)
    }

    fn device(&self, index: u32) -> Option<&Device<A>> {
        self.devices.get(&index).map(|device| &*device)
    }

    fn session(&self, key: &FlowKey<A>) -> Option<&mut Session<A>> {
        self.operate(Operation::Lookup);
        self.sessions.get(key)
    }

    fn insert_session(&self, key: &FlowKey<A>, session: &Session<A>) -> Insert {
        self.insert(|| self.sessions.insert(key, session))
    }

    fn remove_session(&self, key: &FlowKey<A>) -> bool {
        self.operate(Operation::Remove);
        self.sessions.remove(key)
    }

    fn mapping(&self, outside: &EndpointKey<A>) -> Option<&mut Mapping<A>> {
        self.operate(Operation::Lookup);
        self.mappings.get(outside)
    }

    fn insert_mapping(&self, outside: &EndpointKey<A>, mapping: &Mapping<A>) -> Insert {
        self.insert(|| self.mappings.insert(outside, mapping))
    }

    fn remove_mapping(&self, outside: &EndpointKey<A>) -> bool {
        self.operate(Operation::Remove);
        let stands_on_it = |(key, session): &(FlowKey<A>, Session<A>)| {
            let number = key.arrival.protocol();
            EndpointKey::new(session.source, session.source_port, number) == *outside
        };
        if self.sessions.all().iter().any(stands_on_it) {
            self.retaken.borrow_mut().insert(*outside);
        }
        self.mappings.remove(outside)
    }

    fn count(&self, counter: &mut u32, more: bool) {
        self.operate(Operation::Count);
        *counter = step(*counter, more);
    }

    fn outside_of(&self, inside: &EndpointKey<A>) -> Option<EndpointKey<A>> {
        self.operate(Operation::Lookup);
        self.inside.copy(inside)
    }

    fn insert_outside_of(&self, inside: &EndpointKey<A>, outside: &EndpointKey<A>) -> Insert {
        self.insert(|| self.inside.insert(inside, outside))
    }

    fn remove_outside_of(&self, inside: &EndpointKey<A>) {
        self.operate(Operation::Remove);
        self.inside.remove(inside);
    }

    fn permission(&self, key: &PermissionKey<A>) -> Option<&mut Permission> {
        self.operate(Operation::Lookup);
        self.permissions.get(key)
    }

    fn remove_permission(&self, key: &PermissionKey<A>) -> bool {
        self.operate(Operation::Remove);
        self.permissions.remove(key)
    }

    fn set_permission(&self, key: &PermissionKey<A>, permission: &Permission) -> Insert {
        self.insert(|| self.permissions.set(key, permission))
    }

    fn note_unsolicited(&self, key: &FlowKey<A>, syn: &Unsolicited) {
        self.operate(Operation::Lookup);
        self.unsolicited.insert(key, syn);
    }

    fn note_asked(&self, forwarded: &FlowKey<A>, destination: &EndpointKey<A>) {
        self.operate(Operation::Insert);
        self.asked.insert(forwarded, destination);
    }

    fn take_asked(&self, forwarded: &FlowKey<A>) -> Option<EndpointKey<A>> {
        self.operate(Operation::Lookup);
        let destination = self.asked.get(forwarded).map(|there| *there)?;
        self.asked.remove(forwarded);
        Some(destination)
    }

    fn fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment> {
        self.operate(Operation::Lookup);
        self.fragments.get(key)
    }

    fn new_fragment(&self, key: &FragmentKey<A>) -> Option<&mut Fragment> {
        self.operate(Operation::Lookup);
        let empty = Fragment {
            source_port: Be16::ZERO,
            destination_port: Be16::ZERO,
            expires_at: Instant::default(),
            identification: Be32::ZERO,
            units: 0,
            all_units: 0,
            held: 0,
            fate: 0,
            protocol: 0,
            padding: [0; 5],
            seen: [0; 128],
        };
        if self.fragments.set(key, &empty) == Insert::Full {
            // The kernel's table makes room in place of the oldest.
            let age = |(_, fragment): &(_, Fragment)| self.now().since(fragment.expires_at);
            let oldest = self.fragments.all().into_iter().max_by_key(age)?.0;
            self.fragments.remove(&oldest);
            self.fragments.set(key, &empty);
        }
        self.fragments.get(key)
    }

    fn next_identification(&self) -> Be32 {
        let next = self.identification.get();
        self.identification
            .set(next.wrapping_add(self.identification_step.get()));
        Be32::new(u32::from(next))
    }

    fn guest(&self, address: A) -> Option<&mut Guest> {
        self.operate(Operation::Lookup);
        self.guests.get(&address)
    }

    fn insert_guest(&self, address: A, guest: &Guest) -> Insert {
        self.insert(|| self.guests.insert(&address, guest))
    }

    fn guests_on(&self, device: u32) -> Option<&mut u32> {
        self.operate(Operation::Lookup);
        self.guests_on.get(&device)
    }

    fn remove_guest(&self, address: A) -> bool {
        self.operate(Operation::Remove);
        self.guests.remove(&address)
    }

    fn is_denied(&self, destination: A) -> bool {
        self.operate(Operation::Lookup);
        is_in(&self.denied.borrow(), destination)
    }

    fn is_untranslated(&self, destination: A) -> bool {
        self.operate(Operation::Lookup);
        is_in(&self.untranslated.borrow(), destination)
    }

    fn count_off_guest(&self, address: A) {
        self.operate(Operation::Count);
        if let Some(guest) = self.guests.get(&address) {
            guest.sessions = step(guest.sessions, false);
        }
    }

    fn count_port_on_guest(&self, address: A, port: u32, more: bool) {
        self.operate(Operation::Count);
        if let Some(guest) = self.guests.get(&address) {
            guest.note_port(port, more);
            guest.ports = step(guest.ports, more);
        }
    }

    fn forget_link_of_guest(&self, address: A) {
        if let Some(guest) = self.guests.get(&address) {
            guest.link = 0;
        }
    }

    fn upkeep(&self) -> Option<&mut Upkeep> {
        if self.upkeep.get(&()).is_none() {
            self.upkeep.insert(&(), &Upkeep::default());
        }
        let upkeep = self.upkeep.get(&())?;
        if self.is_attended.get() {
            upkeep.attended = self.now();
        }
        Some(upkeep)
    }

    fn look_after(&self, write: impl FnOnce(&mut FlowKey<A>)) {
        let mut key = FlowKey::default();
        write(&mut key);
        self.looked_after.borrow_mut().push_back(key);
    }

    fn take_looked_after(&self, key: &mut FlowKey<A>) -> bool {
        let first = self.looked_after.borrow_mut().pop_front();
        first.inspect(|first| *key = *first).is_some()
    }

    fn ports(&self, index: u32) -> Option<&mut PortSet> {
        self.ports.get(&index)
    }

    fn reserved(&self, class: u32) -> Option<&Reserved> {
        self.reserved.get(&class).map(|reserved| &*reserved)
    }

    fn route_from(&self, _device: NonZeroU32, packet: &Packet<A>) -> Route {
        let destination = packet.destination;
        let set = self.routes.borrow().get(&destination).copied();
        set.unwrap_or_else(|| self.usual_route(destination))
    }

    fn route_on(&self, device: u32, _source: A, destination: A) -> Route {
        let set = self.routes.borrow().get(&destination).copied();
        let Some(mtu) = self.devices.copy(&device).map(|device| device.mtu) else {
            return Route::default();
        };
        set.unwrap_or_else(|| route(device, mtu))
    }

    fn host_socket(&self, local: &EndpointKey<A>, remote: &EndpointKey<A>) -> bool {
        assert_ne!(local.protocol, A::ICMP, "sockets have no ICMP");
        let nobody = EndpointKey::new(A::UNSPECIFIED, Be16::ZERO, local.protocol);
        self.sockets
            .borrow()
            .iter()
            .any(|socket| *socket == (*local, nobody) || *socket == (*local, *remote))
    }

    fn random(&self) -> u32 {
        if let Some(chance) = self.chances.borrow_mut().pop_front() {
            return chance;
        }
        // xorshift32, the same in every run.
        let mut number = self.random.get();
        number ^= number << 13;
        number ^= number >> 17;
        number ^= number << 5;
        self.random.set(number);
        number
    }

    fn counts_traffic(&self) -> bool {
        self.counts_traffic.get()
    }

    fn now(&self) -> Instant {
        self.now.get()
    }
}

#[track_caller]
fn step(count: u32, more: bool) -> u32 {
    let next = if more {
        count.checked_add(1)
    } else {
        count.checked_sub(1)
    };
    next.expect("what was counted is uncounted once")
}
