//! The commands `transhume vm`.

use crate::output::print_line;
use crate::{Client, Error, Result, show};
use clap::Subcommand;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Semaphore;
use transhume_api::{Failure, FailureKind, Request, Response};
use transhume_base::names::{MAX_DEFINITION_LEN, is_name};

/// VMs that are stopped at once by one command: the service serves a number of clients.
const AT_ONCE: usize = 32;

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Start a VM
    ///
    /// From a file, whose definition is kept here from then on, or one that is defined here already. The other hosts of
    /// transhumed.toml are asked whether they have it.
    #[command(
        after_help = "Examples:\n  transhume vm start /srv/vms/web1.toml\n  transhume vm start web1"
    )]
    Start {
        /// A defined VM's name, or a definition (a TOML file); - reads one from standard input
        #[arg(value_name = "NAME|FILE")]
        what: PathBuf,
        /// Also where a host cannot be asked whether it has it. Only when you know that it does not run there: two
        /// running copies destroy its disks
        #[arg(long)]
        anyway: bool,
    },
    /// Keep a VM's definition here, without starting it
    #[command(after_help = "Example:\n  transhume vm define web1.toml")]
    Define {
        /// Its definition (TOML); - reads it from standard input
        definition: PathBuf,
    },
    /// Forget a VM that does not run; its disks stay
    #[command(after_help = "Example:\n  transhume vm undefine web1")]
    Undefine {
        /// The VM
        name: String,
    },
    /// Start a VM when the host is started
    #[command(
        after_help = "Examples:\n  transhume vm autostart web1\n  transhume vm autostart web1 --disable"
    )]
    Autostart {
        /// The VM
        name: String,
        /// Do not any more
        #[arg(long)]
        disable: bool,
    },
    /// Take over a QEMU that runs already
    ///
    /// The definition must describe that QEMU as it runs: what differs is named, and nothing is touched.
    #[command(after_help = "Example:\n  transhume vm adopt web1.toml --qmp /run/web1/qmp.sock")]
    Adopt {
        /// Its definition (TOML); - reads it from standard input
        definition: PathBuf,
        /// QEMU's QMP socket (-qmp unix:PATH,server=on,wait=off), which no one else may hold
        #[arg(long, value_name = "PATH")]
        qmp: PathBuf,
    },
    /// Show QEMU's command line for a definition, without starting it
    ///
    /// Before you run it, make the folders of its sockets and its logs, which it names.
    #[command(after_help = "Example:\n  transhume vm arguments web1.toml")]
    Arguments {
        /// The definition (TOML); - reads it from standard input
        definition: PathBuf,
    },
    /// List the VMs that run on this host
    #[command(after_help = "Examples:\n  transhume vm list\n  transhume vm list --all")]
    List {
        /// And those that are defined here and do not run
        #[arg(long)]
        all: bool,
    },
    /// Show a VM
    #[command(after_help = "Example:\n  transhume vm show web1")]
    Show {
        /// The VM
        name: String,
    },
    /// End a VM: its guest shuts down as if its power button were pressed
    #[command(
        after_help = "Examples:\n  transhume vm stop web1\n  transhume vm stop web1 --force\n  transhume vm stop --all --shutdown-timeout 120"
    )]
    Stop {
        /// The VM
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// All VMs that run here, at once
        #[arg(long, conflicts_with = "name")]
        all: bool,
        /// How long a guest may take [default: 60]
        #[arg(long, value_name = "SECONDS", conflicts_with = "force", value_parser = clap::value_parser!(u32).range(1..=86_400))]
        shutdown_timeout: Option<u32>,
        /// Do not ask the guest: as if power were cut
        #[arg(long)]
        force: bool,
    },
    /// Halt a VM's CPUs; its memory and devices stay as they are
    ///
    /// It can be moved while it is paused, and stays paused at the other host. `transhume vm resume` lets it run
    /// again.
    #[command(after_help = "Example:\n  transhume vm pause web1")]
    Pause {
        /// The VM
        name: String,
    },
    /// Resume a paused VM
    ///
    /// After a migration whose outcome was not known: only when you have seen that the other host does not
    /// run it. Two running copies destroy its disks.
    #[command(after_help = "Example:\n  transhume vm resume web1")]
    Resume {
        /// The VM
        name: String,
    },
}

