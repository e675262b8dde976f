//! The switch to post-copy in QEMU's stream: pages to forget, the package of devices, a ping.

use transhume_protocol::memory::Discard;
use transhume_protocol::qemu::{Command, CommandKind};

use super::stream_reader::StreamReader;
use crate::error::RelayError;
use crate::progress::Counter;
use crate::send::buffers::Buffer;
use crate::send::post_copy_switch::Switch;

impl StreamReader {
    /// Takes a command of QEMU's.
    pub(crate) fn command(
        &mut self,
        command: &Command<'_>,
        bytes: &[u8],
        buffer: &Buffer,
    ) -> Result<(), RelayError> {
        match (command.kind, self.collector.switch) {
            (CommandKind::PostcopyRamDiscard, _) => {
                self.leave_pre_copy(buffer)?;
                self.discard(command)?;
            }
            (CommandKind::Packaged, _) => {
                self.leave_pre_copy(buffer)?;
                self.collector.records().package();
                self.collector.records().raw(bytes);
                self.collector.switch = Switch::Package(command.package_len().unwrap_or_default());
            }
            (CommandKind::Ping, Switch::Package(0)) => {
                self.collector.records().raw(bytes);
                self.end_package(buffer)?;
            }
            _ => self.collector.records().raw(bytes),
        }
        Ok(())
    }

    /// The VM is paused: what the destination was only referred to goes to it before it forgets anything.
    fn leave_pre_copy(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        if self.collector.switch.has_begun() {
            return Ok(());
        }
        if !self.collector.shared().is_armed() {
            return Err(RelayError::Unasked);
        }
        self.collector.dispatch_copy(buffer)?;
        self.settle()?;
        self.collector.switch = Switch::Discards;
        self.collector.reading.ledger().leave_pre_copy();
        self.collector.shared().flow.end_reports();
        self.collector.shared().set_memory_sent();
        Ok(())
    }

    fn discard(&mut self, command: &Command<'_>) -> Result<(), RelayError> {
        let Discard { block, ranges } = Discard::read(command, self.decoder.blocks())?;
        for (page, count) in ranges {
            self.collector
                .shared()
                .progress
                .add(Counter::PostCopyPages, count);
            self.collector.shared().order.owe(block, page, count);
            let mut done = 0;
            while done < count {
                let some = u32::try_from(count - done).unwrap_or(u32::MAX);
                self.collector.records().discard(block, page + done, some);
                done += u64::from(some);
            }
        }
        Ok(())
    }

    /// QEMU has written the whole package; until 10.1 it cannot run the VM any more.
    fn end_package(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        self.collector.dispatch_copy(buffer)?;
        let shared = self.collector.shared();
        if !shared.keeps_until_loaded() {
            // The commit overtakes what waits.
            shared.flow.drain()?;
            shared.hand_over()?;
        }
        self.collector.switch = Switch::Done;
        Ok(())
    }
}
