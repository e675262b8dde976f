//! Control messages: rare, so serde and bincode encode them. This is the only file that uses bincode.

use super::{Compared, Comparison, LinkError, MAX_SMALL_PAYLOAD, Signs, StorageHere};
use serde::{Deserialize, Serialize};

/// What the source wants to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The source host's name.
    pub from: String,
    /// A random number of the source's choice, no other offer's.
    pub job: u64,
    /// The number of the migration's first offer.
    pub first: u64,
    /// How often the migration was offered before: each time, the connection broke before `Ready` came.
    /// The destination ends what it began for those offers before it answers.
    pub attempt: u16,
    /// The definition of the VM, as TOML, its machine type spelled out (`pc-q35-7.2`).
    pub definition: String,
    /// The source's QEMU version: major, minor, micro.
    pub qemu: [u32; 3],
    /// What its distribution says of that build, as in `Debian 1:10.0.2+ds-2`; empty if it says nothing.
    pub qemu_package: String,
    /// Size of each disk, as the guest sees it.
    pub disks: Vec<OfferedDisk>,
    /// The processor's features, if the guest sees those of its host.
    pub cpu_flags: Vec<String>,
    /// Key of the page digests.
    pub digest_key: [u8; 16],
    /// Whether the VM runs; a paused one stays paused.
    pub running: bool,
    /// Only look whether it would work.
    pub dry_run: bool,
    /// The number of the migration at the source, for people: they find it there by it.
    pub source_job: u64,
    /// Whether the VM is started when its host is.
    pub autostart: bool,
    /// What the source's signs on its storage are known by.
    pub signs: Signs,
    /// How long its virtqueues are; of no device if its QEMU was not asked.
    pub virtio: Vec<OfferedVirtio>,
}

/// A virtio device of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedVirtio {
    /// Its place in QEMU's tree of objects.
    pub path: String,
    /// What it is, as in `virtio-blk`.
    pub kind: String,
    /// How long each of its queues is.
    pub lengths: Vec<u32>,
}

/// A disk of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedDisk {
    /// Its name in the definition.
    pub id: String,
    /// Its size in bytes, as the guest sees it.
    pub size: u64,
}

/// Whether a VM comes in post-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PostCopy {
    /// It does not.
    No,
    /// It may, if the destination can take it so.
    Perhaps,
    /// It does, or the migration fails.
    Yes,
}

/// What post-copy cost the guest after it ran at its destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stalls {
    /// How long each virtual CPU stood still, in milliseconds; empty where QEMU does not tell.
    pub cpus_ms: Vec<u32>,
    /// How long all of them did at once, in milliseconds.
    pub all_cpus_ms: u32,
    /// What processes waited instead, where the guest has a gate.
    pub processes: Option<Waits>,
}

/// Waits of processes for memory that was absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waits {
    /// Their pages that were absent.
    pub pages: u64,
    /// Times that one went to sleep.
    pub waits: u64,
    /// How long they slept in all, in microseconds.
    pub waited_us: u64,
    /// How long one slept at most, in microseconds.
    pub longest_us: u64,
    /// Page frames of the guest that were named absent.
    pub absent: u64,
    /// CPU time of the guest that all of it took, in microseconds.
    pub cpu_us: u64,
}

/// Whether a host has a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// It knows nothing of it.
    Absent,
    /// It is defined there, and does not run.
    Defined,
    /// It is being started there, or arrives.
    Coming,
    /// It runs there, or may.
    Here,
    /// A migration of it is in doubt there.
    InDoubt,
}

/// How a guest ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestEnd {
    /// It shut down.
    ShutDown,
    /// It panicked, and its QEMU ends then.
    Panicked,
    /// It rebooted, and its QEMU ends then (`-no-reboot`).
    Rebooted,
}

impl GuestEnd {
    /// What the guest did, as in "its guest shut down".
    pub fn did(self) -> &'static str {
        match self {
            Self::ShutDown => "shut down",
            Self::Panicked => "panicked",
            Self::Rebooted => "rebooted, and its QEMU ends then (-no-reboot)",
        }
    }
}

/// The guest's clock, as it went at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestClock {
    /// How far it was ahead of the destination's monotonic clock, in nanoseconds.
    pub ahead_ns: i64,
    /// How far off that may be, in nanoseconds.
    pub within_ns: u64,
}

