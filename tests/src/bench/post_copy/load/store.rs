//! Clients of redis (its protocol is RESP2). Users read pages of values and write fields of them, as many as they read,
//! at random. A job beside them moves values to fresh memory, so that much of it was written since it was sent.

use super::{CONNECTIONS, Client, Clients, connect, wrong};
use crate::bench::measure::as_f64;
use crate::hosts::Users;
use crate::{Error, Result};
use micro_guest::content::{PAGE_SIZE, Random};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const PORT: u16 = 6379;
/// Of a value, in bytes.
const VALUE: usize = 64 << 10;
/// What a user reads at a time, and how many of that a value has.
const PART: usize = PAGE_SIZE;
const PARTS: usize = VALUE / PART;
/// A user's field, in bytes; each part begins with one.
const FIELD: usize = 8;
/// The longest line that an answer begins with.
const LINE: u64 = 256;
/// Values on their way at a time while the store is filled.
const AHEAD: usize = 16;
/// Values that the job moves at a time, and a second.
const MOVED: usize = 4;
const RATE: f64 = 2000.0;
/// Nobody sees a value while it is moved: a script runs alone.
const SCRIPT: &[u8] = b"for _, key in ipairs(KEYS) do redis.call('COPY', key, 'fresh', 'REPLACE') \
    redis.call('RENAME', 'fresh', key) end return #KEYS";

/// A connection.
struct Connection(BufReader<TcpStream>);

/// A user, and the values that are its own.
pub(crate) struct Store {
    connection: Connection,
    number: u64,
    /// How often it wrote the field of each part of each value.
    versions: Vec<u32>,
    random: Random,
    buffer: Vec<u8>,
    expected: Vec<u8>,
}

/// The job.
struct Job {
    connection: Connection,
    /// Values of each user.
    values: u64,
    random: Random,
    last: Instant,
    owed: f64,
}

/// Half of a part is random and half of it repeats, as in the memory of programs.
fn fill(part: &mut [u8], key: u64, number: usize, version: u32) {
    // Odd, so that no two keys begin alike.
    let seed = (key << 8 | number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut random = Random::new(seed);
    let (words, _) = part.as_chunks_mut::<FIELD>();
    for (at, word) in words.iter_mut().enumerate() {
        *word = match at {
            0 => field(version),
            _ if at.is_multiple_of(2) => random.number().to_le_bytes(),
            _ => key.to_le_bytes(),
        };
    }
}

fn field(version: u32) -> [u8; FIELD] {
    u64::from(version).to_le_bytes()
}

/// A command and its arguments, the last of them of any bytes.
fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// An answer's first line, without its end.
fn line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    stream.take(LINE).read_line(&mut line)?;
    if line.ends_with("\r\n") {
        line.truncate(line.len() - 2);
        Ok(line)
    } else {
        Err(wrong(format!("the store said: {line:?}")))
    }
}

/// Reads so many bytes of a value.
fn bytes_of(stream: &mut impl BufRead, length: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
    let first = line(stream)?;
    if first != format!("${length}") {
        return Err(wrong(format!("no such value: {first:?}")));
    }
    buffer.resize(length + 2, 0);
    stream.read_exact(buffer)?;
    buffer.truncate(length);
    Ok(())
}

fn key_of(number: u64, value: u64) -> u64 {
    number << 32 | value
}

impl Connection {
    fn open(users: &Users) -> Result<Self> {
        Ok(Self(BufReader::new(connect(users, PORT)?)))
    }

    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    fn expect(&mut self, wanted: &str) -> io::Result<()> {
        let said = line(&mut self.0)?;
        if said == wanted {
            Ok(())
        } else {
            Err(wrong(format!("the store said: {said}")))
        }
    }
}

impl Store {
    /// Fills the store with so many MiB of values; its users, and the job.
    pub(crate) fn fill(users: &Users, mib: u64) -> Result<Clients> {
        let values = (mib << 20) / VALUE as u64 / CONNECTIONS;
        let parts = usize::try_from(values).unwrap_or(0) * PARTS;
        let fill = |number| {
            let mut store = Self {
                connection: Connection::open(users)?,
                number,
                versions: vec![0; parts],
                random: Random::new(number),
                buffer: Vec::new(),
                expected: vec![0; PART],
            };
            store
                .fill_own(values)
                .map_err(Error::system("fill the guest's store"))?;
            Ok(Box::new(store) as Box<dyn Client>)
        };
        let clients = (0..CONNECTIONS).map(fill).collect::<Result<_>>()?;
        let job = Job {
            connection: Connection::open(users)?,
            values,
            random: Random::new(CONNECTIONS),
            last: Instant::now(),
            owed: 0.0,
        };
        Ok((clients, vec![Box::new(job)]))
    }

