//! Port 0 of a virtio console, without ever waiting for the host.
//!
//! The crate's `VirtIOConsole` waits until the host took what it sends; a host that does not read
//! would stop this guest. This one has one buffer each way on the crate's queues and transport, and
//! says when the buffer is free.

use crate::pci::{self, Identity};
use alloc::boxed::Box;
use alloc::vec;
use transhume_protocol::agent::MAX_FRAME_LEN;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// `VIRTIO_F_VERSION_1`: all this driver needs.
const FEATURES: u64 = 1 << 32;
const INPUT: usize = 1024;

/// The port.
pub(crate) struct Console {
    transport: PciTransport,
    receive: VirtQueue<Identity, 2>,
    transmit: VirtQueue<Identity, 2>,
    input: Box<[u8]>,
    /// The device has `input`.
    awaited: Option<u16>,
    output: Box<[u8]>,
    /// The device has this much of `output`.
    sending: Option<(u16, usize)>,
}

impl Console {
    /// Finds and starts the device.
    pub(crate) fn find() -> Option<Self> {
        let mut transport = pci::find(DeviceType::Console)?;
        transport.set_status(DeviceStatus::empty());
        let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(status);
        let features = transport.read_device_features() & FEATURES;
        transport.write_driver_features(features);
        transport.set_status(status | DeviceStatus::FEATURES_OK);
        let receive = VirtQueue::new(&mut transport, RECEIVE, false, false).ok()?;
        let transmit = VirtQueue::new(&mut transport, TRANSMIT, false, false).ok()?;
        transport.set_status(status | DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK);
        Some(Self {
            transport,
            receive,
            transmit,
            input: vec![0; INPUT].into(),
            awaited: None,
            output: vec![0; MAX_FRAME_LEN].into(),
            sending: None,
        })
    }

    /// Passes what came in to `take`.
    pub(crate) fn receive(&mut self, take: impl FnOnce(&[u8])) {
        if let Some(token) = self.awaited
            && self.receive.peek_used() == Some(token)
        {
            // SAFETY: the buffer that was added under this token, untouched since.
            let length = unsafe { self.receive.pop_used(token, &[], &mut [&mut self.input]) };
            self.awaited = None;
            let length = length.map_or(0, |length| length as usize).min(INPUT);
            take(&self.input[..length]);
        }
        if self.awaited.is_none() {
            // SAFETY: the buffer is not touched before its token is popped, and is never freed.
            self.awaited = unsafe { self.receive.add(&[], &mut [&mut self.input]) }.ok();
            if self.receive.should_notify() {
                self.transport.notify(RECEIVE);
            }
        }
    }

    /// The buffer for the next bytes to send; `None` while the host has not taken the last ones.
    pub(crate) fn output(&mut self) -> Option<&mut [u8]> {
        if let Some((token, length)) = self.sending
            && self.transmit.peek_used() == Some(token)
        {
            // SAFETY: the buffer that was added under this token, untouched since.
            let _ = unsafe {
                self.transmit
                    .pop_used(token, &[&self.output[..length]], &mut [])
            };
            self.sending = None;
        }
        self.sending.is_none().then_some(&mut self.output)
    }

    /// Sends the first `length` bytes of the buffer that [`Self::output`] gave.
    pub(crate) fn send(&mut self, length: usize) {
        if self.sending.is_some() || length == 0 {
            return;
        }
        // SAFETY: `output` gives the buffer out only after the token was popped; it is never freed.
        let added = unsafe { self.transmit.add(&[&self.output[..length]], &mut []) };
        self.sending = added.ok().map(|token| (token, length));
        if self.transmit.should_notify() {
            self.transport.notify(TRANSMIT);
        }
    }
}
