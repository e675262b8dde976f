//! The settings, from the kernel's command line.

use std::path::PathBuf;
use std::time::Duration;

/// What the guest is to do.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The files to read.
    pub(crate) folder: PathBuf,
    /// How much page cache, in bytes.
    pub(crate) cache: u64,
    /// Memory of its own, in bytes.
    pub(crate) memory: usize,
    /// Bytes a second written to it.
    pub(crate) dirty: u64,
    /// Memory that another process walks through, in bytes; none for no such process.
    pub(crate) walk: usize,
    /// Memory that a third process walks through by system calls, in bytes; none for no such process.
    pub(crate) call: usize,
    /// Pages a second that either comes to, at most.
    pub(crate) walk_rate: u32,
    /// Threads that compute.
    pub(crate) compute: u64,
    /// Threads that serve requests.
    pub(crate) workers: u64,
    /// A worker's pause after each request.
    pub(crate) think: Duration,
    /// The time between beats.
    pub(crate) beat: Duration,
}

impl Settings {
    pub(crate) fn read() -> Result<Self, String> {
        let text = std::fs::read_to_string("/proc/cmdline")
            .map_err(|error| format!("cannot read /proc/cmdline: {error}"))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let number = |key: &str, default: u64| -> Result<u64, String> {
            let prefix = format!("testbed.{key}=");
            match text
                .split_whitespace()
                .find_map(|word| word.strip_prefix(&prefix))
            {
                None => Ok(default),
                Some(value) => value
                    .parse()
                    .map_err(|_| format!("testbed.{key}={value} is no number")),
            }
        };
        let small = |key: &str, default: u32| {
            let value = number(key, default.into())?;
            u32::try_from(value).map_err(|_| format!("testbed.{key}={value} is too much"))
        };
        Ok(Self {
            folder: PathBuf::from("/disk"),
            cache: number("cache-mib", 64)? << 20,
            memory: usize::try_from(number("memory-mib", 32)? << 20)
                .map_err(|error| error.to_string())?,
            dirty: number("dirty-mib", 0)? << 20,
            walk: usize::try_from(number("walk-mib", 0)? << 20)
                .map_err(|error| error.to_string())?,
            call: usize::try_from(number("call-mib", 0)? << 20)
                .map_err(|error| error.to_string())?,
            walk_rate: small("walk-rate", 40_000)?,
            compute: number("compute", 0)?,
            workers: number("workers", 1)?,
            think: Duration::from_millis(number("think-ms", 2)?),
            beat: Duration::from_millis(number("beat-ms", 20)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_there() {
        let settings =
            Settings::parse("quiet testbed.cache-mib=3 testbed.dirty-mib=20").expect("settings");
        assert_eq!(settings.cache, 3 << 20);
        assert_eq!(settings.dirty, 20 << 20);
        assert_eq!(settings.workers, 1);
    }

    #[test]
    fn refuses_what_is_no_number() {
        assert!(Settings::parse("testbed.cache-mib=lots").is_err());
    }
}
