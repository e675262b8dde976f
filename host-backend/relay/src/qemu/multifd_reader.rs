//! Reads one of QEMU's multifd channels.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use transhume_protocol::link::Digest;
use transhume_protocol::memory::Block;
use transhume_protocol::qemu;
use transhume_protocol::qemu::multifd::{GREETING_LEN, Greeting, PACKET_LEN, Packet};

use super::key;
use super::multifd_barrier::{Missed, MultifdBarrier};
use crate::error::RelayError;
use crate::progress::Counter;
use crate::send::batches::Collector;
use crate::send::buffers::{BUFFER_LEN, Buffer};
use crate::send::sent_pages::Noted;
use transhume_pages::{PAGE_SIZE, PageKey};

/// Packets in a batch, at most: zero pages alone fill no buffer.
const MAX_PACKETS: usize = 32;

const _: () = assert!(qemu::multifd::MAX_PACKET_PAGES * PAGE_SIZE <= BUFFER_LEN);

/// The reader of one channel.
pub(crate) struct ChannelReader {
    socket: UnixStream,
    collector: Collector,
    rendezvous: Arc<MultifdBarrier>,
    blocks: Arc<[Block]>,
    buffer: Buffer,
    /// Bytes of the buffer that the batch has taken.
    used: usize,
    packets: usize,
    begun: Instant,
    noted: Vec<(PageKey, Digest, Noted)>,
}

impl ChannelReader {
    pub(crate) fn new(
        socket: UnixStream,
        collector: Collector,
        rendezvous: Arc<MultifdBarrier>,
    ) -> Self {
        Self {
            socket,
            rendezvous,
            blocks: Arc::default(),
            buffer: collector.reading.pool.take(),
            collector,
            used: 0,
            packets: 0,
            begun: Instant::now(),
            noted: Vec::new(),
        }
    }

    /// Reads to the end of the channel.
    pub(crate) fn run(mut self) -> Result<(), RelayError> {
        let mut greeting = [0; GREETING_LEN];
        self.read_whole(&mut greeting)?;
        let Greeting { channel, .. } = Greeting::decode(&greeting)?;
        tracing::debug!(channel, "QEMU opened a channel");
        self.begin_batch()?;
        let mut packet = [0; PACKET_LEN];
        while self.read_whole(&mut packet)? {
            self.count(PACKET_LEN);
            self.packet(&packet)?;
        }
        Ok(())
    }

    fn count(&self, bytes: usize) {
        self.collector
            .shared()
            .progress
            .add(Counter::StreamBytes, bytes as u64);
    }

    /// Fills `bytes`. Says whether the channel had them, and has not ended where it may.
    fn read_whole(&mut self, bytes: &mut [u8]) -> Result<bool, RelayError> {
        match self.socket.read_exact(bytes) {
            Ok(()) => Ok(true),
            // QEMU closes its channels when all is done.
            Err(_) if self.rendezvous.has_ended() => Ok(false),
            Err(error) => Err(ended(error)),
        }
    }

    fn begin_batch(&mut self) -> Result<(), RelayError> {
        (self.used, self.packets) = (0, 0);
        self.collector.begin_batch()?;
        self.begun = Instant::now();
        Ok(())
    }

    fn send_batch(&mut self) -> Result<(), RelayError> {
        if self.collector.holds_buffer() {
            let fresh = self.collector.reading.pool.take();
            let buffer = std::mem::replace(&mut self.buffer, fresh);
            self.collector.dispatch(Some(Arc::new(buffer)))?;
        } else {
            self.collector.dispatch(None)?;
        }
        self.collector.keep_pace()?;
        self.begin_batch()
    }

    fn packet(&mut self, bytes: &[u8; PACKET_LEN]) -> Result<(), RelayError> {
        let blocks = Arc::clone(&self.blocks);
        let packet = Packet::decode(bytes, &blocks)?;
        if !packet.is_empty() {
            self.rendezvous.begin_pages()?;
            if BUFFER_LEN - self.used < packet.data_len() {
                self.send_batch()?;
            }
            self.pages(&packet)?;
        }
        if packet.sync {
            self.send_batch()?;
            self.rendezvous.arrive()?;
            if self.blocks.is_empty() {
                self.blocks = self.collector.reading.ledger().blocks();
            }
            return Ok(());
        }
        let full = self.used == BUFFER_LEN || self.packets == MAX_PACKETS;
        if full || !self.collector.more_comes(&self.socket, self.begun) {
            self.send_batch()?;
        }
        Ok(())
    }

    /// Reads a packet's pages and takes them. There is room for them in the buffer.
    fn pages(&mut self, packet: &Packet<'_>) -> Result<(), RelayError> {
        let length = packet.data_len();
        let data = &mut self.buffer[self.used..self.used + length];
        self.socket.read_exact(data).map_err(ended)?;
        let (pages, _) = data.as_chunks::<PAGE_SIZE>();
        let fresh = Noted {
            first: false,
            unchanged: false,
        };
        self.noted.clear();
        for (page, data) in packet.pages().zip(pages) {
            let digest = self.collector.digester.digest(data);
            self.noted.push((key(page), digest, fresh));
        }
        {
            // Once a packet, so that the readers hardly ever wait for one another.
            let mut ledger = self.collector.reading.ledger();
            for (key, digest, noted) in &mut self.noted {
                *noted = ledger.page(*key, *digest)?;
            }
            for page in packet.zero_pages() {
                ledger.filled(key(page))?;
            }
        }
        self.count(length);
        for (key, digest, noted) in self.noted.drain(..) {
            self.collector.page(key, &digest, self.used, noted);
            self.used += PAGE_SIZE;
        }
        for page in packet.zero_pages() {
            self.collector.filled(key(page), 0);
        }
        self.packets += 1;
        Ok(())
    }
}

impl From<Missed> for RelayError {
    fn from(missed: Missed) -> Self {
        match missed {
            Missed::Closed => Self::Stopped,
            Missed::OutOfPlace => Self::Disordered,
        }
    }
}

fn ended(error: io::Error) -> RelayError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => RelayError::EarlyEnd,
        _ => RelayError::Socket(error),
    }
}
