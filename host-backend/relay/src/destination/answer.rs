//! Answers another host on its connection.

use transhume_link::Connection;
use transhume_protocol::link::Control;

/// Says something to it; an error is for people.
pub(crate) fn send(connection: &mut Connection, message: &Control) -> Result<(), String> {
    connection.send(message).map_err(|error| error.to_string())
}

/// Refuses what it asked for.
pub(crate) fn refuse(connection: &mut Connection, reasons: Vec<String>) -> Result<(), String> {
    send(connection, &Control::Refused { reasons })
}
