//! Who asked for what, and whether they got it: one line for each decision, in the log's part `audit`.
//!
//! It holds names and addresses only: no definition, no key, nothing of a guest. What others chose the words of is
//! cut short, and is recorded as text, which the log's writer escapes.

/// What lines are recorded under.
pub const TARGET: &str = "audit";
/// Characters of a name, and of a reason, that a line holds at most.
const NAME: usize = 64;
const REASON: usize = 512;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who<'a> {
    /// A process of this host, by its socket's credentials (`SO_PEERCRED`).
    Client {
        /// Its user.
        uid: u32,
        /// Its process.
        pid: Option<i32>,
    },
    /// Another host.
    Peer {
        /// What it is called, if that is known.
        name: Option<&'a str>,
        /// Whether its certificate says so. On a plain link nobody proves anything.
        proven: bool,
        /// Where it connects from.
        address: &'a str,
    },
}

/// Notes a decision on something that is asked for, of a VM if it is about one.
pub fn note(who: Who<'_>, what: &str, vm: Option<&str>, verdict: Result<(), &str>) {
    let (uid, pid, peer, proven, address) = match who {
        Who::Client { uid, pid } => (Some(uid), pid, None, None, None),
        Who::Peer {
            name,
            proven,
            address,
        } => (None, None, name, Some(proven), Some(address)),
    };
    let (peer, vm) = (peer.map(|name| cut(name, NAME)), vm.map(|vm| cut(vm, NAME)));
    macro_rules! line {
        ($level:ident, $decision:literal $(, $why:ident)?) => {
            tracing::$level!(
                target: TARGET,
                decision = $decision,
                what,
                vm,
                uid,
                pid,
                peer,
                proven,
                address
                $(, $why)?
            )
        };
    }
    match verdict {
        Ok(()) => line!(info, "allowed"),
        Err(why) => {
            let why = cut(why, REASON);
            line!(warn, "refused", why);
        }
    }
}

/// The beginning of a text.
fn cut(text: &str, most: usize) -> &str {
    match text.char_indices().nth(most) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_testing::written;

    #[test]
    fn a_line_says_who_what_and_why() {
        let client = Who::Client {
            uid: 1000,
            pid: Some(7),
        };
        let said = written(|| note(client, "vm-stop", Some("web1"), Ok(())));
        assert_eq!(
            said,
            " INFO audit: decision=\"allowed\" what=\"vm-stop\" vm=\"web1\" uid=1000 pid=7\n"
        );
        let peer = Who::Peer {
            name: Some("hosta"),
            proven: true,
            address: "10.0.0.1:4711",
        };
        let said = written(|| note(peer, "offer", None, Err("it is not listed")));
        assert_eq!(
            said,
            " WARN audit: decision=\"refused\" what=\"offer\" peer=\"hosta\" proven=true \
             address=\"10.0.0.1:4711\" why=\"it is not listed\"\n"
        );
    }

    #[test]
    fn nobody_writes_a_line_of_their_own_or_a_long_one() {
        let name = format!(
            "a\n INFO audit: decision=\"allowed\"\u{1b}[2J\u{e9}{}",
            "x".repeat(9999)
        );
        let peer = Who::Peer {
            name: Some(&name),
            proven: false,
            address: "10.0.0.1:4711",
        };
        let said = written(|| note(peer, "offer", Some(&name), Err(&name)));
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains('\u{1b}'), "{said}");
        assert!(said.len() < 1000, "{said}");
    }
}
