//! Whoever speaks to the host link, and whatever they say: a daemon drops them, says so in its log, and
//! serves on; a destination that is none is refused.

use crate::error::check;
use crate::hosts::Host;
use crate::hosts::daemon::PORT;
use crate::scenario::fixture::micro::Micro;
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;
use transhume_protocol::link::{
    Control, Cover, FrameHeader, FrameKind, Numbering, Preamble, encode_control,
};

const LIMIT: Duration = Duration::from_secs(180);
/// Longer than a daemon waits for anything.
const PATIENCE: Duration = Duration::from_secs(40);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "refused-strangers",
            about: "random bytes at the host link",
            limit: LIMIT,
            run: |bed| strangers(&Pair::new(bed, NEWEST, None)?),
        },
        Scenario {
            name: "refused-strangers-plain",
            about: "truncated and misplaced frames at a host link without encryption",
            limit: LIMIT,
            run: |bed| strangers(&Pair::plain(bed, NEWEST, None)?),
        },
        Scenario {
            name: "refused-by-no-daemon",
            about: "a destination where nobody listens, or somebody else",
            limit: LIMIT,
            run: |bed| no_daemon(Pair::new(bed, NEWEST, None)?),
        },
        Scenario {
            name: "refused-by-no-daemon-plain",
            about: "the same without encryption",
            limit: LIMIT,
            run: |bed| no_daemon(Pair::plain(bed, NEWEST, None)?),
        },
        Scenario {
            name: "refused-certificates",
            about: "a destination of another site, or with another host's certificate",
            limit: LIMIT,
            run: certificates,
        },
    ]
}

/// Bytes that look random and are the same each time (xorshift64).
pub(crate) fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

pub(crate) fn frame(kind: FrameKind, payload: &[u8]) -> Result<Vec<u8>> {
    numbered(0, kind, payload)
}

/// A frame of a session.
pub(crate) fn numbered(number: u64, kind: FrameKind, payload: &[u8]) -> Result<Vec<u8>> {
    let numbering = Numbering { number, taken: 0 };
    let header = FrameHeader::encode(kind, numbering, Cover::Whole, std::iter::once(payload))
        .map_err(|error| Error::Check(format!("A frame cannot be made: {error}")))?;
    Ok([&header[..], payload].concat())
}

/// What strangers say after connecting, by a name for messages.
fn sayings() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let hello = Preamble::OURS.encode();
    let message = |control: &Control| {
        encode_control(control)
            .map_err(|error| Error::Check(format!("A message cannot be made: {error}")))
    };
    let query = frame(
        FrameKind::Control,
        &message(&Control::Query {
            job: 7,
            vm: "../../etc".into(),
        })?,
    )?;
    let commit = frame(FrameKind::Control, &message(&Control::Commit)?)?;
    let join = frame(
        FrameKind::Control,
        &message(&Control::Join {
            job: 7,
            token: [7; 16],
            connection: 0,
            received: 0,
        })?,
    )?;
    let mut flipped = query.clone();
    if let Some(last) = flipped.last_mut() {
        *last ^= 1;
    }
    let mut huge = query.clone();
    // All of the header that is not its magic or kind: lengths among it.
    for byte in huge.iter_mut().take(16).skip(1) {
        *byte = 0xff;
    }
    let after = |bytes: &[u8]| [&hello[..], bytes].concat();
    Ok(vec![
        ("nothing", Vec::new()),
        ("half a preamble", hello[..6].to_vec()),
        ("random bytes", random(1, 100_000)),
        (
            "a request of HTTP",
            b"GET / HTTP/1.1\r\nHost: hostb\r\n\r\n".to_vec(),
        ),
        (
            "a version of the future",
            Preamble {
                oldest: 900,
                newest: 901,
            }
            .encode()
            .to_vec(),
        ),
        ("random bytes after a preamble", after(&random(2, 100_000))),
        ("half a header", after(&query[..5])),
        ("half a frame", after(&query[..query.len() - 3])),
        ("a frame with a wrong checksum", after(&flipped)),
        ("a frame of the largest size", after(&huge)),
        ("a commit of nothing", after(&commit)),
        ("a query that leads elsewhere", after(&query)),
        ("a connection for a migration that is none", after(&join)),
        (
            "pages at once",
            after(&frame(FrameKind::Batch, &random(3, 5000))?),
        ),
        (
            "a message of random bytes",
            after(&frame(FrameKind::Control, &random(4, 300))?),
        ),
    ])
}

fn say(target: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut stream = TcpStream::connect((target, PORT))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // A daemon that closes early is what is wanted.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        result => result.map(drop),
    }
}

