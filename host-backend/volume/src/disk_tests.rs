//! Real disks: raw files, and qcow2 images made and exported by QEMU's own programs.

use super::*;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;
use transhume_machine::image_chain::Image;
use transhume_testing::{others_get_through, program};

/// Set in the process that is killed to see what becomes of its storage daemon.
const VICTIM_IMAGE: &str = "TRANSHUME_TEST_VICTIM_IMAGE";

/// Content that no two sectors share.
fn content(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(length);
    out
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error} (install qemu-utils)"));
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn qcow2_reader(path: &Path, settings: &Settings) -> qcow2::Qcow2Reader {
    let image = Image::open(path, Format::Qcow2, true, |_, _| Ok(())).unwrap();
    qcow2::Qcow2Reader::open(&image, settings).unwrap()
}

struct Bed {
    directory: tempfile::TempDir,
    run: tempfile::TempDir,
    settings: Settings,
}

impl Bed {
    fn new() -> Self {
        // Disks beside this program: /tmp may have no direct reads. Sockets in /tmp: their paths are
        // short.
        let program = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let run = tempfile::tempdir().unwrap();
        let settings = Settings::new(run.path());
        Self {
            directory,
            run,
            settings,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn raw(&self, content: &[u8]) -> PathBuf {
        let path = self.path("disk.raw");
        fs::write(&path, content).unwrap();
        path
    }

    fn qcow2(&self, content: &[u8]) -> PathBuf {
        let raw = self.raw(content);
        let path = self.path("disk, \"odd\" name.qcow2");
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                raw.to_str().unwrap(),
                path.to_str().unwrap(),
            ],
        );
        path
    }
}

/// Reads all kinds of ranges, by several threads at once, and compares.
fn compare(reader: &dyn Reader, expected: &[u8]) {
    assert_eq!(reader.size(), expected.len() as u64);
    let size = expected.len();
    thread::scope(|scope| {
        for worker in 0..4_usize {
            scope.spawn(move || {
                let mut aligned = AlignedBuffer::allocate(3 << 20).unwrap();
                for step in 0..40_usize {
                    let offset = (worker * 7919 + step * 104_729) * 512 % size;
                    let length = [512, 4096, 12_288, 4608, 3 << 20][step % 5].min(size - offset);
                    // Both at a page's start and off it.
                    let shift = if step % 2 == 0 { 0 } else { 512 };
                    let length = length.min(aligned.len() - shift);
                    let buffer = &mut aligned[shift..shift + length];
                    buffer.fill(0xaa);
                    reader.read_at(offset as u64, buffer).unwrap();
                    assert!(
                        buffer == &expected[offset..offset + length],
                        "{length} bytes at {offset} differ"
                    );
                }
            });
        }
    });
    let mut buffer = [0; 1024];
    assert!(matches!(
        reader.read_at(size as u64 - 512, &mut buffer),
        Err(Error::OutOfRange { .. })
    ));
    assert!(matches!(
        reader.read_at(256, &mut buffer),
        Err(Error::Unaligned { .. })
    ));
    reader.read_at(size as u64, &mut []).unwrap();
}

#[test]
fn a_raw_file_is_read_as_it_is() {
    let bed = Bed::new();
    let expected = content(5 << 20);
    let reader = open(&bed.raw(&expected), Format::Raw, &bed.settings).unwrap();
    compare(&*reader, &expected);
}

#[test]
fn the_end_of_an_odd_file_is_padded_to_a_sector() {
    let bed = Bed::new();
    for length in [1, 511, 4096 + 512, (1 << 20) + 1234] {
        let mut expected = content(length);
        let reader = open(&bed.raw(&expected), Format::Raw, &bed.settings).unwrap();
        expected.resize(length.next_multiple_of(512), 0);
        assert_eq!(reader.size(), expected.len() as u64);
        let mut buffer = AlignedBuffer::allocate(expected.len()).unwrap();
        buffer.fill(0xaa);
        reader.read_at(0, &mut buffer).unwrap();
        assert!(*buffer == expected[..], "{length}");
    }
}

