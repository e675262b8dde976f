use super::super::OpenedFiles;
use super::*;
use std::os::unix::fs::symlink;
use transhume_testing::qcow2_header as header;

/// A host whose operator named one directory.
struct Host {
    folder: tempfile::TempDir,
    limits: Limits,
    settings: LaunchSettings,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("vms")).expect("a folder");
        std::fs::write(folder.path().join("secret"), "root").expect("a file");
        Self {
            limits: Limits {
                paths: vec![folder.path().join("vms")],
                bridges: vec!["br0".to_owned()],
                taps: vec!["tap0".to_owned()],
                accelerators: vec![Accelerator::Kvm],
                place: "[incoming] of FILE on hostb".to_owned(),
                ..Limits::default()
            },
            settings: LaunchSettings {
                host: "hostb".to_owned(),
                run_directory: folder.path().join("run"),
                log_directory: folder.path().join("log"),
                qemu: "/usr/bin/qemu-system-x86_64".into(),
                user: None,
            },
            folder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("written");
    }

    /// What is said of a definition with these lines.
    fn said(&self, head: &str, tables: &str) -> Vec<String> {
        let accelerator = if head.contains("accelerator") {
            ""
        } else {
            "accelerator = \"kvm\"\n"
        };
        let text = format!(
            "name = \"web1\"\nmachine = \"q35\"\nmemory = \"64MiB\"\nvcpus = 1\n{accelerator}{head}\n{tables}"
        );
        let definition = Definition::parse(&text).expect("a definition");
        let refusals = self.limits.check(&definition, &self.settings);
        refusals.iter().map(ToString::to_string).collect()
    }

    fn disk(&self, format: &str, path: &Path) -> Vec<String> {
        let path = path.display();
        self.said(
            "",
            &format!("[[disk]]\nid = \"root\"\nformat = \"{format}\"\npath = \"{path}\"\n"),
        )
    }

    fn allowed(&self, path: &str) {
        assert_eq!(self.disk("raw", &self.path(path)), [""; 0], "{path}");
    }

    fn refused(&self, format: &str, path: &str, words: &[&str]) {
        let said = self.disk(format, &self.path(path));
        assert_eq!(said.len(), 1, "{path}: {said:?}");
        for word in words {
            assert!(said[0].contains(word), "{path}: {said:?}");
        }
    }
}

#[test]
fn paths_are_judged_by_where_they_lead() {
    let host = Host::new();
    let link = |to: &str, name: &str| symlink(to, host.path(name)).expect("a link");
    host.write("vms/web1.raw", b"");
    link("web1.raw", "vms/within");
    link("vms", "by-another-name");
    link("../secret", "vms/out");
    link("..", "vms/up");
    link("../not-there-yet", "vms/dangling");
    link("itself", "vms/itself");
    host.allowed("vms/web1.raw");
    host.allowed("vms/within");
    host.allowed("by-another-name/web1.raw");
    host.allowed("vms/../vms/web1.raw");
    // That it is not there is for the disks' own check to say.
    host.allowed("vms/none/none.raw");
    for path in [
        "secret",
        "absent",
        "vms",
        "vms-other/web1.raw",
        "vms/../secret",
        "vms/none/../../secret",
        "vms/none/..",
        "vms/out",
        "vms/up/secret",
        "vms/up/absent",
        "vms/dangling",
        "vms/dangling/none",
        "vms/itself",
    ] {
        let words = [
            "disk root on hostb",
            path,
            "below none of `paths`",
            "[incoming] of FILE on hostb",
        ];
        host.refused("raw", path, &words);
    }
    // Whether there is such a file is not said; what is written in a link is, where the other host may look anyway.
    let said = |path: &str, link: &str| {
        let said = host.disk("raw", &host.path(path)).concat();
        said.replace(path, "").replace(link, "")
    };
    assert_eq!(said("secret", ""), said("absent", ""));
    assert_eq!(
        said("vms/out", "../secret"),
        said("vms/dangling", "../not-there-yet")
    );
    host.refused(
        "raw",
        "vms/out",
        &["is a link to ../secret,", "Whoever may write below them"],
    );
    host.refused(
        "raw",
        "vms/up/secret",
        &["goes by the link", "vms/up to ..,"],
    );
    symlink("secret", host.path("elsewhere")).expect("a link");
    assert!(!said("elsewhere", "").contains("link"));
}

#[test]
fn a_directory_may_be_a_link_or_absent() {
    let mut host = Host::new();
    symlink("vms", host.path("link")).expect("a link");
    host.write("vms/web1.raw", b"");
    host.limits.paths = vec![host.path("none"), host.path("link")];
    host.allowed("vms/web1.raw");
    host.allowed("none/web1.raw");
    host.limits.paths.clear();
    host.refused("raw", "vms/web1.raw", &["(none)"]);
}

#[test]
fn devices_are_found_by_the_links_that_udev_makes() {
    assert!(is_below(Path::new("/dev/null"), Path::new("/dev")));
    // It leads to /proc.
    assert!(!is_below(Path::new("/dev/fd/0"), Path::new("/dev/fd")));
    assert!(!is_below(
        Path::new("/dev/disk/../null"),
        Path::new("/dev/disk")
    ));
    assert!(!is_below(Path::new("/dev/null"), Path::new("/dev/disk")));
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let link = folder.path().join("link");
    symlink("/dev/null", &link).expect("a link");
    assert!(!is_below(&link, folder.path()));
}

