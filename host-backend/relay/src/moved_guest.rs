//! The guest of a VM of this host, for what its agent hears after a move.

use std::path::PathBuf;
use std::sync::Arc;

use transhume_guest::MovedGuest;
use transhume_hypervisor::Vm;

/// That of a VM.
pub(crate) fn of(vm: &Arc<Vm>) -> MovedGuest {
    let gone = Arc::clone(vm);
    MovedGuest {
        vm: vm.name().to_owned(),
        socket: vm.agent_socket().map(PathBuf::from),
        note: vm.files().clock_note(),
        is_gone: Arc::new(move || gone.qmp().is_closed()),
    }
}

/// Begins to set a guest's clock right if that is still to be done, as where the daemon ended meanwhile.
pub fn set_clock_right(vm: &Arc<Vm>) {
    of(vm).set_clock_right();
}
