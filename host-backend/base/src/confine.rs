//! What a QEMU, and whatever else reads a guest's disks for us, may do: run as a user of its own without any
//! capability, with no way back. It is given by descriptor what it needs; whoever escapes a guest has that, and no more.

use nix::libc;
use std::ffi::CString;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;

/// Reads any file, and searches any directory.
pub const DAC_READ_SEARCH: u32 = 2;
/// `linux/prctl.h`.
const AMBIENT_RAISE: libc::c_ulong = 2;
const AMBIENT_CLEAR_ALL: libc::c_ulong = 4;
/// More than any kernel has.
const MAX_CAPABILITIES: u32 = 64;
/// Devices that QEMU opens by itself: for what a device's group may do, it is let into that group.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/userfaultfd"];

/// The user that QEMU runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    name: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl User {
    /// The user of that name; `None` for root, which QEMU then stays, without its capabilities.
    ///
    /// # Errors
    /// If there is none.
    pub fn find(name: &str) -> std::result::Result<Option<Self>, String> {
        if name == "root" {
            return Ok(None);
        }
        let missing = |why: String| {
            format!(
                "`qemu-user` is {name:?}, and {why}; make such a user (`systemd-sysusers` with \
                 packaging/host/transhume-qemu.conf, or `useradd --system --no-create-home --shell /usr/sbin/nologin \
                 {name}`) or name another. `qemu-user = \"root\"` is possible too: who escapes a guest is root then"
            )
        };
        let user = match nix::unistd::User::from_name(name) {
            Ok(Some(user)) => user,
            Ok(None) => return Err(missing("this host has no such user".to_owned())),
            Err(error) => return Err(missing(error.to_string())),
        };
        if user.uid.is_root() {
            return Ok(None);
        }
        let listed = CString::new(name)
            .map_err(|error| error.to_string())
            .and_then(|name| {
                nix::unistd::getgrouplist(&name, user.gid).map_err(|error| error.to_string())
            })
            .map_err(missing)?;
        Ok(Some(Self {
            name: name.to_owned(),
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
            groups: listed.into_iter().map(nix::unistd::Gid::as_raw).collect(),
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Its own group's number.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Its groups, and those that the devices which QEMU opens are for. Never root's.
    fn all_groups(&self) -> Vec<u32> {
        let mut groups = self.groups.clone();
        for device in DEVICES {
            let Ok(found) = std::fs::metadata(device) else {
                continue;
            };
            if found.mode() & 0o060 == 0o060 {
                groups.push(found.gid());
            }
        }
        groups.retain(|group| *group != 0);
        groups.sort_unstable();
        groups.dedup();
        groups
    }

    /// Whether the mode of a file lets this user read it.
    pub fn may_read(&self, file: &std::fs::Metadata) -> bool {
        let bits = if file.uid() == self.uid {
            0o400
        } else if file.gid() == self.gid || self.groups.contains(&file.gid()) {
            0o040
        } else {
            0o004
        };
        file.mode() & bits != 0
    }
}

/// What becomes of a child between fork and exec.
#[derive(Debug, Clone)]
pub struct Confinement {
    is_root: bool,
    user: Option<(u32, u32, Vec<u32>)>,
    keeps: Option<u32>,
    descriptors: Vec<RawFd>,
}

impl Confinement {
    /// As that user, or as ours if there is none, with these descriptors of ours at the same numbers.
    pub fn of(user: Option<&User>, descriptors: Vec<RawFd>) -> Self {
        let is_root = nix::unistd::geteuid().is_root();
        Self {
            is_root,
            user: user
                .filter(|_| is_root)
                .map(|user| (user.uid, user.gid, user.all_groups())),
            keeps: None,
            descriptors,
        }
    }

    /// The same with one capability, if we have any to give.
    #[must_use]
    pub fn keeping(mut self, capability: u32) -> Self {
        self.keeps = self.is_root.then_some(capability);
        self
    }

    /// To be called in the child. It makes system calls alone: no lock is taken and nothing is allocated.
    ///
    /// # Errors
    /// Of the kernel. The child must not go on then.
    pub fn apply(&self) -> io::Result<()> {
        for descriptor in &self.descriptors {
            // SAFETY: it changes a flag of a descriptor.
            check(unsafe { libc::fcntl(*descriptor, libc::F_SETFD, 0) }.into())?;
        }
        if self.is_root {
            self.lower_bound()?;
        }
        if let Some((uid, gid, groups)) = &self.user {
            prctl(libc::PR_SET_KEEPCAPS, self.keeps.is_some().into())?;
            // SAFETY: the groups are as many as is said; the rest are numbers.
            unsafe {
                check(libc::setgroups(groups.len(), groups.as_ptr()).into())?;
                check(libc::setresgid(*gid, *gid, *gid).into())?;
                check(libc::setresuid(*uid, *uid, *uid).into())?;
            }
        }
        prctl2(libc::PR_CAP_AMBIENT, AMBIENT_CLEAR_ALL, 0)?;
        set_capabilities(self.keeps)?;
        if let Some(capability) = self.keeps {
            prctl2(libc::PR_CAP_AMBIENT, AMBIENT_RAISE, capability.into())?;
        }
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
        // SAFETY: it cannot fail.
        unsafe { libc::umask(0o077) };
        Ok(())
    }

    /// No program that the child runs gets a capability by being somebody's.
    fn lower_bound(&self) -> io::Result<()> {
        for capability in (0..MAX_CAPABILITIES).filter(|one| Some(*one) != self.keeps) {
            match prctl(libc::PR_CAPBSET_DROP, capability.into()) {
                Ok(()) => {}
                // There are no more.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                // Without CAP_SETPCAP the bound stays; no_new_privs keeps the child from it all the same.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    prctl2(option, argument, 0)
}

fn prctl2(option: libc::c_int, argument: libc::c_ulong, second: libc::c_ulong) -> io::Result<()> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: none of the options that are used here takes an address.
    check(unsafe { libc::prctl(option, argument, second, NONE, NONE) }.into())
}

/// `struct __user_cap_header_struct` and two of `struct __user_cap_data_struct` (linux/capability.h).
fn set_capabilities(kept: Option<u32>) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // Those that are kept here are of the first 32.
    let low = kept.map_or(0, |capability| 1 << capability);
    let all = |bits| Data {
        effective: bits,
        permitted: bits,
        inheritable: bits,
    };
    let data = [all(low), all(0)];
    // SAFETY: both are as the kernel wants them, and live until it returns.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

/// Gives a directory to the user.
///
/// # Errors
/// Of the kernel.
pub fn give(path: &std::path::Path, user: Option<&User>) -> io::Result<()> {
    let Some(user) = user.filter(|_| nix::unistd::geteuid().is_root()) else {
        return Ok(());
    };
    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
}
