//! What QEMU says against its stream: the return path.

use transhume_protocol::memory::PageRequest;
use transhume_protocol::qemu::return_path::{MAX_MESSAGE_LEN, Message, PACKAGE_LOADED};
use transhume_protocol::qemu::{Command, CommandKind};

use crate::error::RelayError;
use crate::progress::Counter;
use crate::send::shared::Shared;
use transhume_pages::PAGE_SIZE;

/// The number of a ping of our own. QEMU's are small.
const PING: u32 = 0x7472_616e;

/// The command that is answered when QEMU has worked off all of its stream before it. With post-copy ahead it
/// throws away what its memory holds at the start of the stream: what is written there before is lost.
pub(crate) fn ping() -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let payload = &PING.to_be_bytes();
    let kind = CommandKind::Ping;
    Command { kind, payload }.encode(&mut bytes)?;
    Some(bytes)
}

/// The answer to the ping at the package's end: the devices are loaded at the destination.
pub(crate) fn package_loaded() -> Vec<u8> {
    let mut message = Vec::new();
    let number = PACKAGE_LOADED;
    Message::Pong { number }.encode(&mut message);
    message
}

/// Longest request, in pages: its length in bytes has 32 bits.
const MAX_REQUEST: u64 = 1 << 18;

/// What asks the source's QEMU for pages.
pub(crate) fn page_requests(requests: &[PageRequest]) -> Vec<u8> {
    let mut said = Vec::new();
    for PageRequest { block, page, count } in requests {
        let mut done = 0;
        while done < *count {
            let pages = (count - done).min(MAX_REQUEST);
            Message::RequestPagesOf {
                block,
                offset: (page + done) * PAGE_SIZE as u64,
                length: u32::try_from(pages * PAGE_SIZE as u64).unwrap_or(0),
            }
            .encode(&mut said);
            done += pages;
        }
    }
    said
}

/// What QEMU said that is not passed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct KeptBack {
    /// It answered our own ping.
    pub(crate) ping: bool,
    /// It has loaded the package of devices.
    pub(crate) loaded: bool,
}

/// Takes the answer to our own ping, and that to the package's, out of what QEMU says, has each request for pages name its block, since
/// between two of QEMU's there may be one of ours (see `receive::fault_gate`), and has the source told what is here.
#[derive(Default)]
pub(crate) struct Filter {
    partial: Vec<u8>,
    /// Length of the longest bitmap that may come, in bytes.
    longest_bitmap: usize,
    /// The block that QEMU named last.
    block: String,
}

impl Filter {
    /// Of a QEMU whose post-copy is resumed; its longest block has so many pages.
    pub(crate) fn resumed(pages: u64) -> Self {
        Self {
            longest_bitmap: usize::try_from(pages.div_ceil(64) * 8).unwrap_or(usize::MAX),
            ..Self::default()
        }
    }

    /// What is to be passed on of the whole messages so far, and what was kept back of them.
    /// `received` makes of QEMU's word on a block's pages what the source is told.
    pub(crate) fn filter(
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

/// Passes on to the source's QEMU what the destination's says, but for what would let it switch over: that waits.
#[derive(Default)]
pub(crate) struct Passing {
    partial: Vec<u8>,
    /// Length of the longest bitmap of received pages that may come, in bytes.
    longest_bitmap: usize,
}

impl Passing {
    /// Of a post-copy that is resumed; the longest block has so many bytes.
    pub(crate) fn resumed(longest: u64) -> Self {
        let words = longest.div_ceil(PAGE_SIZE as u64 * 64);
        Self {
            longest_bitmap: usize::try_from(words * 8).unwrap_or(usize::MAX),
            ..Self::default()
        }
    }

    /// Passes on what is whole.
    pub(crate) fn pass(&mut self, bytes: &[u8], shared: &Shared) -> Result<(), RelayError> {
        self.partial.extend_from_slice(bytes);
        let mut used = 0;
        while let Some((message, length)) =
            Message::decode_resumed(&self.partial[used..], self.longest_bitmap)?
        {
            let bytes = &self.partial[used..used + length];
            if let Message::RequestPagesOf { length, .. } | Message::RequestPages { length, .. } =
                message
            {
                let pages = u64::from(length) / PAGE_SIZE as u64;
                shared.progress.add(Counter::RequestedPages, pages);
            }
            // The destination always names the block.
            if let Message::RequestPagesOf {
                block,
                offset,
                length,
            } = message
                && let Some(first) = shared.order.waits_for(block, offset)
            {
                let pages = u64::from(length) / PAGE_SIZE as u64;
                shared.requests.note(first, pages);
            }
            if matches!(message, Message::SwitchoverAck) {
                shared.hold_switchover(bytes);
            } else {
                shared.tell_hypervisor(bytes)?;
            }
            used += length;
        }
        self.partial.drain(..used);
        if self.partial.len() > MAX_MESSAGE_LEN.saturating_add(self.longest_bitmap) {
            return Err(RelayError::Misplaced("message of the return path"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_asked_for_by_their_block_and_long_requests_are_cut() {
        let request = PageRequest {
            block: "pc.ram".to_owned(),
            page: 5,
            count: MAX_REQUEST + 1,
        };
        let bytes = page_requests(&[request]);
        let (mut rest, mut found) = (&bytes[..], Vec::new());
        while let Some((message, length)) = Message::decode(rest).unwrap() {
            let Message::RequestPagesOf {
                block: "pc.ram",
                offset,
                length: bytes,
            } = message
            else {
                panic!("{message:?}");
            };
            found.push((offset / 4096, u64::from(bytes) / 4096));
            rest = &rest[length..];
        }
        assert!(rest.is_empty());
        assert_eq!(found, [(5, MAX_REQUEST), (5 + MAX_REQUEST, 1)]);
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
            let mut filter = Filter::resumed(64);
            let (mut passed, mut answered, mut loaded) = (Vec::new(), 0, 0);
            for piece in all.chunks(step) {
                let told = filter.filter(piece, |block, bitmap| {
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
            assert!(Filter::default().filter(wrong, none).is_err());
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
        let (passed, _) = Filter::default().filter(&short, none).unwrap();
        assert_eq!(passed, named);
        assert_eq!(&ping().unwrap()[5..], PING.to_be_bytes());
    }
}
