//! ICMP errors: the packet that they quote is translated with them (RFC 7915 sections 4.3
//! and 5.3), and the length of what they quote is told anew where something follows it
//! (RFC 4884).
//!
//! A checksum that is wrong stays wrong: nothing is summed up anew.

use super::{
    Header, Mtus, UDP_CHECKSUM, Untranslatable, Version, addresses, icmp_pseudo_header, icmp_sum,
    not_none, plan_header, translate_protocol, write_network,
};
use crate::{
    checksum::Delta,
    frame::{Frame, lengths},
    net::{Be16, Be32, protocol},
    network::Network as _,
    parse::{LONGEST_ERROR, Packet, Part},
};

/// So much of a quoted packet's transport header is certain to be there (RFC 792).
const LEAST_TRANSPORT: u32 = 8;

/// A quoted packet that something follows is filled up to so many bytes (RFC 4884 section
/// 3).
const LEAST_FOLLOWED: u32 = 128;

/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u32 = 16;

/// The header of a packet that an ICMP error quotes, as it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quote<A> {
    pub source: A,
    pub destination: A,
    /// From the frame's start.
    pub(super) offset: u32,
    /// Of everything before the transport header, in bytes.
    pub(super) length: u32,
    /// What becomes of it, but for the addresses.
    pub(super) header: Header,
}

/// What becomes of an ICMP error: what it quotes, and then its plan in version `B`. Too
/// long for a stack of the kernel's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation<B: Version> {
    /// Read by [`Translation::read`].
    pub quote: Quote<B::Other>,
    /// What source and destination become: set by the caller.
    pub ends: (B, B),
    /// What source and destination of the quoted packet become: set by the caller.
    pub quote_ends: (B, B),
    network_offset: u32,
    header: Header,
    icmp: [Be32; 2],
    change: Change,
    layout: Layout,
}

/// What becomes of the quoted transport header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Change {
    #[default]
    Nothing,
    /// The checksum, so many bytes into the header.
    Checksum(u32, Be16),
    /// The first four bytes, ICMP's.
    Icmp([u8; 4]),
}

/// Bytes of a frame that stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Where they are, from the frame's start.
    pub from: u32,
    /// Where they belong.
    pub to: u32,
    pub length: u32,
}

/// What follows the quoted header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Layout {
    /// The rest of the quoted packet.
    quoted: Kept,
    /// Zeros behind that, in bytes, a multiple of four.
    padding: u32,
    /// What follows the quoted packet, where something does.
    extension: Kept,
    /// The length of what is quoted, for the header; 0 if nothing follows it.
    told: u8,
    /// What does not stay.
    left_out: Kept,
}

/// The sum of so many bytes.
#[inline(always)]
fn sum<F: Frame>(frame: &F, offset: u32, length: u32) -> Result<u32, Untranslatable> {
    if length == 0 {
        return Ok(0);
    }
    if length > LONGEST_ERROR {
        return Err(Untranslatable::ErrorUnusable);
    }
    let sum = frame.checksum(offset, length);
    Ok(u32::from(!sum.ok_or(Untranslatable::Truncated)?.raw()))
}

/// Says what stays and where it belongs.
#[inline(always)]
fn layout<B: Version>(
    packet: &Packet<B::Other>,
    quote: &Quote<B::Other>,
    (old_type, rest): (u8, u32),
    new_type: u8,
) -> Result<Layout, Untranslatable> {
    let behind = quote.offset + quote.length;
    let end = packet.network_offset + packet.length;
    // Filled up, so that it may be longer than the packet was.
    let told = match B::Other::quote_length_shift(old_type) {
        Some(shift) => (rest >> shift & 0xff) * B::Other::QUOTE_UNIT,
        None => 0,
    };
    let is_followed = told != 0 && told < end - quote.offset;
    let quoted = if is_followed {
        // Nothing of the header may be in what follows.
        told.checked_sub(quote.length + LEAST_TRANSPORT)
            .ok_or(Untranslatable::ErrorUnusable)?
            + LEAST_TRANSPORT
    } else {
        end - behind
    };
    let extension = end - behind - quoted;

    let headers = B::header_length(&quote.header);
    let to = packet.network_offset + B::HEADER + lengths::ICMP + headers;
    let most = B::LONGEST_ERROR - B::HEADER - lengths::ICMP;
    let unit = B::QUOTE_UNIT;
    let followed = (headers + quoted).max(LEAST_FOLLOWED).div_ceil(unit) * unit;
    let can_be_told = B::quote_length_shift(new_type).is_some();
    let told = if is_followed && can_be_told && followed + extension <= most {
        u8::try_from(followed / unit).ok()
    } else {
        None
    };
    if let Some(told) = told {
        let padding = followed - headers - quoted;
        return Ok(Layout {
            quoted: Kept {
                from: behind,
                to,
                length: quoted,
            },
            padding,
            extension: Kept {
                from: behind + quoted,
                to: to + quoted + padding,
                length: extension,
            },
            told,
            left_out: Kept::default(),
        });
    }
    let quoted = quoted.min(most - headers);
    Ok(Layout {
        quoted: Kept {
            from: behind,
            to,
            length: quoted,
        },
        padding: 0,
        extension: Kept::default(),
        told: 0,
        left_out: Kept {
            from: behind + quoted,
            to: 0,
            length: end - behind - quoted,
        },
    })
}

