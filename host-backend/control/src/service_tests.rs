use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transhume_api::FailureKind;
use transhume_cli::Client;

struct Service {
    folder: tempfile::TempDir,
    socket: PathBuf,
}

/// A service without VMs.
async fn service() -> Service {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("transhumed.toml");
    let text = format!(
        "host = \"hosta\"\nqemu-user = \"nobody\"\nplain-link = true\nrun-directory = \"{0}/run\"\nstate-directory = \"{0}/state\"\n\
         qemu = \"/nowhere/qemu\"\n[hosts.hostb]\naddress = \"127.0.0.1:1\"\n",
        folder.path().display()
    );
    std::fs::write(&path, text).expect("a configuration");
    let config = Config::load(&path).expect("a configuration");
    let path = config.control_socket();
    let listener = socket::bind(&config).await.expect("a socket");
    let daemon = Daemon::open(config).await.expect("a service");
    tokio::spawn(async move { serve(&listener, &daemon).await });
    Service {
        folder,
        socket: path,
    }
}

impl Service {
    async fn ask(&self, request: &Request) -> transhume_cli::Result<Response> {
        Client::connect(&self.socket).await?.ask(request).await
    }

    async fn refusal(&self, request: &Request) -> String {
        let error = self.ask(request).await.expect_err("a refusal");
        assert_eq!(error.kind(), FailureKind::Refused, "{error}");
        error.to_string()
    }
}

fn name() -> String {
    "web1".to_owned()
}

#[tokio::test]
async fn begins_with_empty_lists() {
    let service = service().await;
    assert_eq!(
        service
            .ask(&Request::VmList { all: false })
            .await
            .expect("a list"),
        Response::Vms(Vec::new())
    );
    assert_eq!(
        service.ask(&Request::JobList).await.expect("a list"),
        Response::Jobs(Vec::new())
    );
}

#[tokio::test]
async fn refuses_with_cause_and_cure() {
    let service = service().await;
    let definition = |text: &str| Request::VmStart {
        definition: text.to_owned(),
        anyway: false,
    };
    let said = service.refusal(&definition("nam = \"web1\"")).await;
    assert!(said.contains("unknown field `nam`"), "{said}");
    let good =
        "name = \"web1\"\nmachine = \"pc\"\naccelerator = \"tcg\"\nmemory = \"64MiB\"\nvcpus = 1\n";
    let said = service.refusal(&definition(good)).await;
    assert!(
        said.contains("/nowhere/qemu") && said.contains("apt install"),
        "{said}"
    );
    let said = service.refusal(&Request::VmShow { name: name() }).await;
    assert!(said.contains("hosta has no VM named web1"), "{said}");
    for request in [
        Request::VmStop {
            name: name(),
            force: true,
            shutdown_timeout: None,
        },
        Request::VmPause { name: name() },
        Request::VmResume { name: name() },
        Request::Migrate {
            name: name(),
            to: "hostb".to_owned(),
            link_patience: 30,
            goal: transhume_api::Goal::default(),
            dry_run: false,
        },
        Request::JobShow { id: 7 },
        Request::JobFollow { id: 7 },
        Request::JobCancel { id: 7 },
    ] {
        let said = service.refusal(&request).await;
        assert!(said.contains("`transhume "), "{said}");
    }
    let adopt = Request::VmAdopt {
        definition: good.to_owned(),
        qmp: "qmp.sock".into(),
    };
    assert!(service.refusal(&adopt).await.contains("absolute"));
    // What was refused left nothing behind.
    assert_eq!(
        service
            .ask(&Request::VmList { all: false })
            .await
            .expect("a list"),
        Response::Vms(Vec::new())
    );
    let files = std::fs::read_dir(service.folder.path().join("state/vms")).expect("a folder");
    assert_eq!(files.count(), 0);
}

#[tokio::test]
async fn survives_hostile_clients() {
    let service = service().await;
    // A line without an end: dropped at the limit.
    let mut flood = UnixStream::connect(&service.socket)
        .await
        .expect("a connection");
    let chunk = vec![b'x'; 64 << 10];
    let mut sent = 0;
    while sent < 4 * MAX_REQUEST && flood.write_all(&chunk).await.is_ok() {
        sent += chunk.len();
    }
    assert!(sent < 4 * MAX_REQUEST);
    // Nonsense is answered, and nothing behind it is heard.
    let mut client = UnixStream::connect(&service.socket)
        .await
        .expect("a connection");
    client
        .write_all(b"\xff\xfe\n{\"command\":\"vm-list\"}\n")
        .await
        .expect("sent");
    client.shutdown().await.expect("closed");
    let mut said = String::new();
    client.read_to_string(&mut said).await.expect("answers");
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].contains("this is no request"), "{said}");
    assert_eq!(lines.len(), 1, "{said}");
    // One too many is told so at once.
    let mut held = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = Client::connect(&service.socket)
            .await
            .expect("a connection");
        if client.ask(&Request::VmList { all: false }).await.is_err() {
            break;
        }
        held.push(client);
    }
    let mut client = Client::connect(&service.socket)
        .await
        .expect("a connection");
    let error = client.receive().await.expect_err("busy");
    assert!(error.to_string().contains("clients already"), "{error}");
    drop(held);
}
