//! Post-copy at the destination: the VM runs here while part of its memory is still at the source.
//!
//! Before the switch pages may come again and again, the last word counts. At the switch QEMU forgets the pages
//! that the source still has; from then on each of them goes to QEMU exactly once, by its stream: QEMU puts it
//! into place by userfaultfd, and ends if it is there already (`EEXIST`).

use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use transhume_protocol::link::{Control, GuestEnd, Stalls, Waits};
use transhume_protocol::qemu::return_path::{Message, PACKAGE_LOADED};
use transhume_protocol::qemu::{Command, CommandKind};

use super::arrivals::{Arrivals, Stage};
use super::engine::Engine;
use super::gate::Gate;
use crate::error::{CutOff, RelayError};
use transhume_hypervisor::qmp::Event;
use transhume_hypervisor::{Qmp, Vm};
use transhume_pages::PageKey;
use transhume_pages::bitmap::Bitmap;

/// How often QEMU is asked whether all memory is there.
const GLANCE: Duration = Duration::from_millis(100);
/// How long QEMU may take to say so after the source has ended the link.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long the guest's agent may take to say what its gate counted.
const LAST_COUNTS: Duration = Duration::from_secs(1);
/// The number of a ping of our own. QEMU's are small.
const PING: u32 = 0x7472_616e;

/// Pages that QEMU has forgotten and not got again.
pub(super) struct Missing {
    blocks: Vec<Bitmap>,
    left: u64,
}

impl Missing {
    /// None yet, of blocks of so many pages.
    pub(super) fn new(lengths: impl Iterator<Item = u64>) -> Self {
        Self {
            blocks: lengths.map(Bitmap::new).collect(),
            left: 0,
        }
    }

    /// QEMU forgets pages.
    pub(super) fn forget(&mut self, block: u16, page: u64, count: u32) -> Result<(), RelayError> {
        let outside = RelayError::Misplaced("page outside of the VM's memory");
        let Some(pages) = self.blocks.get_mut(usize::from(block)) else {
            return Err(outside);
        };
        let end = page.saturating_add(u64::from(count));
        if end > pages.len() {
            return Err(outside);
        }
        for page in page..end {
            self.left += u64::from(pages.insert(page));
        }
        Ok(())
    }

    /// Whether QEMU needs that page; it will not after this.
    pub(super) fn take(&mut self, key: PageKey) -> bool {
        let pages = self.blocks.get_mut(usize::from(key.block));
        let needed = pages.is_some_and(|pages| pages.remove(key.page));
        self.left -= u64::from(needed);
        needed
    }

    /// Whether QEMU needs that page.
    pub(super) fn contains(&self, key: PageKey) -> bool {
        let pages = self.blocks.get(usize::from(key.block));
        pages.is_some_and(|pages| pages.contains(key.page))
    }

    /// The pages that QEMU has forgotten and not got again, a map a block.
    pub(super) fn pages(&self) -> &[Bitmap] {
        &self.blocks
    }

    /// None but these of a block are missing.
    pub(super) fn set(&mut self, block: usize, pages: Bitmap) {
        if let Some(before) = self.blocks.get_mut(block) {
            self.left = (self.left + pages.count()).saturating_sub(before.count());
            *before = pages;
        }
    }

    /// Whether QEMU has all.
    pub(super) fn is_empty(&self) -> bool {
        self.left == 0
    }
}

/// The command that is answered when QEMU has worked off all of its stream before it. With post-copy ahead it
/// throws away what its memory holds at the start of the stream: what is written there before is lost.
pub(super) fn ping() -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let payload = &PING.to_be_bytes();
    let kind = CommandKind::Ping;
    Command { kind, payload }.encode(&mut bytes)?;
    Some(bytes)
}

/// What QEMU said that is not passed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct KeptBack {
    /// It answered our own ping.
    pub(super) ping: bool,
    /// It has loaded the package of devices.
    pub(super) loaded: bool,
}

/// Takes the answer to our own ping, and that to the package's, out of what QEMU says, has each request for pages name its block, since
/// between two of QEMU's there may be one of ours (see `gate`), and has the source told what is here.
#[derive(Default)]
pub(super) struct Answers {
    partial: Vec<u8>,
    /// Length of the longest bitmap that may come, in bytes.
    longest_bitmap: usize,
    /// The block that QEMU named last.
    block: String,
}

