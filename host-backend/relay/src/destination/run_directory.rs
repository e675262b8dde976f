//! What the run directory of a VM that is about to arrive says of it.

use std::path::Path;

use crate::receive::resume_state;
use transhume_base::{bounded, durable};
use transhume_hypervisor::Error;
use transhume_protocol::link::Offer;

pub(crate) const DEFINITION: &str = "definition.toml";
pub(crate) const ARRIVAL: &str = "arrival";
/// The version of the note in a run directory, and its bytes at most.
const VERSION: u32 = 1;
const MAX_TEXT: u64 = 256;

/// Says, in the run directory of a VM that is about to arrive, by which migration it does, and what it is.
/// The journal says before that it waits. The directory is made. `label`: the migration for people.
pub(crate) fn begin(folder: &Path, definition: &str, job: u64, label: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let text = format!("{VERSION} {job:016x} {label}");
    durable::replace(&folder.join(ARRIVAL), text.as_bytes())?;
    durable::replace(&folder.join(DEFINITION), definition.as_bytes())
}

/// The migration by which a VM arrives that has that run directory, for people.
pub fn arriving_job(folder: &Path) -> Option<String> {
    let text = bounded::read_text(&folder.join(ARRIVAL), MAX_TEXT).ok()?;
    text.splitn(3, ' ').nth(2).map(str::to_owned)
}

/// The VM is no longer about to arrive: what the journal says of that migration is not about its QEMU any more.
pub(crate) fn settle(folder: &Path) -> std::io::Result<()> {
    resume_state::remove(folder)?;
    durable::remove(&folder.join(ARRIVAL))
}

/// Whether a run directory is that of a VM that is about to arrive by that migration.
///
/// # Errors
/// If what it says cannot be read.
pub(crate) fn is_by(folder: &Path, job: u64) -> Result<bool, Error> {
    let path = folder.join(ARRIVAL);
    let text = match bounded::read_text(&path, MAX_TEXT) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::file("read", path, error)),
    };
    let this = format!("{job:016x}");
    let mut words = text.split(' ');
    match (words.next(), words.next()) {
        // Of version 0.
        (Some(by), None) => Ok(by == this),
        (Some(version), Some(by)) if version.parse() == Ok(VERSION) => Ok(by == this),
        _ => Err(Error::Unfit {
            cause: format!("{} is of a version that is not known", path.display()),
            cure: "bring transhumed to the release that wrote it".to_owned(),
        }),
    }
}

/// A migration as people know it: its number at its source, by which they find it there.
pub(crate) fn label(offer: &Offer) -> String {
    format!("{}/{}", offer.from, offer.source_job)
}
