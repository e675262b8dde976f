//! The service's process: its sockets, its clients, its end.

use super::arriving_vms::ArrivingVms;
use super::config::Config;
use super::daemon::Daemon;
use super::{Error, Result, certificate_expiry, log_bounds, socket};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tracing::Instrument;
use transhume_api::{Failure, FailureKind, MAX_REQUEST, Request, Response};
use transhume_base::audit::Who;
use transhume_base::lines::Lines;
use transhume_base::task;
use transhume_relay::destination;

/// Clients served at once.
const CLIENTS: usize = 64;
/// How long a client may say nothing between two requests.
const IDLE: Duration = Duration::from_secs(300);
/// How long a client may take to read an answer.
const SLOW: Duration = Duration::from_secs(10);
/// How often a job's followers are told.
const BEAT: Duration = Duration::from_millis(250);

/// Runs the service until it is told to end by SIGTERM or SIGINT. Its VMs go on.
///
/// # Errors
/// If it cannot begin: a socket or a directory that it cannot have.
pub async fn run(config: Config) -> Result<()> {
    config.security().check()?;
    if config.plain_link {
        tracing::warn!(
            "plain-link = true: the link to other hosts is not encrypted, and they prove nothing"
        );
    }
    let path = config.control_socket();
    let control = socket::bind(&config).await?;
    let listen = config.listen;
    let link = TcpListener::bind(listen)
        .await
        .map_err(|source| Error::File {
            action: "listen at",
            path: PathBuf::from(listen.to_string()),
            source,
            cure: "; change `listen` in transhumed.toml, or end what listens there (`ss -tlnp`)",
        })?;
    let signals = |kind| signal(kind).map_err(|error| Error::file("handle", "signals", error));
    let (mut terminate, mut interrupt) = (
        signals(SignalKind::terminate())?,
        signals(SignalKind::interrupt())?,
    );
    let daemon = Daemon::open(config).await?;
    task::spawn(log_bounds::keep(Arc::downgrade(&daemon)));
    task::spawn(certificate_expiry::watch(Arc::downgrade(&daemon)));
    let host = &daemon.config().host;
    tracing::info!(host, control = %path.display(), %listen, "transhumed is ready");
    let serving = async {
        tokio::select! {
            () = serve(&control, &daemon) => {}
            () = destination::serve(link, Arc::new(ArrivingVms(daemon.clone()))) => {
                tracing::error!("the host link cannot be served any more");
            }
        }
    };
    tokio::pin!(serving);
    let mut serves = true;
    tokio::select! {
        () = &mut serving => serves = false,
        _ = terminate.recv() => tracing::info!("SIGTERM: transhumed ends, its VMs go on"),
        _ = interrupt.recv() => tracing::info!("SIGINT: transhumed ends, its VMs go on"),
    }
    // Connections of what is under way may break, and are to find us.
    tokio::select! {
        () = daemon.close() => {}
        () = &mut serving, if serves => {}
    }
    // Whoever follows a job is told how it ended.
    tokio::time::sleep(BEAT).await;
    // The next one replaces what stays.
    let _ = std::fs::remove_file(&path);
    Ok(())
}

async fn serve(listener: &UnixListener, daemon: &Arc<Daemon>) {
    let permits = Arc::new(Semaphore::new(CLIENTS));
    for number in 1_u64.. {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to be closed.
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(500)).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            let busy = Error::busy(format!(
                "transhumed serves {CLIENTS} clients already; try again"
            ));
            let line = encode(&Response::Error(busy.into()));
            // Never wait for a client that is one too many.
            let _ = stream.try_write(&line);
            let _ = stream.shutdown().await;
            continue;
        };
        let daemon = daemon.clone();
        let span = tracing::debug_span!("client", number);
        let client = async move {
            if let Err(error) = attend(stream, &daemon).await {
                tracing::debug!(%error, "client dropped");
            }
            drop(permit);
        };
        transhume_base::task::spawn(client.instrument(span));
    }
}

async fn attend(stream: UnixStream, daemon: &Arc<Daemon>) -> io::Result<()> {
    let credentials = stream.peer_cred()?;
    let who = Who::Client {
        uid: credentials.uid(),
        pid: credentials.pid(),
    };
    let (reader, mut writer) = tokio::io::split(stream);
    let mut lines = Lines::new(reader, MAX_REQUEST);
    while let Some(line) = tokio::time::timeout(IDLE, lines.next()).await?? {
        match serde_json::from_slice::<Request>(&line) {
            Ok(Request::JobFollow { id }) => follow(daemon, id, &mut writer).await?,
            Ok(request) => {
                tracing::debug!(?request);
                let job_vm = |id| Some(daemon.jobs.get(id).ok()?.vm().to_owned());
                let response = match daemon.config().admit(who, &request, job_vm) {
                    Ok(()) => daemon.handle(request).await,
                    Err(error) => Response::Error(error.into()),
                };
                answer(&mut writer, &response).await?;
            }
            Err(error) => {
                let message = format!("this is no request that this transhumed knows: {error}");
                let failure = Failure {
                    kind: FailureKind::Failed,
                    message,
                };
                answer(&mut writer, &Response::Error(failure)).await?;
                // It speaks something else: what follows is not meant for us.
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn follow(
    daemon: &Arc<Daemon>,
    id: u64,
    writer: &mut WriteHalf<UnixStream>,
) -> io::Result<()> {
    let Ok(job) = daemon.jobs.get(id) else {
        return answer(writer, &daemon.handle(Request::JobShow { id }).await).await;
    };
    loop {
        let running = job.is_running();
        answer(writer, &Response::Job(Box::new(job.info()))).await?;
        if !running {
            return Ok(());
        }
        // Either way it is looked at again.
        let _ = tokio::time::timeout(BEAT, job.ended()).await;
    }
}

async fn answer(writer: &mut WriteHalf<UnixStream>, response: &Response) -> io::Result<()> {
    tokio::time::timeout(SLOW, writer.write_all(&encode(response))).await?
}

fn encode(response: &Response) -> Vec<u8> {
    let mut line = serde_json::to_vec(response).unwrap_or_else(|error| {
        format!("{{\"error\":{{\"kind\":\"failed\",\"message\":\"no JSON: {error}\"}}}}")
            .into_bytes()
    });
    line.push(b'\n');
    line
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