/// Messages that drive a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Source: would you take this VM?
    Offer(Box<Offer>),
    /// Destination: yes. Names its QEMU version.
    Accepted {
        /// Major, minor, micro.
        qemu: [u32; 3],
        /// Whether its QEMU can hold the switchover back (`switchover-ack`).
        switchover_ack: bool,
        /// For people: why the VM must not come in post-copy from the source's QEMU to this one.
        no_post_copy: Option<String>,
        /// What it has for the VM's disks.
        storage: Box<StorageHere>,
    },
    /// Destination: no, with a reason and its cure for each thing that is missing.
    Refused {
        /// For people.
        reasons: Vec<String>,
    },
    /// Source: start your QEMU.
    Prepare {
        /// Whether `switchover-ack` is to be used.
        switchover_ack: bool,
        /// Connections that the source would use.
        connections: u8,
        /// How many seconds the link may be away before the migration ends.
        patience: u16,
        /// Whether the VM may run at the destination before all of its memory is there.
        post_copy: PostCopy,
    },
    /// Destination: my QEMU waits for the stream. The session begins.
    Ready {
        /// Whoever knows it may join the session.
        token: [u8; 16],
        /// Connections that the session has, at least 1.
        connections: u8,
        /// For people: why the VM cannot come in post-copy, if the source would leave that to the destination.
        no_post_copy: Option<String>,
    },
    /// Source: the VM is paused here and its whole state is with you; it is yours. In post-copy part of its
    /// memory follows.
    Commit,
    /// Destination: I run the VM.
    Running,
    /// Either side: the migration is over, for this reason. Before `Commit` the VM stays at the source;
    /// as an answer to `Commit` it says that the destination ended its QEMU without running it.
    Abort {
        /// For people.
        reason: String,
    },
    /// Source, on a new connection: what became of that migration?
    Query {
        /// The number of the offer.
        job: u64,
        /// The VM.
        vm: String,
    },
    /// Destination's answer: whether it took the VM over. If not, it has ended its QEMU.
    Outcome {
        /// Whether it runs (or will run) the VM.
        taken: bool,
    },
    /// Source, on a new connection: it belongs to that session.
    Join {
        /// The number of the offer.
        job: u64,
        /// From [`Control::Ready`].
        token: [u8; 16],
        /// Which of the session's connections it is, from 0. An earlier one of that number is over.
        connection: u8,
        /// All frames up to this number have come.
        received: u64,
    },
    /// Destination: so it does.
    Joined {
        /// All frames up to this number have come.
        received: u64,
    },
    /// Source, before a QEMU that cannot go back from there goes over to post-copy: wait for the link however long
    /// it is away, until the VM runs with you. Destination: so I do.
    KeepWaiting,
    /// Source, on a new connection: the VM of that migration was handed over in post-copy, and the rest of its
    /// memory is to follow from here. What there is of an earlier session ends. Answered by
    /// [`Control::Resumed`], [`Control::AlreadyComplete`], by [`Control::Outcome`] when the VM is lost, or by
    /// [`Control::Refused`] when it cannot be resumed now.
    Resume {
        /// The number of the offer.
        job: u64,
        /// The VM.
        vm: String,
        /// Connections that the source would use.
        connections: u8,
        /// How many seconds the link may be away.
        patience: u16,
    },
    /// Destination: my QEMU waits for the stream that resumes. The session begins.
    Resumed {
        /// Whoever knows it may join the session.
        token: [u8; 16],
        /// Connections that the session has, at least 1.
        connections: u8,
        /// Number of QEMU's RAM section.
        section: u32,
        /// QEMU's RAM blocks by name, each with its length in bytes: their order is that of the first stream.
        blocks: Vec<(String, u64)>,
    },
    /// Destination: all memory of the VM is here already.
    AlreadyComplete,
    /// Destination, when all memory of a VM in post-copy is here: what that cost the guest.
    Stalled(Stalls),
    /// A host that is about to start a VM, on a new connection: do you have it?
    Locate {
        /// The VM.
        vm: String,
    },
    /// The answer to [`Control::Locate`].
    Located(Presence),
    /// Destination, in post-copy from a QEMU that can take the VM back until then: mine has loaded the devices. I
    /// neither run the VM nor drop it before you have said [`Control::Commit`] or [`Control::Abort`].
    Loaded,
    /// Destination, in answer to [`Control::Query`]: I have said [`Control::Loaded`] and heard nothing since. Answered by
    /// [`Control::Commit`] if the source's QEMU cannot run the VM any more, and by [`Control::Abort`] if it keeps it;
    /// then comes [`Control::Outcome`].
    Held,
    /// Source, between `Accepted` and `Prepare`, or in the session: read these blocks. Some of each session, see
    /// the destination's bound.
    Compare(Comparison),
    /// Destination: so they are here.
    Compared(Compared),
    /// Destination, of a VM in post-copy: its guest ended by itself and its QEMU with it, so the rest of its memory is
    /// not wanted any more. Also an answer to [`Control::Resume`].
    GuestEnded(GuestEnd),
    /// Source, between `Accepted` and `Prepare`: what does your monotonic clock show? Answered at once.
    ClockWanted,
    /// Destination: that.
    Clock {
        /// Nanoseconds since a moment that stays the same while the host is up.
        monotonic_ns: u64,
    },
    /// Source, in the session before it says [`Control::Commit`]: so the guest's clock would go on, had it not moved.
    GuestClock(GuestClock),
}

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_SMALL_PAYLOAD>()
}

