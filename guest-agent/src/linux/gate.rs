//! The kernel module's gate. See kernel-module/transhume.h.

use super::Error;
use super::device;
use crate::gate::Gate;
use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use nix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::Duration;
use tracing::info;
use transhume_protocol::agent::{FrameRun, FrameRuns, GateCounts};

/// `TRANSHUME_MAX_FRAMES`.
const MAX_FRAMES: u64 = 1 << 30;
/// `TRANSHUME_MAX_RANGES`.
const MAX_RANGES: usize = 512;
/// `TRANSHUME_GATE_ACTIVE` and `TRANSHUME_GATE_EXPIRED`.
const ACTIVE: u32 = 1;
const EXPIRED: u32 = 3;

/// `struct transhume_gate_open`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Open {
    frames: u64,
    flags: u32,
    reserved: u32,
}

/// `struct transhume_frames`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Frames {
    pfn: u64,
    pages: u64,
}

/// `struct transhume_frame_list`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct List {
    frames: u64,
    count: u32,
    flags: u32,
}

/// `struct transhume_gate_walk`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Walk {
    addr: u64,
    gated: u64,
    pid: i32,
    flags: u32,
}

/// `struct transhume_gate_state`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct State {
    state: u32,
    waiting: u32,
    absent: u64,
    named: u64,
    gated: u64,
    waits: u64,
    interrupted: u64,
    passed: u64,
    waited_us: u64,
    longest_us: u64,
    faults: u64,
    faults_us: u64,
}

nix::ioctl_write_ptr!(gate_open, device::MAGIC, 3, Open);
nix::ioctl_write_ptr!(gate_absent, device::MAGIC, 4, List);
nix::ioctl_readwrite!(gate_walk, device::MAGIC, 5, Walk);
nix::ioctl_write_ptr!(gate_arrived, device::MAGIC, 6, List);
nix::ioctl_write_ptr!(gate_wanted, device::MAGIC, 7, List);
nix::ioctl_read!(gate_state, device::MAGIC, 8, State);

/// The gate of this guest's module.
#[derive(Debug, Default)]
pub struct LinuxGate {
    device: Option<File>,
    /// What it was opened for.
    frames: u64,
    /// Frames may be absent.
    is_named: bool,
    /// Its descriptor was not asked for yet.
    is_new: bool,
    /// Processes whose memory is to be walked, and where in the first one to go on.
    to_walk: Vec<i32>,
    addr: u64,
    wanted: VecDeque<FrameRun>,
    /// CPU time that it took to open.
    opening: Duration,
    /// The CPU time that this process had when frames were named.
    named_at: Duration,
    /// CPU time from there until all processes were walked.
    walking: Duration,
}

impl LinuxGate {
    /// The module's descriptor, once for each gate that opens: it is readable while somebody waits, and hangs up
    /// when the gate ended by itself.
    pub(super) fn take_new(&mut self) -> Option<BorrowedFd<'_>> {
        let device = self.device.as_ref().filter(|_| self.is_new)?;
        self.is_new = false;
        Some(device.as_fd())
    }

    /// Hands runs to the module, as many at once as it takes.
    fn list(
        &self,
        runs: FrameRuns<'_>,
        call: unsafe fn(nix::libc::c_int, *const List) -> nix::Result<nix::libc::c_int>,
    ) {
        let Some(device) = &self.device else { return };
        let mut frames = Vec::with_capacity(MAX_RANGES);
        // What cannot be read ends the message; what came before counts.
        let mut runs = runs.iter().map_while(Result::ok).peekable();
        loop {
            frames.clear();
            frames.extend(
                runs.by_ref()
                    .take(MAX_RANGES)
                    .map(|FrameRun { pfn, pages }| Frames { pfn, pages }),
            );
            let list = List {
                frames: frames.as_ptr() as u64,
                count: u32::try_from(frames.len()).unwrap_or(0),
                flags: 0,
            };
            // SAFETY: the descriptor is open; the call reads `list` and the frames that it points to, which
            // both outlive it.
            let called = unsafe { call(device.as_raw_fd(), &raw const list) };
            // A gate that is over says so by `is_open`.
            if called.is_err() || runs.peek().is_none() {
                return;
            }
        }
    }

    fn state(&self) -> State {
        let mut state = State::default();
        if let Some(device) = &self.device {
            // SAFETY: the descriptor is open, and `state` is what the call fills.
            let _ = unsafe { gate_state(device.as_raw_fd(), &raw mut state) };
        }
        state
    }

    /// From here on all that this process does is for the gate.
    fn set_named(&mut self) {
        if !std::mem::replace(&mut self.is_named, true) {
            self.named_at = cpu_time();
        }
    }

    fn fetch_wanted(&mut self) {
        let Some(device) = &self.device else { return };
        let mut frames = [Frames::default(); 64];
        let list = List {
            frames: frames.as_mut_ptr() as u64,
            count: 64,
            flags: 0,
        };
        // SAFETY: the descriptor is open; the call reads `list` and writes `count` frames at most where it
        // points to, which is an array of that many.
        let found = unsafe { gate_wanted(device.as_raw_fd(), &raw const list) };
        let found = found.ok().and_then(|count| usize::try_from(count).ok());
        let found = frames.get(..found.unwrap_or(0)).unwrap_or_default();
        self.wanted.extend(
            found
                .iter()
                .map(|&Frames { pfn, pages }| FrameRun { pfn, pages }),
        );
    }

    /// Goes on with one process; whether there is more of it.
    fn walk_process(&mut self, pid: i32) -> bool {
        let Some(device) = &self.device else {
            return false;
        };
        let mut walk = Walk {
            addr: self.addr,
            gated: 0,
            pid,
            flags: 0,
        };
        // SAFETY: the descriptor is open, and `walk` is what the call reads and fills.
        let walked = unsafe { gate_walk(device.as_raw_fd(), &raw mut walk) };
        self.addr = if walked.is_ok() { walk.addr } else { 0 };
        self.addr != 0
    }
}

