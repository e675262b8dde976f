//! What a VM's definition may use of this host when another host sends it. QEMU runs as root, so a definition
//! names files, programs and networks with root's rights: nothing but what this host's operator named is used.

use super::LaunchSettings;
use super::preflight::{Refusal, TIMEOUT};
use std::cell::RefCell;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use transhume_machine::definition::{Accelerator, Backend};
use transhume_machine::{Definition, image_chain};

/// What VMs that arrive from a host may use; nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Directories that all of their files are below.
    pub paths: Vec<PathBuf>,
    /// Bridges that their network cards may be plugged into.
    pub bridges: Vec<String>,
    /// Tap devices, likewise.
    pub taps: Vec<String>,
    /// Whether they may use QEMU's own address translation, by which a guest reaches what this host reaches.
    pub user_network: bool,
    /// The QEMUs that they may name; the host's own needs no mention.
    pub qemu_binaries: Vec<PathBuf>,
    /// What may run their vCPUs.
    pub accelerators: Vec<Accelerator>,
    /// Where this is written, for messages.
    pub place: String,
}

impl Limits {
    /// Every reason why that definition may not come. Looks at files: for a thread that may be blocked.
    pub fn check(&self, definition: &Definition, settings: &LaunchSettings) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        if let Some(qemu) = &definition.qemu
            && *qemu != settings.qemu
            && !self.qemu_binaries.contains(qemu)
        {
            refusals.push(self.refusal(
                format!("`qemu` of the definition is {}", qemu.display()),
                "qemu-binaries",
                &self.qemu_binaries,
            ));
        }
        if !self.accelerators.contains(&definition.accelerator) {
            refusals.push(self.refusal(
                format!("`accelerator` is {}", definition.accelerator),
                "accelerators",
                &self.accelerators,
            ));
        }
        for (index, nic) in definition.nics.iter().enumerate() {
            let (key, kind, name, listed) = match nic.backend {
                Backend::Bridge => ("bridges", "bridge", &nic.bridge, &self.bridges),
                Backend::Tap => ("taps", "tap device", &nic.ifname, &self.taps),
                Backend::User if self.user_network => continue,
                Backend::User => {
                    refusals.push(Refusal::new(
                        format!("nic[{index}] is of the backend user, which `user-network` does not allow"),
                        format!(
                            "set `user-network = true` in {}, and restart transhumed there",
                            self.place
                        ),
                    ));
                    continue;
                }
            };
            let name = name.as_deref().unwrap_or_default();
            if !listed.iter().any(|one| one == name) {
                let cause = format!("nic[{index}] is plugged into the {kind} {name}");
                refusals.push(self.refusal(cause, key, listed));
            }
        }
        refusals.extend(self.check_files(definition, settings));
        refusals
    }

    /// [`Limits::check`] with bounded patience: storage over a network may not answer.
    pub async fn check_in_time(
        &self,
        definition: &Definition,
        settings: &LaunchSettings,
    ) -> Vec<Refusal> {
        let (limits, definition, settings) = (self.clone(), definition.clone(), settings.clone());
        let host = settings.host.clone();
        let check = transhume_base::task::blocking(move || limits.check(&definition, &settings));
        match tokio::time::timeout(TIMEOUT, check).await {
            Ok(Ok(refusals)) => refusals,
            Ok(Err(error)) => vec![Refusal::new(
                format!("looking at the VM's files on {host} failed: {error}"),
                "see the daemon's log",
            )],
            Err(_) => vec![Refusal::storage(&host)],
        }
    }

    /// Whether a file may be used that was opened by that path: where it was found is what counts.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn admit(&self, path: &Path, file: &File) -> io::Result<()> {
        let found = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let listed = |directory: &PathBuf| {
            resolve(directory).is_ok_and(|real| leads_below(path, &found, directory, &real))
        };
        if self.paths.iter().any(listed) {
            return Ok(());
        }
        let refusal = self.refusal(path.display(), "paths", &self.paths);
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            refusal.to_string(),
        ))
    }

    fn check_files(&self, definition: &Definition, settings: &LaunchSettings) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        for disk in &definition.disks {
            let path = definition.disk_path(disk, &settings.host);
            // A disk without a path is refused with other reasons.
            if path.as_os_str().is_empty() {
                continue;
            }
            let what = format!("disk {} on {}", disk.id, settings.host);
            if let Err(refusal) = self.check_path(&what, path) {
                refusals.push(refusal);
            } else if disk.format == transhume_machine::definition::Format::Qcow2 {
                refusals.extend(self.check_backing(&what, path));
            }
        }
        if let Some(boot) = &definition.boot {
            let files = [
                ("boot.kernel", Some(&boot.kernel)),
                ("boot.initrd", boot.initrd.as_ref()),
            ];
            for (what, path) in files {
                refusals.extend(path.and_then(|path| self.check_path(what, path).err()));
            }
        }
        refusals
    }

    fn check_backing(&self, what: &str, image: &Path) -> Option<Refusal> {
        let refused = RefCell::new(None);
        let admit = |file: &Path| {
            let checked = self.check_path(&format!("{what}, its backing file"), file);
            checked.map_err(|refusal| {
                *refused.borrow_mut() = Some(refusal);
                io::ErrorKind::PermissionDenied.into()
            })
        };
        let below = image_chain::below(image, admit);
        if let Some(refusal) = refused.into_inner() {
            return Some(refusal);
        }
        match below {
            Ok(_) => None,
            // What is not there, or cannot be read, is refused with other reasons.
            Err(error) if error.kind() != io::ErrorKind::InvalidData => None,
            Err(error) => Some(Refusal::new(
                format!("{what}: {error}"),
                "a VM from another host brings no disk of which QEMU would have to guess what it is made of",
            )),
        }
    }

    /// The answer does not tell whether there is such a file. A link is named with what is written in it, if it is in a
    /// directory that is open to the other host.
    fn check_path(&self, what: &str, path: &Path) -> Result<(), Refusal> {
        if self.paths.iter().any(|directory| is_below(path, directory)) {
            return Ok(());
        }
        let cause = format!("{what}: {}", path.display());
        let link = self
            .paths
            .iter()
            .find_map(|directory| link_in(path, directory));
        if let Some((link, to)) = link {
            let link = if link == path {
                "is a link".to_owned()
            } else {
                format!("goes by the link {}", link.display())
            };
            let mut refusal = self.refusal(
                format!("{cause}, which {link} to {}", to.display()),
                "paths",
                &self.paths,
            );
            // Whoever wrote the link may want just that it is followed.
            refusal.cure = format!(
                "have it lead to a file below one of them. Whoever may write below them made the link: only when VMs from \
                 other hosts may use what it leads to, add to `paths` in {}",
                self.place
            );
            return Err(refusal);
        }
        Err(self.refusal(cause, "paths", &self.paths))
    }

    fn refusal(&self, cause: impl Display, key: &str, listed: &[impl Shown]) -> Refusal {
        let listed = if listed.is_empty() {
            "none".to_owned()
        } else {
            let listed: Vec<String> = listed.iter().map(Shown::shown).collect();
            listed.join(", ")
        };
        let within = if key == "paths" {
            "lies below none of"
        } else {
            "is not in"
        };
        Refusal::new(
            format!("{cause}, which {within} `{key}` ({listed})"),
            format!(
                "change the VM, or add to `{key}` in {}, and restart transhumed there",
                self.place
            ),
        )
    }
}

