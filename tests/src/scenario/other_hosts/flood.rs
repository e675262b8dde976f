//! Hosts that flood, stop in the midst of a word, or say again what was said: they get nothing, a migration of
//! another VM goes on beside them, and the daemon stays small.

use super::false_source::{Link, lost, offer, wrong};
use super::strangers::{frame, numbered};
use crate::error::check;
use crate::hosts::daemon::PORT;
use crate::scenario::failures::any_moment::{Moment, Watch};
use crate::scenario::fixture::micro::{Micro, NAME};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use transhume_protocol::link::{
    Control, Cover, FrameHeader, FrameKind, Numbering, PostCopy, Preamble, encode_control,
};

/// What the link carries meanwhile, in Mbit/s: less than the guest writes, so that the migration beside does not end
/// before all is tried.
const SLOW: u32 = 24;
/// Connections at once, many times what a daemon lets wait.
const CROWD: usize = 300;
const PATIENCE: Duration = Duration::from_secs(60);
/// The most that a peer may have under way: see `SESSION_WINDOW`.
const WINDOW_FRAMES: u64 = 16;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "refused-floods",
        about: "floods, halves of frames and recorded sessions, beside a migration",
        limit: Duration::from_secs(240),
        run: floods,
    }]
}

/// A connection on which nothing but this is said.
fn say(pair: &Pair<'_>, bytes: &[u8]) -> Result<TcpStream> {
    let target = pair.hosts.b.address;
    let connect = || TcpStream::connect((target, PORT));
    let mut stream = pair.hosts.a.inside(connect)?.map_err(lost)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
    // One that was hung up on already is what is wanted.
    let _ = stream.write_all(bytes);
    Ok(stream)
}

fn after_hello(bytes: &[u8]) -> Vec<u8> {
    [&Preamble::OURS.encode()[..], bytes].concat()
}

/// Waits until the daemon hangs up.
fn hung_up(mut stream: TcpStream, name: &str) -> Result<()> {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            Err(Error::Check(format!("hostb did not hang up on {name}")))
        }
        _ => Ok(()),
    }
}

/// Begins a session of another VM as its source, and returns the connection and the session's token.
fn session(pair: &Pair<'_>, job: u64) -> Result<(Link, [u8; 16])> {
    let mut link = Link::open(pair)?;
    let mut offered = offer(pair.bed, job)?;
    if let Control::Offer(offer) = &mut offered {
        let name = format!("name = \"{NAME}\"");
        offer.definition = offer.definition.replace(&name, "name = \"other\"");
    }
    link.send(&offered)?;
    match link.hear()? {
        Some(Control::Accepted { .. }) => {}
        other => return Err(Error::Check(format!("Not accepted: {other:?}"))),
    }
    link.send(&Control::Prepare {
        switchover_ack: true,
        connections: 2,
        patience: 2,
        post_copy: PostCopy::No,
    })?;
    match link.hear()? {
        Some(Control::Ready { token, .. }) => Ok((link, token)),
        other => Err(Error::Check(format!("Not ready: {other:?}"))),
    }
}

/// The other VM's QEMU has ended, and the one that arrives has not.
fn only_the_migration(pair: &Pair<'_>, what: &str) -> Result<()> {
    let run = pair.b.vm_folder("other");
    let ended = pair.wait("the other VM's QEMU to be gone", || {
        Ok(pair.qemus(At::B).len() == 1 && !run.exists())
    });
    ended.map_err(|error| pair.with_logs(Error::Check(format!("{what}: {error}"))))
}

/// A recorded or a false wish to join: refused.
fn join(pair: &Pair<'_>, job: u64, token: [u8; 16]) -> Result<()> {
    let mut link = Link::open(pair)?;
    link.send(&Control::Join {
        job,
        token,
        connection: 0,
        received: 0,
    })?;
    match link.hear()? {
        Some(Control::Refused { .. }) => Ok(()),
        other => Err(Error::Check(format!("A join was answered by {other:?}"))),
    }
}

