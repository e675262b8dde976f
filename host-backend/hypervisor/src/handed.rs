//! What QEMU is given of this host: every file is opened here, looked at as it was opened, and handed over as a
//! descriptor. So QEMU opens nothing that was not checked, whatever has taken a file's name since, and needs no right
//! to open anything.

use super::files::{LaunchSettings, RunFiles};
use super::preflight::TIMEOUT;
use super::{Error, Limits, Result, tap};
use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use transhume_base::confine::User;
use transhume_machine::definition::{AgentPort, Backend, Disk, Nic};
use transhume_machine::image_chain::{Image, Node};
use transhume_machine::{Definition, image_chain};

/// The files that a definition names, open and checked.
#[derive(Debug)]
pub struct OpenedFiles {
    /// The disks' images, in the definition's order.
    pub images: Vec<Image>,
    kernel: Option<File>,
    initrd: Option<File>,
}

impl OpenedFiles {
    /// Opens them, for a thread that may be blocked. With `limits`, each must lie where those allow.
    ///
    /// # Errors
    /// Why the first of them cannot be used.
    pub fn open(
        definition: &Definition,
        settings: &LaunchSettings,
        limits: Option<&Limits>,
    ) -> Result<Self> {
        let admit = |path: &Path, file: &File| match limits {
            Some(limits) => limits.admit(path, file),
            None => Ok(()),
        };
        let unfit = |what: String, error: io::Error| {
            Error::Unfit {
            cause: format!("{what} on {}: {error}", settings.host),
            cure: "QEMU gets no file that was not checked: see that it is there, and what it is based on".to_owned(),
        }
        };
        let open = |disk: &Disk| {
            let path = definition.disk_path(disk, &settings.host);
            Image::open(path, disk.format, disk.read_only, admit)
                .map_err(|error| unfit(format!("disk {}, {}", disk.id, path.display()), error))
        };
        let images = definition.disks.iter().map(open).collect::<Result<_>>()?;
        let boot_file = |what: &str, path: Option<&PathBuf>| {
            let Some(path) = path else { return Ok(None) };
            open_boot_file(path, settings.user.as_ref(), admit)
                .map(Some)
                .map_err(|error| unfit(format!("{what}, {}", path.display()), error))
        };
        let boot = definition.boot.as_ref();
        Ok(Self {
            images,
            kernel: boot_file("boot.kernel", boot.map(|boot| &boot.kernel))?,
            initrd: boot_file("boot.initrd", boot.and_then(|boot| boot.initrd.as_ref()))?,
        })
    }

    /// [`OpenedFiles::open`] with bounded patience: storage over a network may not answer.
    ///
    /// # Errors
    /// The same.
    pub async fn open_in_time(
        definition: &Definition,
        settings: &LaunchSettings,
        limits: Option<&Limits>,
    ) -> Result<Self> {
        let (definition, settings) = (definition.clone(), settings.clone());
        let limits = limits.cloned();
        let host = settings.host.clone();
        let open = transhume_base::task::blocking(move || {
            Self::open(&definition, &settings, limits.as_ref())
        });
        match tokio::time::timeout(TIMEOUT, open).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => Err(Error::Protocol(error.to_string())),
            Err(_) => Err(Error::Unfit {
                cause: format!(
                    "the storage of {host} did not answer within {} s",
                    TIMEOUT.as_secs()
                ),
                cure: "check its mounts (`findmnt`, `dmesg`)".to_owned(),
            }),
        }
    }
}

/// QEMU opens it once more, by `/proc/self/fd`: its user must be able to read it.
fn open_boot_file(
    path: &Path,
    user: Option<&User>,
    admit: impl Fn(&Path, &File) -> io::Result<()>,
) -> io::Result<File> {
    let (file, _) = image_chain::open(path, OFlag::empty(), true, admit)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    match user {
        Some(user) if !user.may_read(&found) => Err(io::Error::other(format!(
            "QEMU's user {} cannot read it: chmod a+r {}",
            user.name(),
            path.display()
        ))),
        _ => Ok(file),
    }
}