impl Gate for LinuxGate {
    type Error = Error;

    fn open(&mut self, frames: u64) -> Result<(), Error> {
        if self.frames == frames && !self.is_named && self.is_open() {
            self.arrived(FrameRuns::NONE);
            return Ok(());
        }
        self.close();
        let began = cpu_time();
        let device = device::open_file()?;
        let open = Open {
            frames: frames.min(MAX_FRAMES),
            flags: 0,
            reserved: 0,
        };
        // SAFETY: the descriptor is open, and `open` outlives the call, which only reads it.
        unsafe { gate_open(device.as_raw_fd(), &raw const open) }.map_err(|error| match error {
            Errno::ENOTTY => Error::GateUnknown,
            Errno::EBUSY => Error::GateBusy,
            Errno::EOPNOTSUPP => Error::GateImpossible,
            source => Error::Call {
                call: "opening the kernel module's gate",
                source,
            },
        })?;
        // What is read back from a disk by whoever sleeps would be waited for in vain.
        let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
        self.device = Some(device);
        self.frames = frames;
        self.is_named = false;
        self.is_new = true;
        self.to_walk.clear();
        self.addr = 0;
        self.opening = cpu_time().saturating_sub(began);
        Ok(())
    }

    fn absent(&mut self, runs: FrameRuns<'_>) {
        self.set_named();
        self.list(runs, gate_absent);
    }

    fn walk(&mut self) -> bool {
        self.set_named();
        if self.to_walk.is_empty() {
            self.to_walk = processes();
            self.addr = 0;
        }
        let Some(&pid) = self.to_walk.last() else {
            return false;
        };
        if !self.walk_process(pid) {
            self.to_walk.pop();
        }
        self.walking = cpu_time().saturating_sub(self.named_at);
        !self.to_walk.is_empty()
    }

    fn arrived(&mut self, runs: FrameRuns<'_>) {
        self.list(runs, gate_arrived);
    }

    fn wanted(&mut self) -> Option<FrameRun> {
        if self.wanted.is_empty() {
            self.fetch_wanted();
        }
        self.wanted.pop_front()
    }

    fn is_open(&mut self) -> bool {
        self.state().state == ACTIVE
    }

    fn close(&mut self) -> GateCounts {
        let state = self.state();
        let was_open = self.device.is_some();
        let closed_at = cpu_time();
        // The module lets everybody go when the file is closed.
        if self.device.take().is_some() {
            let _ = munlockall();
        }
        let mut agent = self.opening;
        if self.is_named {
            agent += cpu_time().saturating_sub(self.named_at);
        }
        let cpu = agent + Duration::from_micros(state.faults_us);
        if was_open && self.is_named {
            info!(
                absent = state.named,
                gated = state.gated,
                waits = state.waits,
                opening = ?self.opening,
                walking = ?self.walking,
                closing = ?cpu_time().saturating_sub(closed_at),
                agent = ?agent,
                faults = state.faults,
                in_faults = ?Duration::from_micros(state.faults_us),
                "the gate is over"
            );
        }
        self.is_named = false;
        self.is_new = false;
        self.to_walk.clear();
        self.wanted.clear();
        GateCounts {
            expired: state.state == EXPIRED,
            gated: state.gated,
            waits: state.waits,
            interrupted: state.interrupted,
            passed: state.passed,
            waited_us: state.waited_us,
            longest_us: state.longest_us,
            absent: state.named,
            cpu_us: u64::try_from(cpu.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// The CPU time of this thread, which does all there is to do, calls of the module included.
pub(super) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// All processes, but not their threads.
pub(super) fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
