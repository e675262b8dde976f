//! Who this host is to others, and whom it believes: a certificate, its key, and the authority that made
//! the certificates of all hosts of a site. TLS 1.3 (RFC 8446) alone, without session tickets or early data,
//! so that nothing of an old session can be used again.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::{Resumption, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use thiserror::Error;

use transhume_base::bounded;

/// How long a handshake may take, all of it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A certificate, a chain or a key is shorter.
const MAX_FILE: u64 = 256 * 1024;

/// The files of an identity, all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The authority's certificate; several are all believed.
    pub authority: PathBuf,
    /// This host's certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Why an identity cannot be used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// A file that cannot be read.
    #[error(
        "{path} cannot be read: {source}; `transhume pki` makes such files, and [tls] in transhumed.toml names them"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("{path} holds no {what} ({cause}); it must be PEM, as `transhume pki issue` writes it")]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What is wrong.
        cause: String,
    },
    /// Certificate and key, or the authority, cannot be used.
    #[error(
        "the certificate {path} cannot be used: {cause}; `transhume pki show` tells what it is"
    )]
    Unusable {
        /// The certificate.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The certificate is for another name.
    #[error(
        "the certificate {path} is not for {host}; `transhume pki issue {host}` makes one that is"
    )]
    Name {
        /// The certificate.
        path: PathBuf,
        /// This host.
        host: String,
    },
}

/// What is proven to other hosts, and asked of them.
pub(super) struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads an identity for a host.
    pub(super) fn load(files: &Files, host: &str) -> Result<Self, IdentityError> {
        let unusable = |cause: &dyn fmt::Display| IdentityError::Unusable {
            path: files.certificate.clone(),
            cause: cause.to_string(),
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.authority)? {
            roots
                .add(certificate)
                .map_err(|error| IdentityError::Content {
                    path: files.authority.clone(),
                    what: "authority's certificate",
                    cause: error.to_string(),
                })?;
        }
        let chain = certificates(&files.certificate)?;
        let key = private_key(&files.key)?;
        if !is_for(&chain[0], host) {
            return Err(IdentityError::Name {
                path: files.certificate.clone(),
                host: host.to_owned(),
            });
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(roots);
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|error| unusable(&error))?;
        client.resumption = Resumption::disabled();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&error))?;
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// Proves itself on a connection to a host, and has it prove that it is that host.
    pub(super) fn connect(
        &self,
        socket: &TcpStream,
        host: &str,
    ) -> Result<rustls::Connection, HandshakeError> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| HandshakeError::Name(error.to_string()))?;
        let session = ClientConnection::new(Arc::clone(&self.client), name)
            .map_err(HandshakeError::Refused)?;
        shake_hands(session.into(), socket)
    }

    /// The same on a connection that another host made.
    pub(super) fn accept(&self, socket: &TcpStream) -> Result<rustls::Connection, HandshakeError> {
        let session =
            ServerConnection::new(Arc::clone(&self.server)).map_err(HandshakeError::Refused)?;
        shake_hands(session.into(), socket)
    }
}

/// Why two hosts did not come to believe each other.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The connection.
    #[error(
        "the connection ended during the TLS handshake ({0}); the other host may not believe this one's certificate: see its log"
    )]
    Socket(io::Error),
    /// Too slow.
    #[error("the TLS handshake took longer than {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Slow,
    /// One side does not believe the other.
    #[error("{}", refusal(.0))]
    Refused(rustls::Error),
    /// A name that cannot stand in a certificate.
    #[error("{0}")]
    Name(String),
}

fn refusal(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Cause, Error};
    match error {
        Error::InvalidMessage(_) => {
            "the other host does not speak TLS; [tls] must be in transhumed.toml of both \
                                     hosts, or `plain-link = true` in both"
                .to_owned()
        }
        Error::InvalidCertificate(cause) => {
            let what = match cause {
                Cause::Expired | Cause::ExpiredContext { .. } => {
                    "has expired: `transhume pki issue --renew` makes a new one for it"
                }
                Cause::NotValidYet | Cause::NotValidYetContext { .. } => {
                    "is not valid yet: are the clocks right?"
                }
                Cause::UnknownIssuer | Cause::BadSignature => {
                    "is not from an authority that this host believes: all hosts need certificates of one authority, and \
                     `transhume pki show` tells whose one is"
                }
                Cause::NotValidForName | Cause::NotValidForNameContext { .. } => {
                    "is for another name than it has in transhumed.toml: `transhume pki show` tells for which"
                }
                other => return format!("the other host's certificate is not good: {other:?}"),
            };
            format!("the other host's certificate {what}")
        }
        Error::NoCertificatesPresented => {
            "the other host has no certificate; [tls] must be in transhumed.toml of both hosts".to_owned()
        }
        Error::AlertReceived(Alert::CertificateExpired) => {
            "the other host says that this host's certificate has expired, or is not valid yet; `transhume pki show` tells \
             when it is, and `transhume pki issue --renew` makes a new one"
                .to_owned()
        }
        Error::AlertReceived(
            Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateRequired
            | Alert::AccessDenied
            | Alert::DecryptError,
        ) => format!(
            "the other host does not believe this host's certificate ({error}): all hosts need certificates of one \
             authority, and `transhume pki show` tells whose one is"
        ),
        error => error.to_string(),
    }
}

fn shake_hands(
    mut session: rustls::Connection,
    mut socket: &TcpStream,
) -> Result<rustls::Connection, HandshakeError> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let patience = socket.read_timeout().map_err(HandshakeError::Socket)?;
    while session.is_handshaking() || session.wants_write() {
        while session.wants_write() {
            session
                .write_tls(&mut socket)
                .map_err(HandshakeError::Socket)?;
        }
        if !session.is_handshaking() {
            break;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HandshakeError::Slow);
        }
        socket
            .set_read_timeout(Some(left))
            .map_err(HandshakeError::Socket)?;
        match session.read_tls(&mut socket) {
            Ok(0) => {
                return Err(HandshakeError::Socket(io::ErrorKind::UnexpectedEof.into()));
            }
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Err(HandshakeError::Slow);
            }
            Err(error) => return Err(HandshakeError::Socket(error)),
        }
        if let Err(error) = session.process_new_packets() {
            // The peer should learn why.
            let _ = session.write_tls(&mut socket);
            return Err(HandshakeError::Refused(error));
        }
    }
    socket
        .set_read_timeout(patience)
        .map_err(HandshakeError::Socket)?;
    Ok(session)
}

/// Whether a certificate is for a host.
pub(super) fn is_for(certificate: &CertificateDer<'_>, host: &str) -> bool {
    let Ok(name) = ServerName::try_from(host) else {
        return false;
    };
    ParsedCertificate::try_from(certificate)
        .is_ok_and(|parsed| verify_server_name(&parsed, &name).is_ok())
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    bounded::read(path, MAX_FILE).map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let content = |cause: String| IdentityError::Content {
        path: path.to_owned(),
        what: "certificate",
        cause,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(content("it is not in there".to_owned())),
        Err(error) => Err(content(error.to_string())),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| IdentityError::Content {
        path: path.to_owned(),
        what: "private key",
        cause: error.to_string(),
    })
}
