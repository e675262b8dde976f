use super::*;
use transhume_hypervisor::LaunchSettings;

const HEAD: &str = "host = \"hostb\"\nplain-link = true\n";

fn config(text: &str) -> Config {
    let config = Config::parse(&format!("{HEAD}{text}")).expect(text);
    Config {
        file: "/etc/transhume/transhumed.toml".into(),
        ..config
    }
}

#[test]
fn a_host_that_is_not_listed_may_do_nothing() {
    let config = config("[incoming]\npaths = [\"/srv/vms\"]\n[hosts.hosta]\naddress = \"a:1\"\n");
    let said = config.may_send("hostc").expect_err("refused");
    for word in [
        "hostb does not list hostc",
        "[hosts.hostc]",
        "/etc/transhume/transhumed.toml on hostb",
    ] {
        assert!(said.contains(word), "{said}");
    }
    let said = config.may_take("hostc").expect_err("refused").to_string();
    assert!(
        said.contains("no host named hostc (it knows: hosta)"),
        "{said}"
    );
    assert!(said.contains("[hosts.hostc]"), "{said}");
}

#[test]
fn a_listed_host_may_send_and_take_unless_it_is_said() {
    let both = config("[hosts.hosta]\naddress = \"a:1\"\n");
    assert!(both.may_send("hosta").is_ok() && both.may_take("hosta").is_ok());
    let neither = config("[hosts.hosta]\naddress = \"a:1\"\nmay-send = false\nmay-take = false\n");
    let said = neither.may_send("hosta").expect_err("refused");
    assert!(
        said.contains("`may-send = false`") && said.contains("[hosts.hosta]"),
        "{said}"
    );
    let said = neither.may_take("hosta").expect_err("refused").to_string();
    assert!(
        said.contains("`may-take = false`") && said.contains("transhumed.toml"),
        "{said}"
    );
}

#[test]
fn what_a_host_may_use_is_added_to_what_all_may() {
    let config = config(
        "[incoming]\npaths = [\"/srv/vms\"]\nbridges = [\"br0\"]\n\
         [hosts.hosta]\naddress = \"a:1\"\npaths = [\"/dev/san\"]\ntaps = [\"tap0\"]\nuser-network = true\n\
         qemu-binaries = [\"/opt/qemu\"]\naccelerators = [\"kvm\", \"tcg\"]\n\
         [hosts.hostc]\naddress = \"c:1\"\n",
    );
    let limits = config.may_send("hosta").expect("allowed");
    assert_eq!(limits.paths, [Path::new("/srv/vms"), Path::new("/dev/san")]);
    assert_eq!(
        (&limits.bridges[..], &limits.taps[..]),
        (&["br0".to_owned()][..], &["tap0".to_owned()][..])
    );
    assert!(limits.user_network);
    assert_eq!(limits.qemu_binaries, [Path::new("/opt/qemu")]);
    assert_eq!(limits.accelerators, [Accelerator::Kvm, Accelerator::Tcg]);
    assert_eq!(
        limits.place,
        "[incoming] or [hosts.hosta] of /etc/transhume/transhumed.toml on hostb"
    );
    let limits = config.may_send("hostc").expect("allowed");
    assert_eq!(limits.paths, [Path::new("/srv/vms")]);
    assert!(limits.taps.is_empty() && limits.qemu_binaries.is_empty() && !limits.user_network);
    assert_eq!(limits.accelerators, [Accelerator::Kvm]);
}

