use super::*;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
const TIMEOUT: Duration = Duration::from_secs(20);

/// A QEMU that says `greeting`, then answers each request with what `answer` makes of it.
fn qemu(
    greeting: &'static str,
    answer: impl Fn(Value) -> Option<String> + Send + 'static,
) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("a client");
        let (reader, mut writer) = stream.into_split();
        writer
            .write_all(format!("{greeting}\r\n").as_bytes())
            .await
            .expect("greet");
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let request: Value = serde_json::from_str(&line).expect("a request");
            let Some(text) = answer(request) else { break };
            writer.write_all(text.as_bytes()).await.expect("answer");
        }
    });
    (folder, path)
}

fn returns(request: &Value, value: &Value) -> String {
    json!({ "id": request["id"], "return": value }).to_string() + "\r\n"
}

#[tokio::test]
async fn negotiates_and_executes() {
    let (_folder, path) = qemu(GREETING, |request| {
        Some(match request["execute"].as_str() {
            Some("qmp_capabilities") => {
                assert_eq!(request["arguments"], json!({ "enable": ["oob"] }));
                returns(&request, &json!({}))
            }
            Some("query-status") => {
                assert!(request.get("arguments").is_none());
                returns(&request, &json!({ "status": "running", "running": true, "singlestep": false }))
            }
            _ => json!({ "id": request["id"], "error": { "class": "CommandNotFound", "desc": "no such" } })
                .to_string() + "\n",
        })
    });
    let qmp = Qmp::connect(&path, TIMEOUT).await.expect("connected");
    assert_eq!(qmp.version().to_string(), "7.2.22");
    assert_eq!(qmp.pid(), Some(std::process::id()));
    assert!(qmp.status().await.expect("a status").running);
    let error = qmp
        .execute("nonsense", Value::Null)
        .await
        .expect_err("refused");
    assert!(matches!(&error, Error::Refused { class, .. } if class == "CommandNotFound"));
    assert_eq!(error.to_string(), "QEMU refused `nonsense`: no such");
}

#[tokio::test]
async fn tells_events_with_qemus_time() {
    let (_folder, path) = qemu(GREETING, |request| {
        let event = json!({ "event": "STOP", "timestamp": { "seconds": 12, "microseconds": 34 } });
        let junk = json!({ "id": "not ours", "return": 1 });
        let answer = returns(&request, &json!({}));
        Some(if request["execute"] == "stop" {
            format!("{event}\n{junk}\n{answer}")
        } else {
            answer
        })
    });
    let qmp = Qmp::connect(&path, TIMEOUT).await.expect("connected");
    let mut events = qmp.events();
    qmp.stop().await.expect("stopped");
    let event = events.recv().await.expect("an event");
    assert_eq!(event.name, "STOP");
    assert_eq!(event.at, Duration::new(12, 34_000));
}

#[tokio::test]
async fn a_lost_connection_fails_what_waits_and_what_comes() {
    let (_folder, path) = qemu(GREETING, |request| {
        (request["execute"] == "qmp_capabilities").then(|| returns(&request, &json!({})))
    });
    let qmp = Qmp::connect(&path, TIMEOUT).await.expect("connected");
    let error = qmp.status().await.expect_err("lost");
    assert!(matches!(error, Error::Lost(_)), "{error}");
    assert!(qmp.is_closed());
    let error = qmp.cont().await.expect_err("still lost");
    assert!(matches!(error, Error::Lost(_)), "{error}");
    qmp.quit().await.expect("a QEMU that is gone has quit");
}

#[tokio::test]
async fn gives_up_on_a_silent_qemu() {
    let (_folder, path) = qemu(GREETING, |request| {
        Some(if request["execute"] == "qmp_capabilities" {
            returns(&request, &json!({}))
        } else {
            String::new()
        })
    });
    let qmp = Qmp::connect(&path, TIMEOUT).await.expect("connected");
    let error = qmp
        .execute_within("stop", Value::Null, Duration::from_millis(20))
        .await
        .expect_err("silence");
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(lock(&qmp.shared.waiting).is_empty());
}

#[tokio::test]
async fn refuses_what_is_not_qmp() {
    let (_folder, path) = qemu("SSH-2.0-OpenSSH_9.2", |_| None);
    let error = Qmp::connect(&path, TIMEOUT).await.expect_err("no QMP");
    assert!(
        error.to_string().contains("is it the socket of `-qmp`?"),
        "{error}"
    );

    let folder = tempfile::tempdir().expect("a folder");
    let error = Qmp::connect(&folder.path().join("none"), TIMEOUT)
        .await
        .expect_err("nobody");
    assert!(matches!(error, Error::Connect { .. }), "{error}");

    let silent = folder.path().join("silent");
    let _listener = UnixListener::bind(&silent).expect("a socket");
    let error = Qmp::connect(&silent, Duration::from_millis(20))
        .await
        .expect_err("silence");
    assert!(matches!(error, Error::NoGreeting { .. }), "{error}");
}

#[tokio::test]
async fn ends_on_an_endless_line() {
    let (_folder, path) = qemu(GREETING, |request| {
        Some(if request["execute"] == "qmp_capabilities" {
            returns(&request, &json!({}))
        } else {
            "x".repeat(MAX_LINE + 1)
        })
    });
    let qmp = Qmp::connect(&path, TIMEOUT).await.expect("connected");
    let error = qmp.status().await.expect_err("too long");
    assert!(error.to_string().contains("longer than"), "{error}");
}

#[tokio::test]
async fn remembers_why_qemu_ends() {
    use super::super::Shutdown;
    let event = |name: &str, data: Value| {
        let timestamp = json!({ "seconds": 1, "microseconds": 2 });
        json!({ "event": name, "data": data, "timestamp": timestamp }).to_string() + "\r\n"
    };
    let ends = |reason: &str| event("SHUTDOWN", json!({ "guest": true, "reason": reason }));
    let guest = |end| Some(Shutdown::Guest(end));
    for (said, expected) in [
        (ends("guest-shutdown"), guest(GuestEnd::ShutDown)),
        (ends("guest-panic"), guest(GuestEnd::Panicked)),
        (ends("guest-reset"), guest(GuestEnd::Rebooted)),
        (ends("host-qmp-quit"), Some(Shutdown::Told)),
        (
            ends("host-error"),
            Some(Shutdown::Other("host-error".to_owned())),
        ),
        (event("STOP", json!({})), None),
        // With `-no-shutdown`: it was reset since.
        (ends("guest-shutdown") + &event("RESUME", json!({})), None),
    ] {
        let (_folder, path) = qemu(GREETING, move |request| {
            let answer = returns(&request, &json!({}));
            (request["execute"] != "quit").then(|| answer + &said)
        });
        let qmp = Qmp::connect(&path, TIMEOUT).await.expect("connected");
        let _ = qmp.quit().await;
        qmp.closed().await;
        assert_eq!(qmp.shutdown(), expected);
        if expected.is_some() {
            qmp.shuts_down().await;
        }
    }
}
