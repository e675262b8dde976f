//! Asks the agent in which order the guest's memory is wanted.

use std::io;
use std::os::unix::net::UnixStream;

use transhume_protocol::agent::HostMessage;

use crate::agent::{Agent, send};

/// Asks the agent while it is listened to.
pub struct Questions(UnixStream);

impl Questions {
    /// Has it look at what processes touch from now on.
    ///
    /// # Errors
    /// If the channel cannot be used.
    pub fn watch(&self) -> io::Result<()> {
        send(&self.0, &HostMessage::Watch)
    }

    /// Asks for the order of frames below `frames`. The answer comes as [`crate::Reported::Order`], or never if the
    /// agent does not know of it.
    ///
    /// # Errors
    /// If the channel cannot be used.
    pub fn order(&self, frames: u64) -> io::Result<()> {
        send(&self.0, &HostMessage::ClassesWanted { frames })
    }
}

impl Agent {
    /// Something to ask this agent by.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn questions(&self) -> io::Result<Questions> {
        self.stream.try_clone().map(Questions)
    }
}