#[test]
fn says_what_is_wrong() {
    for (text, word) in [
        (
            "[incoming]\npaths = [\"srv\"]",
            "`incoming.paths` names srv",
        ),
        ("[incoming]\npaths = [\"/srv/../etc\"]", "without .."),
        ("[incoming]\npaths = \"/srv\"", "sequence"),
        ("[incoming]\nbridges = [\"br0,br1\"]", "`incoming.bridges`"),
        ("[incoming]\ntaps = [\"\"]", "`incoming.taps`"),
        ("[incoming]\naccelerators = [\"xen\"]", "`kvm` or `tcg`"),
        (
            "[incoming]\nqemu-binaries = [\"qemu\"]",
            "`incoming.qemu-binaries`",
        ),
        ("[incoming]\ndisks = []", "unknown field `disks`"),
        (
            "[hosts.b]\naddress = \"b:1\"\npaths = [\"srv\"]",
            "`hosts.b.paths`",
        ),
        ("[hosts.b]\naddress = \"b:1\"\nmay-send = \"no\"", "boolean"),
        ("[hosts.b]\nmay-send = true", "address"),
        ("[hosts.B]\naddress = \"b:1\"", "a-z"),
    ] {
        let said = Config::parse(&format!("{HEAD}{text}")).expect_err(text);
        assert!(said.contains(word), "{said}");
    }
}

/// The example that is shipped must work with the VM that is shipped.
#[test]
fn the_examples_fit_each_other() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../packaging/host")
            .join(name);
        std::fs::read_to_string(path).expect("an example")
    };
    let config = Config::parse(&read("transhumed.toml")).expect("a configuration");
    let web1 = Definition::parse(&read("web1.toml")).expect("a definition");
    let limits = config.may_send("hostb").expect("allowed");
    let settings = LaunchSettings {
        host: config.host.clone(),
        ..config.launch_settings()
    };
    let said: Vec<String> = limits
        .check(&web1, &settings)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(said, [""; 0]);
}

#[test]
fn what_changes_something_is_noted_before_it_is_done() {
    let config = config("[hosts.hosta]\naddress = \"a:1\"\nmay-take = false\n");
    let who = Who::Client {
        uid: 1000,
        pid: None,
    };
    let name = || "web1".to_owned();
    let note = |request: &Request| {
        transhume_testing::written(|| {
            let verdict = config.admit(who, request, |_| Some(name()));
            assert_eq!(
                verdict.is_err(),
                matches!(request, Request::Migrate { to, .. } if to != "hostb")
            );
        })
    };
    let definition =
        "name = \"web1\"\nmachine = \"q35\"\nmemory = \"64MiB\"\nvcpus = 1\n".to_owned();
    let stop = |force| Request::VmStop {
        name: name(),
        force,
        shutdown_timeout: None,
    };
    let migrate = |to: &str| Request::Migrate {
        name: name(),
        to: to.to_owned(),
        link_patience: 30,
        goal: transhume_api::Goal::default(),
        dry_run: true,
    };
    for (request, what) in [
        (
            Request::VmStart {
                definition: definition.clone(),
                anyway: false,
            },
            "vm-start",
        ),
        (
            Request::VmAdopt {
                definition,
                qmp: "/q".into(),
            },
            "vm-adopt",
        ),
        (stop(false), "vm-stop"),
        (stop(true), "vm-stop by force"),
        (Request::VmPause { name: name() }, "vm-pause"),
        (Request::VmResume { name: name() }, "vm-resume"),
        (Request::JobCancel { id: 7 }, "job-cancel 7"),
        (migrate("hosta"), "migrate to hosta (dry run)"),
        (migrate("hostc"), "migrate to hostc (dry run)"),
        (migrate("hostb"), "migrate to hostb (dry run)"),
    ] {
        let said = note(&request);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.contains(&format!("what=\"{what}\" vm=\"web1\" uid=1000")),
            "{said}"
        );
        assert!(!said.contains("q35"), "{said}");
    }
    assert!(note(&migrate("hosta")).contains("decision=\"refused\""));
    assert_eq!(note(&Request::VmList { all: false }), "");
}

#[test]
fn a_directory_that_is_not_there_is_found_at_once() {
    let config = config(
        "[incoming]\npaths = [\"/\", \"/none\"]\n[hosts.hosta]\naddress = \"a:1\"\npaths = [\"/nor-this\"]\n",
    );
    let missing = config.missing_paths();
    let expected = [("incoming", "/none"), ("hosts.hosta", "/nor-this")];
    assert_eq!(
        missing,
        expected.map(|(place, path)| (place.to_owned(), Path::new(path)))
    );
}
