//! Where a guest's users are: a namespace of its own, reached by the guest's card on whichever host it is.
//!
//! Each host has a bridge with a tap device for the guest; both bridges hang on one of the users'. None of it is the
//! hosts' link, and nothing of it is shaped.

use super::{Hosts, TAP, network};
use crate::Result;
use crate::cleanup::{Guard, Leftover};

/// The guest's address, with the length of its network's prefix.
pub const GUEST: &str = "198.18.1.2/24";
/// The users' address.
const USERS: &str = "198.18.1.1/24";
const BRIDGE: &str = "guests";

/// The users' namespace. It is removed when this is dropped.
#[derive(Debug)]
pub struct Users {
    namespace: String,
    _guard: Guard,
}

impl Users {
    /// Joins them with both hosts.
    pub fn of(hosts: &Hosts) -> Result<Self> {
        let namespace = format!("{}-users", hosts.unique);
        let guard = Guard::new(Leftover::Namespace(namespace.clone()));
        network::create(&namespace)?;
        let bridge = |namespace: &str| {
            network::ip(&format!(
                "-n {namespace} link add {BRIDGE} type bridge mcast_snooping 0"
            ))?;
            network::ip(&format!("-n {namespace} link set {BRIDGE} up"))
        };
        let plug = |namespace: &str, device: &str| {
            network::ip(&format!(
                "-n {namespace} link set {device} master {BRIDGE} up"
            ))
        };
        bridge(&namespace)?;
        network::ip(&format!("-n {namespace} address add {USERS} dev {BRIDGE}"))?;
        for host in [&hosts.a, &hosts.b] {
            bridge(&host.namespace)?;
            network::ip(&format!(
                "link add users netns {} type veth peer name {} netns {namespace}",
                host.namespace, host.name
            ))?;
            plug(&host.namespace, "users")?;
            plug(&namespace, host.name)?;
            network::ip(&format!("-n {} tuntap add {TAP} mode tap", host.namespace))?;
            plug(&host.namespace, TAP)?;
        }
        Ok(Self {
            namespace,
            _guard: guard,
        })
    }

    /// Does something from where they are, as far as the network goes: on a thread of its own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        network::inside(&self.namespace, work)
    }
}
