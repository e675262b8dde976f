//! Debian packages, unpacked side by side under `target/testbed/roots` without being installed.
//!
//! apt runs with a configuration and a state of its own, on the mirror that this machine uses, and
//! checks everything against Debian's archive keyring. What has been unpacked once needs no network
//! again.

mod apt;
mod roots;
mod sources;
pub mod tools;

use crate::layout::Layout;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// One folder of unpacked packages.
struct Recipe {
    name: &'static str,
    /// For people.
    title: &'static str,
    packages: &'static [&'static str],
    /// The release that all of it is from, or a suite of it to prefer over the release's own; bookworm, unless it says
    /// otherwise.
    suite: Option<&'static str>,
    /// Of the packages' closure, only names that begin so; all of them when empty.
    keep: &'static [&'static str],
}

impl Recipe {
    /// The release of Debian that all of it is from.
    fn release(&self) -> &'static str {
        self.suite.map_or("bookworm", |suite| {
            suite.split_once('-').map_or(suite, |(release, _)| release)
        })
    }

    /// What to prefer over the release's own suites, which have its security fixes, too.
    fn preferred(&self) -> Option<&'static str> {
        self.suite.filter(|suite| *suite != self.release())
    }
}

const QEMU_7_2: Recipe = Recipe {
    name: "qemu-7.2",
    title: "QEMU 7.2",
    packages: &["qemu-system-x86"],
    suite: None,
    keep: &[],
};
const QEMU_10_0: Recipe = Recipe {
    name: "qemu-10.0",
    title: "QEMU 10.0 and its tools",
    packages: &["qemu-system-x86", "qemu-utils"],
    suite: Some("bookworm-backports"),
    keep: &[],
};
const QEMU_10_0_13: Recipe = Recipe {
    name: "qemu-10.0.13",
    title: "QEMU 10.0 as Debian 13 has it now",
    packages: &["qemu-system-x86"],
    suite: Some("trixie"),
    keep: &[],
};
/// Hosts that run as guests are guests of this one, too: since 10.2 QEMU's translator does not lose interrupts of a CPU
/// that runs a guest itself.
const QEMU_11_1: Recipe = Recipe {
    name: "qemu-11.1",
    title: "QEMU 11.1",
    packages: &["qemu-system-x86"],
    suite: Some("trixie-backports"),
    keep: &[],
};
const KERNEL_6_1: Recipe = Recipe {
    name: "linux-6.1",
    title: "Linux 6.1 and its headers",
    packages: &["linux-image-cloud-amd64", "linux-headers-cloud-amd64"],
    suite: None,
    keep: &[
        "linux-image-",
        "linux-headers-",
        "linux-kbuild-",
        "linux-compiler-",
    ],
};
const KERNEL_6_12: Recipe = Recipe {
    name: "linux-6.12",
    title: "Linux 6.12 and its headers",
    packages: &[
        "linux-image-6.12-cloud-amd64",
        "linux-headers-6.12-cloud-amd64",
    ],
    suite: None,
    keep: &[
        "linux-image-",
        "linux-headers-",
        "linux-kbuild-",
        "linux-compiler-",
    ],
};
const BUSYBOX: Recipe = Recipe {
    name: "busybox",
    title: "busybox",
    packages: &["busybox-static"],
    suite: None,
    keep: &[],
};
/// With the libraries of Debian's that these two need, and nothing else of their closure.
const SERVERS: Recipe = Recipe {
    name: "servers",
    title: "redis and nginx",
    packages: &["redis-server", "nginx"],
    suite: None,
    keep: &["redis-", "nginx_", "lib", "zlib1g_"],
};
/// The user space of a host that runs as a guest; its QEMU and kernel are those above.
const NESTED_HOST: Recipe = Recipe {
    name: "nested-host",
    title: "a host's own programs",
    packages: &["iproute2", "busybox-static", "libgcc-s1"],
    suite: None,
    keep: &["iproute2_", "busybox-static_", "lib", "zlib1g_"],
};
/// What a server holds in its page cache: a database or two, run-times, compilers.
const FILES: Recipe = Recipe {
    name: "files",
    title: "1.5 GiB of real files for the guest's disks",
    packages: &[
        "openjdk-17-jre-headless",
        "postgresql-15",
        "mariadb-server",
        "g++",
        "git",
        "python3-scipy",
        "php8.2-cli",
        "nodejs",
    ],
    suite: None,
    keep: &[],
};

/// The releases of QEMU that the test bed runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qemu {
    /// Debian 12's.
    V7_2,
    /// Debian 12's from backports: 10.0.2, which builds machines otherwise than 10.0.13.
    V10_0,
    /// Debian 13's, as its updates have it: 10.0.13 or a later one.
    V10_0_13,
    /// Debian 13's from backports.
    V11_1,
}

impl Qemu {
    /// All.
    pub const ALL: [Self; 4] = [Self::V7_2, Self::V10_0, Self::V10_0_13, Self::V11_1];

    /// The release's number.
    pub fn version(self) -> &'static str {
        match self {
            Self::V7_2 => "7.2",
            Self::V10_0 => "10.0",
            Self::V10_0_13 => "10.0.13",
            Self::V11_1 => "11.1",
        }
    }

    /// The name of its folder of packages.
    pub fn folder(self) -> &'static str {
        self.recipe().name
    }

    fn recipe(self) -> &'static Recipe {
        match self {
            Self::V7_2 => &QEMU_7_2,
            Self::V10_0 => &QEMU_10_0,
            Self::V10_0_13 => &QEMU_10_0_13,
            Self::V11_1 => &QEMU_11_1,
        }
    }
}

