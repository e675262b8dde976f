//! COM1, polled: the control channel.

use crate::port;
use alloc::collections::VecDeque;
use alloc::string::String;
use core::fmt::{self, Write};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_DEPTH: usize = 16;
/// Most bytes that wait for a slow reader; lines beyond are dropped whole.
const BACKLOG: usize = 16 * 1024;
const MAX_LINE: usize = 256;

/// The control channel.
pub(crate) struct Serial {
    output: VecDeque<u8>,
    line: String,
    line_too_long: bool,
    /// The `#word` in front of the command that is being answered, with a space, or nothing.
    tag: String,
}

impl Serial {
    /// Sets the port up: 8n1, FIFOs on, no interrupts.
    pub(crate) fn new() -> Self {
        // The FIFOs are not cleared: a command may already be in there.
        for (register, value) in [
            (1, 0x00),
            (3, 0x80),
            (0, 0x01),
            (1, 0x00),
            (3, 0x03),
            (2, 0x01),
            (4, 0x03),
        ] {
            // SAFETY: COM1's registers.
            unsafe { port::write_u8(COM1 + register, value) };
        }
        Self {
            output: VecDeque::with_capacity(BACKLOG),
            line: String::with_capacity(MAX_LINE),
            line_too_long: false,
            tag: String::new(),
        }
    }

    /// Queues a line; [`Self::poll`] sends it.
    pub(crate) fn say(&mut self, line: fmt::Arguments<'_>) {
        let before = self.output.len();
        if writeln!(Queue(&mut self.output), "{line}").is_err() {
            self.output.truncate(before);
        }
        self.poll();
    }

    /// Sets what answers begin with.
    pub(crate) fn set_tag(&mut self, tag: &str) {
        self.tag.clear();
        self.tag.push_str(tag);
    }

    /// Queues the answer to a command.
    pub(crate) fn answer(&mut self, line: fmt::Arguments<'_>) {
        let tag = core::mem::take(&mut self.tag);
        self.say(format_args!("{tag}{line}"));
        self.tag = tag;
    }

    /// Sends what the port takes, without waiting.
    pub(crate) fn poll(&mut self) {
        while !self.output.is_empty() && line_status() & TRANSMITTER_EMPTY != 0 {
            for byte in self.output.drain(..self.output.len().min(FIFO_DEPTH)) {
                // SAFETY: COM1's register.
                unsafe { port::write_u8(COM1, byte) };
            }
        }
    }

    /// The next whole line that came in, if any.
    pub(crate) fn next_line(&mut self) -> Option<String> {
        while line_status() & DATA_READY != 0 {
            // SAFETY: COM1's register; a byte is there.
            let byte = unsafe { port::read_u8(COM1) };
            match byte {
                b'\n' if self.line_too_long => {
                    self.line.clear();
                    self.line_too_long = false;
                }
                b'\n' => {
                    return Some(core::mem::replace(
                        &mut self.line,
                        String::with_capacity(MAX_LINE),
                    ));
                }
                b'\r' => {}
                _ if self.line.len() >= MAX_LINE => self.line_too_long = true,
                _ => self.line.push(char::from(byte)),
            }
        }
        None
    }
}

fn line_status() -> u8 {
    // SAFETY: COM1's register; reading it clears error bits only.
    unsafe { port::read_u8(LINE_STATUS) }
}

struct Queue<'a>(&'a mut VecDeque<u8>);

impl Write for Queue<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > BACKLOG {
            return Err(fmt::Error);
        }
        self.0.extend(text.bytes());
        Ok(())
    }
}

/// Writes to COM1 at once, waiting for the port: for last words only.
pub(crate) struct LastWords;

impl Write for LastWords {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while line_status() & TRANSMITTER_EMPTY == 0 {}
            // SAFETY: COM1's register.
            unsafe { port::write_u8(COM1, byte) };
        }
        Ok(())
    }
}
