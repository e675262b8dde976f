//! The command line's end of the control socket.

use crate::{Error, Result};
use nix::unistd::{Gid, Group};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use transhume_api::{MAX_RESPONSE, Request, Response};
use transhume_base::lines::Lines;

/// A connection to the service.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    lines: Lines<ReadHalf<UnixStream>>,
    writer: WriteHalf<UnixStream>,
}

impl Client {
    /// Connects to the service at `path`.
    ///
    /// # Errors
    /// [`Error::Service`], with what to do.
    pub async fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).await.map_err(|error| {
            let cure = match error.kind() {
                io::ErrorKind::PermissionDenied => cure(path),
                _ => "is it running (`systemctl status transhumed`)? Another socket can be named by --socket \
                      or TRANSHUME_SOCKET"
                    .to_owned(),
            };
            Error::Service {
                socket: path.to_owned(),
                cause: format!("cannot be reached: {error}; {cure}"),
            }
        })?;
        let (reader, writer) = tokio::io::split(stream);
        Ok(Self {
            socket: path.to_owned(),
            lines: Lines::new(reader, MAX_RESPONSE),
            writer,
        })
    }

    fn wrong(&self, cause: impl std::fmt::Display) -> Error {
        Error::Service {
            socket: self.socket.clone(),
            cause: cause.to_string(),
        }
    }

    /// Asks.
    ///
    /// # Errors
    /// [`Error::Service`] if the service is gone.
    pub async fn send(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.wrong(error))?;
        line.push(b'\n');
        if line.len() > transhume_api::MAX_REQUEST {
            return Err(Error::refused(
                "the definition is too long",
                "is it the right file? A definition has some ten lines",
            ));
        }
        let sent = self.writer.write_all(&line).await;
        sent.map_err(|error| self.wrong(format!("went away: {error}; try again")))
    }

    /// The next answer.
    ///
    /// # Errors
    /// [`Error::Answered`] if it is a failure, [`Error::Service`] if there is none.
    pub async fn receive(&mut self) -> Result<Response> {
        let line = match self.lines.next().await {
            Ok(Some(line)) => line,
            Ok(None) => {
                return Err(self.wrong(
                    "ended before it answered; see its log (`journalctl -u transhumed`). What was under way is \
                     shown by `transhume vm list` and `transhume job list` when it runs again",
                ));
            }
            Err(error) => return Err(self.wrong(format!("cannot be read: {error}"))),
        };
        match serde_json::from_slice(&line) {
            Ok(Response::Error(failure)) => Err(Error::Answered(failure)),
            Ok(response) => Ok(response),
            Err(error) => Err(self.wrong(format!(
                "answered what this transhume does not know ({error}); bring both to the same version"
            ))),
        }
    }

    /// Asks, and waits for one answer.
    ///
    /// # Errors
    /// As [`Client::send`] and [`Client::receive`].
    pub async fn ask(&mut self, request: &Request) -> Result<Response> {
        self.send(request).await?;
        self.receive().await
    }
}

/// What a person can do about a socket that they may not connect to.
fn cure(path: &Path) -> String {
    let Ok(found) = std::fs::metadata(path) else {
        return "run this as root (sudo); or let a group in: `control-group` in transhumed.toml, and \
                RuntimeDirectoryMode=0711 in transhumed.service"
            .to_owned();
    };
    let name = |gid: Gid| {
        let group = Group::from_gid(gid).ok().flatten();
        group.map_or_else(|| gid.to_string(), |group| group.name)
    };
    if found.mode() & 0o020 == 0 {
        return "run this as root (sudo), or let a group in by `control-group` in transhumed.toml"
            .to_owned();
    }
    let group = name(Gid::from_raw(found.gid()));
    format!(
        "it is for root and the group {group}: run this as root (sudo), or join the group (`sudo usermod -aG {group} \
         $USER`) and log in again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn who_may_not_connect_is_told_who_may() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("control.sock");
        assert!(cure(&socket).contains("RuntimeDirectoryMode=0711"));
        std::fs::write(&socket, "").expect("a file");
        let mode = |mode| {
            std::fs::set_permissions(&socket, Permissions::from_mode(mode)).expect("a mode");
        };
        mode(0o600);
        assert!(cure(&socket).contains("control-group"));
        mode(0o660);
        let own = Group::from_gid(Gid::current())
            .expect("groups")
            .expect("a group");
        let said = cure(&socket);
        assert!(
            said.contains(&format!("usermod -aG {}", own.name)),
            "{said}"
        );
    }
}
