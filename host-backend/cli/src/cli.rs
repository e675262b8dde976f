//! The command `transhume`.

use crate::output::print_line;
use crate::vm_commands::{VmCommand, check_name};
use crate::{Client, Error, Result, show};
use clap::{Args, Parser, Subcommand};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use transhume_api::{Failure, FailureKind, Goal, JobInfo, JobState, Mode, Request, Response};
use transhume_base::names::is_name;
use transhume_pki::Authority;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed
  2    the command line is wrong
  3    refused before anything was touched
  4    the migration failed or was cancelled, and the guest runs at the source
  5    the outcome is not known: an operator must look
  6    the guest shut down or panicked by itself during the migration; nothing runs it any more
  7    the VM is lost: its QEMU ended during the migration, and not by its guest's doing
  130  Ctrl-C while following a job, which goes on";

/// Moves running virtual machines between hosts.
#[derive(Debug, Parser)]
#[command(
    name = "transhume",
    version,
    about = "Moves running virtual machines between hosts",
    after_help = "Example:\n  transhume vm start web1.toml\n  transhume migrate web1 --to hostb",
    after_long_help = format!(
        "Example:\n  transhume vm start web1.toml\n  transhume migrate web1 --to hostb\n\n{EXIT_CODES}"
    )
)]
pub struct Cli {
    /// The socket of this host's transhumed
    #[arg(
        long,
        global = true,
        env = "TRANSHUME_SOCKET",
        default_value = "/run/transhume/control.sock",
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// Answer with one JSON object, for programs
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start, find, show and end the VMs of this host
    #[command(subcommand, after_help = "Example:\n  transhume vm list")]
    Vm(VmCommand),
    /// Move a running VM to another host
    ///
    /// Shows how it goes until it has ended, then what it took. Ctrl-C leaves it going.
    #[command(after_help = format!(
        "Examples:\n  transhume migrate web1 --to hostb --dry-run\n  transhume migrate web1 --to hostb\n  \
         transhume migrate web1 --to hostb --json > report.json\n  \
         transhume migrate web1 --to hostb --deadline 120 --max-downtime 500\n  \
         transhume migrate web1 --to hostb --mode pre\n\n{EXIT_CODES}"
    ))]
    Migrate(MigrateArgs),
    /// Make and show certificates for the link between hosts
    #[command(
        subcommand,
        after_help = "Examples:\n  transhume pki init\n  transhume pki issue hosta\n  transhume pki \
                                        show /etc/transhume/pki/hosta.crt"
    )]
    Pki(PkiCommand),
    /// List, show and cancel migrations
    #[command(subcommand, after_help = "Example:\n  transhume job list")]
    Job(JobCommand),
}

/// Where an authority is, if nothing else is said.
const PKI: &str = "/etc/transhume/pki";

#[derive(Debug, Subcommand)]
enum PkiCommand {
    /// Make a site's authority: once, on a machine that is kept well
    ///
    /// Its certificate (ca.crt) goes to every host; its key (ca.key) stays.
    #[command(after_help = "Example:\n  transhume pki init --dir transhume-pki")]
    Init {
        /// The folder to make it in
        #[arg(long, value_name = "DIR", default_value = PKI)]
        dir: PathBuf,
        /// How long it is valid
        #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
    /// Make a host's certificate and key, to be copied to that host
    ///
    /// A running transhumed takes a new one with the next connection.
    #[command(after_help = "Example:\n  transhume pki issue hosta --dir transhume-pki")]
    Issue {
        /// The host's name, as in `host` of its transhumed.toml
        host: String,
        /// The authority's folder
        #[arg(long, value_name = "DIR", default_value = PKI)]
        dir: PathBuf,
        /// The folder to put them into, if not the authority's
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// How long it is valid
        #[arg(long, value_name = "DAYS", default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
        /// Replace the certificate and the key that are there
        #[arg(long)]
        renew: bool,
    },
    /// Show what a certificate says
    #[command(after_help = "Example:\n  transhume pki show /etc/transhume/pki/hosta.crt")]
    Show {
        /// The certificate (PEM)
        certificate: PathBuf,
    },
}

#[derive(Debug, Args)]
struct MigrateArgs {
    /// The VM
    name: String,
    /// The host to move it to, as [hosts] in transhumed.toml names it
    #[arg(long, value_name = "HOST")]
    to: String,
    /// Only check that it would work, and tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// How long the link to the host may be away before the migration ends, and the VM runs on here
    #[arg(
        long,
        alias = "link-patience",
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u16).range(1..=3600)
    )]
    link_timeout: u16,
    /// When the VM should run there, at the latest; else the migration ends, and the VM runs on here
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=604_800))]
    deadline: Option<u32>,
    /// How long nobody may run it, at most [default: 300, and less if that comes soon]
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u32).range(50..=600_000))]
    max_downtime: Option<u32>,
    /// QEMU may slow the guest down if it writes faster than the link carries
    #[arg(long, alias = "may-throttle")]
    allow_throttling: bool,
    /// How memory moves: all of it before the VM runs there (pre); once, and what was written meanwhile after it
    /// runs there (post); or as post only when pre would not end, or not in time (auto)
    #[arg(long, value_enum, default_value_t)]
    mode: ModeArgument,
    /// Do not wait for its end
    #[arg(long, conflicts_with = "dry_run")]
    detach: bool,
}