#[test]
fn a_file_that_shrank_is_an_error_and_not_zeros() {
    let bed = Bed::new();
    let path = bed.raw(&content(1 << 20));
    let reader = open(&path, Format::Raw, &bed.settings).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8192)
        .unwrap();
    let mut buffer = AlignedBuffer::allocate(16_384).unwrap();
    reader.read_at(0, &mut buffer[..8192]).unwrap();
    assert!(matches!(
        reader.read_at(0, &mut buffer),
        Err(Error::Truncated { offset: 8192, .. })
    ));
}

#[test]
fn what_another_host_wrote_is_seen_at_once() {
    let bed = Bed::new();
    let path = bed.raw(&content(1 << 20));
    let reader = open(&path, Format::Raw, &bed.settings).unwrap();
    let mut buffer = AlignedBuffer::allocate(4096).unwrap();
    reader.read_at(4096, &mut buffer).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    reader.read_at(4096, &mut buffer).unwrap();
    assert!(buffer.iter().all(|&byte| byte == 0x55));
}

#[test]
fn what_is_no_disk_is_refused() {
    let bed = Bed::new();
    for format in [Format::Raw, Format::Qcow2] {
        assert!(matches!(
            open(&bed.path("nothing"), format, &bed.settings),
            Err(Error::Open { .. })
        ));
        assert!(matches!(
            open(bed.directory.path(), format, &bed.settings),
            Err(Error::Kind(_))
        ));
    }
}

#[test]
fn a_qcow2_image_is_read_as_the_guest_sees_it() {
    let bed = Bed::new();
    let mut expected = content(6 << 20);
    // Clusters that the image does not hold.
    expected[1 << 20..2 << 20].fill(0);
    let reader = open(&bed.qcow2(&expected), Format::Qcow2, &bed.settings).unwrap();
    compare(&*reader, &expected);
    assert_eq!(
        fs::read_dir(bed.run.path()).unwrap().count(),
        0,
        "the socket's directory is gone"
    );
}

#[test]
fn an_image_is_read_with_its_backing_file() {
    let bed = Bed::new();
    let expected = content(2 << 20);
    let base = bed.qcow2(&expected);
    let overlay = bed.path("overlay.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            base.to_str().unwrap(),
            overlay.to_str().unwrap(),
        ],
    );
    let mut expected = expected;
    expected[4096..8192].fill(0x77);
    run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 0x77 4096 4096",
            overlay.to_str().unwrap(),
        ],
    );
    let reader = open(&overlay, Format::Qcow2, &bed.settings).unwrap();
    compare(&*reader, &expected);
}

#[test]
fn an_image_in_use_by_another_process_is_read() {
    let bed = Bed::new();
    let expected = content(1 << 20);
    let path = bed.qcow2(&expected);
    // Holds the image's write lock until its standard input ends.
    let mut writer = Command::new("qemu-io")
        .args(["-f", "qcow2", path.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = writer.stdin.take().unwrap();
    stdin.write_all(b"write -P 0x33 0 65536\nflush\n").unwrap();
    let mut said = BufReader::new(writer.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("wrote 65536")));
    let second = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "read 0 512", path.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!second.status.success(), "the image is not locked");

    let reader = open(&path, Format::Qcow2, &bed.settings).unwrap();
    let mut buffer = AlignedBuffer::allocate(128 * 1024).unwrap();
    reader.read_at(0, &mut buffer).unwrap();
    assert!(buffer[65536..] == expected[65536..128 * 1024]);
    drop(stdin);
    assert!(writer.wait().unwrap().success());
}

