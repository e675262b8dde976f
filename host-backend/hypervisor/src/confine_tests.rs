use super::Vm;
use super::command_line::Start;
use super::files::LaunchSettings;
use super::handed::OpenedFiles;
use super::process::Child;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use transhume_base::confine::{Confinement, User};
use transhume_machine::Definition;
use transhume_testing::{others_get_through, program};

/// Somebody without rights, whom every system has; `None` if others do not get through to what he is to run.
fn nobody(program: &Path) -> Option<User> {
    let nobody = User::find("nobody").expect("a user without rights");
    nobody.filter(|_| others_get_through(program))
}

fn field(pid: u32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.expect("every process has it").trim().to_owned()
}

/// The files and devices that a process has open, and what it has mapped that could be written.
fn open_files(pid: u32) -> BTreeSet<PathBuf> {
    let folder = format!("/proc/{pid}/fd");
    let links = std::fs::read_dir(folder).expect("it runs");
    links
        .filter_map(|link| std::fs::read_link(link.ok()?.path()).ok())
        .filter(|path| path.is_absolute() && !path.starts_with("/memfd:"))
        .collect()
}

#[tokio::test]
async fn a_running_qemu_has_what_it_was_handed_and_no_more() {
    // Beside this program: /tmp may have no direct reads. Nobody but its owner gets in.
    let beside = std::env::current_exe().expect("a path");
    let disks = tempfile::tempdir_in(beside.parent().expect("a folder")).expect("a folder");
    let run = tempfile::tempdir().expect("a folder");
    let path = |name: &str| disks.path().join(name);
    std::fs::write(path("base.raw"), vec![0; 1 << 20]).expect("written");
    let made = Command::new(program("qemu-img"))
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"])
        .arg(path("top.qcow2"))
        .status();
    assert!(made.expect("it runs").success());
    for name in ["base.raw", "top.qcow2"] {
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path(name), private).expect("ours");
    }
    let settings = LaunchSettings {
        host: "hosta".to_owned(),
        run_directory: run.path().to_owned(),
        log_directory: run.path().join("log"),
        qemu: program("qemu-system-x86_64"),
        user: nobody(&program("qemu-system-x86_64")),
    };
    let text = format!(
        "name = \"web1\"\nmachine = \"q35\"\naccelerator = \"tcg\"\nmemory = \"64MiB\"\nvcpus = 1\n[[disk]]\n\
         id = \"root\"\nformat = \"qcow2\"\npath = \"{}\"\n",
        path("top.qcow2").display()
    );
    let definition = Definition::parse(&text).expect("a definition");
    let opened = OpenedFiles::open(&definition, &settings, None).expect("all is there");
    let vm = Vm::launch(&definition, &settings, Start::Incoming, &opened).await;
    drop(opened);
    let vm = vm.expect("it starts");
    let pid = vm.pid().expect("its process is known");
    assert_eq!(vm.qmp().pid(), Some(pid), "its socket is not our own");
    let files = vm.files().clone();
    let ours = BTreeSet::from([
        path("base.raw"),
        path("top.qcow2"),
        files.qemu_log(),
        files.serial_log(),
        "/dev/null".into(),
    ]);
    let open = open_files(pid);
    assert!(open.contains(&path("base.raw")), "{open:?}");
    assert!(open.is_subset(&ours), "{open:?}");
    assert_eq!(field(pid, "NoNewPrivs:"), "1");
    assert_eq!(field(pid, "Seccomp:"), "2");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(pid, set), "0000000000000000", "{set}");
    }
    if let Some(user) = settings
        .user
        .as_ref()
        .filter(|_| nix::unistd::geteuid().is_root())
    {
        let ids = |id: u32| [id; 4].map(|id| id.to_string()).join("\t");
        assert_eq!(field(pid, "Uid:"), ids(user.uid()));
        assert_eq!(field(pid, "Gid:"), ids(user.gid()));
        assert!(!field(pid, "Groups:").split(' ').any(|group| group == "0"));
    }
    // A daemon that is started again knows it by what the definition says.
    let again = Definition::parse(&text).expect("a definition");
    let qmp = files.qmp();
    drop(vm);
    let vm = Vm::adopt(&again, &qmp, &settings)
        .await
        .expect("it is the same");
    vm.kill().await.expect("it ends");
}

#[tokio::test]
async fn the_confined_read_no_secret() {
    let folder = tempfile::tempdir().expect("a folder");
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path(), everybody).expect("ours");
    let secret = folder.path().join("hosta.key");
    std::fs::write(&secret, "a key\n").expect("written");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("ours");
    let log = folder.path().join("log");
    let read = async |user: Option<User>| {
        let file = std::fs::File::create(&log).expect("a log");
        let arguments = [secret.display().to_string()];
        let confinement = Confinement::of(user.as_ref(), Vec::new());
        let mut child = Child::spawn(Path::new("/bin/cat"), &arguments, file, confinement)
            .expect("it is there");
        let status = child.exited().await;
        (status, std::fs::read_to_string(&log).expect("its words"))
    };
    // The file can be read, by us.
    assert_eq!(read(None).await.1, "a key\n");
    if nix::unistd::geteuid().is_root() {
        let (status, said) = read(nobody(Path::new("/bin/cat"))).await;
        assert_eq!(status, "exit status: 1");
        assert!(said.contains("Permission denied"), "{said}");
    }
}

#[test]
fn a_user_that_is_not_there_has_a_cure() {
    assert_eq!(User::find("root"), Ok(None));
    let said = User::find("no-such-user").expect_err("there is none");
    assert!(
        said.contains("useradd") && said.contains("qemu-user"),
        "{said}"
    );
}
