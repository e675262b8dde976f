//! The service's configuration: `/etc/transhume/transhumed.toml`.

use super::config_hosts::{Incoming, Peer};
use super::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use transhume_base::confine::User;
use transhume_base::names::is_name;
use transhume_hypervisor::LaunchSettings;
use transhume_link::{Files, Security};
use transhume_machine::Size;

const MAX_TEXT: u64 = 1 << 20;
/// Each has a thread here and one in QEMU.
const MAX_CHANNELS: u8 = 8;
/// A shorter log holds not even the end of a guest's boot.
const MIN_LOG: Size = Size::from_bytes(16 << 10);

/// What an operator says about a host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Where it was read, for messages.
    #[serde(skip)]
    pub file: PathBuf,
    /// This host's name.
    pub host: String,
    /// Where the other hosts reach this one.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where sockets go.
    #[serde(default = "default_run_directory")]
    pub run_directory: PathBuf,
    /// What must survive a restart.
    #[serde(default = "default_state_directory")]
    pub state_directory: PathBuf,
    /// Where the logs of VMs go: their serial consoles, and what their QEMUs say.
    #[serde(default = "default_log_directory")]
    pub log_directory: PathBuf,
    /// How long each of them may become before it begins anew; as much of what was before is kept beside.
    #[serde(default = "default_log_size")]
    pub log_size: Size,
    /// The QEMU for VMs whose definition names none.
    #[serde(default = "default_qemu")]
    pub qemu: PathBuf,
    /// Who QEMU runs as; without its capabilities, in any case.
    #[serde(default = "default_qemu_user")]
    pub qemu_user: String,
    /// `qemu_user` as it was found on this host; root's own if there is none.
    #[serde(skip)]
    pub user: Option<User>,
    /// Through how many channels (`multifd`) QEMU hands a VM's memory over; 1 for its stream alone.
    #[serde(default = "default_qemu_channels")]
    pub qemu_channels: u8,
    /// Certificates for the link between hosts.
    pub tls: Option<Tls>,
    /// The link is not encrypted, and nobody proves who they are: for a network of the hosts' own.
    #[serde(default)]
    pub plain_link: bool,
    /// Whose the control socket is; root's if nobody is named.
    pub control_owner: Option<String>,
    /// The group that may use the control socket; none if none is named.
    pub control_group: Option<String>,
    /// What VMs from any of `hosts` may use here.
    #[serde(default)]
    pub incoming: Incoming,
    /// The other hosts, by name; a host that is not among them may do nothing.
    #[serde(default)]
    pub hosts: BTreeMap<String, Peer>,
}

/// Certificates, all PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tls {
    /// The authority's certificate.
    pub authority: PathBuf,
    /// This host's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7465))
}

fn default_run_directory() -> PathBuf {
    "/run/transhume".into()
}

fn default_state_directory() -> PathBuf {
    "/var/lib/transhume".into()
}

fn default_log_directory() -> PathBuf {
    "/var/log/transhume".into()
}

fn default_log_size() -> Size {
    Size::from_bytes(1 << 20)
}

fn default_qemu_user() -> String {
    "transhume-qemu".into()
}

fn default_qemu_channels() -> u8 {
    1
}