#[test]
fn an_image_brings_the_files_that_it_names() {
    let host = Host::new();
    host.write("vms/base.qcow2", &header("", None, 0));
    host.write("vms/good.qcow2", &header("base.qcow2", Some("qcow2"), 0));
    assert_eq!(host.disk("qcow2", &host.path("vms/good.qcow2")), [""; 0]);
    host.write("vms/out.qcow2", &header("../secret", Some("raw"), 0));
    host.write("vms/deep.qcow2", &header("out.qcow2", Some("qcow2"), 0));
    for image in ["vms/out.qcow2", "vms/deep.qcow2"] {
        host.refused("qcow2", image, &["its backing file", "secret", "`paths`"]);
    }
    host.write("vms/guess.qcow2", &header("base.qcow2", None, 0));
    host.refused("qcow2", "vms/guess.qcow2", &["qemu-img rebase"]);
    // A raw disk is what it is, whatever its guest writes to its first sector.
    host.allowed("vms/out.qcow2");
}

#[test]
fn a_file_that_was_swapped_after_the_look_is_not_handed_over() {
    let host = Host::new();
    host.write("vms/web1.raw", b"");
    host.write("vms/base", &[0; 4096]);
    let disk = |format: &str, name: &str| {
        let text = format!(
            "name = \"web1\"\nmachine = \"q35\"\nmemory = \"64MiB\"\nvcpus = 1\n[[disk]]\nid = \"root\"\n\
             format = \"{format}\"\npath = \"{}\"\n",
            host.path(name).display()
        );
        let definition = Definition::parse(&text).expect("a definition");
        OpenedFiles::open(&definition, &host.settings, Some(&host.limits)).map(drop)
    };
    disk("raw", "vms/web1.raw").expect("it lies there");
    std::fs::remove_file(host.path("vms/web1.raw")).expect("it was there");
    symlink("../secret", host.path("vms/web1.raw")).expect("a link");
    let said = disk("raw", "vms/web1.raw")
        .expect_err("it leads out")
        .to_string();
    assert!(said.contains("`paths`"), "{said}");
    host.write("vms/top", &header("base", Some("raw"), 0));
    disk("qcow2", "vms/top").expect("all of it lies there");
    host.write("vms/top", &header("../secret", Some("raw"), 0));
    let said = disk("qcow2", "vms/top")
        .expect_err("it is based on more")
        .to_string();
    assert!(said.contains("`paths`"), "{said}");
}

#[test]
fn every_reason_is_named_at_once() {
    let mut host = Host::new();
    let head = "qemu = \"/opt/qemu\"\naccelerator = \"tcg\"\n";
    let tables = "[boot]\nkernel = \"/boot/vmlinuz\"\ninitrd = \"/boot/initrd\"\n\
                  [[disk]]\nid = \"root\"\nformat = \"raw\"\npath = \"/etc/shadow\"\n\
                  [[nic]]\nmac = \"52:54:00:00:00:01\"\nbackend = \"bridge\"\nbridge = \"br1\"\n\
                  [[nic]]\nmac = \"52:54:00:00:00:02\"\nbackend = \"tap\"\nifname = \"tap1\"\n\
                  [[nic]]\nmac = \"52:54:00:00:00:03\"\nbackend = \"user\"\n";
    let said = host.said(head, tables);
    let expected = [
        "`qemu-binaries`",
        "`accelerators`",
        "bridge br1",
        "tap device tap1",
        "user-network = true",
        "/etc/shadow",
        "/boot/vmlinuz",
        "/boot/initrd",
    ];
    assert_eq!(said.len(), expected.len(), "{said:?}");
    for (said, word) in said.iter().zip(expected) {
        assert!(
            said.contains(word) && said.contains("[incoming] of FILE on hostb"),
            "{said}"
        );
    }
    host.limits = Limits {
        paths: vec!["/boot".into(), "/etc".into()],
        bridges: vec!["br1".to_owned()],
        taps: vec!["tap1".to_owned()],
        user_network: true,
        qemu_binaries: vec!["/opt/qemu".into()],
        accelerators: vec![Accelerator::Kvm, Accelerator::Tcg],
        place: String::new(),
    };
    assert_eq!(host.said(head, tables), [""; 0]);
    // The host's own QEMU may be named.
    host.limits.qemu_binaries.clear();
    assert_eq!(
        host.said("qemu = \"/usr/bin/qemu-system-x86_64\"\n", ""),
        [""; 0]
    );
}

#[test]
fn a_disk_counts_by_its_path_here() {
    let host = Host::new();
    let path = host.path("vms/web1.raw");
    let disk = format!(
        "[[disk]]\nid = \"root\"\nformat = \"raw\"\npath = \"/etc/shadow\"\n[disk.on]\nhostb = \"{}\"\n",
        path.display()
    );
    assert_eq!(host.said("", &disk), [""; 0]);
    let disk = disk
        .replace("/etc/shadow", "/srv/a")
        .replace(&path.display().to_string(), "/etc/shadow");
    assert_eq!(host.said("", &disk).len(), 1);
}