#[test]
fn a_broken_image_is_refused_in_the_storage_daemon_s_words() {
    let bed = Bed::new();
    let path = bed.raw(&content(1 << 16));
    match open(&path, Format::Qcow2, &bed.settings).err().unwrap() {
        Error::Export { said, .. } => assert!(said.contains("qcow2"), "{said}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_storage_daemon_is_told() {
    let mut bed = Bed::new();
    let path = bed.qcow2(&content(1 << 16));
    bed.settings.storage_daemon = bed.path("no-such-program");
    assert!(matches!(
        open(&path, Format::Qcow2, &bed.settings),
        Err(Error::Start { .. })
    ));
    bed.settings.run_directory = bed.path("no-such-directory");
    assert!(matches!(
        open(&path, Format::Qcow2, &bed.settings),
        Err(Error::Socket { .. })
    ));
}

fn is_running(pid: u32) -> bool {
    // A process that nobody has waited for yet stays as a zombie, which runs no more.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}

fn wait_for_end(pid: u32) {
    let since = Instant::now();
    while is_running(pid) {
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "process {pid} runs on"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_storage_daemon_ends_with_its_reader() {
    let bed = Bed::new();
    let path = bed.qcow2(&content(1 << 16));
    // Opened by a thread that is gone when the reader is used, as a pool's thread may be.
    let (reader, settings) = (path, bed.settings.clone());
    let reader = thread::spawn(move || qcow2_reader(&reader, &settings))
        .join()
        .unwrap();
    let pid = reader.pid();
    assert!(is_running(pid));
    reader.read_at(0, &mut [0; 512]).unwrap();
    drop(reader);
    wait_for_end(pid);
}

#[test]
fn the_storage_daemon_may_read_and_nothing_else() {
    let mut bed = Bed::new();
    let nobody = User::find("nobody").expect("a user without rights");
    bed.settings.user = nobody.filter(|_| others_get_through(&program("qemu-storage-daemon")));
    let bytes = content(1 << 20);
    let path = bed.qcow2(&bytes);
    // For its owner's eyes only, as disks are.
    run("chmod", &["600", path.to_str().unwrap()]);
    let reader = qcow2_reader(&path, &bed.settings);
    let mut buffer = vec![0; 1 << 16];
    reader.read_at(0, &mut buffer).unwrap();
    assert!(buffer == bytes[..buffer.len()]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", reader.pid())).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(field("NoNewPrivs:"), "1");
    if let Some(user) = &bed.settings.user
        && nix::unistd::geteuid().is_root()
    {
        let uid = nix::unistd::User::from_name(user.name())
            .unwrap()
            .unwrap()
            .uid;
        assert_eq!(field("Uid:"), uid.to_string());
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(field(set), "0000000000000004", "{set}");
        }
    }
}

#[test]
fn reads_fail_when_the_storage_daemon_is_killed() {
    let bed = Bed::new();
    let path = bed.qcow2(&content(1 << 20));
    let reader = qcow2_reader(&path, &bed.settings);
    let pid = reader.pid();
    run("kill", &["-9", &pid.to_string()]);
    wait_for_end(pid);
    let mut buffer = [0; 512];
    for _ in 0..=bed.settings.connections {
        assert!(matches!(
            reader.read_at(0, &mut buffer),
            Err(Error::Export { .. })
        ));
    }
}

/// Not a test of its own: the process that [`the_storage_daemon_ends_with_our_process`] kills.
#[test]
fn victim() {
    let Some(image) = std::env::var_os(VICTIM_IMAGE) else {
        return;
    };
    let run = tempfile::tempdir().unwrap();
    let settings = Settings::new(run.path());
    let reader = qcow2_reader(Path::new(&image), &settings);
    drop(run);
    println!("\nstorage daemon {}", reader.pid());
    loop {
        thread::park();
    }
}

#[test]
fn the_storage_daemon_ends_with_our_process() {
    let bed = Bed::new();
    let path = bed.qcow2(&content(1 << 16));
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "disk_tests::victim", "--nocapture"])
        .env(VICTIM_IMAGE, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid: u32 = BufReader::new(victim.stdout.take().unwrap())
        .lines()
        .find_map(|line| {
            line.unwrap()
                .strip_prefix("storage daemon ")
                .map(|pid| pid.parse().unwrap())
        })
        .unwrap();
    assert!(is_running(pid));
    victim.kill().unwrap();
    victim.wait().unwrap();
    wait_for_end(pid);
}
