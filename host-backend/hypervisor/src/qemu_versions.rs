//! Which builds of QEMU were tried, and what one of them is known to do.
//!
//! | what | from | seen in |
//! |---|---|---|
//! | The source of a post-copy can run the VM again until the destination has loaded the devices. | 10.2 | 11.1.3 |
//! | It cannot once it has written them. | | 7.2.22, 10.0.2, 10.0.13 |
//! | Under the translator no written page is missed (`03bfc2188f`, "physmem: Fix migration dirty bitmap coherency with TCG memory access"). | 9.0 | 10.0.2 |
//! | One is again, in one of some 50 moves of a guest that writes 60 MB/s: written soon after it was sent, it was neither sent again nor named for post-copy. Not with a guest that has each translation looked up anew before the store (278 moves). | | 11.1.3 |

use super::qmp::Version;

/// The newest release that was tried: major and minor.
const NEWEST_TRIED: (u32, u32) = (11, 1);
/// QEMUs that are asked how long a running VM's queues are, major and minor version: those in which that was tried. 11.1.3
/// aborts at `x-query-virtio-status`, and no VM is to be lost by a question.
const TELLS_VIRTQUEUES: [(u32, u32); 2] = [(7, 2), (10, 0)];
/// QEMU has `switchover-ack` from here on.
const SWITCHOVER_ACK_SINCE: (u32, u32) = (8, 1);
/// From here on the source of a post-copy keeps the VM until its devices are loaded (`postcopy-device`).
const KEEPS_UNTIL_LOADED: (u32, u32) = (10, 2);
/// From the one on, and up to the other, the translator notes each page that a guest writes.
const TRANSLATOR_NOTES_WRITES: [(u32, u32); 2] = [(9, 0), (10, 0)];
/// Where memory is no multiple of this, earlier ones do, too: `include/exec/ram_addr.h` of QEMU 7.2,
/// `cpu_physical_memory_sync_dirty_bitmap`. In bytes.
const WORD_OF_BITMAP: u64 = 64 * 4096;

/// A build of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// Its version.
    pub version: Version,
    /// What its distribution says of it, as in `Debian 1:10.0.2+ds-2`; may be empty.
    pub package: String,
}

impl std::fmt::Display for Build {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.version)?;
        if !self.package.is_empty() {
            write!(formatter, " ({})", self.package)?;
        }
        Ok(())
    }
}

impl Version {
    fn release(self) -> (u32, u32) {
        (self.major, self.minor)
    }

    /// Whether no release as new as this was tried.
    pub fn is_untried(self) -> bool {
        self.release() > NEWEST_TRIED
    }

    /// Whether it can be asked how long a running VM's virtqueues are.
    pub fn tells_virtqueues(self) -> bool {
        TELLS_VIRTQUEUES.contains(&self.release())
    }

    /// Whether it can hold the switch-over back until the destination lets it (`switchover-ack`).
    pub fn has_switchover_ack(self) -> bool {
        self.release() >= SWITCHOVER_ACK_SINCE
    }

    /// Whether the channels (`multifd`) of a QEMU of that version are known to be in an order that can be told; see
    /// `docs/decisions/0013-multifd.md`.
    pub fn tells_channels_order(self) -> bool {
        let known = (8, 1)..(10, 0);
        !self.is_untried() && !known.contains(&self.release())
    }

    /// Whether the source of a post-copy keeps the VM until the destination has loaded its devices, so that a
    /// VM that cannot be loaded goes back.
    pub fn keeps_until_loaded(self) -> bool {
        self.release() >= KEEPS_UNTIL_LOADED
    }

    /// Whether a VM that runs by the translator, with so many bytes of memory, moves with all that it writes.
    pub fn translator_notes_writes(self, memory: u64) -> bool {
        let [from, to] = TRANSLATOR_NOTES_WRITES;
        let release = self.release();
        release <= to && (release >= from || !memory.is_multiple_of(WORD_OF_BITMAP))
    }
}

impl Build {
    /// Why a VM must not come in post-copy from this build to the one of `host`, if it must not, for people.
    pub fn no_post_copy_to(&self, there: &Self, host: &str) -> Option<String> {
        let (major, minor) = NEWEST_TRIED;
        for build in [self, there] {
            if build.version.is_untried() {
                return Some(format!(
                    "QEMU {} is newer than any whose post-copy was tried with Transhume ({major}.{minor})",
                    build.version
                ));
            }
        }
        // What does not load is lost there.
        (!self.version.keeps_until_loaded() && self != there).then(|| {
            format!(
                "it is not known whether QEMU {there} on {host} loads the devices of QEMU {self}, and in post-copy a VM \
                 that is not loaded is lost; with the same build on both hosts, or from QEMU 10.2 on, it could"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(major: u32, minor: u32, micro: u32, package: &str) -> Build {
        Build {
            version: Version {
                major,
                minor,
                micro,
            },
            package: package.to_owned(),
        }
    }

    #[test]
    fn post_copy_is_for_builds_that_load_each_other_or_give_the_vm_back() {
        let old = build(10, 0, 2, "Debian 1:10.0.2+ds-2");
        let patched = build(10, 0, 2, "Debian 1:10.0.2+ds-3");
        let new = build(11, 1, 3, "Debian 1:11.1.3");
        let next = build(11, 2, 0, "");
        let refused = |from: &Build, to: &Build| from.no_post_copy_to(to, "hostb");
        assert_eq!(refused(&old, &old), None);
        assert_eq!(refused(&new, &new), None);
        assert_eq!(refused(&new, &build(11, 1, 4, "")), None);
        for to in [&patched, &new] {
            assert!(refused(&old, to).is_some_and(|why| why.contains("not loaded is lost")));
        }
        for (from, to) in [(&new, &next), (&next, &next)] {
            assert!(refused(from, to).is_some_and(|why| why.contains("11.2.0 is newer")));
        }
    }

    #[test]
    fn a_translator_misses_writes_before_9_0_where_whole_words_are_taken_and_after_10_0() {
        let (old, new) = (build(7, 2, 22, "").version, build(9, 0, 0, "").version);
        let (good, bad) = (build(10, 0, 13, "").version, build(10, 1, 0, "").version);
        assert!(good.translator_notes_writes(128 << 20));
        assert!(!bad.translator_notes_writes((128 << 20) + 8192));
        assert!(!old.translator_notes_writes(128 << 20));
        assert!(old.translator_notes_writes((128 << 20) + 8192));
        assert!(new.translator_notes_writes(128 << 20));
    }
}
