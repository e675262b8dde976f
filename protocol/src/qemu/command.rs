//! Commands: what the source tells the destination between sections.

use super::reader::{Reader, Stop};
use super::{Error, PAGE, section};
use std::borrow::Cow;

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum CommandKind {
    /// Open the return path.
    OpenReturnPath = 1,
    /// Answer with a PONG of the same number.
    Ping = 2,
    /// Post-copy may follow.
    PostcopyAdvise = 3,
    /// Be ready for pages in post-copy.
    PostcopyListen = 4,
    /// Run the VM.
    PostcopyRun = 5,
    /// Forget ranges of a block that were dirtied after they had been sent.
    PostcopyRamDiscard = 6,
    /// A stream of a length given in the payload follows; it comes as [`super::Kind::Package`].
    Packaged = 7,
    /// Resume a broken post-copy.
    PostcopyResume = 9,
    /// Send back which pages of a block were received.
    ReceivedBitmap = 10,
    /// The VM is paused; what follows is the rest. QEMU 10.0 and later.
    SwitchoverStart = 11,
}

/// A command with its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command<'a> {
    /// What it asks for.
    pub kind: CommandKind,
    /// Its arguments, undecoded.
    pub payload: &'a [u8],
}

/// Continuous replication: after the switch the stream has checkpoints instead of an end.
const ENABLE_COLO: u16 = 8;

impl CommandKind {
    fn new(number: u16) -> Result<Self, Error> {
        Ok(match number {
            1 => Self::OpenReturnPath,
            2 => Self::Ping,
            3 => Self::PostcopyAdvise,
            4 => Self::PostcopyListen,
            5 => Self::PostcopyRun,
            6 => Self::PostcopyRamDiscard,
            7 => Self::Packaged,
            ENABLE_COLO => return Err(Error::Capability(Cow::Borrowed("x-colo"))),
            9 => Self::PostcopyResume,
            10 => Self::ReceivedBitmap,
            11 => Self::SwitchoverStart,
            other => return Err(Error::UnknownCommand(other)),
        })
    }

    fn allows(self, length: usize) -> bool {
        match self {
            Self::OpenReturnPath
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::PostcopyResume
            | Self::SwitchoverStart => length == 0,
            Self::Ping | Self::Packaged => length == 4,
            // Empty if only dirty bitmaps may come in post-copy.
            Self::PostcopyAdvise => length == 0 || length == 16,
            Self::PostcopyRamDiscard | Self::ReceivedBitmap => true,
        }
    }
}

impl<'a> Command<'a> {
    /// Reads a command after its type byte.
    pub(super) fn read(reader: &mut Reader<'a>) -> Result<Self, Stop> {
        let kind = CommandKind::new(reader.u16()?)?;
        let length = usize::from(reader.u16()?);
        if !kind.allows(length) {
            return Err(Error::CommandLength {
                command: kind,
                length,
            }
            .into());
        }
        let payload = reader.bytes(length)?;
        if kind == CommandKind::PostcopyAdvise
            && let Some((sizes, _)) = payload.split_first_chunk()
        {
            // The page sizes of all blocks, or-ed. A block of another size has a longer entry in the table.
            let sizes = u64::from_be_bytes(*sizes);
            if sizes != PAGE {
                return Err(Error::HugePages(sizes).into());
            }
        }
        Ok(Self { kind, payload })
    }

    /// Appends the command. `None`, and nothing is written, if the payload is longer than 64 KiB - 1.
    #[must_use]
    pub fn encode(&self, out: &mut Vec<u8>) -> Option<()> {
        let length = u16::try_from(self.payload.len()).ok()?;
        out.push(section::COMMAND);
        out.extend_from_slice(&(self.kind as u16).to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(self.payload);
        Some(())
    }

    /// Length in bytes of the package that follows, if this is [`CommandKind::Packaged`].
    pub fn package_len(&self) -> Option<u32> {
        match (self.kind, self.payload) {
            (CommandKind::Packaged, &[a, b, c, d]) => Some(u32::from_be_bytes([a, b, c, d])),
            _ => None,
        }
    }
}
