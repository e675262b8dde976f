//! Who has a VM that goes over in the middle of its stream, as post-copy does.
//!
//! ```text
//! Local ──arm──► Armed ──commit──► Committed         QEMU before 10.2: when it has written the package
//!                  └──tell_loaded──► Told ──commit──► Committed         later ones
//! Local, Armed, Told ──abort──► Aborted
//! ```
//!
//! Contract: the source runs the VM, or can again, in `Local`, `Armed` and `Aborted`; the destination has it in
//! `Committed`, for good. In `Told` the source's QEMU alone knows, and is asked. The journal says before a step that it
//! may come; nothing leads out of `Committed` or `Aborted`.

use std::time::Instant;

use crate::error::RelayError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It stays here whatever the stream says.
    Local,
    /// The stream may hand it over.
    Armed,
    /// QEMU was told that the devices are loaded at the destination: whether it can still run the VM, it says.
    Told,
    /// It was handed over.
    Committed(Instant),
    /// It stays here, for good.
    Aborted,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct HandOver {
    stage: Stage,
    /// The stream could hand it over at one time.
    was_armed: bool,
    /// The destination has loaded the devices.
    loaded: bool,
    /// The hypervisor keeps the VM until it is told that its devices are loaded at the destination.
    keeps_until_loaded: bool,
}

impl HandOver {
    /// Of a VM that runs here.
    pub(crate) fn new(keeps_until_loaded: bool) -> Self {
        Self {
            stage: Stage::Local,
            was_armed: false,
            loaded: false,
            keeps_until_loaded,
        }
    }

    /// The VM was handed over before this relay began.
    pub(crate) fn set_committed(&mut self) {
        self.stage = Stage::Committed(Instant::now());
    }

    /// From here on the stream may hand the VM over.
    ///
    /// # Errors
    /// If it was decided before.
    pub(crate) fn arm(&mut self) -> Result<(), RelayError> {
        if self.stage != Stage::Local {
            return Err(RelayError::Stopped);
        }
        self.stage = Stage::Armed;
        self.was_armed = true;
        Ok(())
    }

    /// The destination has loaded the devices.
    pub(crate) fn set_loaded(&mut self) {
        self.loaded = true;
    }

    /// Before the hypervisor is told so: from then on it may be unable to run the VM.
    ///
    /// # Errors
    /// If the stream may not hand it over, or it was decided before.
    pub(crate) fn tell_loaded(&mut self) -> Result<(), RelayError> {
        if self.stage != Stage::Armed || !self.keeps_until_loaded {
            return Err(RelayError::Stopped);
        }
        self.stage = Stage::Told;
        Ok(())
    }

    /// Before the destination is told that the VM is its own.
    ///
    /// # Errors
    /// If the hypervisor can still run it, or it was decided that it stays.
    pub(crate) fn commit(&mut self) -> Result<(), RelayError> {
        let last = if self.keeps_until_loaded {
            Stage::Told
        } else {
            Stage::Armed
        };
        if self.stage != last {
            return Err(RelayError::Stopped);
        }
        self.stage = Stage::Committed(Instant::now());
        Ok(())
    }

    /// Keeps the VM here. Returns when it was handed over, if it is too late.
    pub(crate) fn abort(&mut self) -> Option<Instant> {
        let committed = self.committed();
        if committed.is_none() {
            self.stage = Stage::Aborted;
        }
        committed
    }

    /// When the VM was handed over, if it was.
    pub(crate) fn committed(&self) -> Option<Instant> {
        match self.stage {
            Stage::Committed(at) => Some(at),
            _ => None,
        }
    }

    /// Whether the stream may hand the VM over.
    pub(crate) fn is_armed(&self) -> bool {
        self.stage == Stage::Armed
    }

    /// Whether the destination has loaded the devices.
    pub(crate) fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Whether the hypervisor keeps the VM until it is told that its devices are loaded at the destination.
    pub(crate) fn keeps_until_loaded(&self) -> bool {
        self.keeps_until_loaded
    }

    /// Whether the destination may hold the VM, loaded, and the VM may still stay here.
    pub(crate) fn may_be_held(&self) -> bool {
        self.keeps_until_loaded && self.was_armed && self.committed().is_none()
    }

    /// Whether the hypervisor has to be told something before it can take the VM back.
    pub(crate) fn waits_for_word(&self) -> bool {
        self.may_be_held() && self.stage != Stage::Told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Arm,
        Loaded,
        Tell,
        Commit,
        Abort,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Arm),
            Just(Step::Loaded),
            Just(Step::Tell),
            Just(Step::Commit),
            Just(Step::Abort)
        ];
        prop::collection::vec(step, 0..12)
    }

    proptest! {
        #[test]
        fn one_host_has_it_whatever_is_tried(keeps: bool, steps in steps()) {
            let mut hand_over = HandOver::new(keeps);
            let (mut armed, mut told, mut aborted) = (false, false, false);
            for step in steps {
                let before = hand_over.stage;
                match step {
                    Step::Arm => armed |= hand_over.arm().is_ok(),
                    Step::Loaded => hand_over.set_loaded(),
                    Step::Tell => told |= hand_over.tell_loaded().is_ok(),
                    Step::Commit => {
                        let committed = hand_over.commit().is_ok();
                        prop_assert!(!committed || (armed && told == keeps && !aborted));
                    }
                    Step::Abort => {
                        let was = hand_over.committed();
                        prop_assert_eq!(hand_over.abort(), was);
                        aborted |= was.is_none();
                    }
                }
                // Decided is decided.
                if matches!(before, Stage::Committed(_) | Stage::Aborted) {
                    prop_assert_eq!(hand_over.stage, before);
                }
                prop_assert!(!(aborted && hand_over.committed().is_some()));
                prop_assert!(!hand_over.waits_for_word() || hand_over.may_be_held());
            }
        }
    }

    #[test]
    fn a_hypervisor_that_keeps_it_is_told_first() {
        let mut keeps = HandOver::new(true);
        keeps.arm().unwrap();
        assert!(keeps.commit().is_err() && keeps.may_be_held() && keeps.waits_for_word());
        keeps.tell_loaded().unwrap();
        assert!(keeps.may_be_held() && !keeps.waits_for_word());
        keeps.commit().unwrap();
        assert!(keeps.abort().is_some() && !keeps.may_be_held());
        let mut does_not = HandOver::new(false);
        does_not.arm().unwrap();
        assert!(does_not.tell_loaded().is_err());
        does_not.commit().unwrap();
    }
}