impl VmCommand {
    pub(crate) fn request(&self) -> Result<Request> {
        Ok(match self {
            Self::Start { what, anyway } => match what.to_str() {
                Some(name) if is_name(name) => Request::VmStartDefined {
                    name: name.to_owned(),
                    anyway: *anyway,
                },
                _ => Request::VmStart {
                    definition: read(what)?,
                    anyway: *anyway,
                },
            },
            Self::Define { definition } => Request::VmDefine {
                definition: read(definition)?,
            },
            Self::Undefine { name } => Request::VmUndefine {
                name: check_name(name)?,
            },
            Self::Autostart { name, disable } => Request::VmAutostart {
                name: check_name(name)?,
                enable: !disable,
            },
            Self::Arguments { definition } => Request::VmArguments {
                definition: read(definition)?,
            },
            Self::Adopt { definition, qmp } => Request::VmAdopt {
                definition: read(definition)?,
                qmp: std::path::absolute(qmp).map_err(|error| Error::file("find", qmp, error))?,
            },
            Self::List { all } => Request::VmList { all: *all },
            Self::Show { name } => Request::VmShow {
                name: check_name(name)?,
            },
            Self::Stop {
                name,
                force,
                shutdown_timeout,
                ..
            } => Request::VmStop {
                name: check_name(name.as_deref().unwrap_or_default())?,
                force: *force,
                shutdown_timeout: *shutdown_timeout,
            },
            Self::Pause { name } => Request::VmPause {
                name: check_name(name)?,
            },
            Self::Resume { name } => Request::VmResume {
                name: check_name(name)?,
            },
        })
    }

    /// Whether it is about all VMs: [`VmCommand::stop_all`].
    pub(crate) fn is_for_all(&self) -> bool {
        matches!(self, Self::Stop { all: true, .. })
    }

    /// Ends all VMs that run here, at once, and tells of each what became of it; what to exit with.
    pub(crate) async fn stop_all(&self, socket: &Path, json: bool) -> Result<u8> {
        let Self::Stop {
            force,
            shutdown_timeout,
            ..
        } = self
        else {
            return Ok(0);
        };
        let list = Request::VmList { all: false };
        let Response::Vms(vms) = Client::connect(socket).await?.ask(&list).await? else {
            return Ok(0);
        };
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let mut stops = Vec::new();
        for vm in vms {
            let request = Request::VmStop {
                name: vm.name.clone(),
                force: *force,
                shutdown_timeout: *shutdown_timeout,
            };
            let (socket, places) = (socket.to_owned(), Arc::clone(&places));
            let stop = async move {
                // It is never closed.
                let _place = places.acquire().await;
                Client::connect(&socket).await?.ask(&request).await
            };
            stops.push((vm.name, transhume_base::task::spawn(stop)));
        }
        let (mut all, mut code) = (serde_json::Map::new(), 0);
        for (name, stop) in stops {
            let stopped = stop.await.unwrap_or_else(|error| Err(unanswered(&error)));
            let said = match &stopped {
                Ok(response) => show::people(response),
                Err(error) => {
                    code = 1;
                    error.to_string()
                }
            };
            if json {
                let one = serde_json::json!({ "stopped": stopped.is_ok(), "message": said });
                all.insert(name, one);
            } else if stopped.is_ok() {
                print_line(&said);
            } else {
                eprintln!("transhume: {name}: {said}");
            }
        }
        if json {
            print_line(&serde_json::Value::Object(all).to_string());
        }
        Ok(code)
    }
}

fn unanswered(why: &tokio::task::JoinError) -> Error {
    Error::Answered(Failure {
        kind: FailureKind::Failed,
        message: format!("no answer: {why}"),
    })
}

/// A file given where a name belongs is a common slip.
pub(crate) fn check_name(name: &str) -> Result<String> {
    if is_name(name) {
        return Ok(name.to_owned());
    }
    Err(Error::refused(
        format!("{name:?} is no VM's name"),
        "`transhume vm list` shows them; a definition's file is for `vm start` and `vm adopt` only",
    ))
}

fn read(path: &Path) -> Result<String> {
    let limit = MAX_DEFINITION_LEN as u64;
    if path == Path::new("-") {
        let mut text = String::new();
        let input = std::io::stdin()
            .lock()
            .take(limit + 1)
            .read_to_string(&mut text);
        input.map_err(|error| Error::file("read", "standard input", error))?;
        return Ok(text);
    }
    transhume_base::bounded::read_text(path, limit).map_err(|source| Error::File {
        action: "read",
        path: path.to_owned(),
        source,
        cure: "; the definition is a TOML file, as in `transhume vm start web1.toml`",
    })
}
