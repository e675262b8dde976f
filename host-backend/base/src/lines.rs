//! Lines from a peer that is not trusted: never longer than a limit.

use std::io;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// Reads lines that end in `\n` and are at most `limit` bytes long.
#[derive(Debug)]
pub struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    limit: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Reads from `reader`.
    pub fn new(reader: R, limit: usize) -> Self {
        Self {
            reader: BufReader::with_capacity(16 << 10, reader),
            line: Vec::new(),
            limit,
        }
    }

    /// The next line without its end, or `None` at the end of input. May be dropped and called again:
    /// nothing is lost.
    ///
    /// # Errors
    /// The reader's, [`io::ErrorKind::InvalidData`] for a line over the limit and
    /// [`io::ErrorKind::UnexpectedEof`] for an end in mid-line.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let available = self.reader.fill_buf().await?;
            if available.is_empty() {
                return if self.line.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the connection ended in the middle of a line",
                    ))
                };
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(available.len());
            if self.line.len() + taken > self.limit {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line is longer than {} bytes", self.limit),
                ));
            }
            self.line.extend_from_slice(&available[..taken]);
            self.reader.consume(taken + usize::from(end.is_some()));
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn splits_lines_and_knows_its_limit() {
        let mut lines = Lines::new(&b"one\n\nthree\n"[..], 5);
        for expected in [&b"one"[..], b"", b"three"] {
            assert_eq!(
                lines.next().await.expect("a line").as_deref(),
                Some(expected)
            );
        }
        assert_eq!(lines.next().await.expect("the end"), None);
        let error = Lines::new(&b"123456\n"[..], 5)
            .next()
            .await
            .expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = Lines::new(&b"123"[..], 5)
            .next()
            .await
            .expect_err("cut off");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
