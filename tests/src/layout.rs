//! Where the test bed keeps what it makes.

use crate::{Error, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The folders of one work tree.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The work tree's root.
    pub source: PathBuf,
    /// Cargo's target folder.
    pub target: PathBuf,
    /// The test bed's own folder in it.
    pub base: PathBuf,
    /// Whether the hosts' programs are built as they are released. Else they are built as unit tests are, with checks for
    /// overflow and of what is taken for granted, and dependencies are compiled once.
    pub released: bool,
}

impl Layout {
    /// Finds the work tree from the environment that cargo gives, or as it was when this was built.
    pub fn find(released: bool) -> Result<Self> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let source = manifest.parent().map(Path::to_owned).unwrap_or_default();
        if !source.join("Cargo.lock").exists() {
            return Err(Error::machine(
                format!("No workspace at {}", source.display()),
                "Run `cargo testbed …` inside the work tree",
            ));
        }
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| source.join("target"), |dir| source.join(dir));
        let base = target.join("testbed");
        fs::create_dir_all(&base).map_err(Error::file("create", &base))?;
        Ok(Self {
            source,
            target,
            base,
            released,
        })
    }

    /// A folder in the test bed's own, made when absent.
    pub fn folder(&self, name: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.base.join(name);
        fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
        Ok(path)
    }

    /// Keeps other processes of this work tree, and other threads, from what has that name until it is dropped.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.folder("locks")?.join(name);
        let file = File::create(&path).map_err(Error::file("create", &path))?;
        file.lock().map_err(Error::file("lock", &path))?;
        Ok(file)
    }

    /// An unpacked set of packages.
    pub fn root(&self, name: &str) -> PathBuf {
        self.base.join("roots").join(name)
    }
}

/// Writes a file in one step: a reader sees the old one or the new one whole.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let draft = path.with_extension(format!("draft-{}", std::process::id()));
    fs::write(&draft, content).map_err(Error::file("write", &draft))?;
    fs::rename(&draft, path).map_err(Error::file("rename", &draft))
}