impl<B: Version> Translation<B> {
    /// Reads the header of the packet that an ICMP error quotes.
    ///
    /// # Errors
    /// [`Untranslatable::ErrorUnusable`] if that cannot be translated.
    #[inline(always)]
    pub fn read<F: Frame>(
        &mut self,
        frame: &F,
        packet: &Packet<B::Other>,
    ) -> Result<(), Untranslatable> {
        let unusable = Untranslatable::ErrorUnusable;
        let offset = packet.transport_offset() + lengths::ICMP;
        self.quote = B::Other::read_quote(frame, offset)?;
        let end = packet.network_offset + packet.length;
        let header = &mut self.quote.header;
        let is_fragment_of_icmp = header.is_fragment && header.protocol == B::Other::ICMP;
        if offset + self.quote.length + LEAST_TRANSPORT > end || is_fragment_of_icmp {
            return Err(unusable);
        }
        let protocol = translate_protocol::<B::Other>(header.protocol);
        header.protocol = protocol.map_err(|_| unusable)?;
        if B::is_too_long(header) {
            return Err(unusable);
        }
        Ok(())
    }

    /// Plans the translation of the error, whose addresses are set. `identification` is as
    /// for [`super::plan`].
    ///
    /// # Errors
    /// Why it is not translated.
    #[inline(always)]
    pub fn plan<F: Frame>(
        &mut self,
        frame: &F,
        packet: &Packet<B::Other>,
        mtus: Mtus,
        identification: Be32,
    ) -> Result<(), Untranslatable> {
        B::Other::check(frame, packet)?;
        if packet.part != Part::Whole {
            return Err(Untranslatable::FragmentedIcmp);
        }
        let read = frame.read::<[u8; 8]>(packet.transport_offset());
        let [old_type, code, check_high, check_low, rest @ ..] =
            read.ok_or(Untranslatable::Truncated)?;
        let rest = u32::from_be_bytes(rest);
        let ((new_type, new_code), mut new_rest) =
            B::Other::translate_error((old_type, code), rest, &self.quote, mtus)
                .ok_or(Untranslatable::NoCounterpart)?;
        self.layout = layout::<B>(packet, &self.quote, (old_type, rest), new_type)?;
        if let Some(shift) = B::quote_length_shift(new_type) {
            new_rest |= u32::from(self.layout.told) << shift;
        }
        let (change, transport) = self.plan_transport(frame)?;
        self.change = change;

        let old_length = packet.length - packet.header_length;
        let length = lengths::ICMP
            + B::header_length(&self.quote.header)
            + self.layout.quoted.length
            + self.layout.padding
            + self.layout.extension.length;
        let left_out = self.layout.left_out;
        let [old_word, new_word] = [[old_type, code], [new_type, new_code]].map(Be16::from_bytes);
        let new_rest = Be32::new(new_rest);
        let old = icmp_sum((packet.source, packet.destination), old_length)
            + u32::from(old_word.raw())
            + Be32::new(rest).sum()
            + sum(frame, self.quote.offset, self.quote.length)?
            + sum(frame, left_out.from, left_out.length)?;
        let new = icmp_sum(self.ends, length)
            + u32::from(new_word.raw())
            + new_rest.sum()
            + B::header_sum(&self.quote.header, self.quote_ends);
        let [check_high, check_low] = Delta::of_sums(old, new)
            .and(transport)
            .apply(Be16::from_bytes([check_high, check_low]))
            .bytes();
        self.icmp = [
            Be32::from_bytes([new_type, new_code, check_high, check_low]),
            new_rest,
        ];
        self.network_offset = packet.network_offset;
        self.header = plan_header(frame, packet, length, identification)?;
        Ok(())
    }

