//! The test bed's Linux guest: Debian's kernel, busybox, our module, agent and workload, and disks with
//! real files on them.

pub mod build;
mod cpio;
pub mod disk;
mod image;
mod modules;
mod nested;

pub use image::{Boot, boot, boot_with_servers};
pub use nested::{Contents, NestedHost, nested_host};
