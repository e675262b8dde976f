//! A relay between two QEMUs that takes the stream apart and puts it together again.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::return_path::{MAX_MESSAGE_LEN, Message};
use transhume_protocol::qemu::{
    CommandKind, Configuration, Decoder, Encoder, Error, Item, Kind, MAX_ITEM_LEN, PAGE_SIZE, Page,
    start_stream,
};

/// What a relay does to the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Encodes every item anew, which must give the same bytes.
    AsItIs,
    /// Holds every third page back until the END.
    HoldBack,
}

/// What a relay has seen.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) machine: String,
    pub(crate) blocks: Vec<Block>,
    pub(crate) pages: usize,
    pub(crate) zero_pages: usize,
    pub(crate) held_back: usize,
    pub(crate) commands: Vec<CommandKind>,
    pub(crate) packages: usize,
    /// What came back, as text.
    pub(crate) messages: Vec<String>,
    pub(crate) end_of_stream: bool,
    pub(crate) memory_is_whole: bool,
}

/// Starts a relay that listens at `source` and connects to `destination`.
pub(crate) fn start(source: &Path, destination: &Path, plan: Plan) -> JoinHandle<Record> {
    let listener = UnixListener::bind(source).unwrap();
    let destination: PathBuf = destination.to_owned();
    thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut to = UnixStream::connect(destination).unwrap();
        let mut answers = to.try_clone().unwrap();
        let mut asker = from.try_clone().unwrap();
        let return_path = thread::spawn(move || relay_answers(&mut answers, &mut asker));
        let mut relay = Relay::new(plan);
        relay.run(&mut from, &mut to).unwrap();
        to.shutdown(Shutdown::Write).unwrap();
        relay.record.messages = return_path.join().unwrap();
        relay.record.memory_is_whole = relay.decoder.memory_is_whole();
        relay.record
    })
}

/// Starts a relay without a destination that expects an error, and closes the stream then.
pub(crate) fn start_alone(source: &Path) -> JoinHandle<Error> {
    let listener = UnixListener::bind(source).unwrap();
    thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let error = Relay::new(Plan::AsItIs).run(&mut from, &mut std::io::sink());
        error.unwrap_err()
    })
}

/// Passes messages back until there are no more, and says what they were.
fn relay_answers(from: &mut UnixStream, to: &mut UnixStream) -> Vec<String> {
    let mut messages = Vec::new();
    let mut buffer = Vec::new();
    let mut piece = [0; 512];
    loop {
        let length = from.read(&mut piece).unwrap_or(0);
        if length == 0 {
            return messages;
        }
        buffer.extend_from_slice(&piece[..length]);
        while let Some((message, used)) = Message::decode(&buffer).unwrap() {
            let mut out = Vec::new();
            message.encode(&mut out);
            assert_eq!(out, buffer[..used]);
            messages.push(format!("{message:?}"));
            let _ = to.write_all(&out);
            buffer.drain(..used);
        }
        assert!(buffer.len() < MAX_MESSAGE_LEN);
    }
}

struct Relay {
    plan: Plan,
    decoder: Decoder,
    encoder: Encoder,
    ending: bool,
    /// Bytes of the START so far.
    start: Option<Vec<u8>>,
    held: BTreeMap<Page, Held>,
    record: Record,
}

enum Held {
    Fill(u8),
    Data(Vec<u8>),
}

impl Relay {
    fn new(plan: Plan) -> Self {
        Self {
            plan,
            decoder: Decoder::new(),
            encoder: Encoder::new(0, Vec::new()),
            ending: false,
            start: None,
            held: BTreeMap::new(),
            record: Record::default(),
        }
    }

    fn run(&mut self, from: &mut impl Read, to: &mut impl Write) -> Result<(), Error> {
        let mut buffer = vec![0; MAX_ITEM_LEN + (1 << 16)];
        let (mut filled, mut out) = (0, Vec::new());
        loop {
            let length = from.read(&mut buffer[filled..]).unwrap();
            if length == 0 {
                assert_eq!(filled, 0, "the stream ends in the middle of an item");
                return Ok(());
            }
            filled += length;
            let mut at = 0;
            while let Some(item) = self.decoder.next(&buffer[at..filled])? {
                let bytes = &buffer[at..at + item.length];
                at += item.length;
                self.pass(&item, bytes, &mut out);
            }
            buffer.copy_within(at..filled, 0);
            filled -= at;
            to.write_all(&out).unwrap();
            out.clear();
        }
    }