    /// What becomes of the quoted transport header, and what that adds to a sum over it.
    #[inline(always)]
    fn plan_transport<F: Frame>(&self, frame: &F) -> Result<(Change, Delta), Untranslatable> {
        let quote = &self.quote;
        let ends = self.quote_ends;
        let unusable = Untranslatable::ErrorUnusable;
        let offset = quote.offset + quote.length;
        let old_ends = (quote.source, quote.destination);
        let number = quote.header.protocol;
        if number == B::ICMP {
            let read = frame.read::<[u8; 4]>(offset);
            let [icmp_type, code, check_high, check_low] = read.ok_or(unusable)?;
            // RFC 7915 section 4.3: nothing is looked into further than that.
            let new_type = B::Other::translate_echo(icmp_type).ok_or(unusable)?;
            let [old, new] = [icmp_type, new_type].map(|kind| Be16::from_bytes([kind, code]));
            let kind = Delta::of_word(old, new);
            let delta = icmp_pseudo_header(old_ends, ends, quote.header.payload_length).and(kind);
            let old_check = Be16::from_bytes([check_high, check_low]);
            let check = delta.apply(old_check);
            let [high, low] = check.bytes();
            let change = kind.and(Delta::of_word(old_check, check));
            return Ok((Change::Icmp([new_type, code, high, low]), change));
        }
        let field = match number {
            protocol::TCP => TCP_CHECKSUM,
            protocol::UDP | protocol::UDP_LITE => UDP_CHECKSUM,
            0..=u8::MAX => return Ok((Change::Nothing, Delta::ZERO)),
        };
        if field + 2 > self.layout.quoted.length {
            return Ok((Change::Nothing, Delta::ZERO));
        }
        let is_tcp = number == protocol::TCP;
        let old = Be16::from_bytes(frame.read::<[u8; 2]>(offset + field).ok_or(unusable)?);
        if !is_tcp && old == Be16::ZERO {
            return Ok((Change::Nothing, Delta::ZERO));
        }
        let new = addresses(old_ends, ends).apply(old);
        let new = if is_tcp { new } else { not_none(new) };
        Ok((Change::Checksum(field, new), Delta::of_word(old, new)))
    }

    /// How long the frame is to be, in bytes.
    #[inline(always)]
    #[must_use]
    pub fn length(&self) -> u32 {
        self.network_offset + B::HEADER + self.header.payload_length
    }

    /// What is to be copied from the frame as it was, in its order. The second is empty
    /// unless something follows the quoted packet (RFC 4884).
    #[inline(always)]
    #[must_use]
    pub fn parts(&self) -> [Kept; 2] {
        [self.layout.quoted, self.layout.extension]
    }

    /// Writes everything else into the frame, which is as long as it is to be.
    ///
    /// `None` when its memory could not be changed; it may then be half rewritten and must
    /// be dropped.
    #[inline(always)]
    pub fn apply<F: Frame>(&self, frame: &mut F) -> Option<()> {
        write_network(frame, self.network_offset, &self.header, self.ends)?;
        let icmp = self.network_offset + B::HEADER;
        frame.overwrite(icmp, &self.icmp)?;
        B::write(
            frame,
            icmp + lengths::ICMP,
            &self.quote.header,
            self.quote_ends,
        )?;
        let transport = self.layout.quoted.to;
        match self.change {
            Change::Nothing => {}
            Change::Checksum(field, sum) => frame.overwrite(transport + field, &sum.bytes())?,
            Change::Icmp(bytes) => frame.overwrite(transport, &bytes)?,
        }
        let padding = transport + self.layout.quoted.length;
        for word in 0..LEAST_FOLLOWED / 4 {
            if word * 4 >= self.layout.padding {
                break;
            }
            frame.overwrite(padding + word * 4, &Be32::ZERO)?;
        }
        Some(())
    }
}
