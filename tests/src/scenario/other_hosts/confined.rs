//! A guest's QEMU, on either host: a user without rights, in its sandbox, and with nothing open but what it was handed.

use crate::error::check;
use crate::hosts::daemon::qemu_user;
use crate::packages::Qemu;
use crate::scenario::fixture::micro::{Micro, Qemus};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const OLD: Qemus = (Qemu::V7_2, Qemu::V7_2);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "confined-7.2",
            about: "what QEMU may do on either host",
            limit: LIMIT,
            run: |bed| confined(bed, OLD),
        },
        Scenario {
            name: "confined-10.0",
            about: "the same of a newer QEMU",
            limit: LIMIT,
            run: |bed| confined(bed, NEWEST),
        },
    ]
}

fn confined(bed: &Bed, qemus: Qemus) -> Result<()> {
    let micro = Micro::new(bed)?;
    let pair = Pair::new(bed, qemus, None)?;
    let mut life = pair.boot(&micro)?;
    let disks = micro.disks.iter().map(|disk| disk.path.clone());
    let files: Vec<PathBuf> = disks.chain([bed.micro_guest()?.to_owned()]).collect();
    is_confined(&pair, At::A, &files)?;
    pair.moves(At::A, &mut life)?;
    is_confined(&pair, At::B, &files)
}

fn is_confined(pair: &Pair<'_>, at: At, files: &[PathBuf]) -> Result<()> {
    let [pid] = pair.qemus(at)[..] else {
        return Err(Error::Check(format!("{} runs no QEMU", at.name())));
    };
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next())
            .unwrap_or_default()
            .to_owned()
    };
    let user = nix::unistd::User::from_name(qemu_user(pair.qemu(at)));
    let uid = user.ok().flatten().map_or(0, |user| user.uid.as_raw());
    let none = "0000000000000000";
    for (name, wanted) in [
        ("Uid:", uid.to_string().as_str()),
        ("CapPrm:", none),
        ("CapEff:", none),
        ("CapBnd:", none),
        ("CapAmb:", none),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        let found = field(name);
        check(found == wanted, || {
            format!("QEMU at {}: {name} {found}, not {wanted}", at.name())
        })?;
    }
    let (folder, logs) = (pair.folder(at), pair.host(at).folder.join("log"));
    let handed = |path: &Path| {
        files.iter().any(|file| file == path)
            || path.starts_with(&folder)
            || path.starts_with(&logs)
            || path == Path::new("/dev/null")
            || path == Path::new("/dev/userfaultfd")
    };
    let path = format!("/proc/{pid}/fd");
    let links = fs::read_dir(&path).map_err(Error::file("read", &path))?;
    for link in links.flatten() {
        let Ok(open) = fs::read_link(link.path()) else {
            continue;
        };
        let is_file = open.is_absolute() && !open.starts_with("/memfd:");
        check(!is_file || handed(&open), || {
            format!("QEMU at {} has {} open", at.name(), open.display())
        })?;
    }
    Ok(())
}
