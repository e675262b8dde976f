//! Checks of single fields of a definition.

use crate::{Error, Result};
use std::path::Path;
use transhume_base::names::is_name;

/// Longest path, in bytes.
const MAX_PATH: usize = 4095;

/// Six octets as in `52:54:00:12:34:56`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut octets = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(octets)
}

pub(crate) fn check_name(field: &str, name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    Err(Error::field(
        field,
        format!("holds the name {name:?}"),
        "write at most 63 of a-z, 0-9 and -, not starting with -, as in \"web1\"",
    ))
}

pub(crate) fn check_word(field: &str, word: &str, also: &str, example: &str) -> Result<()> {
    let good = |character: char| character.is_ascii_alphanumeric() || also.contains(character);
    if (1..=256).contains(&word.len()) && word.chars().all(good) {
        return Ok(());
    }
    Err(Error::field(
        field,
        format!("is {word:?}"),
        format!("write letters, digits and {also} only, as in \"{example}\""),
    ))
}

pub(crate) fn check_path(field: &str, path: &Path) -> Result<()> {
    let Some(text) = path.to_str() else {
        return Err(Error::field(field, "is not UTF-8", "rename the file"));
    };
    if !path.is_absolute() {
        return Err(Error::field(
            field,
            format!("is {text:?}, which is no absolute path"),
            "write the path from / on",
        ));
    }
    if text.len() > MAX_PATH || text.chars().any(char::is_control) {
        return Err(Error::field(
            field,
            "is too long or holds control characters",
            format!("write a path of at most {MAX_PATH} bytes"),
        ));
    }
    Ok(())
}

/// Whether `name` may name a network interface.
pub fn is_interface(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_graphic() && !b"/:,=%".contains(&byte);
    (1..=15).contains(&name.len()) && name.bytes().all(good) && name != "." && name != ".."
}

pub(crate) fn check_interface(field: &str, name: &str) -> Result<()> {
    if is_interface(name) {
        return Ok(());
    }
    Err(Error::field(
        field,
        format!("is {name:?}"),
        "write an interface's name of 1 to 15 characters, as in \"tap0\"",
    ))
}
