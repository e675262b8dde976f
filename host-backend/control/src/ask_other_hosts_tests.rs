use super::*;
use crate::arriving_vms::ArrivingVms;
use crate::config::Config;
use crate::state_directory::{Record, State, Stopped};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpListener;
use transhume_api::{Request, Response, VmInfo};
use transhume_base::process_identity::Identity;
use transhume_hypervisor::fake::{FakeQemu, definition};
use transhume_relay::destination;

/// A host `name` in that folder, which knows another one at `address`.
async fn host(folder: &Path, name: &str, address: SocketAddr) -> Arc<Daemon> {
    let other = if name == "hosta" { "hostb" } else { "hosta" };
    let text = format!(
        "host = \"{name}\"\nplain-link = true\nrun-directory = \"{0}/run\"\nstate-directory = \"{0}/state\"\n\
         qemu = \"/none\"\n[hosts.{other}]\naddress = \"{address}\"\n",
        folder.display()
    );
    let config = Config::parse(&text).expect("a configuration");
    Daemon::open(config).await.expect("a service")
}

/// Where nobody listens.
fn nowhere() -> SocketAddr {
    ([127, 0, 0, 1], 1).into()
}

fn record(run: &Path) -> Record {
    let qmp = run.join("vms/web1/qmp.sock");
    Record::new(definition("web1"), qmp, None)
}

async fn list(daemon: &Arc<Daemon>, all: bool) -> Vec<VmInfo> {
    match daemon.handle(Request::VmList { all }).await {
        Response::Vms(vms) => vms,
        other => panic!("no list: {other:?}"),
    }
}

#[tokio::test]
async fn a_host_that_has_it_says_so_and_one_that_is_silent_is_named() {
    let folders =
        [tempfile::tempdir(), tempfile::tempdir()].map(|folder| folder.expect("a folder"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let address = listener.local_addr().expect("an address");
    let b = host(folders[1].path(), "hostb", nowhere()).await;
    tokio::spawn(destination::serve(
        listener,
        Arc::new(ArrivingVms(b.clone())),
    ));
    let a = host(folders[0].path(), "hosta", address).await;

    a.refuse_elsewhere("web1", false)
        .await
        .expect("nobody has it");
    let defined = record(folders[1].path()).stopped("it was stopped");
    b.table.define(defined).expect("defined");
    a.refuse_elsewhere("web1", false)
        .await
        .expect("it does not run");
    b.table.reserve("web1").expect("free");
    for anyway in [false, true] {
        let error = a
            .refuse_elsewhere("web1", anyway)
            .await
            .expect_err("it is there");
        assert!(
            error.to_string().contains("hostb says that web1"),
            "{error}"
        );
    }

    let error = b.refuse_elsewhere("web2", false).await.expect_err("silent");
    let said = error.to_string();
    assert!(
        said.contains("hosta") && said.contains("--anyway"),
        "{said}"
    );
    b.refuse_elsewhere("web2", true)
        .await
        .expect("an operator knows");
}

#[tokio::test]
async fn a_vm_is_kept_over_a_loss_of_power() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = State::open(&folder.path().join("state")).expect("a state");
    let mut before = record(&folder.path().join("run"));
    before.autostart = true;
    before.qemu = Some(Identity {
        boot: "the one before".to_owned(),
        ..Identity::find(std::process::id()).expect("we run")
    });
    state.save_vm(&before).expect("noted");
    for _ in 0..2 {
        let daemon = host(folder.path(), "hosta", nowhere()).await;
        assert!(list(&daemon, false).await.is_empty());
        let vms = list(&daemon, true).await;
        assert_eq!((vms[0].name.as_str(), vms[0].autostart), ("web1", true));
        let note = vms[0].note.as_deref().unwrap_or_default();
        assert!(note.contains("lost its power"), "{note}");
        assert!(daemon.is_due("web1"));
    }
}

#[tokio::test]
async fn a_vm_that_stopped_since_the_host_was_started_is_not_started_by_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let daemon = host(folder.path(), "hosta", nowhere()).await;
    let stopped = Record {
        autostart: true,
        stopped: Some(Stopped::now("it was stopped")),
        ..record(folder.path())
    };
    daemon.table.define(stopped).expect("defined");
    assert!(!daemon.is_due("web1"));
}

#[tokio::test]
async fn a_qemu_that_lives_is_not_forgotten_when_its_socket_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let qemu = FakeQemu::start(&run, "web1");
    let state = State::open(&folder.path().join("state")).expect("a state");
    let before = Record {
        qemu: Some(qemu.identity()),
        ..record(&run)
    };
    state.save_vm(&before).expect("noted");
    std::fs::remove_file(run.join("vms/web1/qmp.sock")).expect("a socket");
    let daemon = host(folder.path(), "hosta", nowhere()).await;
    assert_eq!(list(&daemon, false).await[0].state, "unreachable");
    qemu.end(true);
    let shown = daemon
        .handle(Request::VmShow {
            name: "web1".to_owned(),
        })
        .await;
    let Response::Vm(info) = shown else {
        panic!("{shown:?}");
    };
    assert_eq!(info.state, "stopped");
}

#[tokio::test]
async fn a_vm_that_is_defined_can_be_undefined_and_one_that_does_not_start_leaves_it_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let daemon = host(folder.path(), "hosta", nowhere()).await;
    let definition = definition("web1").to_toml().expect("a text");
    let answer = daemon.handle(Request::VmDefine { definition }).await;
    assert!(matches!(answer, Response::Done(_)), "{answer:?}");
    let name = "web1".to_owned();
    let start = Request::VmStartDefined {
        name: name.clone(),
        anyway: true,
    };
    let Response::Error(failure) = daemon.handle(start).await else {
        panic!("there is no QEMU");
    };
    assert_eq!(failure.kind.exit_code(), 3, "{}", failure.message);
    assert_eq!(list(&daemon, true).await[0].state, "stopped");
    let answer = daemon.handle(Request::VmUndefine { name }).await;
    assert!(matches!(answer, Response::Done(_)), "{answer:?}");
    assert!(list(&daemon, true).await.is_empty());
}