    fn fill_own(&mut self, values: u64) -> io::Result<()> {
        let mut content = vec![0; VALUE];
        let mut ahead = 0;
        for value in 0..values {
            let key = key_of(self.number, value);
            for (number, part) in content.chunks_exact_mut(PART).enumerate() {
                fill(part, key, number, 0);
            }
            let bytes = command(&[b"SET", key.to_string().as_bytes(), &content]);
            self.connection.say(&bytes)?;
            ahead += 1;
            if ahead > AHEAD {
                self.connection.expect("+OK")?;
                ahead -= 1;
            }
        }
        (0..ahead).try_for_each(|_| self.connection.expect("+OK"))
    }

    /// The key of a part's value, and where the part is in it.
    fn place(&self, part: usize) -> (u64, usize) {
        (key_of(self.number, (part / PARTS) as u64), part % PARTS)
    }

    fn write(&mut self, part: usize) -> io::Result<()> {
        self.versions[part] = self.versions[part].wrapping_add(1);
        let (key, number) = self.place(part);
        let (key, at) = (key.to_string(), (number * PART).to_string());
        let bytes = command(&[
            b"SETRANGE",
            key.as_bytes(),
            at.as_bytes(),
            &field(self.versions[part]),
        ]);
        self.connection.say(&bytes)?;
        // The answer is the value's length.
        self.connection.expect(&format!(":{VALUE}"))
    }

    fn read(&mut self, part: usize) -> io::Result<()> {
        let (key, number) = self.place(part);
        let (from, to) = (number * PART, (number + 1) * PART - 1);
        let bytes = command(&[
            b"GETRANGE",
            key.to_string().as_bytes(),
            from.to_string().as_bytes(),
            to.to_string().as_bytes(),
        ]);
        self.connection.say(&bytes)?;
        bytes_of(&mut self.connection.0, PART, &mut self.buffer)?;
        fill(&mut self.expected, key, number, self.versions[part]);
        if self.buffer == self.expected {
            Ok(())
        } else {
            Err(wrong(format!(
                "the value of {key} is not what was written, at {from}"
            )))
        }
    }
}

impl Client for Store {
    fn ask(&mut self) -> io::Result<()> {
        let count = self.versions.len().max(1) as u64;
        let part = usize::try_from(self.random.below(count)).unwrap_or(0);
        if self.random.below(2) == 0 {
            self.write(part)
        } else {
            self.read(part)
        }
    }

    fn check(&mut self) -> io::Result<u64> {
        for part in 0..self.versions.len() {
            self.read(part)?;
        }
        Ok(self.versions.len() as u64)
    }
}

impl Client for Job {
    /// Some values, no faster than the rate.
    fn ask(&mut self) -> io::Result<()> {
        let now = Instant::now();
        // What could not be done in a tenth of a second is given up: the rate is a limit, not a debt.
        let earned = RATE * now.duration_since(self.last).as_secs_f64();
        self.owed = (self.owed + earned).min(RATE / 10.0);
        self.last = now;
        let some = as_f64(MOVED as u64);
        if self.owed < some {
            std::thread::sleep(Duration::from_millis(2));
            return Ok(());
        }
        self.owed -= some;
        let count = MOVED.to_string();
        let keys: Vec<String> = (0..MOVED)
            .map(|_| {
                let number = self.random.below(CONNECTIONS);
                key_of(number, self.random.below(self.values.max(1))).to_string()
            })
            .collect();
        let mut words: Vec<&[u8]> = vec![b"EVAL", SCRIPT, count.as_bytes()];
        words.extend(keys.iter().map(String::as_bytes));
        self.connection.say(&command(&words))?;
        self.connection.expect(&format!(":{MOVED}"))
    }

    fn check(&mut self) -> io::Result<u64> {
        // What it moved is its users' to compare.
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_written_as_arrays() {
        assert_eq!(
            command(&[b"GET", b"12"]),
            b"*2\r\n$3\r\nGET\r\n$2\r\n12\r\n"
        );
    }

    #[test]
    fn a_part_is_read_and_what_is_none_is_not() {
        let mut written = vec![0; PART];
        fill(&mut written, 7, 1, 3);
        let mut bytes = format!("${PART}\r\n").into_bytes();
        bytes.extend_from_slice(&written);
        bytes.extend_from_slice(b"\r\n");
        let mut buffer = Vec::new();
        bytes_of(&mut &bytes[..], PART, &mut buffer).expect("a part");
        assert_eq!(buffer, written);
        assert!(bytes_of(&mut &b"$-1\r\n"[..], PART, &mut buffer).is_err());
        assert!(bytes_of(&mut &bytes[..100], PART, &mut buffer).is_err());
    }

    #[test]
    fn no_two_parts_are_alike() {
        let content = |key, number, version| {
            let mut part = vec![0; PART];
            fill(&mut part, key, number, version);
            part
        };
        let one = content(7, 1, 3);
        for other in [content(8, 1, 3), content(7, 2, 3), content(7, 1, 4)] {
            assert_ne!(one, other);
        }
    }
}
