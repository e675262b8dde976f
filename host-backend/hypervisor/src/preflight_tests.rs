use super::*;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// A host with a QEMU that says what `script` says.
struct Host {
    folder: tempfile::TempDir,
    settings: LaunchSettings,
}

const QEMU_7_2: &str = r#"case "$1" in
--version) echo "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"; echo Copyright;;
*) echo "Supported machines are:"; echo "pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)"
   echo "pc-i440fx-7.2        Standard PC (default)";;
esac"#;

fn host(script: &str) -> Host {
    // Not in /tmp, which may have no direct I/O.
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder");
    let qemu = folder.path().join("qemu");
    std::fs::write(&qemu, format!("#!/bin/sh\n{script}\n")).expect("a QEMU");
    std::fs::set_permissions(&qemu, PermissionsExt::from_mode(0o755)).expect("executable");
    let settings = LaunchSettings {
        host: "hostb".to_owned(),
        run_directory: folder.path().join("run"),
        log_directory: folder.path().join("log"),
        qemu,
        user: None,
    };
    Host { folder, settings }
}

impl Host {
    fn file(&self, name: &str, length: u64) -> PathBuf {
        let path = self.folder.path().join(name);
        File::create(&path)
            .and_then(|file| file.set_len(length))
            .expect("a file");
        path
    }
}

fn offer(more: &str, bytes: u64) -> Offer {
    Offer {
        definition: format!(
            "name = \"web1\"\nmachine = \"pc-q35-7.2\"\naccelerator = \"tcg\"\nmemory = \"64MiB\"\nvcpus = 1\n{more}"
        ),
        qemu: [7, 2, 5],
        disks: vec![OfferedDisk {
            id: "root".to_owned(),
            size: bytes,
        }],
        ..transhume_testing::some_offer()
    }
}

fn raw(path: &Path) -> String {
    format!("[[disk]]\nid = \"root\"\nformat = \"raw\"\npath = {path:?}\n")
}

async fn refusals(offer: &Offer, host: &Host) -> Vec<String> {
    let refusals = check(offer, &host.settings).await.expect_err("a refusal");
    refusals.iter().map(ToString::to_string).collect()
}

