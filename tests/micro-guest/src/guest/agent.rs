//! The guest agent: the core that the Linux daemon uses too, on this guest's page table.

use crate::clock::Clock;
use crate::console::Console;
use crate::lies::Liar;
use crate::memory::{Memory, Run};
use alloc::string::String;
use core::convert::Infallible;
use core::ops::Range as Span;
use core::time::Duration;
use transhume_agent::{Action, Classes, Disk, Named, NoClock, NoGate, PageCache, Session, Step};
use transhume_protocol::agent::{ClassCounts, FrameRun, MemoryClass, Range, ReportSource};

/// Entries of the page table that one step looks at.
const STEP: usize = 4096;
/// Polls of the session in one turn of the main loop.
const POLLS: usize = 16;

/// The agent and its channel.
pub(crate) struct Agent {
    console: Option<Console>,
    session: Session,
    walk: usize,
    names: NameWalk,
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
    /// `own`: the frames of its image and heap, if the host is told of them and of the pages that are written.
    pub(crate) fn new(
        console: Option<Console>,
        disk: DiskName,
        own: Option<Span<u64>>,
        liar: Liar,
    ) -> Self {
        Self {
            console,
            session: Session::new(concat!("micro-guest ", env!("CARGO_PKG_VERSION"))),
            walk: 0,
            names: NameWalk {
                own,
                stage: NameStage::Done,
                liar: liar.clone(),
            },
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
        let now = self
            .liar
            .time(Duration::from_micros(Clock::micros(clock.now())));
        let mut table = Table {
            memory,
            clock,
            walk: &mut self.walk,
            disk: &self.disk,
            liar: &mut self.liar,
        };
        let mut names = Names {
            memory,
            walk: &mut self.names,
        };
        for _ in 0..POLLS {
            let Some(out) = console.output() else {
                return false;
            };
            match session.poll_for(&mut table, &mut NoGate, &mut names, &mut NoClock, now, out) {
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
        self.liar.begin();
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

/// How far the host was told which frames are wanted first.
struct NameWalk {
    own: Option<Span<u64>>,
    stage: NameStage,
    liar: Liar,
}

#[derive(Clone, Copy)]
enum NameStage {
    Own,
    /// The pages that are written, from this one on.
    Written(usize),
    Done,
}

/// What is the guest's own, and what it writes, as the session sees it.
struct Names<'a> {
    memory: &'a Memory,
    walk: &'a mut NameWalk,
}

impl Classes for Names<'_> {
    fn watch(&mut self) {
        self.walk.stage = NameStage::Done;
    }

    fn begin(&mut self, _: u64) {
        self.walk.stage = match self.walk.own {
            Some(_) => NameStage::Own,
            None => NameStage::Done,
        };
    }

    fn step(&mut self) -> Named {
        let own = self.walk.own.clone().unwrap_or_default();
        let named = |class, run, walk: &mut NameWalk| Named::Found(class, walk.liar.frames(run));
        match self.walk.stage {
            NameStage::Own => {
                self.walk.stage = NameStage::Written(0);
                let run = FrameRun {
                    pfn: own.start,
                    pages: own.end - own.start,
                };
                named(MemoryClass::Kernel, run, self.walk)
            }
            NameStage::Written(nth) => {
                if let Some(run) = self.walk.liar.invented_frames() {
                    return Named::Found(MemoryClass::WorkingSet(0), run);
                }
                if nth >= self.memory.written() {
                    self.walk.stage = NameStage::Done;
                    return Named::Pending;
                }
                let (pfn, pages) = self.memory.written_run(nth);
                self.walk.stage = NameStage::Written(nth + pages);
                let pages = pages as u64;
                let run = FrameRun { pfn, pages };
                named(MemoryClass::WorkingSet(0), run, self.walk)
            }
            NameStage::Done => Named::Done(ClassCounts {
                kernel: own.end - own.start,
                anonymous: self.memory.roles().1 as u64,
                clean_file: self.memory.roles().0 as u64,
                ..ClassCounts::default()
            }),
        }
    }
}