/// How memory is to move.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum ModeArgument {
    /// As `pre`, and as `post` when it shows that the goal would not be reached otherwise.
    #[default]
    Auto,
    /// All of it before the VM runs at its destination.
    Pre,
    /// Once; then the VM runs at its destination, and what it wrote meanwhile follows.
    Post,
}

impl From<ModeArgument> for Mode {
    fn from(asked: ModeArgument) -> Self {
        match asked {
            ModeArgument::Auto => Self::Auto,
            ModeArgument::Pre => Self::Pre,
            ModeArgument::Post => Self::Post,
        }
    }
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    /// List this host's migrations, the oldest first
    #[command(after_help = "Example:\n  transhume job list")]
    List,
    /// Show a migration
    #[command(after_help = format!("Examples:\n  transhume job show 3\n  transhume job show 3 --follow\n\n{EXIT_CODES}"))]
    Show {
        /// Its number
        id: u64,
        /// Show how it goes until it has ended; with --json one object at each change
        #[arg(long)]
        follow: bool,
    },
    /// Say which host has the VM of a migration that is in doubt, when you have looked
    ///
    /// transhumed asks the destination by itself for as long as it is in doubt. This is for a destination that
    /// will not answer any more. Said wrongly, the VM runs twice and ruins its disks, or not at all.
    #[command(after_help = "Example:\n  transhume job resolve 3 --runs-at hostb")]
    Resolve {
        /// Its number
        id: u64,
        /// The one of the job's two hosts that has the VM
        #[arg(long, value_name = "HOST")]
        runs_at: String,
    },
    /// End a migration; the VM runs on where it is
    #[command(after_help = "Example:\n  transhume job cancel 3")]
    Cancel {
        /// Its number
        id: u64,
    },
}

impl Cli {
    /// Does what the command line says.
    pub async fn run(self) -> ExitCode {
        let json = self.json;
        match self.execute().await {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                let kind = error.kind();
                if json {
                    let failure = Failure::from(error);
                    print_line(&show::json(&Response::Error(failure)));
                } else {
                    eprintln!("transhume: {error}");
                }
                ExitCode::from(kind.exit_code())
            }
        }
    }

    async fn execute(self) -> Result<u8> {
        if let Command::Vm(command) = &self.command
            && command.is_for_all()
        {
            return command.stop_all(&self.socket, self.json).await;
        }
        let request = match &self.command {
            Command::Vm(command) => command.request()?,
            Command::Migrate(args) => {
                check_name(&args.name)?;
                Request::Migrate {
                    name: args.name.clone(),
                    to: args.to.clone(),
                    link_patience: args.link_timeout,
                    goal: Goal {
                        deadline_s: args.deadline,
                        max_downtime_ms: args.max_downtime,
                        may_throttle: args.allow_throttling,
                        mode: args.mode.into(),
                    },
                    dry_run: args.dry_run,
                }
            }
            Command::Job(command) => command.request(),
            Command::Pki(command) => return command.execute(self.json),
        };
        let mut client = Client::connect(&self.socket).await?;
        let response = client.ask(&request).await?;
        let follow = match (&self.command, &response) {
            (Command::Migrate(args), Response::Job(job)) if !args.detach => Some(job.id),
            (Command::Job(JobCommand::Show { follow: true, .. }), Response::Job(job)) => {
                Some(job.id)
            }
            _ => None,
        };
        match (follow, response) {
            (Some(id), _) => self.follow(&mut client, id).await,
            (None, Response::Job(job)) => Ok(self.end(&job)),
            (None, response) => {
                print_line(&if self.json {
                    show::json(&response)
                } else {
                    show::people(&response)
                });
                Ok(0)
            }
        }
    }

    /// Shows a job until its end.
    async fn follow(&self, client: &mut Client, id: u64) -> Result<u8> {
        client.send(&Request::JobFollow { id }).await?;
        let mut progress =
            show::Progress::new(!self.json && std::io::stderr().is_terminal(), self.json);
        loop {
            let response = tokio::select! {
                response = client.receive() => response,
                _ = tokio::signal::ctrl_c() => {
                    progress.clear();
                    eprintln!(
                        "The migration goes on as job {id}. Follow it by `transhume job show {id} --follow`, end it \
                         by `transhume job cancel {id}`."
                    );
                    return Ok(130);
                }
            };
            let response = response
                .inspect_err(|_| progress.clear())
                .map_err(|error| lost_sight(id, error))?;
            let Response::Job(job) = response else {
                continue;
            };
            if job.state == JobState::Running {
                progress.show(&job);
                if self.json && matches!(self.command, Command::Job(_)) {
                    print_line(&show::json(&Response::Job(job)));
                }
                continue;
            }
            progress.clear();
            return Ok(self.end(&job));
        }
    }

    /// Shows a job, and returns what to exit with.
    fn end(&self, job: &JobInfo) -> u8 {
        let code = match &self.command {
            // A question was answered, whatever the answer.
            Command::Job(
                JobCommand::Show { follow: false, .. }
                | JobCommand::Cancel { .. }
                | JobCommand::Resolve { .. },
            ) => None,
            _ => job.state.failure(),
        };
        if self.json {
            print_line(&show::json(&Response::Job(Box::new(job.clone()))));
        } else if code.is_some() {
            eprintln!("transhume: {}", show::job(job));
        } else {
            print_line(&show::job(job));
        }
        code.map_or(0, FailureKind::exit_code)
    }
}

