//! What the program says and exits with when nobody answers it.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Output};

fn transhume(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_transhume"))
        .args(arguments)
        .env("TRANSHUME_SOCKET", "/nowhere/control.sock")
        .output()
        .unwrap()
}

#[test]
fn a_service_that_is_not_there_has_a_cure() {
    let ended = transhume(&["vm", "list"]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stdout.is_empty());
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.starts_with("transhume: transhumed at /nowhere/control.sock cannot be reached"));
    assert!(said.contains("systemctl status transhumed"), "{said}");
}

#[test]
fn a_program_gets_an_object_whatever_happens() {
    let ended = transhume(&["vm", "list", "--json"]);
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8(ended.stdout).unwrap();
    assert!(
        said.starts_with('{') && said.contains("\"failed\""),
        "{said}"
    );
}

#[test]
fn a_wrong_command_line_is_no_failure_of_the_service() {
    assert_eq!(transhume(&["vm", "lost"]).status.code(), Some(2));
    // A file where a name belongs.
    let ended = transhume(&["migrate", "./web1.toml", "--to", "hostb"]);
    assert_eq!(ended.status.code(), Some(3));
}
