use super::*;
use std::path::PathBuf;

fn config(folder: &Path, more: &str) -> Config {
    let text = format!(
        "host = \"hosta\"\nplain-link = true\nrun-directory = \"{}\"\n{more}",
        folder.display()
    );
    Config::parse(&text).expect("a configuration")
}

fn mode(path: impl Into<PathBuf>) -> u32 {
    std::fs::metadata(path.into()).expect("a file").mode() & 0o7777
}

#[tokio::test]
async fn it_is_its_owners_alone_unless_a_group_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let alone = config(&run, "");
    let listener = bind(&alone).await.expect("a socket");
    assert_eq!(mode(alone.control_socket()), 0o600);
    assert_eq!((mode(&run), mode(run.join("vms"))), (RUN_MODE, VMS_MODE));
    let error = bind(&alone).await.expect_err("taken");
    assert!(
        error.to_string().contains("another transhumed answers"),
        "{error}"
    );
    drop(listener);
    let own = Group::from_gid(Gid::current())
        .expect("groups")
        .expect("a group");
    let user = User::from_uid(Uid::current())
        .expect("users")
        .expect("a user");
    let more = format!(
        "control-group = \"{}\"\ncontrol-owner = \"{}\"\n",
        own.name, user.name
    );
    let shared = config(&run, &more);
    let _listener = bind(&shared).await.expect("a socket");
    assert_eq!(mode(shared.control_socket()), 0o660);
    let found = std::fs::metadata(shared.control_socket()).expect("a socket");
    assert_eq!(
        (found.uid(), found.gid()),
        (user.uid.as_raw(), own.gid.as_raw())
    );
}

#[tokio::test]
async fn a_folder_that_lets_everybody_see_the_vms_is_closed() {
    let folder = tempfile::tempdir().expect("a folder");
    let vms = folder.path().join("vms");
    std::fs::create_dir(&vms).expect("a folder");
    std::fs::set_permissions(&vms, Permissions::from_mode(0o755)).expect("a mode");
    let _listener = bind(&config(folder.path(), "")).await.expect("a socket");
    assert_eq!(mode(vms), VMS_MODE);
}

#[tokio::test]
async fn nobody_is_named_who_is_not_there() {
    let folder = tempfile::tempdir().expect("a folder");
    for (more, words) in [
        (
            "control-group = \"no-such-group\"",
            ["`control-group`", "groupadd --system no-such-group"],
        ),
        (
            "control-owner = \"no-such-user\"",
            ["`control-owner`", "useradd --system no-such-user"],
        ),
    ] {
        let error = bind(&config(folder.path(), more)).await.expect_err(more);
        assert!(
            words.iter().all(|word| error.to_string().contains(word)),
            "{error}"
        );
        assert!(matches!(error, Error::Config { .. }));
    }
    assert!(!folder.path().join("control.sock").exists());
}
