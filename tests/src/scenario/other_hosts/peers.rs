//! What a host may ask of another one is what that one's configuration says; all else is refused, the guest
//! runs on where it is, and the audit tells.

use super::false_source::Link;
use crate::error::check;
use crate::hosts::daemon::PORT;
use crate::hosts::{HOST_A, HOST_B};
use crate::scenario::fixture::micro::{Life, Micro, raw_disk};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;
use transhume_protocol::link::Control;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "refused-peer",
            about: "a host that is not listed, or may not send or take, and files that are out of bounds",
            limit: Duration::from_secs(180),
            run: peer,
        },
        Scenario {
            name: "refused-query",
            about: "nobody but a listed host is told what became of a VM",
            limit: Duration::from_secs(60),
            run: query,
        },
    ]
}

impl Pair<'_> {
    /// Starts a daemon again with other rules.
    pub(crate) fn with_rules(&mut self, at: At, rules: Option<String>) -> Result<()> {
        match at {
            At::A => {
                self.a.kill();
                self.hosts.a.rules = rules;
            }
            At::B => {
                self.b.kill();
                self.hosts.b.rules = rules;
            }
        }
        self.restart(at)
    }

    /// What a daemon's configuration says of the other host.
    fn listed(&self, at: At, more: &str) -> String {
        let peer = self.host(at.other());
        format!(
            "[hosts.{}]\naddress = \"{}:{PORT}\"\n{more}",
            peer.name, peer.address
        )
    }

    /// An offer is refused with all of these words, and noted so by the destination.
    fn refuses(&self, life: &mut Life, words: &[&str]) -> Result<()> {
        for (more, offer) in [(&[][..], "offer"), (&["--dry-run"], "offer (dry run)")] {
            let noted = format!("decision=\"refused\" what=\"{offer}\"");
            let before = self.b.count_words(&noted);
            let answer = self.migrate(At::A, more)?.refused(3, words);
            let answer = answer.map_err(|error| self.with_logs(error))?;
            check(answer.word("/state")? == "refused", || {
                format!("Not refused: {answer}")
            })?;
            check(self.b.count_words(&noted) == before + 1, || {
                format!("hostb's audit does not tell of {answer}")
            })?;
        }
        self.stayed(At::A, life)
    }
}

fn peer(bed: &Bed) -> Result<()> {
    let mut pair = Pair::new(bed, NEWEST, None)?;
    // At the destination the disk is reached by a link out of the one folder for disks.
    let vms = pair.hosts.b.folder.join("images");
    fs::create_dir(&vms).map_err(Error::file("create", &vms))?;
    let link = vms.join("micro.raw");
    symlink(raw_disk(bed)?, &link).map_err(Error::file("link", &link))?;
    let micro = Micro {
        more: format!("[disk.on]\n{HOST_B} = \"{}\"\n", link.display()),
        ..Micro::new(bed)?
    };
    let mut life = pair.boot(&micro)?;

    pair.with_rules(At::B, Some(String::new()))?;
    pair.refuses(
        &mut life,
        &[
            "hostb does not list hosta",
            "[hosts.hosta]",
            "transhumed.toml on hostb",
        ],
    )?;

    let rules = pair.listed(At::B, "may-send = false\n");
    pair.with_rules(At::B, Some(rules))?;
    pair.refuses(
        &mut life,
        &[
            "takes no VMs from hosta",
            "`may-send = false`",
            "[hosts.hosta]",
        ],
    )?;

    // All reasons at once.
    let rules = pair.listed(At::B, "");
    pair.with_rules(At::B, Some(rules))?;
    pair.refuses(
        &mut life,
        &[
            "disk root on hostb",
            "images/micro.raw",
            "boot.kernel",
            "`paths`",
            "`accelerators`",
        ],
    )?;

    let kernel = bed
        .micro_guest()?
        .parent()
        .unwrap_or(&vms)
        .display()
        .to_string();
    let bounds = format!(
        "accelerators = [\"tcg\"]\npaths = [\"{kernel}\", \"{}\"]\n",
        vms.display()
    );
    let rules = pair.listed(At::B, &bounds);
    pair.with_rules(At::B, Some(rules))?;
    pair.refuses(
        &mut life,
        &["disk root on hostb", "images/micro.raw", "`paths`"],
    )?;
    check(pair.b.count_words("proven=true") > 0, || {
        "hosta did not prove its name".into()
    })?;

    pair.with_rules(At::B, None)?;
    let rules = pair.listed(At::A, "may-take = false\n");
    pair.with_rules(At::A, Some(rules))?;
    for more in [&[][..], &["--dry-run"]] {
        let words = [
            "from hosta to hostb",
            "`may-take = false`",
            "transhumed.toml",
        ];
        pair.migrate(At::A, more)?.refused(3, &words)?;
    }
    let noted = "decision=\"refused\" what=\"migrate to hostb\" vm=\"micro\" uid=0";
    check(pair.a.count_words(noted) == 1, || {
        format!("{HOST_A}'s audit does not tell of it: {}", pair.a.words())
    })?;
    pair.stayed(At::A, &mut life)?;

    pair.with_rules(At::A, None)?;
    pair.moves(At::A, &mut life)?;
    let noted = "decision=\"allowed\" what=\"offer\" vm=\"micro\" peer=\"hosta\" proven=true";
    check(pair.b.count_words(noted) == 1, || {
        format!("{HOST_B}'s audit does not tell of it: {}", pair.b.words())
    })
}

fn query(bed: &Bed) -> Result<()> {
    let mut pair = Pair::plain(bed, NEWEST, None)?;
    let query = |pair: &Pair<'_>| -> Result<Option<Control>> {
        // It answers here when it listens there.
        ask(&pair.b, &["vm", "list"])?.expect(0)?;
        let mut link = Link::open(pair)?;
        link.send(&Control::Query {
            job: 7,
            vm: "micro".into(),
        })?;
        link.hear()
    };
    // It may ask; but of a migration that is not in the journal nothing can be said.
    let answer = query(&pair)?;
    check(answer.is_none(), || {
        format!("A listed host is told {answer:?} of nothing")
    })?;
    pair.wait("the daemon's word on a listed host", || {
        Ok(pair
            .b
            .count_words("decision=\"allowed\" what=\"query\" vm=\"micro\"")
            == 1)
    })?;
    // On a plain link anybody may be a host that is listed; if none is, nobody is.
    pair.with_rules(At::B, Some(String::new()))?;
    let answer = query(&pair)?;
    check(answer.is_none(), || {
        format!("A stranger is told {answer:?}")
    })?;
    pair.wait("the daemon's word on a stranger", || {
        Ok(pair
            .b
            .count_words("decision=\"refused\" what=\"query\" vm=\"micro\"")
            == 1)
    })
}