/// For messages.
trait Shown {
    fn shown(&self) -> String;
}

impl Shown for PathBuf {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl Shown for String {
    fn shown(&self) -> String {
        self.clone()
    }
}

impl Shown for Accelerator {
    fn shown(&self) -> String {
        self.to_string()
    }
}

/// Whether a path leads below a directory, all links followed.
fn is_below(path: &Path, directory: &Path) -> bool {
    let (Ok(path_real), Ok(directory_real)) = (resolve(path), resolve(directory)) else {
        return false;
    };
    leads_below(path, &path_real, directory, &directory_real)
}

fn leads_below(path: &Path, path_real: &Path, directory: &Path, directory_real: &Path) -> bool {
    let strictly = |path: &Path, directory: &Path| path != directory && path.starts_with(directory);
    if strictly(path_real, directory_real) {
        return true;
    }
    // The links in /dev are udev's, and lead to devices elsewhere in it: /dev/san/web1 to /dev/dm-3. But
    // for its one folder that everybody writes to.
    let dev = Path::new("/dev");
    strictly(path, directory)
        && directory_real.starts_with(dev)
        && path_real.starts_with(dev)
        && !path.starts_with("/dev/shm")
        && !path.components().any(|part| part == Component::ParentDir)
}

/// The first link on a path below a directory, and what is written in it.
fn link_in(path: &Path, directory: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut link = directory.to_owned();
    for part in path.strip_prefix(directory).ok()?.components() {
        let Component::Normal(name) = part else {
            return None;
        };
        link.push(name);
        if let Ok(to) = std::fs::read_link(&link) {
            return Some((link, to));
        }
    }
    None
}

/// Where a path leads; what of it does not exist is taken as it is written.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // A link to what is not there may lead anywhere once it is; so may `..` after it.
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(error);
            };
            if path.symlink_metadata().is_ok() {
                return Err(error);
            }
            Ok(resolve(parent)?.join(name))
        }
        result => result,
    }
}

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
