//! The main loop, and the commands that come over COM1.

use crate::agent::Agent;
use crate::clock::{Clock, HZ};
use crate::disk::VirtioDisk;
use crate::interrupts;
use crate::memory::{Memory, Verdict};
use crate::pace::Pace;
use crate::parameters::{Parameters, size};
use crate::power::End;
use crate::serial::Serial;

/// Ticks between two heartbeats: 50 ms.
const HEARTBEAT: u64 = HZ / 20;
/// Pages that are checked in one turn of the main loop.
const CHECK_STEP: usize = 256;

/// What the guest is made of.
pub(crate) struct Parts {
    pub(crate) serial: Serial,
    pub(crate) clock: Clock,
    pub(crate) memory: Memory,
    pub(crate) disk: VirtioDisk,
    pub(crate) agent: Agent,
}

/// The guest at work.
pub(crate) struct Guest {
    parts: Parts,
    /// When the turn before began, in ticks.
    turn: u64,
    data: Pace,
    cache: Pace,
    churn: Pace,
    check: Option<(usize, Verdict)>,
    pongs: u64,
    heartbeats: u64,
    /// When the next heartbeat is due, in ticks.
    heartbeat: Option<u64>,
    /// How it ends, and when, in ticks.
    end: Option<(End, u64)>,
}

impl Guest {
    /// A guest that is ready to run.
    pub(crate) fn new(parts: Parts, parameters: &Parameters) -> Self {
        Self {
            parts,
            turn: 0,
            data: Pace::new(parameters.rate),
            cache: Pace::new(parameters.cache_rate),
            churn: Pace::new(parameters.churn),
            check: None,
            pongs: 0,
            heartbeats: 0,
            heartbeat: None,
            end: None,
        }
    }

    /// The main loop.
    pub(crate) fn run(mut self) -> ! {
        let (cache, data, zero) = self.parts.memory.roles();
        let ms = Clock::micros(self.parts.clock.now()) / 1000;
        self.parts.serial.say(format_args!(
            "ready cache={cache} data={data} zero={zero} ms={ms}"
        ));
        loop {
            let busy = self.turn();
            if !busy {
                interrupts::wait();
            }
        }
    }

    /// One turn; whether there is more to do at once.
    fn turn(&mut self) -> bool {
        let now = self.parts.clock.now();
        let elapsed = now - self.turn;
        self.turn = now;
        self.parts.serial.poll();
        if let Some(due) = self.heartbeat
            && now >= due
        {
            self.heartbeats += 1;
            self.parts
                .serial
                .say(format_args!("heartbeat {}", self.heartbeats));
            self.heartbeat = Some((due + HEARTBEAT).max(now));
        }
        if let Some((end, _)) = self.end.take_if(|(_, due)| now >= *due) {
            end.now();
        }
        let mut busy = self.change_pages(elapsed);
        busy |= self.check_on();
        busy |= self
            .parts
            .agent
            .turn(&self.parts.memory, &mut self.parts.clock);
        if self.check.is_none()
            && let Some(line) = self.parts.serial.next_line()
        {
            self.obey(&line);
            busy = true;
        }
        busy
    }

    fn change_pages(&mut self, elapsed: u64) -> bool {
        let (data, cache, churn) = (
            self.data.due(elapsed),
            self.cache.due(elapsed),
            self.churn.due(elapsed),
        );
        (0..data).for_each(|_| self.parts.memory.dirty_data());
        (0..cache).for_each(|_| self.parts.memory.dirty_cache());
        (0..churn).for_each(|_| self.parts.memory.churn(&mut self.parts.disk));
        data + cache + churn > 0
    }

