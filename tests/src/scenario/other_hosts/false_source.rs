//! A source that speaks the link's protocol until the destination's QEMU waits for its stream, and then
//! sends what no source would: nothing of it may run, or stay.

use super::strangers::{frame, numbered, random};
use crate::error::check;
use crate::hosts::daemon::PORT;
use crate::scenario::fixture::micro::{Micro, NAME};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;
use transhume_protocol::link::{
    BatchBuilder, BatchEncoding, Control, Cover, FRAME_HEADER_LEN, FrameHeader, FrameKind,
    LinkError, Offer, OfferedDisk, PREAMBLE_LEN, PostCopy, Preamble, SectionKind, Signs,
    decode_control, encode_control,
};

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "refused-false-source",
        about: "random, truncated and impossible streams behind a right handshake",
        limit: Duration::from_secs(180),
        run: false_source,
    }]
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(crate) fn wrong(error: LinkError) -> Error {
    Error::Check(format!("The link's protocol: {error}"))
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(crate) fn lost(error: std::io::Error) -> Error {
    Error::Check(format!("The link to hostb: {error}"))
}

/// A connection to the destination's daemon.
pub(crate) struct Link(TcpStream);

impl Link {
    pub(crate) fn open(pair: &Pair<'_>) -> Result<Self> {
        let target = pair.hosts.b.address;
        let connect = || TcpStream::connect((target, PORT));
        let mut stream = pair.hosts.a.inside(connect)?.map_err(lost)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
        stream.write_all(&Preamble::OURS.encode()).map_err(lost)?;
        let mut theirs = [0; PREAMBLE_LEN];
        stream.read_exact(&mut theirs).map_err(lost)?;
        Preamble::decode(&theirs).map_err(wrong)?;
        Ok(Self(stream))
    }

    pub(crate) fn send(&mut self, message: &Control) -> Result<()> {
        let payload = encode_control(message).map_err(wrong)?;
        self.0
            .write_all(&frame(FrameKind::Control, &payload)?)
            .map_err(lost)
    }

    /// Sends bytes as they are.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Sends frames of a session, numbered from 1, no more ahead of the daemon than the session's window allows; what
    /// the daemon says meanwhile is not looked at. Ends early when it hangs up.
    fn send_within_window(&mut self, frames: &[Vec<u8>]) -> Result<()> {
        const AHEAD: usize = 8;
        let mut taken = 0;
        for (sent, frame) in frames.iter().enumerate() {
            while sent >= taken + AHEAD {
                let Some((header, _)) = self.frame()? else {
                    return Ok(());
                };
                taken = taken.max(usize::try_from(header.numbering.taken).unwrap_or(0));
            }
            if self.0.write_all(frame).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The next control message; `None` when the daemon hangs up.
    pub(crate) fn hear(&mut self) -> Result<Option<Control>> {
        while let Some((header, payload)) = self.frame()? {
            if header.kind == FrameKind::Control {
                return decode_control(&payload).map(Some).map_err(wrong);
            }
        }
        Ok(None)
    }

    /// The next frame; `None` when the daemon hangs up.
    fn frame(&mut self) -> Result<Option<(FrameHeader, Vec<u8>)>> {
        let mut head = [0; FRAME_HEADER_LEN];
        if self.0.read_exact(&mut head).is_err() {
            return Ok(None);
        }
        let header = FrameHeader::decode(&head).map_err(wrong)?;
        let mut payload = vec![0; header.length];
        if self.0.read_exact(&mut payload).is_err() {
            return Ok(None);
        }
        header.check(Cover::Whole, &payload).map_err(wrong)?;
        Ok(Some((header, payload)))
    }
}

/// The micro-guest's own offer, but for the number.
pub(crate) fn offer(bed: &Bed, job: u64) -> Result<Control> {
    let micro = Micro {
        machine: "pc-q35-10.0".into(),
        ..Micro::new(bed)?
    };
    let disks = micro.disks.iter().map(|disk| {
        let size = std::fs::metadata(&disk.path).map_or(0, |found| found.len());
        OfferedDisk {
            id: disk.id.clone(),
            size,
        }
    });
    Ok(Control::Offer(Box::new(Offer {
        from: "hosta".into(),
        job,
        first: job,
        attempt: 0,
        disks: disks.collect(),
        definition: micro.definition(bed)?,
        qemu: [10, 0, 2],
        qemu_package: String::new(),
        cpu_flags: Vec::new(),
        digest_key: [7; 16],
        running: true,
        dry_run: false,
        source_job: 1,
        autostart: false,
        signs: Signs {
            nonce: [9; 16],
            made: 0,
        },
        virtio: Vec::new(),
    })))
}

fn batch(number: u64, build: impl FnOnce(&mut BatchBuilder)) -> Result<Vec<u8>> {
    let mut builder = BatchBuilder::new();
    build(&mut builder);
    let data = vec![0x5a; builder.data_len()];
    let (header, records) = builder
        .finish(number, BatchEncoding::Plain)
        .map_err(wrong)?;
    numbered(
        number + 1,
        FrameKind::Batch,
        &[&header.encode()[..], &records, &data].concat(),
    )
}

/// The start of a stream that QEMU takes, with the order to open its return path, and the package of devices; then more
/// than any package, a frame each.
fn endless_package() -> Result<Vec<Vec<u8>>> {
    const MACHINE: &[u8] = b"pc-q35-10.0";
    let long = vec![0x5a; 1 << 20];
    let start = batch(0, |batch| {
        batch.raw(b"QEVM\0\0\0\x03\x07\0\0\0\x0b");
        batch.raw(MACHINE);
        batch.raw(&[8, 0, 1, 0, 0]);
        batch.blocks(2, [(&b"pc.ram"[..], 128 << 20)].into_iter());
        batch.package();
    })?;
    let more = (1..400).map(|number| batch(number, |batch| batch.raw(&long)));
    std::iter::once(Ok(start)).chain(more).collect()
}

/// What a false source sends when it should send QEMU's stream.
fn streams() -> Result<Vec<(&'static str, Vec<u8>)>> {
    const RAM: &[u8] = b"pc.ram";
    let commit = |number| {
        let commit = encode_control(&Control::Commit).map_err(wrong)?;
        numbered(number, FrameKind::Control, &commit)
    };
    // QEMU's own header, and then nothing that it knows.
    let header = b"QEVM\0\0\0\x03";
    let noise = batch(0, |batch| {
        batch.raw(header);
        batch.raw(&random(5, 4000));
    })?;
    let table = |length| {
        batch(0, |batch| {
            batch.raw(header);
            batch.blocks(2, [(RAM, length)].into_iter());
            batch.section_open(SectionKind::Part);
        })
    };
    let guest = table(128 << 20)?;
    let then = |build: fn(&mut BatchBuilder)| Ok([guest.clone(), batch(1, build)?].concat());
    Ok(vec![
        ("nothing", Vec::new()),
        ("random bytes", random(6, 200_000)),
        ("half a batch", noise[..noise.len() / 2].to_vec()),
        (
            "a batch of random bytes",
            numbered(1, FrameKind::Batch, &random(7, 9000))?,
        ),
        ("a stream of random bytes", noise.clone()),
        (
            "a stream that ends early",
            batch(0, |batch| batch.raw(header))?,
        ),
        ("a commit at once", commit(1)?),
        (
            "a commit of random bytes",
            [noise.clone(), commit(2)?].concat(),
        ),
        ("the same again and again", noise.repeat(3)),
        ("a commit of the far future", commit(u64::MAX)?),
        (
            "a commit outside of the order",
            [noise, commit(0)?].concat(),
        ),
        (
            "a commit before the memory's end",
            [guest.clone(), commit(2)?].concat(),
        ),
        (
            "pages before their table",
            batch(0, |batch| batch.zero(0, 0, 0))?,
        ),
        ("a table of 2^60 bytes", table(1 << 60)?),
        (
            "a page behind the memory's end",
            then(|batch| batch.data(0, 1 << 40))?,
        ),
        ("a page of another block", then(|batch| batch.data(900, 0))?),
        (
            "a disk that is not there",
            then(|batch| batch.reference(0, 0, 77, 8, &[1; 16]))?,
        ),
        (
            "a sector behind the disk's end, then the end of memory",
            then(|batch| {
                batch.reference(0, 0, 0, u64::MAX - 7, &[1; 16]);
                batch.section_close();
                batch.section_open(SectionKind::End);
                batch.section_close();
            })?,
        ),
        (
            "a verdict, which is the destination's to give",
            numbered(1, FrameKind::Verdict, &random(8, 40))?,
        ),
    ])
}

fn false_source(bed: &Bed) -> Result<()> {
    let pair = Pair::plain(bed, NEWEST, None)?;
    let pre_copy = streams()?.into_iter();
    let pre_copy = pre_copy.map(|(name, bytes)| (name, PostCopy::No, vec![bytes]));
    let endless = (
        "a package without an end",
        PostCopy::Yes,
        endless_package()?,
    );
    for (job, (name, post_copy, frames)) in (99..).zip(pre_copy.chain([endless])) {
        let mut link = Link::open(&pair)?;
        link.send(&offer(bed, job)?)?;
        match link.hear()? {
            Some(Control::Accepted { .. }) => {}
            other => return Err(Error::Check(format!("Not accepted: {other:?}"))),
        }
        link.send(&Control::Prepare {
            switchover_ack: true,
            connections: 1,
            patience: 1,
            post_copy,
        })?;
        match link.hear()? {
            Some(Control::Ready { .. }) => {}
            other => return Err(Error::Check(format!("Not ready: {other:?}"))),
        }
        check(pair.qemus(At::B).len() == 1, || "No QEMU waits".into())?;
        // A daemon that hangs up early is what is wanted.
        link.send_within_window(&frames)?;
        let _ = link.0.shutdown(Shutdown::Write);
        while let Some(message) = link.hear().unwrap_or(None) {
            check(message != Control::Running, || {
                format!("{name} runs: no guest came with it")
            })?;
        }
        pair.b.alive()?;
        pair.nothing_left(At::B)
            .map_err(|error| pair.with_logs(Error::Check(format!("{name}: {error}"))))?;
        let words = pair.b.words();
        let word = words.lines().rfind(|line| line.contains("reason="));
        let reason = word.and_then(|line| line.split("reason=").nth(1));
        println!("  {name}: {}", reason.unwrap_or_default());
        pair.wait("its name to be free again", || {
            Ok(ask(&pair.b, &["vm", "show", NAME])?.code == 3)
        })?;
    }
    // A daemon that took it all in would have said nothing of it.
    let refused = pair.b.count_words("more than a package");
    check(refused > 0, || {
        format!("An endless package was not refused: {}", pair.b.words())
    })?;
    pair.daemons_are_small()?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    pair.moves(At::A, &mut life).map(drop)
}
