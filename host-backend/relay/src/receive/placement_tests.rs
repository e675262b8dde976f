//! Pages of a VM in post-copy: each once, from wherever it comes first.

use std::sync::Arc;

use transhume_protocol::link::{Digest, SectionKind};
use transhume_protocol::memory::Block;

use super::output::{Contents, Output, Piece};
use super::placement::Placement;
use super::read_plan::Read;
use super::replies::{Replies, Reply};
use transhume_pages::hint_table::Place;
use transhume_pages::{PAGE_SIZE, PageKey};

const DIGEST: Digest = [7; 16];
const WRONG: Digest = [8; 16];
const BATCH: u64 = 5;

struct Scene {
    placement: Placement,
    replies: Arc<Replies>,
}

fn key(page: u64) -> PageKey {
    PageKey { block: 0, page }
}

impl Scene {
    /// Pages 0 to 3 were forgotten of 8, and the package was passed on.
    fn new() -> Self {
        let replies = Arc::<Replies>::default();
        let output = Arc::new(Output::new());
        let placement = Placement::new(
            Arc::clone(&output),
            Arc::clone(&replies),
            1,
            None,
            true,
            None,
        );
        let length = 8 * PAGE_SIZE as u64;
        let name = "pc.ram".to_owned();
        let blocks = vec![Block { name, length }];
        placement.set_blocks(2, blocks).unwrap();
        placement.discard(0, 0, 4).unwrap();
        placement.package().unwrap();
        output.release();
        placement.open(SectionKind::Part).unwrap();
        let scene = Self { placement, replies };
        assert!(scene.pages().is_empty());
        scene
    }

    /// The source refers to sector 8 of the disk for pages 0 and 1; what is to be read.
    fn refer(&self) -> Read {
        let place = Place { disk: 0, sector: 8 };
        let (mut index, mut needed) = (0, Vec::new());
        let both = [DIGEST, DIGEST];
        self.placement
            .references(BATCH, &mut index, key(0), place, &both, &mut needed)
            .unwrap();
        self.placement.demand(&mut needed);
        self.placement.next_read().unwrap()
    }

    fn found(&self, read: &Read, digests: &[Digest]) {
        let contents = Arc::new(vec![0_u8; read.pages * PAGE_SIZE]);
        let found = Some((contents as Contents, digests.to_vec()));
        self.placement.found(read, found).unwrap();
    }

    fn data(&self, pages: &[u64]) {
        let contents = Arc::new(vec![0_u8; PAGE_SIZE]);
        let pages = pages.iter().map(|&page| (key(page), 0)).collect();
        self.placement.data(contents, pages).unwrap();
    }

    /// What QEMU gets of pages, so far.
    fn pages(&self) -> Vec<u64> {
        // Takes all that is there, and this.
        self.placement.output.push(Piece::Raw(vec![1, 2, 3]));
        let mut pages = Vec::new();
        loop {
            match self.placement.output.take().unwrap() {
                Piece::Pages { pages: some, .. } => {
                    pages.extend(some.iter().map(|(key, _)| key.page));
                }
                Piece::Zero { page, .. } => pages.push(page),
                Piece::Raw(bytes) if bytes == [1, 2, 3] => return pages,
                _ => {}
            }
        }
    }

    /// What the source is told: settled, and wanted.
    fn told(&self) -> (u32, Vec<u32>) {
        let (mut settled, mut wanted) = (0, Vec::new());
        for reply in self.replies.take_all() {
            if let Reply::Verdict(verdict) = reply {
                assert_eq!(verdict.batch, BATCH);
                settled += verdict.settled;
                wanted.extend(verdict.wanted);
            }
        }
        (settled, wanted)
    }
}

#[test]
fn what_a_disk_holds_comes_from_there() {
    let scene = Scene::new();
    let read = scene.refer();
    scene.found(&read, &[DIGEST, DIGEST]);
    assert_eq!(scene.pages(), [0, 1]);
    assert_eq!(scene.told(), (2, vec![]));
    // And not once more.
    scene.data(&[0, 1, 2]);
    assert_eq!(scene.pages(), [2]);
}

#[test]
fn what_it_does_not_hold_is_asked_for() {
    let scene = Scene::new();
    let read = scene.refer();
    scene.found(&read, &[WRONG, DIGEST]);
    assert_eq!(scene.pages(), [1]);
    assert_eq!(scene.told(), (1, vec![0]));
    let contents = Arc::new(vec![0_u8; PAGE_SIZE]) as Contents;
    let both = vec![(key(0), 0), (key(1), 0)];
    scene.placement.fill(BATCH, &contents, both).unwrap();
    assert_eq!(scene.pages(), [0]);
}

