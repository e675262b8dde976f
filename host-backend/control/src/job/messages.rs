//! What operators are told of jobs.

use transhume_api::JobInfo;

/// What an operator is told.
pub(crate) fn in_doubt(info: &JobInfo, cause: &str) -> String {
    let JobInfo {
        id, vm, from, to, ..
    } = info;
    format!(
        "it is not known whether {to} took {vm} over: {cause}. {vm} is left as it is on {from}.\ntranshumed goes on \
         asking {to}, and settles the matter when that answers. To settle it now, look at {to} with `transhume \
         vm show {vm}`. If it runs there: `transhume job resolve {id} --runs-at {to}`. If it does not, and cannot \
         any more: `transhume job resolve {id} --runs-at {from}`."
    )
}