impl Answers {
    /// Of a QEMU whose post-copy is resumed; its longest block has so many pages.
    pub(super) fn resumed(pages: u64) -> Self {
        Self {
            longest_bitmap: usize::try_from(pages.div_ceil(64) * 8).unwrap_or(usize::MAX),
            ..Self::default()
        }
    }

    /// What is to be passed on of the whole messages so far, and what was kept back of them.
    /// `received` makes of QEMU's word on a block's pages what the source is told.
    pub(super) fn filter(
        &mut self,
        bytes: &[u8],
        mut received: impl FnMut(&str, &[u8]) -> Result<Vec<u8>, RelayError>,
    ) -> Result<(Vec<u8>, KeptBack), RelayError> {
        self.partial.extend_from_slice(bytes);
        let (mut used, mut kept) = (0, KeptBack::default());
        let mut passed = Vec::with_capacity(self.partial.len());
        while let Some((message, length)) =
            Message::decode_resumed(&self.partial[used..], self.longest_bitmap)?
        {
            match message {
                Message::Pong { number: PING } => kept.ping = true,
                Message::Pong {
                    number: PACKAGE_LOADED,
                } => kept.loaded = true,
                Message::Received { block, bitmap } => {
                    let bitmap = &received(block, bitmap)?;
                    Message::Received { block, bitmap }.encode(&mut passed);
                }
                Message::RequestPages { offset, length } if !self.block.is_empty() => {
                    let block = &self.block;
                    Message::RequestPagesOf {
                        block,
                        offset,
                        length,
                    }
                    .encode(&mut passed);
                }
                _ => {
                    if let Message::RequestPagesOf { block, .. } = message {
                        block.clone_into(&mut self.block);
                    }
                    passed.extend_from_slice(&self.partial[used..used + length]);
                }
            }
            used += length;
        }
        self.partial.drain(..used);
        Ok((passed, kept))
    }
}

/// What is wrong when QEMU does not want post-copy.
pub(super) fn unsupported(host: &str, error: &transhume_hypervisor::Error) -> String {
    format!(
        "QEMU on {host} cannot take a VM in post-copy: {error}; it needs userfaultfd (/dev/userfaultfd, or \
         vm.unprivileged_userfaultfd = 1) and no limit on locked memory. `--mode pre` does without"
    )
}

/// Waits until all memory of a VM that runs here is here.
pub(super) async fn complete(
    engine: &Engine,
    vm: &Vm,
    mut events: broadcast::Receiver<Event>,
) -> Result<(), CutOff> {
    loop {
        tokio::select! {
            biased;
            () = vm.gone() => return Err(qemu_ended(vm).await),
            error = engine.failure() => return last_word(vm, &error).await,
            event = events.recv() => if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                return Err(qemu_ended(vm).await);
            },
            () = tokio::time::sleep(GLANCE) => {}
        }
        if let Some(how) = vm.qmp().guest_end() {
            return Err(CutOff::GuestEnded(how));
        }
        // The source's QEMU waits for the last thing that this one says.
        if engine.is_closed() && is_complete(vm.qmp()).await {
            return Ok(());
        }
    }
}

/// The source ends the link when it knows that all is here; QEMU may need a moment more.
async fn last_word(vm: &Vm, error: &RelayError) -> Result<(), CutOff> {
    let deadline = Instant::now() + LAST_WORD;
    loop {
        if let Some(how) = vm.qmp().guest_end() {
            return Err(CutOff::GuestEnded(how));
        }
        if is_complete(vm.qmp()).await {
            return Ok(());
        }
        if vm.qmp().is_closed() {
            return Err(qemu_ended(vm).await);
        }
        if Instant::now() > deadline {
            return Err(CutOff::Broken(error.to_string()));
        }
        tokio::time::sleep(GLANCE).await;
    }
}

/// Why a QEMU ended that is gone, or is about to be.
async fn qemu_ended(vm: &Vm) -> CutOff {
    // By then all that it said was read.
    let ended = vm.ends_within(LAST_WORD).await;
    match vm.qmp().guest_end() {
        Some(how) => CutOff::GuestEnded(how),
        None if ended => CutOff::Broken("QEMU has ended".to_owned()),
        None => CutOff::Broken("the QMP connection to QEMU is lost".to_owned()),
    }
}