    fn check_on(&mut self) -> bool {
        let Some((at, mut verdict)) = self.check.take() else {
            return false;
        };
        if at < self.parts.memory.len() {
            self.parts.memory.check(at, CHECK_STEP, &mut verdict);
            self.check = Some((at + CHECK_STEP, verdict));
            return true;
        }
        let Verdict { pages, bad, first } = verdict;
        match first {
            None => self.parts.serial.answer(format_args!("ok pages={pages}")),
            Some((pfn, kind, holds)) => {
                self.parts.serial.answer(format_args!(
                    "bad page={pfn} kind={kind} holds={holds} count={bad} pages={pages}"
                ));
            }
        }
        true
    }

    fn obey(&mut self, line: &str) {
        let tagged = line.starts_with('#').then(|| line.find(' ')).flatten();
        let (tag, line) = line.split_at(tagged.map_or(0, |end| end + 1));
        self.parts.serial.set_tag(tag);
        let (command, argument) = line.split_once(' ').unwrap_or((line, ""));
        let pace = match command {
            "dirty" => Some(&mut self.data),
            "dirty-cache" => Some(&mut self.cache),
            "churn" => Some(&mut self.churn),
            _ => None,
        };
        if let Some(pace) = pace {
            if let Some(rate) = size(argument) {
                *pace = Pace::new(rate);
                self.parts
                    .serial
                    .answer(format_args!("ok {command} {rate}"));
            } else {
                self.parts.serial.answer(format_args!(
                    "error `{argument}` is no rate: bytes per second, with K, M or G"
                ));
            }
            return;
        }
        match (command, argument) {
            ("ping", _) => {
                self.pongs += 1;
                self.parts
                    .serial
                    .answer(format_args!("pong {}", self.pongs));
            }
            ("check", _) => self.check = Some((0, Verdict::default())),
            ("stop", _) => {
                for pace in [&mut self.data, &mut self.cache, &mut self.churn] {
                    *pace = Pace::new(0);
                }
                self.parts.serial.answer(format_args!("ok stopped"));
            }
            ("hot", argument) => match size(argument) {
                Some(bytes) => {
                    self.parts.memory.set_hot(bytes);
                    self.parts.serial.answer(format_args!("ok hot {bytes}"));
                }
                None => self.parts.serial.answer(format_args!(
                    "error `{argument}` is no size: bytes, with K, M or G"
                )),
            },
            ("poweroff" | "reset" | "panic", after) => match (End::named(command), size(after)) {
                (Some(end), Some(ms)) => {
                    self.end = Some((end, self.turn + ms * HZ / 1000));
                    self.parts.serial.answer(format_args!("ok {command} {ms}"));
                }
                _ => self
                    .parts
                    .serial
                    .answer(format_args!("error `{after}` is no time: milliseconds")),
            },
            ("heartbeat", "on") => {
                self.heartbeat = Some(self.turn);
                self.parts.serial.answer(format_args!("ok heartbeat on"));
            }
            ("heartbeat", "off") => {
                self.heartbeat = None;
                self.parts.serial.answer(format_args!("ok heartbeat off"));
            }
            ("corrupt", nth) => match nth
                .parse()
                .ok()
                .and_then(|nth| self.parts.memory.corrupt(nth))
            {
                Some(pfn) => self
                    .parts
                    .serial
                    .answer(format_args!("ok corrupted page={pfn}")),
                None => self
                    .parts
                    .serial
                    .say(format_args!("error `{nth}` names no page that is checked")),
            },
            ("status", _) => self.status(),
            _ => self
                .parts
                .serial
                .say(format_args!("error `{command}` is no command")),
        }
    }

    fn status(&mut self) {
        let ms = Clock::micros(self.parts.clock.now()) / 1000;
        let counters = self.parts.memory.counters;
        self.parts.serial.answer(format_args!(
            "status ms={ms} dirtied={} cache-dirtied={} churned={} read-errors={} heartbeats={} pongs={} frames={}",
            counters.data,
            counters.cache,
            counters.churned,
            counters.read_errors,
            self.heartbeats,
            self.pongs,
            self.parts.agent.frames,
        ));
    }
}
