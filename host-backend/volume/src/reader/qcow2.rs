//! Disks in QEMU's copy-on-write format, read through an [`Export`].

use super::qsd_export::Export;
use crate::{Error, Reader, Settings, check_range};
use std::path::PathBuf;
use transhume_machine::image_chain::Image;

pub(crate) struct Qcow2Reader {
    path: PathBuf,
    export: Export,
}

impl Qcow2Reader {
    pub(crate) fn open(image: &Image, settings: &Settings) -> Result<Self, Error> {
        Ok(Self {
            path: image
                .nodes
                .first()
                .map(|top| top.path.clone())
                .unwrap_or_default(),
            export: Export::start(image, settings)?,
        })
    }

    /// Id of the storage daemon's process.
    #[cfg(test)]
    pub(crate) fn pid(&self) -> u32 {
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
