//! A network device's packets as they are, in and out (`packet(7)`).

use crate::{Error, Result};
use nix::libc;
use nix::net::if_::if_nametoindex;
use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `PACKET_VNET_HDR` of `linux/if_packet.h`: each packet begins with a `virtio_net_hdr`, which says where its checksum
/// is still to be put and into what pieces it is still to be cut. So segments of 64 KiB pass whole.
const PACKET_VNET_HDR: c_int = 15;
/// The longest packet with its headers.
pub(super) const LONGEST: usize = (64 << 10) + 256;
/// What the kernel may hold for a reader that is late, in bytes.
const HELD: c_int = 32 << 20;

#[expect(
    clippy::cast_possible_truncation,
    reason = "constants of the interface that fit"
)]
mod numbers {
    use super::{c_int, libc, size_of};
    pub(super) const FAMILY: u16 = libc::AF_PACKET as u16;
    pub(super) const EVERYTHING: u16 = libc::ETH_P_ALL as u16;
    pub(super) const INT_SIZE: libc::socklen_t = size_of::<c_int>() as libc::socklen_t;
    pub(super) const ADDRESS_SIZE: libc::socklen_t =
        size_of::<libc::sockaddr_ll>() as libc::socklen_t;
}

/// A device. Packets that are sent by it are not read from it.
#[derive(Debug)]
pub(super) struct Device {
    socket: File,
}

fn set(socket: &OwnedFd, level: c_int, option: c_int, value: c_int) -> Result<()> {
    // SAFETY: the option's value is an int, which outlives the call, and its size is given.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            numbers::INT_SIZE,
        )
    };
    nix::errno::Errno::result(answer)
        .map(drop)
        .map_err(Error::system("set an option of a packet socket"))
}

impl Device {
    /// A device of this thread's namespace, by name.
    pub(super) fn open(name: &str) -> Result<Self> {
        let index = if_nametoindex(name).map_err(Error::system(format!("find {name}")))?;
        // SAFETY: socket takes no pointers. Without a protocol it hears nothing before it is bound.
        let made = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                0,
            )
        };
        let made =
            nix::errno::Errno::result(made).map_err(Error::system("open a packet socket"))?;
        // SAFETY: the descriptor is fresh and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(made) };
        set(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, HELD)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, HELD)?;
        let address = libc::sockaddr_ll {
            sll_family: numbers::FAMILY,
            sll_protocol: numbers::EVERYTHING.to_be(),
            sll_ifindex: index.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a whole sockaddr_ll, outlives the call, and its size is given.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                numbers::ADDRESS_SIZE,
            )
        };
        nix::errno::Errno::result(bound).map_err(Error::system(format!("listen to {name}")))?;
        Ok(Self {
            socket: File::from(socket),
        })
    }

    /// The next packet, if there is one: how long it is.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.socket).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a packet. One that finds no room is lost, as on any wire.
    pub(super) fn send(&self, packet: &[u8]) {
        let _ = (&self.socket).write(packet);
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
