//! What another host says for people, bounded and made safe where it comes in: nobody behind this room sees anything
//! else of it.

use transhume_protocol::link::{Control, LinkError, decode_control};

use transhume_base::text::line;

/// Reasons that are kept, and bytes of each.
const MAX_REASONS: usize = 16;
const MAX_REASON: usize = 2048;
/// Bytes of a name: of a host, a VM, a disk, a feature of a processor.
const MAX_NAME: usize = 128;
/// Features of a processor, and disks, that are looked at.
const MAX_NAMES: usize = 4096;
/// Virtual CPUs whose stalls are told.
const MAX_CPUS: usize = 1024;

/// Decodes a control message. The definition in an offer is as it was: its own room checks it.
pub fn decode(payload: &[u8]) -> Result<Control, LinkError> {
    let mut message = decode_control(payload)?;
    match &mut message {
        Control::Offer(offer) => {
            name(&mut offer.from);
            name(&mut offer.qemu_package);
            if offer.disks.len() > MAX_NAMES
                || offer.cpu_flags.len() > MAX_NAMES
                || offer.virtio.len() > MAX_NAMES
            {
                return Err(LinkError::OutOfBounds("number of names in an offer"));
            }
            offer.disks.iter_mut().for_each(|disk| name(&mut disk.id));
            offer.cpu_flags.iter_mut().for_each(name);
            for device in &mut offer.virtio {
                reason(&mut device.path);
                name(&mut device.kind);
            }
        }
        Control::Refused { reasons } => {
            let more = reasons.len().saturating_sub(MAX_REASONS);
            reasons.truncate(MAX_REASONS);
            reasons.iter_mut().for_each(reason);
            if more > 0 {
                reasons.push(format!("(and {more} more)"));
            }
        }
        Control::Abort { reason: said } => reason(said),
        Control::Ready { no_post_copy, .. } => no_post_copy.iter_mut().for_each(reason),
        Control::Query { vm, .. } | Control::Resume { vm, .. } | Control::Locate { vm } => {
            name(vm);
        }
        Control::Resumed { blocks, .. } => blocks.iter_mut().for_each(|(block, _)| {
            // QEMU's names are at most 255 bytes long.
            *block = line(block, 255);
        }),
        Control::Stalled(stalls) => stalls.cpus_ms.truncate(MAX_CPUS),
        Control::Accepted {
            no_post_copy,
            storage,
            ..
        } => {
            no_post_copy.iter_mut().for_each(reason);
            for node in storage.disks.iter_mut().flatten() {
                reason(&mut node.path);
                reason(&mut node.mounted);
                node.identifiers.iter_mut().for_each(reason);
            }
        }
        Control::Prepare { .. }
        | Control::Commit
        | Control::Running
        | Control::Outcome { .. }
        | Control::Join { .. }
        | Control::Joined { .. }
        | Control::KeepWaiting
        | Control::Loaded
        | Control::Held
        | Control::AlreadyComplete
        | Control::Located(_)
        | Control::Compare(_)
        | Control::Compared(_)
        | Control::GuestEnded(_)
        | Control::ClockWanted
        | Control::Clock { .. }
        | Control::GuestClock(_) => {}
    }
    Ok(message)
}

fn reason(text: &mut String) {
    *text = line(text, MAX_REASON);
}

fn name(text: &mut String) {
    *text = line(text, MAX_NAME);
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_protocol::link::{
        MAX_SMALL_PAYLOAD, Offer, OfferedVirtio, Stalls, encode_control,
    };
    use transhume_testing::some_offer;

    fn heard(message: &Control) -> Control {
        decode(&encode_control(message).expect("a message")).expect("a message")
    }

    #[test]
    fn a_reason_cannot_draw_on_the_terminal() {
        let said = "no\u{1b}]0;root\u{7}\u{202e}\r\nJob 1: completed".to_owned();
        let clean = "no?]0;root??? | Job 1: completed";
        let Control::Abort { reason } = heard(&Control::Abort {
            reason: said.clone(),
        }) else {
            panic!("another message");
        };
        assert_eq!(reason, clean);
        let Control::Refused { reasons } = heard(&Control::Refused {
            reasons: vec![said; 40],
        }) else {
            panic!("another message");
        };
        assert_eq!(reasons.len(), MAX_REASONS + 1);
        assert_eq!((&*reasons[0], &*reasons[16]), (clean, "(and 24 more)"));
    }

    /// A device's kind stands in the message that its queue is too long.
    #[test]
    fn a_device_cannot_draw_on_the_terminal() {
        let device = OfferedVirtio {
            path: "/machine/\u{1b}[2J".to_owned(),
            kind: format!("virtio-\u{1b}[2J\n{}", "x".repeat(1000)),
            lengths: vec![128],
        };
        let offer = Offer {
            virtio: vec![device],
            ..some_offer()
        };
        let Control::Offer(offer) = heard(&Control::Offer(Box::new(offer))) else {
            panic!("another message");
        };
        let [device] = &offer.virtio[..] else {
            panic!("another number of devices");
        };
        assert_eq!(device.path, "/machine/?[2J");
        assert!(device.kind.starts_with("virtio-?[2J | x") && device.kind.len() < 2 * MAX_NAME);
    }

    #[test]
    fn the_longest_words_are_short_in_a_job() {
        let long = "\u{1b}".repeat(MAX_SMALL_PAYLOAD - 64);
        let Control::Abort { reason } = heard(&Control::Abort { reason: long }) else {
            panic!("another message");
        };
        assert!(reason.len() < 2 * MAX_REASON, "{}", reason.len());
        let stalls = Stalls {
            // As many as are decoded: each counts as long as it may be.
            cpus_ms: vec![1; 100_000],
            ..Stalls::default()
        };
        let Control::Stalled(stalls) = heard(&Control::Stalled(stalls)) else {
            panic!("another message");
        };
        assert_eq!(stalls.cpus_ms.len(), MAX_CPUS);
    }

    /// A stranger's first message, on a connection that nobody has looked at yet.
    #[test]
    fn no_message_takes_more_than_some_megabytes() {
        // Lists of nothing: a byte each, and some dozen of ours. Of more of them the decoder says that they are too long.
        let reasons = vec![String::new(); 50_000];
        let payload = encode_control(&Control::Refused { reasons }).expect("a message");
        let (decoded, most) = transhume_testing::peak(|| decode(&payload).is_ok());
        assert!(decoded);
        assert!(most < 8 << 20, "{most} bytes");
        let reasons = vec![String::new(); MAX_SMALL_PAYLOAD - 64];
        let refused = encode_control(&Control::Refused { reasons });
        let (refused, most) =
            transhume_testing::peak(|| refused.map(|payload| decode(&payload).is_err()));
        assert!(refused.unwrap_or(true) && most < 8 << 20, "{most} bytes");
    }
}
