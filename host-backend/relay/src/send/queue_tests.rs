//! What a destination may say of what it was sent.

use transhume_protocol::link::{BatchEncoding, BatchHeader, Verdict};

use std::sync::Arc;
use std::time::Duration;

use super::buffers::Pool;
use super::queue::{Content, Next, Outgoing, SendQueue};
use transhume_pages::PageKey;

/// A batch with one reference.
fn refer(flow: &SendQueue, number: u64) {
    let buffer = Arc::new(Arc::new(Pool::default()).take());
    let outgoing = Outgoing {
        header: BatchHeader {
            number,
            encoding: BatchEncoding::Plain,
            records_len: 0,
            data_len: 0,
        },
        records: Vec::new(),
        buffer: Some(buffer),
        data: Vec::new(),
    };
    let key = PageKey {
        block: 0,
        page: number,
    };
    flow.push(outgoing, vec![Content { key, offset: 0 }])
        .unwrap();
}

#[test]
fn a_verdict_on_what_was_not_sent_is_refused() {
    let flow = SendQueue::new();
    refer(&flow, 0);
    refer(&flow, 1);
    let settled = |batch| Verdict {
        batch,
        settled: 1,
        wanted: Vec::new(),
    };
    let next = flow.next(Duration::ZERO).unwrap();
    assert!(matches!(next, Next::Batch(batch) if batch.header.number == 0));
    assert_eq!(flow.judge(&settled(0)).unwrap(), (1, Vec::new()));
    // It would have more and more buffers wait for the link.
    assert!(flow.judge(&settled(1)).is_err());
    let next = flow.next(Duration::ZERO).unwrap();
    assert!(matches!(next, Next::Batch(batch) if batch.header.number == 1));
    assert_eq!(flow.judge(&settled(1)).unwrap(), (1, Vec::new()));
    // What was settled, or sent otherwise, is judged in vain.
    assert_eq!(flow.judge(&settled(1)).unwrap(), (0, Vec::new()));
}
