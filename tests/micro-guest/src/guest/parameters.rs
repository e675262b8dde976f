//! The guest's parameters, from the kernel command line.

use alloc::format;
use alloc::string::{String, ToString};
use core::str::FromStr;

/// What this guest is to do. Sizes in bytes, rates in bytes per second.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    /// Decides all content and every choice.
    pub(crate) seed: u64,
    /// Decides the disk's content.
    pub(crate) disk_seed: u64,
    /// All content, the disk's too, is of the kind that does not compress.
    pub(crate) random: bool,
    /// First sector of the "partition" whose pages are cached.
    pub(crate) disk_offset: u64,
    pub(crate) cache: u64,
    pub(crate) data: u64,
    /// `u64::MAX`: all that is left.
    pub(crate) zero: u64,
    /// Data pages written.
    pub(crate) rate: u64,
    /// Data pages that are written, spread over all of them; 0 for all.
    pub(crate) hot: u64,
    /// The processor's translation of a page is forgotten before the last store to it.
    pub(crate) flush: bool,
    /// Whether the host is told what is the guest's own, and which pages it writes.
    pub(crate) names: bool,
    /// Cache pages written, so that hints about them go stale.
    pub(crate) cache_rate: u64,
    /// Cache pages dropped and read again from another place of the disk.
    pub(crate) churn: u64,
    pub(crate) lie: Lie,
}

/// How the guest deceives the host about its page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// Not at all.
    None,
    /// Every range names other sectors than the right ones.
    Wrong,
    /// Reports all cache pages, those that are dirty included.
    Stale,
    /// Page frames where no memory is.
    OutsideMemory,
    /// Sectors behind the disk's end.
    OutsideDisk,
    /// A report of random ranges without an end.
    Flood,
    /// Reports that name the same memory again and again, all of it in each range.
    Overlap,
    /// One report of random ranges after another, without a pause.
    ManyReports,
    /// Falls silent in the middle of a frame.
    MidFrame,
    /// Answers with a version that was not offered.
    Version,
    /// Random bytes instead of frames.
    Garbage,
}

fn yes_or_no(value: &str) -> Option<bool> {
    match value {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

impl Parameters {
    /// Reads `name=value` words; the error says which word is wrong.
    pub(crate) fn parse(command_line: &str) -> Result<Self, String> {
        let mut parameters = Self {
            seed: 1,
            disk_seed: 1,
            random: false,
            disk_offset: 0,
            cache: 0,
            data: 32 << 20,
            zero: 64 << 20,
            rate: 0,
            hot: 0,
            flush: false,
            names: true,
            cache_rate: 0,
            churn: 0,
            lie: Lie::None,
        };
        for word in command_line.split_ascii_whitespace() {
            let set = word
                .split_once('=')
                .and_then(|(name, value)| parameters.set(name, value));
            set.ok_or_else(|| format!("parameter `{word}` is not understood"))?;
        }
        Ok(parameters)
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "seed" => self.seed = value.parse().ok()?,
            "disk-seed" => self.disk_seed = value.parse().ok()?,
            "content" => {
                self.random = match value {
                    "mixed" => false,
                    "random" => true,
                    _ => return None,
                }
            }
            "disk-offset" => self.disk_offset = value.parse().ok()?,
            "cache" => self.cache = size(value)?,
            "data" => self.data = size(value)?,
            "zero" if value == "rest" => self.zero = u64::MAX,
            "zero" => self.zero = size(value)?,
            "rate" => self.rate = size(value)?,
            "hot" => self.hot = size(value)?,
            "flush" => self.flush = yes_or_no(value)?,
            "names" => self.names = yes_or_no(value)?,
            "cache-rate" => self.cache_rate = size(value)?,
            "churn" => self.churn = size(value)?,
            "lie" => self.lie = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

impl FromStr for Lie {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "none" => Self::None,
            "wrong" => Self::Wrong,
            "stale" => Self::Stale,
            "outside-memory" => Self::OutsideMemory,
            "outside-disk" => Self::OutsideDisk,
            "flood" => Self::Flood,
            "overlap" => Self::Overlap,
            "many-reports" => Self::ManyReports,
            "mid-frame" => Self::MidFrame,
            "version" => Self::Version,
            "garbage" => Self::Garbage,
            other => return Err(other.to_string()),
        })
    }
}

/// A number of bytes, with suffix K, M or G.
pub(crate) fn size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}
