use super::*;

const WEB1: &str = r#"
name = "web1"
machine = "q35"
memory = "2GiB"
vcpus = 2

[boot]
kernel = "/srv/vms/vmlinuz"
initrd = "/srv/vms/initrd"
append = "console=ttyS0 quiet"

[[disk]]
id = "root"
format = "raw"
path = "/srv/vms/web1.raw"
[disk.on]
hostb = "/mnt/san/web1.raw"

[[disk]]
id = "data"
format = "qcow2"
path = "/srv/vms/data.qcow2"
read-only = true

[[nic]]
mac = "52:54:00:12:34:56"
backend = "tap"
ifname = "tap0"

[agent]
port = "serial"

[console]
serial = true
vnc = "unix"
"#;

fn minimal(more: &str) -> String {
    format!("name = \"a\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n{more}")
}

fn complaint(text: &str) -> String {
    Definition::parse(text).expect_err(text).to_string()
}

#[test]
fn reads_every_field() {
    let web1 = Definition::parse(WEB1).expect("a good definition");
    assert_eq!(web1.accelerator, Accelerator::Kvm);
    assert_eq!(web1.cpu_model(), "host");
    assert_eq!(web1.memory.bytes(), 2 << 30);
    assert_eq!(web1.disks[1].format, Format::Qcow2);
    assert!(web1.disks[1].read_only && !web1.disks[0].read_only);
    assert_eq!(web1.nics[0].backend, Backend::Tap);
    assert_eq!(web1.console.vnc, Some(Vnc::Unix));
    assert_eq!(
        web1.disk_path(&web1.disks[0], "hosta"),
        Path::new("/srv/vms/web1.raw")
    );
    assert_eq!(
        web1.disk_path(&web1.disks[0], "hostb"),
        Path::new("/mnt/san/web1.raw")
    );
}

#[test]
fn travels_as_toml() {
    for text in [WEB1.to_owned(), minimal("accelerator = \"tcg\"")] {
        let definition = Definition::parse(&text).expect("a good definition");
        let again = Definition::parse(&definition.to_toml().expect("TOML")).expect("our own TOML");
        assert_eq!(definition, again);
    }
}

#[test]
fn has_defaults() {
    let definition = Definition::parse(&minimal("accelerator = \"tcg\"")).expect("minimal");
    assert_eq!(definition.cpu_model(), "qemu64");
    assert_eq!(definition.agent.port, AgentPort::Serial);
    assert!(definition.console.serial);
    assert_eq!(definition.console.vnc, None);
}

#[test]
fn refuses_unknown_fields_by_name() {
    for (text, name) in [
        (minimal("memroy = \"1GiB\""), "memroy"),
        (minimal("[agent]\nprot = \"serial\""), "prot"),
        (minimal("[console]\nvga = true"), "vga"),
        (minimal("[boot]\nkernel = \"/k\"\ninit = \"/i\""), "init"),
        (
            minimal("[[disk]]\nid = \"a\"\nformat = \"raw\"\npath = \"/a\"\nreadonly = true"),
            "readonly",
        ),
        (
            minimal("[[nic]]\nmac = \"52:54:00:12:34:56\"\nbackend = \"user\"\nmodel = \"e1000\""),
            "model",
        ),
    ] {
        let said = complaint(&text);
        assert!(said.contains(&format!("unknown field `{name}`")), "{said}");
    }
}