/// The kernels that the test bed's Linux guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's.
    V6_1,
    /// Debian 13's, as Debian 12 carries it too.
    V6_12,
}

impl Kernel {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// The release's number.
    pub fn version(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::V6_1 => Self::V6_12,
            Self::V6_12 => Self::V6_1,
        }
    }

    fn recipe(self) -> &'static Recipe {
        match self {
            Self::V6_1 => &KERNEL_6_1,
            Self::V6_12 => &KERNEL_6_12,
        }
    }
}

/// Gets packages, on demand, each set once.
#[derive(Debug, Clone)]
pub struct Packages {
    layout: Layout,
}

impl Packages {
    /// For a work tree.
    pub fn new(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
        }
    }

    /// A runnable `qemu-system-x86_64`: a script that starts it from its own folder.
    pub fn qemu(&self, version: Qemu) -> Result<PathBuf> {
        let root = self.unpacked(version.recipe())?;
        roots::wrapper(&root, "usr/bin/qemu-system-x86_64", &roots::firmware(&root))
    }

    /// A runnable tool of QEMU 10.0: `qemu-img`, `qemu-storage-daemon`, `qemu-nbd`, `qemu-io`.
    pub fn qemu_tool(&self, name: &str) -> Result<PathBuf> {
        let root = self.unpacked(&QEMU_10_0)?;
        roots::wrapper(&root, &format!("usr/bin/{name}"), &[])
    }

    /// An unpacked kernel with its modules, headers and kbuild, made usable where it is.
    pub fn kernel(&self, version: Kernel) -> Result<PathBuf> {
        let root = self.unpacked(version.recipe())?;
        roots::relocate_headers(&root)?;
        Ok(root)
    }

    /// A static busybox.
    pub fn busybox(&self) -> Result<PathBuf> {
        let path = self.unpacked(&BUSYBOX)?.join("bin/busybox");
        if path.exists() {
            Ok(path)
        } else {
            Err(incomplete(&path))
        }
    }

    /// A folder with servers and their libraries.
    pub fn servers(&self) -> Result<PathBuf> {
        self.unpacked(&SERVERS)
    }

    /// The root of a host that runs as a guest.
    pub fn nested_host(&self) -> Result<PathBuf> {
        self.unpacked(&NESTED_HOST)
    }

    /// What a program of a folder of packages loads, its loader included: each by its path in that folder.
    pub fn libraries(&self, root: &Path, program: &str) -> Result<Vec<PathBuf>> {
        roots::libraries(root, program)
    }

    /// Some 1.5 GiB of files of unpacked packages.
    pub fn files(&self) -> Result<PathBuf> {
        self.unpacked(&FILES)
    }

    /// What else is unpacked for tests, with some 400 MiB of files in all.
    pub fn other_files(&self) -> Result<Vec<PathBuf>> {
        let recipes = [&QEMU_7_2, &QEMU_10_0, &QEMU_11_1, &SERVERS, &NESTED_HOST];
        recipes
            .into_iter()
            .map(|recipe| self.unpacked(recipe))
            .collect()
    }

    /// Everything.
    pub fn all(&self) -> Result<()> {
        self.for_tests()?;
        self.files().map(drop)
    }

    /// Everything but what only benches and the demo need.
    pub fn for_tests(&self) -> Result<()> {
        for version in Qemu::ALL {
            self.qemu(version)?;
        }
        self.qemu_tool("qemu-storage-daemon")?;
        for version in Kernel::ALL {
            self.kernel(version)?;
        }
        self.busybox()?;
        self.servers()?;
        self.nested_host()?;
        Ok(())
    }

    fn unpacked(&self, recipe: &Recipe) -> Result<PathBuf> {
        let root = self.layout.root(recipe.name);
        if roots::is_complete(&root, recipe) {
            return Ok(root);
        }
        let _lock = self.layout.lock("packages")?;
        if !roots::is_complete(&root, recipe) {
            self.unpack(recipe, &root).map_err(|error| match error {
                error @ (Error::Machine { .. } | Error::Interrupted) => error,
                error => Error::machine(
                    format!("Cannot get {}: {error}", recipe.title),
                    "Nothing of ours was tried",
                ),
            })?;
        }
        Ok(root)
    }

    fn unpack(&self, recipe: &Recipe, root: &Path) -> Result<()> {
        let apt = apt::Apt::prepare(&self.layout, recipe.release())?;
        let archives = apt.download(recipe)?;
        roots::unpack(root, recipe, &archives)
    }
}

/// A package does not hold what it should.
fn incomplete(path: &Path) -> Error {
    Error::machine(
        format!("{} is not there after unpacking", path.display()),
        "Remove target/testbed/roots and run again; if it stays, the package has changed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_of_the_release_of_its_suite() {
        let recipes = [&SERVERS, &QEMU_10_0, &QEMU_10_0_13, &QEMU_11_1];
        assert_eq!(
            recipes.map(Recipe::release),
            ["bookworm", "bookworm", "trixie", "trixie"]
        );
        let backports = [Some("bookworm-backports"), Some("trixie-backports")];
        assert_eq!(
            recipes.map(Recipe::preferred),
            [None, backports[0], None, backports[1]]
        );
    }
}
