//! Pages that the guest asked for in post-copy, and that have not been read from QEMU since.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;

use transhume_pages::PageKey;

/// So many are kept at most: each CPU and each process waits for one at a time.
const LIMIT: usize = 4096;

#[derive(Default)]
pub(crate) struct Requests(Mutex<HashSet<PageKey, RandomState>>);

impl Requests {
    /// Pages were asked for.
    pub(crate) fn note(&self, first: PageKey, count: u64) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for n in 0..count.min(LIMIT as u64) {
            if pages.len() >= LIMIT {
                // Whoever asks for so many gets them anyhow.
                return;
            }
            let page = first.page.saturating_add(n);
            pages.insert(PageKey { page, ..first });
        }
    }

    /// Whether that page was asked for; it is not any more.
    pub(crate) fn take(&self, key: PageKey) -> bool {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        !pages.is_empty() && pages.remove(&key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_known_once_and_no_more_than_so_many() {
        let requests = Requests::default();
        let key = |page| PageKey { block: 1, page };
        requests.note(key(7), 2);
        assert!(!requests.take(key(6)) && !requests.take(PageKey { block: 0, page: 7 }));
        assert!(requests.take(key(7)) && !requests.take(key(7)) && requests.take(key(8)));
        requests.note(key(u64::MAX), u64::MAX);
        requests.note(key(0), u64::MAX);
        assert!(requests.take(key(0)) && !requests.take(key(LIMIT as u64)));
    }
}