/// How the arguments for a QEMU name what it uses.
#[derive(Debug, Default)]
pub struct Names {
    /// Whether QEMU is confined to what it was given.
    pub(super) handed: bool,
    pub(super) add_fds: Vec<String>,
    pub(super) qmp: String,
    pub(super) serial: String,
    pub(super) serial_log: String,
    pub(super) agent: String,
    pub(super) vnc: PathBuf,
    pub(super) kernel: Option<String>,
    pub(super) initrd: Option<String>,
    /// Nodes from the top, a list a disk.
    pub(super) disks: Vec<Vec<NodeName>>,
    /// What follows the id in `-netdev`, with the kind before it, for each card.
    pub(super) nics: Vec<(&'static str, String)>,
}

#[derive(Debug)]
pub(super) struct NodeName {
    pub(super) block_device: bool,
    pub(super) filename: String,
    pub(super) format: transhume_machine::definition::Format,
    pub(super) read_only: bool,
}

impl Names {
    /// For a QEMU that is started by hand: by paths, which it opens itself.
    pub fn paths(
        definition: &Definition,
        host: &str,
        files: &RunFiles,
        is_block_device: impl Fn(&Path) -> bool,
    ) -> Self {
        let disk = |disk: &Disk| {
            let path = definition.disk_path(disk, host);
            vec![NodeName {
                block_device: is_block_device(path),
                filename: text(path),
                format: disk.format,
                read_only: disk.read_only,
            }]
        };
        let socket = |path: PathBuf| format!("path={}", escape(&text(&path)));
        let boot = definition.boot.as_ref();
        let plug = |nic: &Nic| {
            let name = |name: &Option<String>| escape(name.as_deref().unwrap_or_default());
            match nic.backend {
                Backend::Tap => (
                    "tap",
                    format!(",ifname={},script=no,downscript=no", name(&nic.ifname)),
                ),
                Backend::Bridge => ("bridge", format!(",br={}", name(&nic.bridge))),
                Backend::User => ("user", String::new()),
            }
        };
        Self {
            handed: false,
            add_fds: Vec::new(),
            qmp: socket(files.qmp()),
            serial: socket(files.serial()),
            serial_log: format!(
                "logfile={},logappend=on",
                escape(&text(&files.serial_log()))
            ),
            agent: socket(files.agent()),
            vnc: files.folder().join("vnc.sock"),
            kernel: boot.map(|boot| text(&boot.kernel)),
            initrd: boot.and_then(|boot| boot.initrd.as_deref().map(text)),
            disks: definition.disks.iter().map(disk).collect(),
            nics: definition.nics.iter().map(plug).collect(),
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// QEMU ends a value at a comma; two of them stand for one.
pub(super) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// All that a QEMU is handed.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) names: Names,
    descriptors: Vec<RawFd>,
    /// Kept until QEMU has its own.
    made: Vec<OwnedFd>,
    /// What each set is a file of.
    sets: Sets,
}

/// The files that a QEMU was handed as sets of descriptors, by their numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct Sets(Vec<String>);

impl Sets {
    /// QEMU's words, with the files' own names, cut where they are too long. A file's name is not looked at again:
    /// it may be like a set's.
    pub(super) fn named(&self, words: &str) -> String {
        let mut named = String::new();
        let mut rest = words;
        while let Some(at) = rest.find(SET) {
            named.push_str(&rest[..at]);
            let after = &rest[at + SET.len()..];
            let digits = after.bytes().take_while(u8::is_ascii_digit).count();
            let path = after[..digits]
                .parse()
                .ok()
                .and_then(|n: usize| self.0.get(n));
            match path {
                Some(path) => named.push_str(path),
                None => named.push_str(&rest[at..at + SET.len() + digits]),
            }
            rest = &after[digits..];
            if named.len() > MAX_WORDS {
                break;
            }
        }
        named.push_str(rest);
        transhume_base::text::lines(&named, MAX_WORDS)
    }
}

/// What the name of a set begins with.
const SET: &str = "/dev/fdset/";
/// Bytes of QEMU's words with the names of files in it, at most.
const MAX_WORDS: usize = 16 << 10;

fn set_name(number: usize) -> String {
    format!("{SET}{number}")
}

impl Handed {
    /// Makes sockets, taps and logs, and names them and the opened files. Those must live until QEMU was started.
    pub(super) fn make(
        definition: &Definition,
        files: &RunFiles,
        opened: &OpenedFiles,
    ) -> Result<Self> {
        let mut handed = Self {
            names: Names {
                handed: true,
                vnc: files.vnc(),
                ..Names::default()
            },
            descriptors: Vec::new(),
            made: Vec::new(),
            sets: Sets::default(),
        };
        handed.names.qmp = handed.socket(&files.qmp())?;
        if definition.console.serial {
            handed.names.serial = handed.socket(&files.serial())?;
            let path = files.serial_log();
            let log = files.logs().open_serial()?;
            let set = handed.set(log.as_raw_fd(), &path);
            handed.made.push(log.into());
            handed.names.serial_log = format!("logfile={set},logappend=on");
        }
        if definition.agent.port != AgentPort::None {
            handed.names.agent = handed.socket(&files.agent())?;
        }
        let mut by_number = |file: &Option<File>| {
            file.as_ref().map(|file| {
                handed.descriptors.push(file.as_raw_fd());
                format!("/proc/self/fd/{}", file.as_raw_fd())
            })
        };
        let (kernel, initrd) = (by_number(&opened.kernel), by_number(&opened.initrd));
        (handed.names.kernel, handed.names.initrd) = (kernel, initrd);
        for image in &opened.images {
            let nodes = image.nodes.iter().map(|node| handed.node(node)).collect();
            handed.names.disks.push(nodes);
        }
        for nic in &definition.nics {
            let name = handed.card(nic)?;
            handed.names.nics.push(name);
        }
        Ok(handed)
    }

    /// What its sets are.
    pub(super) fn sets(&self) -> Sets {
        self.sets.clone()
    }

    /// What QEMU inherits.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.descriptors.clone()
    }

    /// A socket that QEMU is to listen at: until it does, connections are refused, and from then on they are to its
    /// process.
    fn socket(&mut self, path: &Path) -> Result<String> {
        let failed = |error: nix::Error| Error::file("create", path, error.into());
        let address = UnixAddr::new(path).map_err(failed)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(failed)?;
        bind(socket.as_raw_fd(), &address).map_err(failed)?;
        // Nobody else's, whatever our umask is: others get through to its folder.
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, private)
            .map_err(|error| Error::file("set the mode of", path, error))?;
        let name = format!("fd={}", socket.as_raw_fd());
        self.keep(socket);
        Ok(name)
    }

