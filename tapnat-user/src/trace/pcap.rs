//! Writes what a trace sees for Wireshark, in the pcapng format: each packet as it came and as it
//! left, on two interfaces for each device, with what became of it as a comment.

use std::{
    borrow::Cow,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use pcap_file::{
    DataLink,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};
use tapnat_common::trace::{MOST_BYTES, Side};

use super::Seen;
use crate::files::{cannot, is_stdout};

/// Times are in nanoseconds: `10^-9`.
const RESOLUTION: u8 = 9;

/// What is written once for each of these in a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Interface {
    device: u32,
    is_after: bool,
    has_link: bool,
}

/// A file that is being written.
pub struct PcapFile {
    writer: PcapNgWriter<BufWriter<Box<dyn Write>>>,
    interfaces: Vec<Interface>,
}

impl PcapFile {
    /// Begins a file, in place of one that is there; `-` is the standard output.
    ///
    /// # Errors
    ///
    /// When it cannot be written to.
    pub fn create(path: &Path) -> Result<Self> {
        let file: Box<dyn Write> = if is_stdout(path) {
            Box::new(io::stdout())
        } else {
            let file = File::create(path);
            Box::new(file.map_err(|error| cannot("cannot write", path, error))?)
        };
        let writer = PcapNgWriter::new(BufWriter::new(file))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            writer,
            interfaces: Vec::new(),
        })
    }

    /// Adds a packet: what came, and what left if anything did. `time` is that since 1970, `device` the
    /// name of the one that it arrived on, `comment` what became of it.
    ///
    /// # Errors
    ///
    /// When the file cannot be written to.
    pub fn write(
        &mut self,
        seen: &Seen,
        time: Duration,
        device: &str,
        comment: &str,
    ) -> Result<()> {
        let record = &seen.record;
        for (is_after, side, data) in [
            (false, &record.before, &seen.before),
            (true, &record.after, &seen.after),
        ] {
            if data.is_empty() {
                continue;
            }
            let interface = Interface {
                device: record.device,
                is_after,
                has_link: side.link != 0,
            };
            let interface_id = self.interface(interface, device)?;
            let block = EnhancedPacketBlock {
                interface_id,
                timestamp: time,
                original_len: original_length(side),
                data: Cow::Borrowed(data),
                options: vec![EnhancedPacketOption::Comment(Cow::Borrowed(comment))],
            };
            self.writer
                .write_pcapng_block(block)
                .context("cannot write a packet")?;
        }
        Ok(())
    }

    fn interface(&mut self, interface: Interface, device: &str) -> Result<u32> {
        if let Some(place) = self.interfaces.iter().position(|it| *it == interface) {
            return u32::try_from(place).context("too many interfaces");
        }
        let link = if interface.has_link {
            DataLink::ETHERNET
        } else {
            DataLink::RAW
        };
        let side = if interface.is_after {
            "after"
        } else {
            "before"
        };
        let name = format!("{device} {side} tapnat");
        let mut block = InterfaceDescriptionBlock::new(link, MOST_BYTES);
        block.options = vec![
            InterfaceDescriptionOption::IfName(Cow::Owned(name)),
            InterfaceDescriptionOption::IfTsResol(RESOLUTION),
        ];
        self.writer
            .write_pcapng_block(block)
            .context("cannot write an interface")?;
        self.interfaces.push(interface);
        u32::try_from(self.interfaces.len() - 1).context("too many interfaces")
    }

    /// Writes what is left.
    ///
    /// # Errors
    ///
    /// When the file cannot be written to.
    pub fn flush(&mut self) -> Result<()> {
        self.writer
            .get_mut()
            .flush()
            .context("cannot write the rest of the packets")
    }
}

fn original_length(side: &Side) -> u32 {
    side.length.max(side.captured)
}
