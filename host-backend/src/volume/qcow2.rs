//! Disks in QEMU's copy-on-write format, read through an [`Export`].

use super::export::Export;
use super::{Error, Reader, Settings, check_range};
use std::path::{Path, PathBuf};

pub(super) struct Qcow2Reader {
    path: PathBuf,
    export: Export,
}

impl Qcow2Reader {
    pub(super) fn open(path: &Path, settings: &Settings) -> Result<Self, Error> {
        Ok(Self {
            path: path.to_owned(),
            export: Export::start(path, settings)?,
        })
    }

    /// Id of the storage daemon's process.
    #[cfg(test)]
    pub(super) fn pid(&self) -> u32 {
        self.export.pid()
    }
}

impl Reader for Qcow2Reader {
    fn size(&self) -> u64 {
        self.export.client().size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        check_range(self.size(), offset, buffer.len())?;
        self.export
            .client()
            .read_at(offset, buffer)
            .map_err(|source| Error::Export {
                path: self.path.clone(),
                said: self.export.said(),
                source: Box::new(source),
            })
    }
}
