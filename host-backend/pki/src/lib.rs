//! Certificates for a small site: an authority in a folder, and a certificate a host. Certificates made
//! otherwise serve as well: the link asks for X.509 alone, with the host's name as a DNS name.

mod error;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use serde::Serialize;
use x509_parser::pem::Pem;
use x509_parser::prelude::GeneralName;

pub use error::Error;
use transhume_base::bounded::read_text;

/// Clocks differ by less, so that a certificate is valid as soon as it is made.
const CLOCKS: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const MAX_FILE: u64 = 256 * 1024;
/// A certificate of which less is left, in seconds, is to be made anew; or less than a third of its life if that is shorter.
const SOON: i64 = 30 * 86_400;

/// An authority: a folder with its certificate (`ca.crt`) and its key (`ca.key`).
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
}

/// A certificate and its key, as files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key, which its owner alone can read.
    pub key: PathBuf,
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shown {
    /// Whose it is, as in `CN=hosta`.
    pub subject: String,
    /// Who made it.
    pub issuer: String,
    /// The hosts that it is for.
    pub hosts: Vec<String>,
    /// Whether it is an authority's.
    pub authority: bool,
    /// Valid from then, in seconds since 1970.
    pub not_before: i64,
    /// Valid until then.
    pub not_after: i64,
    /// Both, for people.
    pub validity: String,
    /// Whether it is valid now.
    pub valid: bool,
}

/// What an operator has to know of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Concern {
    /// No other host believes it now, for this reason.
    Invalid(&'static str),
    /// So many whole days are left.
    Expires(i64),
}

impl Shown {
    /// What an operator has to know of it at a time in seconds since 1970, if anything.
    pub fn concern(&self, now: i64) -> Option<Concern> {
        let left = self.not_after.saturating_sub(now);
        let life = self.not_after.saturating_sub(self.not_before);
        if now < self.not_before {
            Some(Concern::Invalid("is not valid yet: is the clock right?"))
        } else if left < 0 {
            Some(Concern::Invalid("has expired"))
        } else {
            (left < SOON.min(life / 3)).then_some(Concern::Expires(left / 86_400))
        }
    }
}

impl Authority {
    /// The authority in a folder, which need not be there yet.
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    fn certificate(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    fn key(&self) -> PathBuf {
        self.folder.join("ca.key")
    }

    /// Makes the authority, valid for so many days.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is one: hosts would not believe each other any more.
    pub fn init(&self, days: u32) -> Result<Issued, Error> {
        let files = Issued {
            certificate: self.certificate(),
            key: self.key(),
        };
        for path in [&files.certificate, &files.key] {
            if path.exists() {
                return Err(Error::Exists { path: path.clone() });
            }
        }
        let mut params = params("Transhume authority", days);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        std::fs::create_dir_all(&self.folder)
            .map_err(|source| Error::file("create", &self.folder, source))?;
        write(&files.key, &key.serialize_pem(), 0o600)?;
        write(&files.certificate, &certificate.pem(), 0o644)?;
        Ok(files)
    }

    /// Makes a certificate for a host, valid for so many days, in a folder.
    ///
    /// # Errors
    /// [`Error::Issued`] if there is one, or its key, which is not to be replaced (`renew`).
    pub fn issue(&self, host: &str, days: u32, into: &Path, renew: bool) -> Result<Issued, Error> {
        let files = Issued {
            certificate: into.join(format!("{host}.crt")),
            key: into.join(format!("{host}.key")),
        };
        let there = [&files.certificate, &files.key];
        if let Some(path) = there.into_iter().find(|path| path.exists() && !renew) {
            return Err(Error::Issued { path: path.clone() });
        }
        let read_own = |path: PathBuf| {
            read_text(&path, MAX_FILE).map_err(|source| Error::NoAuthority { path, source })
        };
        let own_key = KeyPair::from_pem(&read_own(self.key())?)?;
        let issuer = Issuer::from_ca_cert_pem(&read_own(self.certificate())?, own_key)?;
        let mut params = params(host, days);
        params.subject_alt_names = CertificateParams::new([host.to_owned()])?.subject_alt_names;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        std::fs::create_dir_all(into).map_err(|source| Error::file("create", into, source))?;
        write(&files.key, &key.serialize_pem(), 0o600)?;
        write(&files.certificate, &certificate.pem(), 0o644)?;
        Ok(files)
    }
}

fn params(name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCKS);
    params.not_after = epoch + now + DAY * days;
    params
}

/// Reads what a certificate says: the first one of a PEM file.
pub fn show(path: &Path) -> Result<Shown, Error> {
    let content = |cause: &dyn std::fmt::Display| Error::Content {
        path: path.to_owned(),
        cause: cause.to_string(),
    };
    let text = read_text(path, MAX_FILE).map_err(|source| Error::file("read", path, source))?;
    let pem = Pem::iter_from_buffer(text.as_bytes())
        .next()
        .ok_or_else(|| content(&"it is not PEM"))?
        .map_err(|error| content(&error))?;
    if pem.label != "CERTIFICATE" {
        return Err(content(&format!("it is a {}", pem.label)));
    }
    let certificate = pem.parse_x509().map_err(|error| content(&error))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| content(&error))?;
    let names = names.map(|names| names.value.general_names.as_slice());
    let hosts = names
        .unwrap_or_default()
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect();
    let validity = certificate.validity();
    Ok(Shown {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        hosts,
        authority: certificate.is_ca(),
        not_before: validity.not_before.timestamp(),
        not_after: validity.not_after.timestamp(),
        validity: format!("{} to {}", validity.not_before, validity.not_after),
        valid: validity.is_valid(),
    })
}

/// Writes a whole file or none, with these permissions from the start.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), Error> {
    let draft = path.with_extension("draft");
    let write = || {
        // A draft that was left may have other permissions.
        let _ = std::fs::remove_file(&draft);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&draft, path)
    };
    write().map_err(|source| Error::file("write", path, source))
}
