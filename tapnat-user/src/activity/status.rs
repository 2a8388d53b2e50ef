//! What an instance's tables say, with no regard to time.

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;

use crate::{
    family::IpFamily,
    instance::{InstanceName, Lock},
    journal::Journal,
    tables::{BothTables, PinnedTables, Usage},
    view::{DeviceView, FamiliesView, GuestView, Status, StatusSource, TablesView},
};

/// What these tables of an instance say.
///
/// # Errors
///
/// When the kernel refuses.
pub fn status(name: &InstanceName, tables: &BothTables) -> Result<Status> {
    let families = FamiliesView {
        ipv4: usage(&tables.ipv4, tables.ipv4.session_usage()?)?,
        ipv6: match &tables.ipv6 {
            Some(tables) => Some(usage(tables, tables.session_usage()?)?),
            None => None,
        },
    };
    status_with(name, tables, families)
}

/// How full the tables of a family are, if that is so of its sessions.
pub(super) fn usage<A: IpFamily>(tables: &PinnedTables<A>, sessions: Usage) -> Result<TablesView> {
    Ok(TablesView {
        sessions: sessions.into(),
        mappings: tables.mapping_usage()?.into(),
        guests: tables.guest_usage()?.into(),
    })
}

/// The devices that an instance translates on, with their names as far as this host knows them.
///
/// # Errors
///
/// When the kernel refuses.
pub fn devices(name: &InstanceName, tables: &BothTables) -> Result<Vec<DeviceView>> {
    // Only for the names; what the datapath does is in the tables alone.
    let journal = Journal::load(name).unwrap_or(None);
    let name_of = |index| {
        let claims = journal.as_ref()?.claims();
        let claim = claims.iter().find(|claim| claim.device.index == index)?;
        Some(claim.device.name.clone())
    };
    let ipv6 = match &tables.ipv6 {
        Some(tables) => tables.devices()?,
        None => Vec::new(),
    };
    let devices = tables.ipv4.devices()?.into_iter();
    Ok(devices
        .map(|(index, device)| {
            let ipv6 = ipv6.iter().find(|(known, _)| *known == index);
            let ipv6 = ipv6.map(|(_, device)| device);
            DeviceView::new(name_of(index), index, &device, ipv6)
        })
        .collect())
}

/// What the tables of each family say.
struct Said {
    outside_addresses: Vec<IpAddr>,
    denied: Vec<IpNet>,
    untranslated: Vec<IpNet>,
    guests: Vec<GuestView>,
}

impl Said {
    fn add<A: IpFamily>(&mut self, tables: &PinnedTables<A>) -> Result<()> {
        self.outside_addresses.extend(tables.outside_addresses()?);
        self.denied
            .extend(tables.denied()?.into_iter().map(Into::into));
        self.untranslated
            .extend(tables.untranslated()?.into_iter().map(Into::into));
        self.guests.extend(guests(tables)?);
        Ok(())
    }
}

/// The guests of a family, each by its own address.
///
/// # Errors
///
/// When the kernel refuses.
pub fn guests<A: IpFamily>(tables: &PinnedTables<A>) -> Result<Vec<GuestView>> {
    let guests = tables.guests()?;
    let guests = guests.iter().map(|(address, guest)| {
        let behind = tables.behind_stand_in((*address).into());
        GuestView::new(*address, guest).behind(behind)
    });
    Ok(guests.collect())
}

/// The same where somebody has seen already how full the tables are.
pub(super) fn status_with(
    name: &InstanceName,
    tables: &BothTables,
    families: FamiliesView,
) -> Result<Status> {
    let mut said = Said {
        outside_addresses: Vec::new(),
        denied: Vec::new(),
        untranslated: Vec::new(),
        guests: Vec::new(),
    };
    said.add(&tables.ipv4)?;
    if let Some(tables) = &tables.ipv6 {
        said.add(tables)?;
    }
    Ok(Status::from(StatusSource {
        instance: name.to_string(),
        process: Lock::holder(name).and_then(|holder| holder.0),
        settings: tables.ipv4.settings()?,
        outside_addresses: said.outside_addresses,
        devices: devices(name, tables)?,
        denied: said.denied,
        untranslated: said.untranslated,
        nat64: tables.nat64()?,
        prefixes: tables.prefix_pairs()?,
        families,
        guests: said.guests,
        counters: tables.ipv4.counters()?,
    }))
}
