//! The guest agent: the core that the Linux daemon uses too, on this guest's page table.

use crate::clock::Clock;
use crate::console::Console;
use crate::lies::Liar;
use crate::memory::{Memory, Run};
use alloc::string::String;
use core::convert::Infallible;
use core::time::Duration;
use transhume_agent::{Action, Disk, PageCache, Session, Step};
use transhume_protocol::agent::{Range, ReportSource};

/// Entries of the page table that one step looks at.
const STEP: usize = 4096;
/// Polls of the session in one turn of the main loop.
const POLLS: usize = 16;

/// The agent and its channel.
pub(crate) struct Agent {
    console: Option<Console>,
    session: Session,
    walk: usize,
    disk: DiskName,
    liar: Liar,
    /// Frames that were sent.
    pub(crate) frames: u64,
}

/// The disk that ranges refer to.
pub(crate) struct DiskName {
    pub(crate) sectors: u64,
    pub(crate) serial: String,
}

impl Agent {
    /// An agent that waits for a host; without a console it waits for ever.
    pub(crate) fn new(console: Option<Console>, disk: DiskName, liar: Liar) -> Self {
        Self {
            console,
            session: Session::new(concat!("micro-guest ", env!("CARGO_PKG_VERSION"))),
            walk: 0,
            disk,
            liar,
            frames: 0,
        }
    }

    /// Does what there is to do without waiting; whether there is more.
    pub(crate) fn turn(&mut self, memory: &Memory, clock: &mut Clock) -> bool {
        let Some(console) = &mut self.console else {
            return false;
        };
        let session = &mut self.session;
        console.receive(|bytes| session.receive(bytes));
        if self.liar.is_babbling() {
            if let Some(out) = console.output() {
                let length = self.liar.babble(out);
                console.send(length);
            }
            return false;
        }
        let now = Duration::from_micros(Clock::micros(clock.now()));
        let mut table = Table {
            memory,
            clock,
            walk: &mut self.walk,
            disk: &self.disk,
            liar: &mut self.liar,
        };
        for _ in 0..POLLS {
            let Some(out) = console.output() else {
                return false;
            };
            match session.poll(&mut table, now, out) {
                Action::Send(length) => {
                    let length = table.liar.frame(out, length);
                    console.send(length);
                    self.frames += 1;
                }
                Action::Wait(Duration::ZERO) => {}
                Action::Wait(_) | Action::Idle => return false,
            }
        }
        true
    }
}

/// The page table as the session sees it.
struct Table<'a> {
    memory: &'a Memory,
    clock: &'a mut Clock,
    walk: &'a mut usize,
    disk: &'a DiskName,
    liar: &'a mut Liar,
}

impl PageCache for Table<'_> {
    type Error = Infallible;

    fn source(&mut self) -> ReportSource {
        ReportSource::BareMetal
    }

    fn page_shift(&self) -> u8 {
        12
    }

    fn cpu_time(&mut self) -> Duration {
        if self.liar.hides_its_cost() {
            return Duration::ZERO;
        }
        Duration::from_micros(Clock::micros(self.clock.now()))
    }

    fn begin(&mut self) -> Result<(), Infallible> {
        *self.walk = 0;
        Ok(())
    }

    fn disk(&self, number: u16) -> Option<Disk<'_>> {
        (number == 0 && self.disk.sectors > 0).then_some(Disk {
            sectors: self.disk.sectors,
            serial: &self.disk.serial,
            name: "disk0",
        })
    }

    fn step(&mut self) -> Result<Step, Infallible> {
        if let Some(range) = self.liar.invented(self.disk.sectors) {
            return Ok(Step::Found { disk: 0, range });
        }
        if *self.walk >= self.memory.len() {
            return Ok(Step::Done);
        }
        let (next, run) = self
            .memory
            .next_run(*self.walk, STEP, self.liar.names_dirty_pages());
        *self.walk = next;
        Ok(
            run.map_or(Step::Pending, |Run { pfn, sector, pages }| Step::Found {
                disk: 0,
                range: self
                    .liar
                    .range(Range { pfn, sector, pages }, self.disk.sectors),
            }),
        )
    }

    fn end(&mut self) {}
}
