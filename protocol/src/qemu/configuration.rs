//! The configuration section.

use super::reader::{Reader, Stop};
use super::{Error, section};
use std::borrow::Cow;

/// Binary logarithm of the only page size.
const PAGE_BITS: u32 = 12;

/// What the source says of itself at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Configuration<'a> {
    /// The machine type with its version, for example `pc-q35-7.2`.
    pub machine: &'a str,
    /// The VM's UUID, sent with the capability `validate-uuid`.
    pub uuid: Option<[u8; 16]>,
}

impl<'a> Configuration<'a> {
    /// Reads the section after its type byte, up to the first byte that belongs to the next item.
    ///
    /// Nothing says how many subsections there are, so that next byte has to be there. A capability
    /// is listed only if it is on and changes the stream, so each is refused; a subsection can come
    /// once.
    pub(super) fn read(reader: &mut Reader<'a>) -> Result<Self, Stop> {
        let length = reader.u32()?;
        let machine = reader.text(length, "machine type")?;
        let mut uuid = None;
        let mut last = None;
        while reader.peek()? == section::SUBSECTION {
            reader.u8()?;
            let name = reader.name("subsection")?;
            let version = reader.u32()?;
            if version != 1 || last == Some(name) {
                return Err(Error::Subsection(name.to_owned()).into());
            }
            last = Some(name);
            match name {
                "configuration/target-page-bits" => {
                    let bits = reader.u32()?;
                    if bits != PAGE_BITS {
                        return Err(Error::PageBits(bits).into());
                    }
                }
                "configuration/capabilities" => {
                    if reader.u32()? > 0 {
                        let capability = reader.name("capability")?.to_owned();
                        return Err(Error::Capability(Cow::Owned(capability)).into());
                    }
                }
                "configuration/uuid" => uuid = Some(*reader.array()?),
                other => return Err(Error::Subsection(other.to_owned()).into()),
            }
        }
        Ok(Self { machine, uuid })
    }

    /// Appends the section.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(section::CONFIGURATION);
        // A name is at most 255 bytes long, or the other side refuses it.
        out.extend_from_slice(
            &u32::try_from(self.machine.len())
                .unwrap_or(u32::MAX)
                .to_be_bytes(),
        );
        out.extend_from_slice(self.machine.as_bytes());
        if let Some(uuid) = self.uuid {
            let name = "configuration/uuid";
            out.push(section::SUBSECTION);
            super::encoder::put_name(name, out);
            out.extend_from_slice(&1_u32.to_be_bytes());
            out.extend_from_slice(&uuid);
        }
    }
}