/// Whoever says nothing, and whoever does not come to an end.
fn crowd(pair: &Pair<'_>) -> Result<()> {
    let query = encode_control(&Control::Query {
        job: 7,
        vm: NAME.into(),
    });
    let query = frame(FrameKind::Control, &query.map_err(wrong)?)?;
    let halves = [
        Preamble::OURS.encode()[..5].to_vec(),
        after_hello(&query[..7]),
        after_hello(&query[..query.len() - 1]),
    ];
    let mut open = Vec::new();
    for half in &halves {
        open.push(("half of a word", say(pair, half)?));
    }
    for _ in 0..CROWD {
        open.push(("silence", say(pair, &[])?));
    }
    // In between there is an ear for a host that speaks.
    join(pair, 7, [7; 16])?;
    for (name, stream) in open {
        hung_up(stream, name)?;
    }
    // Signs of life are no reason to wait for a first message.
    let mut alive = say(pair, &after_hello(&[]))?;
    let sign = frame(FrameKind::Alive, &[])?;
    while alive.write_all(&sign).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Frames that are never in order, beyond any window.
fn beyond_the_window(pair: &Pair<'_>, job: u64) -> Result<[u8; 16]> {
    let (mut link, token) = session(pair, job)?;
    let payload = vec![0x5a; 1 << 20];
    let mut sent = 0;
    for number in 2..4 * WINDOW_FRAMES {
        if link
            .write(&numbered(number, FrameKind::Batch, &payload)?)
            .is_err()
        {
            break;
        }
        sent = number;
    }
    only_the_migration(pair, "frames beyond the window")?;
    let refused = pair.b.count_words("frames ahead of the window");
    check(refused > 0, || {
        format!("{sent} frames were taken: {}", pair.b.words())
    })?;
    Ok(token)
}

/// A great many signs of life, and the end in the midst of a frame.
fn endless_life(pair: &Pair<'_>, job: u64) -> Result<()> {
    let (mut link, _) = session(pair, job)?;
    let numbering = Numbering::default();
    let sign = FrameHeader::encode(
        FrameKind::Alive,
        numbering,
        Cover::Whole,
        std::iter::empty(),
    );
    let signs = sign.map_err(wrong)?.repeat(1000);
    for _ in 0..100 {
        link.write(&signs).map_err(lost)?;
    }
    let half = numbered(1, FrameKind::Batch, &[0; 5000])?;
    link.write(&half[..3000]).map_err(lost)?;
    check(pair.qemus(At::B).len() == 2, || {
        "Signs of life ended a session".into()
    })?;
    // It goes on to be silent, until the session's patience ends.
    only_the_migration(pair, "half of a frame")
}

fn floods(bed: &Bed) -> Result<()> {
    let pair = Pair::plain(bed, NEWEST, Some(SLOW))?;
    let micro = Micro {
        memory: 224,
        parameters: "cache=32M data=96M zero=8M rate=8M".into(),
        ..Micro::new(bed)?
    };
    let mut life = pair.boot(&micro)?;
    let mut watch = Watch::open(pair.host(At::A))?;
    // It must not end before all is tried.
    let command = pair.begin_migration(At::A, &["--mode", "pre"])?;
    watch.wait(Moment::Phase("pre-copy"))?;
    let tried = || -> Result<()> {
        let job = pair.in_pre_copy(At::A)?;
        let shown = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        let number = u64::from_str_radix(shown.word("/offer/number")?, 16);
        let number = number.map_err(|error| Error::Check(format!("{shown}: {error}")))?;
        join(&pair, number, [0; 16])?;
        let token = beyond_the_window(&pair, 1001)?;
        // What was recorded of it begins nothing and takes nothing up.
        join(&pair, 1001, token)?;
        let again = session(&pair, 1001).map(|_| ());
        check(again.is_err(), || "A recorded offer was taken".into())?;
        endless_life(&pair, 1002)?;
        crowd(&pair)
    };
    tried().map_err(|error| pair.with_logs(error))?;
    let early = command.ended();
    pair.hosts.shape(Some(1000))?;
    let shown = |error| pair.with_logs(error);
    let answer = command.end()?.expect(0).map_err(shown)?;
    check(!early, || format!("The migration was too short: {answer}"))?;
    let remarks = answer.value["summary"]["remarks"].to_string();
    check(!remarks.contains("broke"), || {
        format!("The migration was disturbed: {answer}")
    })?;
    pair.arrived(At::B, &mut life).map_err(shown)?;
    pair.daemons_are_small()?;
    pair.nothing_left(At::A)
}
