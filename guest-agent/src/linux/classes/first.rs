//! What an administrator wants first: units, or control groups.

use std::fs;
use std::str::FromStr;
use transhume_protocol::agent::RANKS;

/// The rank of the agent itself.
pub(super) const OWN_RANK: u8 = 0;
/// That of what is wanted first.
const FIRST_RANK: u8 = 1;

/// A unit (`redis-server.service`, or without its suffix a service) or a control group by its path (`/system.slice`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    /// A unit, wherever it is.
    Unit(String),
    /// A control group, and those in it.
    Path(String),
}

impl FromStr for Group {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.trim_end_matches('/');
        match text {
            // As of a variable that is set to nothing.
            "" => Ok(Self::Unit(String::new())),
            _ if text.starts_with('/') => Ok(Self::Path(path.to_owned())),
            _ if text.contains('/') => Err("the path of a control group begins with /"),
            _ if text.contains('.') => Ok(Self::Unit(text.to_owned())),
            _ => Ok(Self::Unit(format!("{text}.service"))),
        }
    }
}

impl Group {
    fn holds(&self, path: &str) -> bool {
        match self {
            Self::Unit(unit) => path.split('/').any(|part| part == unit),
            Self::Path(group) => path
                .strip_prefix(group.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        }
    }
}

/// Groups in the order in which they are wanted; all other processes come behind them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct First(Vec<Group>);

impl First {
    /// Those groups in that order. The last rank is for whatever does not get one of its own.
    pub fn new(mut groups: Vec<Group>) -> Self {
        groups.retain(|group| *group != Group::Unit(String::new()));
        Self(groups)
    }

    /// Whether a rank is that of a group that is wanted first.
    pub(super) fn wants(&self, rank: u8) -> bool {
        let place = rank.checked_sub(FIRST_RANK);
        place.is_some_and(|place| usize::from(place) < self.0.len())
    }

    fn rank(&self, path: Option<&str>) -> u8 {
        let place = path.and_then(|path| self.0.iter().position(|group| group.holds(path)));
        let place = u8::try_from(place.unwrap_or(self.0.len())).unwrap_or(u8::MAX);
        place.saturating_add(FIRST_RANK).min(RANKS - 1)
    }

    /// The rank of a process.
    pub(super) fn rank_of(&self, pid: i32) -> u8 {
        if self.0.is_empty() {
            return FIRST_RANK;
        }
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        self.rank(group_of(&groups))
    }
}

/// The path of the control group that systemd goes by.
fn group_of(groups: &str) -> Option<&str> {
    let path = |prefix: &str| {
        let mut lines = groups.lines();
        lines.find_map(|line| line.split_once(':')?.1.strip_prefix(prefix))
    };
    // The first where systemd still goes by version 1, the second of version 2.
    path("name=systemd:").or_else(|| path(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_the_rank_of_its_group() {
        let groups = ["redis-server", "", "/system.slice/db", "user.slice"];
        let groups = groups.map(|group| group.parse().expect("a group"));
        let first = First::new(groups.to_vec());
        for (path, rank) in [
            ("/system.slice/redis-server.service", 1),
            ("/system.slice/redis-server.service/worker", 1),
            ("/system.slice/db", 2),
            ("/system.slice/db/x", 2),
            ("/system.slice/db2", 4),
            ("/user.slice/user-0.slice/session-1.scope", 3),
            ("/", 4),
        ] {
            assert_eq!(first.rank(Some(path)), rank, "{path}");
        }
        assert_eq!(first.rank(None), 4);
        let many = First::new(vec![Group::Unit("a.service".into()); 40]);
        assert_eq!(many.rank(Some("/b")), RANKS - 1);
        assert_eq!(First::default().rank(Some("/")), FIRST_RANK);
    }

    #[test]
    fn groups_of_either_version_are_found() {
        assert_eq!(group_of("0::/a.service\n"), Some("/a.service"));
        let hybrid = "12:memory:/m\n1:name=systemd:/b.service\n0::/\n";
        assert_eq!(group_of(hybrid), Some("/b.service"));
        assert_eq!(group_of("garbage\n"), None);
        assert!("a/b".parse::<Group>().is_err());
    }
}