/// Has QEMU end whose guest has, and tells the source, which needs to keep nothing then. It ends by itself, unless it waits
/// for memory in doing so.
pub(super) async fn guest_ended(
    engine: &Engine,
    arrivals: &Arrivals,
    vm: &Vm,
    job: u64,
    how: GuestEnd,
) {
    let name = vm.name();
    if !vm.ends_within(LAST_WORD).await
        && let Err(error) = vm.kill().await
    {
        tracing::warn!(vm = name, %error, "QEMU of a guest that has ended");
    }
    arrivals.note_surely(job, name, Stage::Ended(how));
    tracing::info!(
        vm = name,
        "its guest {} before all of its memory was here",
        how.did()
    );
    engine.send(Control::GuestEnded(how));
}

/// What it cost the guest. Takes a moment if the guest's agent does.
pub(super) async fn stalls(qmp: &Qmp, gate: Option<Gate>) -> Stalls {
    let counts = match gate {
        Some(gate) => gate.end(LAST_COUNTS).await,
        None => None,
    };
    let said = qmp.query_migrate().await.unwrap_or_default();
    Stalls {
        cpus_ms: said.postcopy_vcpu_blocktime.unwrap_or_default(),
        all_cpus_ms: said.postcopy_blocktime.unwrap_or_default(),
        processes: counts.map(|counts| Waits {
            pages: counts.gated,
            waits: counts.waits,
            waited_us: counts.waited_us,
            longest_us: counts.longest_us,
            absent: counts.absent,
            cpu_us: counts.cpu_us,
        }),
    }
}

async fn is_complete(qmp: &Qmp) -> bool {
    let said = qmp.query_migrate().await;
    said.is_ok_and(|said| said.status.as_deref() == Some("completed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(block: u16, page: u64) -> PageKey {
        PageKey { block, page }
    }

    #[test]
    fn a_forgotten_page_is_needed_once() {
        let mut missing = Missing::new([8, 4].into_iter());
        assert!(!missing.take(key(0, 3)));
        missing.forget(0, 2, 3).unwrap();
        missing.forget(0, 4, 2).unwrap();
        missing.forget(1, 3, 1).unwrap();
        for page in 2..6 {
            assert!(!missing.is_empty());
            assert!(missing.take(key(0, page)) && !missing.take(key(0, page)));
        }
        assert!(!missing.take(key(2, 0)) && !missing.take(key(1, 9)));
        assert!(missing.take(key(1, 3)) && missing.is_empty());
        assert!(missing.forget(1, 3, 2).is_err());
        assert!(missing.forget(2, 0, 1).is_err());
        assert!(missing.forget(0, u64::MAX, 1).is_err());
    }

    #[test]
    fn only_answers_that_are_ours_to_take_are_kept_back() {
        let request = Message::RequestPagesOf {
            block: "pc.ram",
            offset: 4096,
            length: 4096,
        };
        let received = |bitmap| Message::Received {
            block: "pc.ram",
            bitmap,
        };
        let (theirs, told) = ([1; 8], vec![2; 8]);
        let said = [
            Message::Pong { number: 1 },
            Message::Pong { number: PING },
            Message::Pong {
                number: PACKAGE_LOADED,
            },
            request,
            received(&theirs),
        ];
        let passed_on = [said[0], request, received(&told)];
        let [mut all, mut expected] = [Vec::new(), Vec::new()];
        for message in said {
            message.encode(&mut all);
        }
        for message in passed_on {
            message.encode(&mut expected);
        }
        for step in [1, 3, all.len()] {
            let mut answers = Answers::resumed(64);
            let (mut passed, mut answered, mut loaded) = (Vec::new(), 0, 0);
            for piece in all.chunks(step) {
                let told = answers.filter(piece, |block, bitmap| {
                    assert_eq!((block, bitmap), ("pc.ram", &theirs[..]));
                    Ok(told.clone())
                });
                let (some, ours) = told.unwrap();
                passed.extend(some);
                answered += u32::from(ours.ping);
                loaded += u32::from(ours.loaded);
            }
            assert_eq!((passed, answered, loaded), (expected.clone(), 1, 1));
        }
        let none = |_: &str, _: &[u8]| unreachable!("no bitmap may come");
        for wrong in [&[0xff; 8][..], &all] {
            assert!(Answers::default().filter(wrong, none).is_err());
        }

        // A request that means the block named last names it.
        let (mut short, mut named) = (Vec::new(), Vec::new());
        request.encode(&mut short);
        request.encode(&mut named);
        Message::RequestPages {
            offset: 4096,
            length: 4096,
        }
        .encode(&mut short);
        request.encode(&mut named);
        let (passed, _) = Answers::default().filter(&short, none).unwrap();
        assert_eq!(passed, named);
        assert_eq!(&ping().unwrap()[5..], PING.to_be_bytes());
    }
}