fn default_qemu() -> PathBuf {
    "/usr/bin/qemu-system-x86_64".into()
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Config`], with cause and cure.
    pub fn load(path: &Path) -> Result<Self> {
        // What is not there does not come by trying again, either.
        let text =
            transhume_base::bounded::read_text(path, MAX_TEXT).map_err(|source| Error::Config {
                path: path.to_owned(),
                cause: format!(
                    "it cannot be read: {source}; write it (`host = \"NAME\"` and [tls]) or name another by --config"
                ),
            })?;
        let wrong = |cause| Error::Config {
            path: path.to_owned(),
            cause,
        };
        let config = Self::parse(&text).map_err(wrong)?;
        let user = User::find(&config.qemu_user).map_err(wrong)?;
        Ok(Self {
            file: path.to_owned(),
            user,
            ..config
        })
    }

    pub(super) fn parse(text: &str) -> std::result::Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if !is_name(&config.host) {
            return Err(format!(
                "`host` is {:?}; a name has at most 63 of a-z, 0-9 and -, and does not start with -",
                config.host
            ));
        }
        let channels = config.qemu_channels;
        if !(1..=MAX_CHANNELS).contains(&channels) {
            return Err(format!(
                "`qemu-channels` is {channels}; write a number from 1 to {MAX_CHANNELS}"
            ));
        }
        if config.log_size < MIN_LOG {
            return Err(format!(
                "`log-size` is {}; write {MIN_LOG} or more",
                config.log_size
            ));
        }
        let tls = config.tls.iter().flat_map(|tls| {
            [
                ("tls.authority", &tls.authority),
                ("tls.certificate", &tls.certificate),
                ("tls.key", &tls.key),
            ]
        });
        let paths = [
            ("run-directory", &config.run_directory),
            ("state-directory", &config.state_directory),
            ("log-directory", &config.log_directory),
            ("qemu", &config.qemu),
        ];
        for (key, path) in paths.into_iter().chain(tls) {
            if !path.is_absolute() {
                return Err(format!(
                    "`{key}` is {}; write an absolute path",
                    path.display()
                ));
            }
        }
        match &config.tls {
            None if !config.plain_link => {
                return Err(
                    "neither [tls] nor `plain-link = true`; make certificates by `transhume pki`, and name them by \
                     `authority`, `certificate` and `key` in [tls]"
                        .to_owned(),
                );
            }
            Some(_) if config.plain_link => {
                return Err("both [tls] and `plain-link = true`; take one away".to_owned());
            }
            _ => {}
        }
        config.incoming.check("incoming")?;
        for (host, peer) in &config.hosts {
            peer.check(host)?;
        }
        Ok(config)
    }

    /// What VMs get here.
    pub fn launch_settings(&self) -> LaunchSettings {
        LaunchSettings {
            host: self.host.clone(),
            run_directory: self.run_directory.clone(),
            log_directory: self.log_directory.clone(),
            qemu: self.qemu.clone(),
            user: self.user.clone(),
        }
    }

    /// How connections to other hosts are protected.
    pub fn security(&self) -> Security {
        match &self.tls {
            Some(tls) => Security::Tls {
                files: Files {
                    authority: tls.authority.clone(),
                    certificate: tls.certificate.clone(),
                    key: tls.key.clone(),
                },
                host: self.host.clone(),
            },
            None => Security::Plain,
        }
    }

    /// The socket for the command line.
    pub fn control_socket(&self) -> PathBuf {
        self.run_directory.join("control.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_field() {
        let config = Config::parse(
            "host = \"hosta\"\nlisten = \"127.0.0.1:7000\"\nrun-directory = \"/run/t\"\n\
             state-directory = \"/var/t\"\nlog-directory = \"/log/t\"\nlog-size = \"64KiB\"\nqemu = \"/opt/qemu\"\nqemu-channels = 2\n[hosts.hostb]\naddress = \"10.0.0.2:7465\"\n\
             [tls]\nauthority = \"/a\"\ncertificate = \"/c\"\nkey = \"/k\"",
        );
        let config = config.expect("a configuration");
        assert_eq!(config.hosts["hostb"].address, "10.0.0.2:7465");
        assert_eq!(config.control_socket(), Path::new("/run/t/control.sock"));
        assert_eq!(config.qemu_channels, 2);
        assert_eq!(config.log_size, Size::from_bytes(64 << 10));
        assert_eq!(config.launch_settings().log_directory, Path::new("/log/t"));
        assert_eq!(config.launch_settings().qemu, Path::new("/opt/qemu"));
        assert!(matches!(config.security(), Security::Tls { host, .. } if host == "hosta"));
    }

    #[test]
    fn needs_a_name_and_a_link() {
        let config = Config::parse("host = \"hosta\"\nplain-link = true").expect("a configuration");
        assert_eq!(config.listen.port(), 7465);
        assert_eq!(config.run_directory, Path::new("/run/transhume"));
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, word) in [
            ("", "missing field `host`"),
            ("host = \"Host A\"", "a-z"),
            ("host = \"a\"", "transhume pki"),
            (
                "host = \"a\"\nplain-link = true\n[tls]\nauthority = \"/a\"\ncertificate = \"/c\"\nkey = \"/k\"",
                "take one away",
            ),
            (
                "host = \"a\"\n[tls]\nauthority = \"/a\"\ncertificate = \"c\"\nkey = \"/k\"",
                "absolute",
            ),
            ("host = \"a\"\nlisten = \"7465\"", "socket address"),
            (
                "host = \"a\"\nplain-link = true\nqemu-channels = 9",
                "from 1 to 8",
            ),
            ("host = \"a\"\nport = 1", "unknown field `port`"),
            (
                "host = \"a\"\nplain-link = true\nlog-size = \"1KiB\"",
                "16KiB or more",
            ),
            ("host = \"a\"\nrun-directory = \"run\"", "absolute"),
            (
                "host = \"a\"\nplain-link = true\n[hosts.b]\naddress = \"10.0.0.2\"",
                "host:port",
            ),
            (
                "host = \"a\"\nplain-link = true\n[hosts.b]\naddress = \":7465\"",
                "host:port",
            ),
            (
                "host = \"a\"\nplain-link = true\n[hosts.b]\naddress = \"b:0\"",
                "host:port",
            ),
            (
                "host = \"a\"\nplain-link = true\n[hosts.b]\naddress = \"b:1\"\nkey = \"\"",
                "unknown field `key`",
            ),
        ] {
            let said = Config::parse(text).expect_err(text);
            assert!(said.contains(word), "{said}");
        }
    }
}
