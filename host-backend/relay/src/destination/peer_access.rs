//! Whether another host gets what it asks for, noted in the audit. Nothing that an offer names is opened or run
//! before it was judged here.

use transhume_protocol::link::Offer;

use super::host::Host;
use transhume_base::audit::{self, Who};
use transhume_base::names::is_name;
use transhume_hypervisor::preflight;
use transhume_link::{Connection, Security};

/// The other end of a connection.
pub(crate) struct Peer {
    /// The host of `[hosts]` that its certificate is for.
    name: Option<String>,
    /// Whether hosts prove who they are.
    proves: bool,
    address: String,
}

/// The host of `[hosts]` that a connection's certificate is for. On a plain link nobody proves anything.
pub(crate) fn name_of(connection: &Connection, host: &dyn Host) -> Option<String> {
    let proves = !matches!(host.security(), Security::Plain);
    let mut known = host.peers().into_iter().filter(|_| proves);
    let name = known.find(|name| connection.peer_is(name));
    name.map(str::to_owned)
}

impl Peer {
    /// Who connected, which is noted.
    pub(crate) fn greet(connection: &Connection, address: &str, host: &dyn Host) -> Self {
        let peer = Self {
            name: name_of(connection, host),
            proves: !matches!(host.security(), Security::Plain),
            address: address.to_owned(),
        };
        audit::note(peer.who(None), "connection", None, Ok(()));
        peer
    }

    /// Itself for the audit, by another name if it gave one.
    fn who<'a>(&'a self, claimed: Option<&'a str>) -> Who<'a> {
        Who::Peer {
            name: claimed.or(self.name.as_deref()),
            proven: self.proves && (claimed.is_some() || self.name.is_some()),
            address: &self.address,
        }
    }

    /// Whether an offer may be looked at further; if not, every reason.
    pub(crate) async fn admit(
        &self,
        is_from: bool,
        offer: &Offer,
        host: &dyn Host,
    ) -> Result<(), Vec<String>> {
        let what = if offer.dry_run {
            "offer (dry run)"
        } else {
            "offer"
        };
        let from = &offer.from;
        let refuse = |claimed: Option<&str>, vm: Option<&str>, said: &str, reasons: Vec<String>| {
            audit::note(self.who(claimed), what, vm, Err(said));
            Err(reasons)
        };
        if !is_name(from) {
            let reason = "its name is no host's name (at most 63 of a-z, 0-9 and -)".to_owned();
            return refuse(None, None, &reason.clone(), vec![reason]);
        }
        if !is_from {
            let reason = format!(
                "it says that it is {from}, but its certificate is for another name; `transhume pki issue {from}` \
                 makes one that is for it"
            );
            return refuse(None, None, &reason.clone(), vec![reason]);
        }
        let claimed = Some(from.as_str());
        let limits = match host.may_send(from) {
            Ok(limits) => limits,
            Err(reason) => return refuse(claimed, None, &reason.clone(), vec![reason]),
        };
        let definition = match preflight::parse_offered(&offer.definition) {
            Ok(definition) => definition,
            // The reason has lines of it.
            Err(refusal) => {
                let said = "its definition cannot be read";
                return refuse(claimed, None, said, vec![refusal.to_string()]);
            }
        };
        let vm = Some(definition.name.as_str());
        let refusals = limits
            .check_in_time(&definition, &host.launch_settings())
            .await;
        if refusals.is_empty() {
            audit::note(self.who(claimed), what, vm, Ok(()));
            return Ok(());
        }
        let reasons: Vec<String> = refusals.iter().map(ToString::to_string).collect();
        let causes: Vec<&str> = refusals.iter().map(|one| one.cause.as_str()).collect();
        refuse(claimed, vm, &causes.join("; "), reasons)
    }

    /// Whether it is told what became of a migration; `of_others` if that came from another host.
    pub(crate) fn may_ask(&self, vm: &str, of_others: bool, host: &dyn Host) -> Result<(), String> {
        let listed = if self.proves {
            self.name.is_some()
        } else {
            !host.peers().is_empty()
        };
        let verdict = if !listed {
            Err("it asks for a VM, and is none of [hosts] in transhumed.toml")
        } else if of_others {
            Err("it asks for a VM that another host sent")
        } else {
            Ok(())
        };
        audit::note(self.who(None), "query", Some(vm), verdict);
        verdict.map_err(str::to_owned)
    }
}