#[test]
fn the_source_may_be_faster() {
    let scene = Scene::new();
    let read = scene.refer();
    scene.data(&[1]);
    scene.placement.zero(0, 0, 1, 0).unwrap();
    assert_eq!(scene.pages(), [1, 0]);
    assert_eq!(scene.told(), (2, vec![]));
    scene.found(&read, &[DIGEST, DIGEST]);
    assert!(scene.pages().is_empty());
}

#[test]
fn no_reference_to_what_is_here() {
    let scene = Scene::new();
    let place = Place { disk: 0, sector: 8 };
    let refer = |page| {
        let (mut index, mut needed) = (0, Vec::new());
        let digest = [DIGEST];
        let placement = &scene.placement;
        placement.references(BATCH, &mut index, key(page), place, &digest, &mut needed)
    };
    assert!(refer(3).is_ok());
    // Twice; never forgotten; outside of memory.
    for page in [3, 4, 8, u64::MAX] {
        assert!(refer(page).is_err(), "{page}");
    }
    // The end comes when all is there.
    scene.placement.close().unwrap();
    scene.placement.open(SectionKind::End).unwrap();
    assert!(scene.placement.close().is_err());
}

#[test]
fn a_package_without_an_end_is_refused() {
    let output = Output::new();
    output.push(Piece::Raw(vec![0; 100]));
    output.push(Piece::Hold);
    let mut pieces = 0;
    let (refused, most) = transhume_testing::peak(|| {
        loop {
            // What is before it still goes to QEMU.
            if pieces == 10 {
                assert!(matches!(output.take(), Ok(Piece::Raw(bytes)) if bytes.len() == 100));
            }
            if let Err(error) = output.wait_for_room() {
                break error;
            }
            output.push(Piece::Raw(vec![0; 1 << 20]));
            pieces += 1;
        }
    });
    assert!(refused.to_string().contains("package"), "{refused}");
    assert!(
        pieces > 20 && most < 26 << 20,
        "{pieces} pieces, {most} bytes"
    );
    output.release();
    assert!(matches!(output.take(), Ok(Piece::Hold)));
    assert!(matches!(output.take(), Ok(Piece::Raw(_))));
    assert!(output.wait_for_room().is_ok());
}

#[test]
fn contents_count_until_nobody_refers_to_them() {
    let output = Arc::new(Output::new());
    // One page of each goes to QEMU, and all of each is kept for it.
    let mut kept = 0;
    while kept < 24 {
        output.wait_for_room().unwrap();
        let contents = output.keep(vec![0_u8; 1 << 20], 1 << 20);
        let pages = vec![(key(kept), 0)];
        output.push(Piece::Pages { contents, pages });
        kept += 1;
    }
    let waiting = Arc::clone(&output);
    let waits = std::thread::spawn(move || waiting.wait_for_room().is_ok());
    let taken = output.take().unwrap();
    assert!(
        matches!(&taken, Piece::Pages { contents, .. } if (**contents).as_ref().len() == 1 << 20)
    );
    drop(taken);
    assert!(waits.join().unwrap());
}

#[test]
fn more_references_than_an_honest_source_has_open_are_refused() {
    let output = Arc::new(Output::new());
    let placement = Placement::new(output, Arc::default(), 1, None, false, None);
    let pages = 1 << 22;
    let blocks = vec![Block {
        name: "pc.ram".to_owned(),
        length: pages * PAGE_SIZE as u64,
    }];
    placement.set_blocks(2, blocks).unwrap();
    placement.open(SectionKind::Part).unwrap();
    let ((refused, referred), most) = transhume_testing::peak(|| {
        let digests = [DIGEST; 128];
        for batch in 0.. {
            let page = batch * 128;
            let place = Place {
                disk: 0,
                // Far from one another: each page is a read.
                sector: page << 12,
            };
            let (mut index, mut needed) = (0, Vec::new());
            let referred =
                placement.references(batch, &mut index, key(page), place, &digests, &mut needed);
            if let Err(error) = referred {
                return (error, page);
            }
            placement.demand(&mut needed);
        }
        unreachable!("there is no end")
    });
    assert!(refused.to_string().contains("references"), "{refused}");
    assert!(
        referred < 100_000 && most < 32 << 20,
        "{referred} pages, {most} bytes"
    );
}