async fn refusal(offer: &Offer, host: &Host) -> String {
    let mut all = refusals(offer, host).await;
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

#[tokio::test]
async fn a_host_that_has_everything_takes_the_vm() {
    let host = host(QEMU_7_2);
    let offer = offer(&raw(&host.file("disk", 1 << 20)), 1 << 20);
    let definition = check(&offer, &host.settings).await.expect("it can come");
    assert_eq!(definition.machine, "pc-q35-7.2");
}

#[tokio::test]
async fn refuses_a_disk_that_is_not_the_same() {
    let host = host(QEMU_7_2);
    let disk = host.file("disk", 1 << 20);
    let said = refusal(&offer(&raw(&disk), 2 << 20), &host).await;
    assert!(
        said.contains("2097152 bytes") && said.contains("1048576"),
        "{said}"
    );
    let said = refusal(&offer(&raw(Path::new("/nowhere/disk")), 1 << 20), &host).await;
    assert!(
        said.contains("cannot open /nowhere/disk") && said.contains("[disk.on]"),
        "{said}"
    );
    let said = refusal(&offer(&raw(host.folder.path()), 1 << 20), &host).await;
    assert!(said.contains("neither a file nor a block device"), "{said}");
    let elsewhere = raw(&disk).replace("path", "on = { hosta = \"/a\" } #");
    let said = refusal(&offer(&elsewhere, 1 << 20), &host).await;
    assert!(said.contains("no path on host hostb"), "{said}");
}

#[tokio::test]
async fn reads_the_size_of_qcow2() {
    let host = host(QEMU_7_2);
    let disk = host.file("disk", 65536);
    let definition = raw(&disk).replace("\"raw\"", "\"qcow2\"");
    let said = refusal(&offer(&definition, 1 << 30), &host).await;
    assert!(said.contains("does not start as qcow2"), "{said}");

    let mut header = [0; 32];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[24..].copy_from_slice(&(1_u64 << 30).to_be_bytes());
    let mut file = OpenOptions::new()
        .write(true)
        .open(&disk)
        .expect("the file");
    file.write_all(&header).expect("a header");
    assert!(
        check(&offer(&definition, 1 << 30), &host.settings)
            .await
            .is_ok()
    );
    let said = refusal(&offer(&definition, 1 << 20), &host).await;
    assert!(said.contains("1073741824"), "{said}");
}

#[tokio::test]
async fn refuses_an_older_qemu_and_an_unknown_machine() {
    let host = host(QEMU_7_2);
    let disk = raw(&host.file("disk", 512));
    let mut newer = offer(&disk, 512);
    newer.qemu = [10, 0, 2];
    let said = refusal(&newer, &host).await;
    assert!(
        said.contains("QEMU is 7.2.22 on hostb, and the VM runs by 10.0.2"),
        "{said}"
    );
    let mut other = offer(&disk, 512);
    other.definition = other.definition.replace("q35-7.2", "q35-10.0");
    let said = refusal(&other, &host).await;
    assert!(said.contains("knows no machine type pc-q35-10.0"), "{said}");
}

#[tokio::test]
async fn refuses_without_qemu_by_its_name() {
    let mut host = host(QEMU_7_2);
    let disk = raw(&host.file("disk", 512));
    host.settings.qemu = "/nowhere/qemu".into();
    let said = refusal(&offer(&disk, 512), &host).await;
    assert!(
        said.contains("cannot run QEMU (/nowhere/qemu) on hostb"),
        "{said}"
    );
    let other = self::host("echo GNU Emacs 28.2");
    let said = refusals(&offer(&disk, 512), &other).await.join("\n");
    assert!(said.contains("tells no version"), "{said}");
}

#[tokio::test]
async fn tells_everything_that_is_wrong_at_once() {
    let host = host(QEMU_7_2);
    let more = "boot = { kernel = \"/nowhere/vmlinuz\" }\n\
        nic = [{ mac = \"52:54:00:12:34:56\", backend = \"tap\", ifname = \"nosuchtap\" },\n\
        { mac = \"52:54:00:12:34:57\", backend = \"bridge\", bridge = \"nosuchbr\" }]\n";
    let mut offer = offer(&format!("{more}{}", raw(Path::new("/nowhere/disk"))), 512);
    offer.definition = offer.definition.replace("64MiB", "16TiB");
    let said = refusals(&offer, &host).await;
    for word in [
        "/nowhere/disk",
        "/nowhere/vmlinuz",
        "nosuchtap",
        "ip link add nosuchbr",
        "MiB of memory available",
    ] {
        assert!(
            said.iter().any(|one| one.contains(word)),
            "{word}: {said:#?}"
        );
    }
    assert_eq!(said.len(), 5, "{said:#?}");
}

#[tokio::test]
async fn refuses_a_name_in_use_and_a_senseless_definition() {
    let host = host(QEMU_7_2);
    let good = offer(&raw(&host.file("disk", 512)), 512);
    let socket = host.settings.files("web1").qmp();
    std::fs::create_dir_all(socket.parent().expect("a folder")).expect("a folder");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let said = refusal(&good, &host).await;
    assert!(said.contains("runs on hostb already"), "{said}");
    let mut bad = good;
    bad.definition.push_str("colour = \"blue\"");
    let said = refusal(&bad, &host).await;
    assert!(said.contains("unknown field `colour`"), "{said}");
}

#[test]
fn refuses_a_lesser_processor() {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let seen = words("fpu sse2 avx512f");
    assert_eq!(check_cpu(&seen, &words("avx512f sse2 fpu more")), None);
    let said = check_cpu(&seen, &words("fpu sse2"))
        .expect("a refusal")
        .to_string();
    assert!(said.contains("lacks 1 of its features (avx512f)"), "{said}");
}

#[test]
fn weighs_memory() {
    let meminfo = "MemTotal:  1000000 kB\nMemAvailable:  200000 kB\n";
    assert_eq!(
        check_memory(Size::from_bytes(100 << 20), meminfo, "hostb"),
        None
    );
    let said = check_memory(Size::from_bytes(256 << 20), meminfo, "hostb").expect("a refusal");
    assert!(
        said.to_string()
            .contains("hostb has 195 MiB of memory available, and the VM needs 320 MiB"),
        "{said}"
    );
}
