//! Who may speak to whom, and that what is said arrives.

use super::*;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use transhume_pki::Authority;

/// What a host has, its certificate being for `name`.
fn security(site: &Path, authority: &str, name: &str, host: &str) -> Security {
    let folder = site.join(authority);
    let own = Authority::at(&folder);
    let made = folder.join("ca.crt");
    if !made.exists() {
        own.init(30).unwrap();
    }
    let issued = own.issue(name, 30, &folder, true).unwrap();
    Security::Tls {
        files: Files {
            authority: made,
            certificate: issued.certificate,
            key: issued.key,
        },
        host: host.to_owned(),
    }
}

/// Connects as `client` to `hostb`, which is `server`; how it went for both.
fn meet(
    client: &Security,
    server: &Security,
) -> (Result<Connection, Error>, Result<Connection, Error>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let server = scope.spawn(|| Connection::accept(listener.accept().unwrap().0, server));
        // What is not closed would keep the other side waiting.
        let client = Connection::open(&address, "hostb", client);
        (client, server.join().unwrap())
    })
}

fn expect(result: Result<Connection, Error>, words: &str) {
    let said = match result {
        Ok(_) => "it was believed".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(said.contains(words), "{said}");
}

#[test]
fn hosts_of_one_authority_believe_each_other() {
    let site = tempfile::tempdir().unwrap();
    let a = security(site.path(), "pki", "hosta", "hosta");
    let b = security(site.path(), "pki", "hostb", "hostb");
    let (client, server) = meet(&a, &b);
    let (client, mut server) = (client.unwrap(), server.unwrap());
    assert!(server.peer_is("hosta") && client.peer_is("hostb"));
    assert!(!server.peer_is("hostb") && !server.peer_is("hosta.example") && !server.peer_is(""));

    // Both directions at once, with frames longer than what is encrypted at once.
    let (mut sender, mut receiver, closer) = client.split();
    let pages: Vec<Vec<u8>> = (0..300_u16)
        .map(|n| vec![n.to_le_bytes()[0]; 4096])
        .collect();
    let pieces: Vec<&[u8]> = pages.iter().map(Vec::as_slice).collect();
    let whole = pages.concat();
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..10 {
                sender
                    .send(FrameKind::Batch, Numbering::default(), &pieces)
                    .unwrap();
            }
        });
        scope.spawn(|| {
            for _ in 0..10 {
                assert_eq!(*receiver.receive_numbered().unwrap().0.payload, *whole);
            }
        });
        for _ in 0..10 {
            let (frame, numbering) = server.receiver.receive_numbered().unwrap();
            assert_eq!(*frame.payload, *whole);
            server
                .sender
                .send(frame.kind, numbering, &[&frame.payload])
                .unwrap();
        }
    });
    closer.close();
    assert!(matches!(
        server.receiver.receive_numbered(),
        Err(Error::Closed)
    ));
}

#[test]
fn others_are_refused() {
    let site = tempfile::tempdir().unwrap();
    let a = security(site.path(), "pki", "hosta", "hosta");
    let b = security(site.path(), "pki", "hostb", "hostb");
    let c = security(site.path(), "pki", "hostc", "hostc");
    let mut stranger = security(site.path(), "elsewhere", "hosta", "hosta");
    if let Security::Tls { files, .. } = &mut stranger {
        // It would speak to whoever is there.
        files.authority = site.path().join("pki/ca.crt");
    }
    let false_b = security(site.path(), "elsewhere", "hostb", "hostb");

    let (client, server) = meet(&stranger, &b);
    drop(client);
    expect(server, "not from an authority");

    let (client, _) = meet(&a, &false_b);
    expect(client, "not from an authority");

    // It is a host of the site, but not the one that was meant.
    let (client, _) = meet(&a, &c);
    expect(client, "another name");

    let (client, server) = meet(&Security::Plain, &b);
    drop(client);
    expect(server, "does not speak TLS");

    let (client, _) = meet(&a, &Security::Plain);
    expect(client, "does not speak TLS");
}

#[test]
fn bytes_of_somebody_in_between_are_no_reason_to_do_without_tls() {
    let site = tempfile::tempdir().unwrap();
    let a = security(site.path(), "pki", "hosta", "hosta");
    let b = security(site.path(), "pki", "hostb", "hostb");
    let (client, server) = meet(&a, &b);
    let (client, mut server) = (client.unwrap(), server.unwrap());
    (&client.sender.channel.socket)
        .write_all(&[0xff; 64])
        .unwrap();
    let error = server.receiver.receive_numbered().unwrap_err();
    let words = error.to_string();
    assert!(
        error.is_of_the_link() && !words.contains("plain-link"),
        "{words}"
    );
}

#[test]
fn what_is_no_handshake_ends_it() {
    let site = tempfile::tempdir().unwrap();
    let b = security(site.path(), "pki", "hostb", "hostb");
    for bytes in [
        &b""[..],
        b"\x16\x03\x01",
        &[0xff; 5000],
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.write_all(bytes).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let result = Connection::accept(listener.accept().unwrap().0, &b);
        assert!(result.is_err(), "{bytes:?}");
        let _ = peer.read_to_end(&mut Vec::new());
    }
}

#[test]
fn an_identity_that_cannot_be_used_says_why() {
    let site = tempfile::tempdir().unwrap();
    let other = security(site.path(), "pki", "hostc", "hosta");
    let words = other.check().unwrap_err().to_string();
    assert!(words.contains("transhume pki issue hosta"), "{words}");
    let Security::Tls { files, host } = security(site.path(), "pki", "hosta", "hosta") else {
        return;
    };
    for (files, word) in [
        (
            Files {
                key: site.path().join("none.key"),
                ..files.clone()
            },
            "[tls]",
        ),
        (
            Files {
                key: files.certificate.clone(),
                ..files.clone()
            },
            "no private key",
        ),
        (
            Files {
                certificate: files.key.clone(),
                ..files.clone()
            },
            "no certificate",
        ),
        (
            Files {
                key: site.path().join("pki/ca.key"),
                ..files.clone()
            },
            "cannot be used",
        ),
    ] {
        let host = host.clone();
        let words = Security::Tls { files, host }
            .check()
            .unwrap_err()
            .to_string();
        assert!(words.contains(word), "{words}");
    }
}