#[test]
fn names_field_cause_and_cure() {
    let disk = |more: &str| minimal(&format!("[[disk]]\nformat = \"raw\"\n{more}"));
    let nic = |more: &str| minimal(&format!("[[nic]]\n{more}"));
    for (text, field, word) in [
        (minimal("").replace("\"a\"", "\"-a\""), "name", "a-z"),
        (minimal("").replace("\"a\"", "\"\""), "name", "a-z"),
        (minimal("").replace("\"a\"", "\"../a\""), "name", "a-z"),
        (
            minimal("").replace("\"pc\"", "\"pc,accel=kvm\""),
            "machine",
            "letters",
        ),
        (minimal("").replace("64MiB", "1MiB"), "memory", "from 8MiB"),
        (
            minimal("").replace("64MiB", "65537KiB"),
            "memory",
            "multiple",
        ),
        (
            minimal("").replace("vcpus = 1", "vcpus = 0"),
            "vcpus",
            "from 1",
        ),
        (minimal("cpu = \"host -append\""), "cpu", "letters"),
        (minimal("qemu = \"qemu-system-x86_64\""), "qemu", "absolute"),
        (
            minimal("[boot]\nkernel = \"/k\"\ninitrd = \"/srv/a,/etc/shadow\""),
            "boot.initrd",
            "comma",
        ),
        (
            minimal("[boot]\nkernel = \"vmlinuz\""),
            "boot.kernel",
            "absolute",
        ),
        (
            minimal("[boot]\nkernel = \"/k\"\nappend = \"a\\nb\""),
            "boot.append",
            "one line",
        ),
        (disk("id = \"Root\"\npath = \"/a\""), "disk[0].id", "a-z"),
        (disk("id = \"root\""), "disk[0].path", "missing"),
        (
            disk("id = \"root\"\npath = \"a\""),
            "disk[0].path",
            "absolute",
        ),
        (
            disk("id = \"root\"\n[disk.on]\nhostb = \"b\""),
            "disk[0].on.hostb",
            "absolute",
        ),
        (
            disk(
                "id = \"root\"\npath = \"/a\"\n[[disk]]\nid = \"root\"\nformat = \"raw\"\npath = \"/b\"",
            ),
            "disk[1].id",
            "another",
        ),
        (
            nic("mac = \"52:54:00:12:34\"\nbackend = \"user\""),
            "nic[0].mac",
            "six octets",
        ),
        (
            nic("mac = \"53:54:00:12:34:56\"\nbackend = \"user\""),
            "nic[0].mac",
            "group",
        ),
        (
            nic("mac = \"52:54:00:12:34:56\"\nbackend = \"tap\""),
            "nic[0].ifname",
            "missing",
        ),
        (
            nic("mac = \"52:54:00:12:34:56\"\nbackend = \"tap\"\nifname = \"a,b\""),
            "nic[0].ifname",
            "1 to 15",
        ),
        (
            nic("mac = \"52:54:00:12:34:56\"\nbackend = \"user\"\nbridge = \"br0\""),
            "nic[0].bridge",
            "no meaning",
        ),
    ] {
        let said = complaint(&text);
        assert!(
            said.contains(&format!("`{field}`")) && said.contains(word),
            "{text}\n{said}"
        );
    }
}

#[test]
fn refuses_what_toml_types_can_tell() {
    for (text, word) in [
        ("", "missing field `name`"),
        ("name = ", "line 1"),
        (&minimal("").replace("64MiB", "64"), "no size"),
        (&minimal("").replace("vcpus = 1", "vcpus = -1"), "-1"),
        (&minimal("accelerator = \"xen\""), "`kvm`"),
    ] {
        let said = complaint(text);
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn bounds_numbers_of_things() {
    let disk =
        |index| format!("[[disk]]\nid = \"d{index}\"\nformat = \"raw\"\npath = \"/d{index}\"\n");
    let disks: Vec<String> = (0..=MAX_DISKS).map(disk).collect();
    let text = minimal(&disks.concat());
    assert!(complaint(&text).contains("16 are the most"));
    assert!(complaint(&"#".repeat(MAX_DEFINITION_LEN + 1)).contains("bytes of text"));
}

mod worst {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = Definition::parse(&text);
        }

        #[test]
        fn a_spoilt_definition_is_read_or_refused(
            spoils in prop::collection::vec((0..WEB1.len(), "\\PC{0,9}|[\\[\\]{}.=\"\n]{1,9}", 0_usize..30), 1..4),
        ) {
            let mut text = WEB1.to_owned();
            for (at, with, length) in spoils {
                let place = |at: usize| (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
                let (from, to) = (place(at), place(at + length));
                text.replace_range(from..to, &with);
            }
            if let Ok(definition) = Definition::parse(&text) {
                // What is taken is the same on another host.
                let again = Definition::parse(&definition.to_toml().expect("a definition"));
                prop_assert_eq!(again.ok(), Some(definition));
            }
        }
    }

    /// Texts of a peer, as long as they may be.
    #[test]
    fn the_worst_texts_take_little_memory() {
        let full = |piece: &str| piece.repeat(MAX_DEFINITION_LEN / piece.len());
        let keys = (0..30_000).fold(String::new(), |keys, n| keys + &format!("k{n}=1\n"));
        let texts = [
            full("[[disk]]\n"),
            full("["),
            format!("a={}", "[".repeat(MAX_DEFINITION_LEN - 2)),
            format!("a={}", "{b=".repeat(MAX_DEFINITION_LEN / 3 - 1)),
            format!("{}b=1", "a.".repeat(MAX_DEFINITION_LEN / 2 - 2)),
            format!("cpu=[{}]", "0,".repeat(MAX_DEFINITION_LEN / 2 - 3)),
            format!("name=\"{}\"", "\u{1b}".repeat(MAX_DEFINITION_LEN - 8)),
            full("\u{202e}"),
            keys[..MAX_DEFINITION_LEN.min(keys.len())].to_owned(),
        ];
        for text in texts {
            assert!(text.len() <= MAX_DEFINITION_LEN);
            let (parsed, most) = transhume_testing::peak(|| Definition::parse(&text));
            let said = parsed.expect_err("nothing of it is a VM").to_string();
            assert!(said.len() < 8192, "{} bytes are said of it", said.len());
            assert!(most < 64 << 20, "{most} bytes for {:?}", &text[..9]);
        }
    }
}