    /// Writes an item, or what takes its place.
    fn pass(&mut self, item: &Item<'_>, bytes: &[u8], out: &mut Vec<u8>) {
        let from = out.len();
        match &item.kind {
            Kind::Page { page, data } => {
                self.record.pages += 1;
                self.name_as_source(item.length > 8 + PAGE_SIZE);
                if self.holds(*page) {
                    self.held.insert(*page, Held::Data(data.to_vec()));
                    return;
                }
                // A page held back is older.
                self.held.remove(page);
                self.encoder.page(*page, data, out).unwrap();
            }
            Kind::Zero { page, fill } => {
                self.record.zero_pages += 1;
                self.name_as_source(item.length > 8 + 1);
                if self.holds(*page) {
                    self.held.insert(*page, Held::Fill(*fill));
                    return;
                }
                self.held.remove(page);
                self.encoder.zero(*page, *fill, out).unwrap();
            }
            Kind::EndOfSection => {
                if self.ending {
                    self.put_held(out);
                }
                self.encoder.end_of_section(out);
            }
            _ => self.pass_other(item, bytes, out),
        }
        if self.plan == Plan::AsItIs {
            assert_eq!(&out[from..], bytes, "{:?}", item.kind);
        }
        if let Some(start) = &mut self.start {
            start.extend_from_slice(bytes);
        }
        if matches!(item.kind, Kind::Footer { .. })
            && let Some(start) = self.start.take()
        {
            let mut encoded = Vec::new();
            self.encoder.start(&mut encoded);
            assert_eq!(encoded, start);
        }
    }

    fn pass_other(&mut self, item: &Item<'_>, bytes: &[u8], out: &mut Vec<u8>) {
        match &item.kind {
            Kind::Configuration(configuration) => {
                configuration.machine.clone_into(&mut self.record.machine);
                let mut whole = Vec::new();
                let machine = configuration.machine;
                let uuid = configuration.uuid;
                start_stream(&Configuration { machine, uuid }, &mut whole);
                out.extend_from_slice(&whole[8..]);
            }
            Kind::SectionStart { id } => {
                self.encoder = Encoder::new(*id, Vec::new());
                self.start = Some(Vec::new());
                out.extend_from_slice(bytes);
            }
            Kind::RamBlocks => {
                let id = self.decoder.ram_section().unwrap();
                self.encoder = Encoder::new(id, self.decoder.blocks().to_vec());
                self.record.blocks = self.decoder.blocks().to_vec();
                out.extend_from_slice(bytes);
            }
            Kind::SectionPart { .. } => self.encoder.part(out),
            Kind::SectionEnd { .. } => {
                self.ending = true;
                self.encoder.end(out);
            }
            Kind::Footer { .. } => self.encoder.footer(out),
            Kind::Command(command) => {
                self.record.commands.push(command.kind);
                command.encode(out).unwrap();
            }
            Kind::Package => {
                self.record.packages += item.length;
                out.extend_from_slice(bytes);
            }
            Kind::EndOfStream => {
                self.record.end_of_stream = true;
                out.extend_from_slice(bytes);
            }
            _ => out.extend_from_slice(bytes),
        }
    }

    /// QEMU names a block again where it has begun to scan anew, though the record before was for it too.
    fn name_as_source(&mut self, named: bool) {
        if named {
            self.encoder.forget_block();
        }
    }

    fn holds(&self, page: Page) -> bool {
        self.plan == Plan::HoldBack && !self.ending && (page.offset >> 12).is_multiple_of(3)
    }

    fn put_held(&mut self, out: &mut Vec<u8>) {
        self.record.held_back = self.held.len();
        for (page, content) in std::mem::take(&mut self.held) {
            match content {
                Held::Fill(fill) => self.encoder.zero(page, fill, out).unwrap(),
                Held::Data(data) => {
                    self.encoder.page_header(page, out).unwrap();
                    out.extend_from_slice(&data);
                }
            }
        }
    }
}