    fn keep(&mut self, made: OwnedFd) {
        self.descriptors.push(made.as_raw_fd());
        self.made.push(made);
    }

    /// A set of one descriptor, which QEMU opens like a file of the name that is returned.
    fn set(&mut self, descriptor: RawFd, path: &Path) -> String {
        let number = self.names.add_fds.len();
        self.names.add_fds.push(format!(
            "fd={descriptor},set={number},opaque={}",
            escape(&text(path))
        ));
        self.descriptors.push(descriptor);
        self.sets.0.push(path.display().to_string());
        set_name(number)
    }

    fn node(&mut self, node: &Node) -> NodeName {
        NodeName {
            block_device: node.block_device,
            filename: self.set(node.file.as_raw_fd(), &node.path),
            format: node.format,
            read_only: node.read_only,
        }
    }

    fn card(&mut self, nic: &Nic) -> Result<(&'static str, String)> {
        let name = |name: &Option<String>| name.clone().unwrap_or_default();
        let (what, name, made) = match nic.backend {
            Backend::User => return Ok(("user", String::new())),
            Backend::Tap => {
                let name = name(&nic.ifname);
                let made = tap::open(&name);
                ("tap device", name, made)
            }
            Backend::Bridge => {
                let name = name(&nic.bridge);
                let made = tap::on_bridge(&name);
                ("bridge", name, made)
            }
        };
        let tap = made.map_err(|error| Error::Unfit {
            cause: format!("the {what} {name} cannot be used: {error}"),
            cure: "see that it is there and that no other VM has it (`ip -d link`)".to_owned(),
        })?;
        let number = tap.as_raw_fd();
        self.keep(tap);
        Ok(("tap", format!(",fd={number}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_is_heard_with_the_names_that_its_operator_knows() {
        let sets = Sets((0..12).map(|number| format!("/srv/{number}.raw")).collect());
        let said = r#"Failed to get "write" lock: is another process using the image [/dev/fdset/11]? /dev/fdset/1: in use"#;
        let heard = sets.named(said);
        assert!(
            heard.contains("[/srv/11.raw]") && heard.ends_with("/srv/1.raw: in use"),
            "{heard}"
        );
    }

    #[test]
    fn a_file_that_is_named_like_a_set_is_not_one() {
        let like = |set: usize| format!("/srv{}/i", set_name(set).repeat(300));
        let sets = Sets(vec!["/srv/a".to_owned(), like(0), like(1), like(2)]);
        assert_eq!(sets.named("/dev/fdset/1"), like(0));
        let most = transhume_testing::peak(|| {
            let heard = sets.named(&"/dev/fdset/3 ".repeat(1000));
            assert!(heard.len() < MAX_WORDS + 16, "{} bytes", heard.len());
        })
        .1;
        assert!(most < 8 * MAX_WORDS, "{most} bytes");
        assert_eq!(
            sets.named("/dev/fdset/9 /dev/fdset/ /dev/fdset/99999999999999999999"),
            "/dev/fdset/9 /dev/fdset/ /dev/fdset/99999999999999999999"
        );
    }
}
