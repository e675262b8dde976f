//! A client of a web server (HTTP/1.1): pieces of files at random, compared with the files.

use super::{CONNECTIONS, Client, Clients, connect, wrong};
use crate::hosts::Users;
use crate::{Error, Result};
use micro_guest::content::Random;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

const PORT: u16 = 80;
/// Of a file, what one request asks for, in bytes.
const PIECE: u64 = STEP as u64;
const STEP: usize = 64 << 10;
/// The longest head of an answer.
const HEAD: u64 = 16 << 10;

/// What can be asked for.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// Each file by its name at the server, and the same one here.
    files: Vec<(String, PathBuf)>,
    /// Places in files, each with its length.
    pieces: Vec<(usize, u64, u64)>,
}

impl Pieces {
    /// Of files, each by its name at the server, its path here and its length.
    pub(crate) fn new(files: Vec<(String, PathBuf, u64)>) -> Self {
        let mut all = Self {
            files: Vec::new(),
            pieces: Vec::new(),
        };
        for (name, path, length) in files {
            let file = all.files.len();
            all.files.push((name, path));
            for at in (0..length).step_by(STEP) {
                all.pieces.push((file, at, PIECE.min(length - at)));
            }
        }
        all
    }
}

/// A connection.
pub(crate) struct Web {
    stream: BufReader<TcpStream>,
    pieces: Arc<Pieces>,
    random: Random,
    asked: u64,
    buffer: Vec<u8>,
    expected: Vec<u8>,
}

/// Reads an answer's head; the length of what follows.
fn head(stream: &mut impl BufRead) -> io::Result<u64> {
    let mut limited = stream.take(HEAD);
    let mut line = String::new();
    limited.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 206") && !line.starts_with("HTTP/1.1 200") {
        return Err(wrong(format!("the server said: {line:?}")));
    }
    let mut length = None;
    loop {
        line.clear();
        if limited.read_line(&mut line)? == 0 {
            return Err(wrong("the head of an answer has no end"));
        }
        if line == "\r\n" {
            return length.ok_or_else(|| wrong("an answer without a length"));
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
}

impl Web {
    /// The clients.
    pub(crate) fn connect(users: &Users, pieces: &Arc<Pieces>) -> Result<Clients> {
        if pieces.pieces.is_empty() {
            return Err(Error::Check("There are no files to be served".into()));
        }
        let client = |number| {
            Ok(Box::new(Self {
                stream: BufReader::new(connect(users, PORT)?),
                pieces: Arc::clone(pieces),
                random: Random::new(number),
                asked: 0,
                buffer: Vec::new(),
                expected: Vec::new(),
            }) as Box<dyn Client>)
        };
        let clients = (0..CONNECTIONS).map(client).collect::<Result<_>>()?;
        Ok((clients, Vec::new()))
    }
}

impl Client for Web {
    fn ask(&mut self) -> io::Result<()> {
        let count = self.pieces.pieces.len() as u64;
        let place = usize::try_from(self.random.below(count)).unwrap_or(0);
        let (file, at, length) = self.pieces.pieces[place];
        let (name, path) = &self.pieces.files[file];
        let request = format!(
            "GET /{name} HTTP/1.1\r\nHost: guest\r\nRange: bytes={at}-{}\r\n\r\n",
            at + length - 1
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        if head(&mut self.stream)? != length {
            return Err(wrong(format!("{name} has another length")));
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        for buffer in [&mut self.buffer, &mut self.expected] {
            buffer.resize(length, 0);
        }
        self.stream.read_exact(&mut self.buffer)?;
        File::open(path)?.read_exact_at(&mut self.expected, at)?;
        if self.buffer != self.expected {
            return Err(wrong(format!("{name} is not what it was, at {at}")));
        }
        self.asked += 1;
        Ok(())
    }

    fn check(&mut self) -> io::Result<u64> {
        Ok(self.asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_cut_into_pieces() {
        let pieces = Pieces::new(vec![
            ("a".into(), "/a".into(), PIECE + 5),
            ("b".into(), "/b".into(), 10),
        ]);
        assert_eq!(pieces.pieces, [(0, 0, PIECE), (0, PIECE, 5), (1, 0, 10)]);
    }

    #[test]
    fn the_head_of_an_answer_is_read() {
        let answer = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-4/9\r\ncontent-length: 5\r\n\r\nhello";
        assert_eq!(head(&mut &answer[..]).expect("a length"), 5);
        assert!(head(&mut &b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\n"[..]).is_err());
        assert!(head(&mut &b"HTTP/1.1 200 OK\r\n\r\n"[..]).is_err());
        assert!(head(&mut &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"[..]).is_err());
    }
}
