//! The control socket: for root, or for the owner and the group that the configuration names. The kernel lets
//! nobody else connect, so a client's credentials need no second look.

use super::config::Config;
use super::{Error, Result};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Group, Uid, User};
use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;
use tokio::net::{UnixListener, UnixStream};

/// Everybody gets through to the control socket, and nobody sees what else there is.
const RUN_MODE: u32 = 0o711;
/// QEMU's user gets through to the folder of its VM that is its own. Monitors and consoles, which a group of the
/// control socket has no business with, are root's, each by its own mode.
const VMS_MODE: u32 = 0o711;

/// Listens for the command line.
pub(super) async fn bind(config: &Config) -> Result<UnixListener> {
    let (uid, gid) = (owner(config)?, group(config)?);
    let path = config.control_socket();
    make_folders(&config.run_directory)?;
    if gid.is_some() || uid.is_some() {
        warn_if_unreachable(&config.run_directory, gid);
    }
    if UnixStream::connect(&path).await.is_ok() {
        return Err(Error::refused(
            format!("another transhumed answers at {}", path.display()),
            "end it first, or give this one a `run-directory` of its own",
        ));
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::file("remove", path, error));
        }
        _ => {}
    }
    // For its maker alone until it is whose it shall be.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(&path);
    umask(before);
    let listener = bound.map_err(|error| Error::file("listen at", &path, error))?;
    let given = chown(&path, uid.map(Uid::as_raw), gid.map(Gid::as_raw));
    given.map_err(|error| Error::file("give to control-owner and control-group", &path, error))?;
    if gid.is_some() {
        set_mode(&path, 0o660)?;
    }
    Ok(listener)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|error| Error::file("set the mode of", path, error))
}

fn make_folders(run: &Path) -> Result<()> {
    let cannot = |path: &Path, source| Error::File {
        action: "create",
        path: path.to_owned(),
        source,
        cure: "; transhumed needs to write to its `run-directory`",
    };
    if !run.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(run)
            .map_err(|error| cannot(run, error))?;
        // Whatever the umask.
        set_mode(run, RUN_MODE)?;
    }
    let vms = run.join("vms");
    DirBuilder::new()
        .recursive(true)
        .mode(VMS_MODE)
        .create(&vms)
        .map_err(|error| cannot(&vms, error))?;
    set_mode(&vms, VMS_MODE)
}

fn warn_if_unreachable(run: &Path, group: Option<Gid>) {
    let Ok(found) = std::fs::metadata(run) else {
        return;
    };
    let mode = found.mode();
    let by_group = group.is_some_and(|group| group.as_raw() == found.gid()) && mode & 0o010 != 0;
    if mode & 0o001 == 0 && !by_group {
        tracing::warn!(
            folder = %run.display(),
            mode = format!("{:o}", mode & 0o7777),
            "control-owner and control-group may not get to the control socket in it: let them through by `chmod \
             711`, or by RuntimeDirectoryMode=0711 in transhumed.service if systemd makes it"
        );
    }
}

fn owner(config: &Config) -> Result<Option<Uid>> {
    let Some(name) = &config.control_owner else {
        return Ok(None);
    };
    match User::from_name(name) {
        Ok(Some(user)) => Ok(Some(user.uid)),
        found => Err(unknown(config, "control-owner", "user", name, found.err())),
    }
}

fn group(config: &Config) -> Result<Option<Gid>> {
    let Some(name) = &config.control_group else {
        return Ok(None);
    };
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(Some(group.gid)),
        found => Err(unknown(config, "control-group", "group", name, found.err())),
    }
}

fn unknown(config: &Config, key: &str, kind: &str, name: &str, error: Option<nix::Error>) -> Error {
    let cause = match error {
        None => format!(
            "`{key}` is {name:?}, and this host has no such {kind}; make it (`{kind}add --system {name}`) or name \
             another"
        ),
        Some(error) => format!(
            "`{key}` is {name:?}, and that {kind} cannot be looked up: {error}; see `getent {} {name}`",
            if kind == "user" { "passwd" } else { "group" }
        ),
    };
    Error::Config {
        path: config.file.clone(),
        cause,
    }
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
