//! What comes from disks: references of the source's, reads for them and ahead of them, and what was found.

use super::{
    Awaited, Before, Contents, Digest, Entry, MAX_AWAITED, PAGE_SIZE, PageKey, Place, Placement,
    PoisonError, Read, RelayError, SECTORS_PER_PAGE, State, Verdicts, join,
};

impl Placement {
    /// The source refers to a disk for pages of one batch, numbered from `index` on. Returns the reads
    /// that are needed for them in `needed`.
    pub(crate) fn references(
        &self,
        batch: u64,
        index: &mut u32,
        first: PageKey,
        place: Place,
        digests: &[Digest],
        needed: &mut Vec<(Place, PageKey)>,
    ) -> Result<(), RelayError> {
        let mut verdicts = Verdicts::default();
        let mut state = self.lock();
        state.in_section()?;
        let was_full = self.is_full(&state);
        for (n, digest) in (0_u64..).zip(digests) {
            let key = PageKey {
                block: first.block,
                page: first.page.saturating_add(n),
            };
            let known = if let Some(missing) = &state.missing {
                if !missing.contains(key) || state.awaited.contains_key(&key) {
                    return Err(RelayError::Misplaced("reference for a page that is here"));
                }
                // What was read ahead was forgotten.
                None
            } else {
                let known = state.ahead.get(&key).copied();
                if let Before::Something(_) = state.replace(key)? {
                    return Err(RelayError::Misplaced(
                        "reference for a page that came before",
                    ));
                }
                known
            };
            let mut awaited = Awaited {
                batch,
                index: *index,
                digest: *digest,
                asked: false,
            };
            *index += 1;
            let sector = n
                .checked_mul(SECTORS_PER_PAGE)
                .and_then(|sectors| place.sector.checked_add(sectors));
            match (known, sector) {
                (Some(known), _) if known == *digest => verdicts.settle(awaited),
                (None, Some(sector)) if usize::from(place.disk) < self.disks => {
                    state.awaited.insert(key, awaited);
                    if !state.block(key)?.reading.contains(key.page) {
                        state.block(key)?.reading.insert(key.page);
                        needed.push((
                            Place {
                                disk: place.disk,
                                sector,
                            },
                            key,
                        ));
                    }
                }
                _ => {
                    // The disk had something else, or the place is none.
                    verdicts.want(&mut awaited);
                    state.awaited.insert(key, awaited);
                }
            }
        }
        self.make_room_known(was_full, &state);
        let awaited = state.awaited.len();
        drop(state);
        self.reply(verdicts);
        if awaited > MAX_AWAITED {
            return Err(RelayError::Misplaced("more references than may be open"));
        }
        Ok(())
    }

    /// Hands the reads for a batch's references to the disk readers.
    pub(crate) fn demand(&self, needed: &mut Vec<(Place, PageKey)>) {
        if needed.is_empty() {
            return;
        }
        let reads = join(needed);
        needed.clear();
        let mut state = self.lock();
        state.plan.demand(reads);
        if state.plan.demanded() > 2 * MAX_AWAITED {
            // The disk is slow, and the source has sent the pages itself.
            let State {
                plan,
                awaited,
                blocks,
                ..
            } = &mut *state;
            plan.keep_demands(|key| {
                let keep = awaited.contains_key(&key);
                if let Some(block) = blocks.get_mut(usize::from(key.block))
                    && !keep
                {
                    block.reading.remove(key.page);
                }
                keep
            });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until the source takes what a disk reader may have to say.
    pub(crate) fn wait_for_replies(&self) -> Result<(), RelayError> {
        self.replies.wait_for_room()
    }

    /// What a disk reader should read next; waits for it.
    pub(crate) fn next_read(&self) -> Result<Read, RelayError> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return Err(RelayError::Stopped);
            }
            if let Some(read) = state.plan.next_demand() {
                return Ok(read);
            }
            if state.may_read_ahead && !self.is_full(&state) {
                let State {
                    plan,
                    blocks,
                    ahead,
                    ..
                } = &mut *state;
                let wanted = |key: PageKey| {
                    blocks.get(usize::from(key.block)).is_some_and(|block| {
                        !block.spoken.contains(key.page) && !block.reading.contains(key.page)
                    }) && !ahead.contains_key(&key)
                };
                if let Some(read) = plan.next_ahead(wanted) {
                    for &(key, _) in &read.targets {
                        state.block(key)?.reading.insert(key.page);
                    }
                    return Ok(read);
                }
                if plan.open_window(wanted) {
                    // Others have their turn between windows.
                    drop(state);
                    state = self.lock();
                    continue;
                }
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes what a disk reader found: the memory and a digest a target, or nothing when the read
    /// failed.
    pub(crate) fn found(
        &self,
        read: &Read,
        found: Option<(Contents, Vec<Digest>)>,
    ) -> Result<(), RelayError> {
        let mut verdicts = Verdicts::default();
        let mut placed = Vec::new();
        let mut state = self.lock();
        for (n, &(key, index)) in read.targets.iter().enumerate() {
            state.block(key)?.reading.remove(key.page);
            let digest = found.as_ref().and_then(|(_, digests)| digests.get(n));
            // A read is at most READ_PAGES long.
            let offset = u32::try_from(index * PAGE_SIZE).unwrap_or(u32::MAX);
            if let Entry::Occupied(mut awaited) = state.awaited.entry(key) {
                if digest == Some(&awaited.get().digest) {
                    verdicts.settle(awaited.remove());
                    if state
                        .missing
                        .as_mut()
                        .is_none_or(|missing| missing.take(key))
                    {
                        placed.push((key, offset));
                    }
                } else {
                    verdicts.want(awaited.get_mut());
                }
            } else if let Some(digest) = digest
                && state.may_read_ahead
                && !state.block(key)?.spoken.contains(key.page)
            {
                state.ahead.insert(key, *digest);
                placed.push((key, offset));
            }
        }
        if let Some((contents, _)) = found {
            self.place(&state, &contents, placed)?;
        }
        drop(state);
        self.changed.notify_all();
        self.reply(verdicts);
        Ok(())
    }
}