impl PkiCommand {
    /// It is done here: no service is needed for it.
    fn execute(&self, json: bool) -> Result<u8> {
        let (value, people) = match self {
            Self::Init { dir, days } => {
                let made = Authority::at(dir).init(*days)?;
                let people = format!(
                    "The authority is made. Copy {} to every host; keep {} from everyone.",
                    made.certificate.display(),
                    made.key.display()
                );
                (serde_json::to_value(made), people)
            }
            Self::Issue {
                host,
                dir,
                out,
                days,
                renew,
            } => {
                if !is_name(host) {
                    return Err(Error::refused(
                        format!("{host:?} is no host's name"),
                        "a name has at most 63 of a-z, 0-9 and -, as `host` in transhumed.toml",
                    ));
                }
                let into = out.as_ref().unwrap_or(dir);
                let made = Authority::at(dir).issue(host, *days, into, *renew)?;
                let people = format!(
                    "{} is {host}'s certificate, {} its key. On {host}, transhumed.toml names them in [tls].",
                    made.certificate.display(),
                    made.key.display()
                );
                (serde_json::to_value(made), people)
            }
            Self::Show { certificate } => {
                let shown = transhume_pki::show(certificate)?;
                let hosts = if shown.authority {
                    "an authority".to_owned()
                } else {
                    shown.hosts.join(", ")
                };
                let people = format!(
                    "subject  {}\nissuer   {}\nfor      {hosts}\nvalid    {}{}",
                    shown.subject,
                    shown.issuer,
                    shown.validity,
                    if shown.valid { "" } else { ": not now" }
                );
                (serde_json::to_value(shown), people)
            }
        };
        print_line(&if json {
            value.unwrap_or_default().to_string()
        } else {
            people
        });
        Ok(0)
    }
}

impl JobCommand {
    fn request(&self) -> Request {
        match self {
            Self::List => Request::JobList,
            Self::Show { id, .. } => Request::JobShow { id: *id },
            Self::Resolve { id, runs_at } => Request::JobResolve {
                id: *id,
                runs_at: runs_at.clone(),
            },
            Self::Cancel { id } => Request::JobCancel { id: *id },
        }
    }
}

/// The service went away while a job was followed: nobody here knows how that ends.
fn lost_sight(id: u64, error: Error) -> Error {
    match error {
        Error::Service { socket, .. } => Error::Answered(Failure {
            kind: FailureKind::Unresolved,
            message: format!(
                "transhumed at {} ended during job {id}; see its log (`journalctl -u transhumed`). When it runs \
                 again it finds out what became of the VM: `transhume job show {id}`",
                socket.display()
            ),
        }),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{path}: {help}");
            for command in command
                .get_subcommands()
                .filter(|one| one.get_name() != "help")
            {
                check(command, &path);
            }
        }
        Cli::command().debug_assert();
        check(&Cli::command(), "");
    }

    #[test]
    fn reads_what_the_documentation_shows() {
        for line in [
            "transhume vm start web1.toml",
            "transhume vm adopt web1.toml --qmp /run/qmp.sock",
            "transhume vm list --json",
            "transhume vm show web1",
            "transhume vm stop web1 --force",
            "transhume vm stop web1 --shutdown-timeout 300",
            "transhume vm stop --all --shutdown-timeout 120",
            "transhume vm start web1",
            "transhume vm start web1 --anyway",
            "transhume vm define web1.toml",
            "transhume vm undefine web1",
            "transhume vm autostart web1 --disable",
            "transhume vm list --all",
            "transhume migrate web1 --to hostb --dry-run",
            "transhume --socket /run/a.sock migrate web1 --to hostb --json",
            "transhume migrate web1 --to hostb --detach",
            "transhume job list",
            "transhume job show 3 --follow",
            "transhume job cancel 3",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "transhume",
            "transhume migrate web1",
            "transhume job cancel x",
            "transhume vm stop",
            "transhume vm stop web1 --all",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