/// Encodes a control message as a frame's payload.
pub fn encode_control(message: &Control) -> Result<Vec<u8>, LinkError> {
    bincode::serde::encode_to_vec(message, configuration())
        .map_err(|error| LinkError::Control(error.to_string()))
}

/// Decodes a control message; bytes after it are an error.
pub fn decode_control(payload: &[u8]) -> Result<Control, LinkError> {
    let (message, used) = bincode::serde::decode_from_slice(payload, configuration())
        .map_err(|error| LinkError::Control(error.to_string()))?;
    if used != payload.len() {
        return Err(LinkError::Control(format!(
            "{} bytes follow it",
            payload.len() - used
        )));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn offers_round_trip(
            from in ".{0,40}", qemu_package in ".{0,40}", job: u64, first: u64, attempt: u16, definition in ".{0,200}", cpu_flags in prop::collection::vec("[a-z0-9_]{1,9}", 0..4),
            disks in prop::collection::vec(("[a-z]{1,9}", any::<u64>()), 0..4), qemu: [u32; 3],
            digest_key: [u8; 16], running: bool, dry_run: bool,
            nonce: [u8; 16], made: u64,
            lengths in prop::collection::vec(("[a-z/]{1,9}", prop::collection::vec(any::<u32>(), 0..4)), 0..4),
        ) {
            let signs = Signs { nonce, made };
            let disks = disks.into_iter().map(|(id, size)| OfferedDisk { id, size }).collect();
            let message = Control::Offer(Box::new(Offer {
                from, job, first, attempt, definition, qemu, qemu_package, disks, cpu_flags, digest_key, running, dry_run,
                source_job: job ^ 1, autostart: running, signs,
                virtio: lengths.into_iter().map(|(path, lengths)| OfferedVirtio { kind: path.clone(), path, lengths }).collect(),
            }));
            let bytes = encode_control(&message).unwrap();
            prop_assert_eq!(decode_control(&bytes), Ok(message));
        }

        #[test]
        fn no_payload_panics(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_control(&payload);
        }
    }

    #[test]
    fn a_guest_that_ended_is_told_of() {
        for end in [GuestEnd::ShutDown, GuestEnd::Panicked, GuestEnd::Rebooted] {
            let message = Control::GuestEnded(end);
            let bytes = encode_control(&message).unwrap();
            assert_eq!(decode_control(&bytes), Ok(message));
        }
    }

    #[test]
    fn clocks_are_told() {
        let guest = GuestClock {
            ahead_ns: i64::MIN,
            within_ns: u64::MAX,
        };
        for message in [
            Control::ClockWanted,
            Control::Clock {
                monotonic_ns: u64::MAX,
            },
            Control::GuestClock(guest),
        ] {
            let bytes = encode_control(&message).unwrap();
            assert_eq!(decode_control(&bytes), Ok(message));
        }
    }

    #[test]
    fn bytes_after_a_message_are_refused() {
        let mut bytes = encode_control(&Control::Commit).unwrap();
        bytes.push(0);
        assert!(decode_control(&bytes).is_err());
    }
}
