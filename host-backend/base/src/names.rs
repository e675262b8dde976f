//! What VMs and hosts may be called, and how long a definition of a VM may be.

/// Bytes of TOML that a definition may have.
pub const MAX_DEFINITION_LEN: usize = 256 << 10;

/// Whether `name` may name a VM or a host: `[a-z0-9][a-z0-9-]{0,62}`.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= 63
        && name.bytes().next().is_some_and(plain)
        && name.bytes().all(|byte| plain(byte) || byte == b'-')
}
