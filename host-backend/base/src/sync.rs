//! What threads wait for one another with. Models of them have `transhume_testing::model_sync` in its place.

pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
pub use std::time::Instant;
