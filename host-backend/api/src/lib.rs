//! What the service and its clients say to each other: JSON objects, one a line, over a unix socket. A
//! request gets one response; `job-follow` gets one at each change until its job has ended.

mod failure;
mod goal;
mod job;
pub mod migration;
mod mode;
mod request;
mod vm;

pub use failure::{Failure, FailureKind};
pub use goal::Goal;
pub use job::{JobInfo, JobState, Offered};
pub use mode::{Choice, Mode};
pub use request::{MAX_REQUEST, MAX_RESPONSE, Request, Response};
pub use vm::{DiskInfo, MachineInfo, VmInfo};
