//! The test bed's own wire: two hosts that are apart.

use crate::bench::measure::as_f64;
use crate::error::check;
use crate::hosts::Hosts;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);
const DELAY: Duration = Duration::from_millis(10);
/// In Mbit/s.
const RATE: u32 = 1000;
const MIB: usize = 1 << 20;
/// How much is carried.
const AMOUNT: usize = 256 * MIB;
const PORT: u16 = 7;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "hosts-apart",
        about: "between hosts that are apart nothing comes early, and all that is sent comes",
        limit: LIMIT,
        run: apart,
    }]
}

fn failed(error: std::io::Error) -> Error {
    Error::system("carry bytes from host to host")(error)
}

/// What is at a place of what is carried: no two MiB are alike.
fn byte_at(place: usize) -> u8 {
    (place / MIB).to_le_bytes()[0] ^ (place % 251).to_le_bytes()[0]
}

fn apart(_: &Bed) -> Result<()> {
    let hosts = Hosts::apart(Some(RATE), DELAY)?;
    let address = hosts.b.address;
    let listener = hosts.b.inside(|| TcpListener::bind((address, PORT)))?;
    let listener = listener.map_err(failed)?;
    let mut near = hosts
        .a
        .inside(|| TcpStream::connect((address, PORT)))?
        .map_err(failed)?;
    let (mut far, _) = listener.accept().map_err(failed)?;
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
    }

    let mut byte = [0];
    let mut shortest = Duration::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        near.write_all(&byte).map_err(failed)?;
        far.read_exact(&mut byte).map_err(failed)?;
        far.write_all(&byte).map_err(failed)?;
        near.read_exact(&mut byte).map_err(failed)?;
        shortest = shortest.min(begun.elapsed());
    }
    check(shortest >= 2 * DELAY, || {
        format!("There and back took {shortest:?}, less than {DELAY:?} each way")
    })?;

    let begun = Instant::now();
    let carried = std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let mut piece = vec![0; MIB];
            for start in (0..AMOUNT).step_by(MIB) {
                for (at, byte) in piece.iter_mut().enumerate() {
                    *byte = byte_at(start + at);
                }
                near.write_all(&piece)?;
            }
            Ok(())
        });
        let mut piece = vec![0; MIB];
        for start in (0..AMOUNT).step_by(MIB) {
            far.read_exact(&mut piece).map_err(failed)?;
            let wrong = piece
                .iter()
                .enumerate()
                .position(|(at, byte)| *byte != byte_at(start + at));
            check(wrong.is_none(), || {
                format!("A byte is wrong in the MiB at {start}")
            })?;
        }
        sender
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("a thread failed")))
            .map_err(failed)
    });
    carried?;
    let rate = as_f64(AMOUNT as u64) * 8.0 / 1e6 / begun.elapsed().as_secs_f64();
    println!("  there and back in {shortest:?}, and {rate:.0} Mbit/s");
    Ok(())
}