fn strangers(pair: &Pair<'_>) -> Result<()> {
    let mut life = pair.boot(&Micro::new(pair.bed)?)?;
    let target = pair.hosts.b.address;
    for (name, bytes) in sayings()? {
        let before = pair.b.count_words("connection dropped");
        pair.hosts
            .a
            .inside(|| say(target, &bytes))?
            .map_err(|error| {
                pair.with_logs(Error::Check(format!(
                    "hostb did not hang up on {name}: {error}"
                )))
            })?;
        pair.b.alive()?;
        // These two get an answer.
        if !name.starts_with("a query") && !name.starts_with("a connection") {
            pair.wait("the daemon's word on a stranger", || {
                Ok(pair.b.count_words("connection dropped") > before)
            })?;
        }
    }
    for line in pair.b.words().lines() {
        println!("  {line}");
    }
    pair.stayed(At::A, &mut life)?;
    pair.moves(At::A, &mut life).map(drop)
}

/// Serves one connection on a host's port with these bytes.
fn serve_once(host: &Host, bytes: Vec<u8>) -> Result<std::thread::JoinHandle<()>> {
    let listener = host
        .inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?
        .map_err(Error::system("listen"))?;
    Ok(std::thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.set_read_timeout(Some(PATIENCE));
            let mut asked = Vec::new();
            let _ = stream.read_to_end(&mut asked);
        }
    }))
}

fn no_daemon(mut pair: Pair<'_>) -> Result<()> {
    let mut life = pair.boot(&Micro::new(pair.bed)?)?;
    pair.b.kill();
    pair.migrate(At::A, &[])?.refused(
        3,
        &["cannot connect to 198.18.0.2:7465", "transhumed running"],
    )?;
    for (name, bytes) in sayings()? {
        let server = serve_once(&pair.hosts.b, bytes)?;
        let answer = pair.migrate(At::A, &[])?;
        // Its own words on it, whatever they are.
        answer.expect(3).and_then(|answer| {
            println!("  {name}: {}", answer.message());
            check(!answer.message().is_empty(), || {
                format!("No reason: {answer}")
            })
        })?;
        // It has hung up.
        server
            .join()
            .map_err(|_| Error::Check("the listener failed".into()))?;
        life.goes_on()?;
    }
    pair.hosts.set_link(false)?;
    pair.migrate(At::A, &[])?
        .refused(3, &["cannot connect to"])?;
    pair.hosts.set_link(true)?;
    pair.restart(At::B)?;
    pair.stayed(At::A, &mut life)?;
    pair.moves(At::A, &mut life).map(drop)
}

fn certificates(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    let authority = pair.hosts.a.folder.join("authority");
    let elsewhere = pair.hosts.a.folder.join("elsewhere");
    let own = pair.hosts.b.folder.join("pki");
    let pki = |arguments: &[&str], authority: &Path| {
        let dir = authority.display().to_string();
        let arguments = [&["pki"], arguments, &["--dir", &dir]].concat();
        ask(&pair.a, &arguments)?.expect(0)
    };
    let issue = |host: &str, authority: &Path| -> Result<()> {
        let out = own.display().to_string();
        let wanted = ["issue", host, "--out", &out];
        // What it has may be in use.
        if own.join(format!("{host}.key")).exists() {
            let dir = authority.display().to_string();
            let refused = ask(&pair.a, &[&["pki"], &wanted[..], &["--dir", &dir]].concat())?;
            refused.refused(3, &["--renew"])?;
        }
        pki(&[&wanted[..], &["--renew"]].concat(), authority)?;
        // A running daemon takes it with the next connection.
        for kind in ["crt", "key"] {
            let (from, to) = (
                own.join(format!("{host}.{kind}")),
                own.join(format!("hostb.{kind}")),
            );
            if from != to {
                std::fs::rename(&from, &to).map_err(Error::file("rename", &from))?;
            }
        }
        Ok(())
    };
    let refused = |words: &[&str]| pair.migrate(At::A, &[])?.refused(3, words).map(drop);
    pki(&["init"], &elsewhere)?;
    issue("hostb", &elsewhere)?;
    refused(&["not from an authority that this host believes"])?;
    // Its own daemon says so before any other host can.
    issue("hostc", &authority)?;
    refused(&["hostb"])?;
    pair.wait("hostb's word on its certificate", || {
        Ok(pair.b.count_words("transhume pki issue hostb") > 0)
    })?;
    issue("hostb", &authority)?;
    pair.stayed(At::A, &mut life)?;
    pair.moves(At::A, &mut life).map(drop)
}
