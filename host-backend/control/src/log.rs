//! The log: one line for each event, whoever chose its words.

use std::io::{self, IsTerminal as _, Stderr, Write};

use tracing_subscriber::filter::{FilterExt as _, LevelFilter, Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};
use transhume_base::audit;

/// Begins the log, and the audit, which no filter keeps out of it.
pub(crate) fn begin(filter: EnvFilter) {
    let lines = || {
        fmt::layer()
            .with_writer(|| OneLine(io::stderr()))
            .with_ansi(io::stderr().is_terminal())
    };
    let log = lines()
        .with_target(false)
        .with_filter(filter.and(filter_fn(|data| data.target() != audit::TARGET)));
    let audit = lines().with_filter(Targets::new().with_target(audit::TARGET, LevelFilter::INFO));
    tracing_subscriber::registry()
        .with(vec![log.boxed(), audit.boxed()])
        .init();
}

/// Bytes of an event, at most: journald begins another record after 48 KiB (`LineMax`, journald.conf(5)).
const MAX_EVENT: usize = 32 << 10;

/// Writes what it is given at once, an event, as one line that is not too long: bars stand where its lines ended, and
/// where a record of journald's would. Else what another host or QEMU says could pass for a line of ours.
struct OneLine<W = Stderr>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.write_all(event)?;
        Ok(event.len())
    }

    fn write_all(&mut self, event: &[u8]) -> io::Result<()> {
        let line = event.strip_suffix(b"\n").unwrap_or(event);
        let whole = &line[..line.len().min(MAX_EVENT)];
        let pieces: Vec<&[u8]> = whole
            .split(|byte| matches!(byte, b'\n' | b'\r' | b'\0'))
            .collect();
        let mut joined = pieces.join(&b" | "[..]);
        // The bars take room, too.
        if joined.len() > MAX_EVENT || whole.len() < line.len() {
            joined.truncate(MAX_EVENT);
            joined.extend_from_slice(" […]".as_bytes());
        }
        let mut line = joined;
        line.push(b'\n');
        self.0.write_all(&line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// What a log keeps.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_it_says() {
        let kept = Kept::default();
        let into = kept.clone();
        let log = tracing_subscriber::fmt()
            .with_writer(move || OneLine(into.clone()))
            .without_time()
            .with_ansi(false)
            .finish();
        let forged = "it is full\n INFO audit: decision=\"allowed\"\r\nx";
        tracing::subscriber::with_default(log, || {
            tracing::warn!(error = %forged, "not completed: {forged}");
        });
        let said = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("it is full |  INFO audit"), "{said}");
        for long in ["\0".repeat(MAX_EVENT), "é".repeat(MAX_EVENT)] {
            let mut kept = Vec::new();
            OneLine(&mut kept).write_all(long.as_bytes()).unwrap();
            assert!(kept.len() <= MAX_EVENT + 8 && !kept.contains(&0));
            assert!(String::from_utf8_lossy(&kept).ends_with(" […]\n"));
        }
    }
}
