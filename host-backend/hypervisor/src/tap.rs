//! Tap devices, opened here and handed to QEMU, which then needs no right to configure networks.

use nix::libc;
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `linux/if_tun.h`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// `linux/sockios.h`.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
/// As qemu-bridge-helper names them; the kernel puts a number in.
const PATTERN: &str = "tap%d";
/// A bridge takes the lowest address of what is plugged into it for its own: this is never that.
const HIGH: libc::c_char = libc::c_char::from_ne_bytes([0xfe]);

/// Attaches to a tap device that is there.
///
/// # Errors
/// Of the kernel: if there is none, or somebody else has it.
pub(super) fn open(name: &str) -> io::Result<OwnedFd> {
    // TUNSETIFF would make one.
    nix::net::if_::if_nametoindex(name)?;
    attach(name).map(|(tap, _)| tap.into())
}

/// Makes a tap device that goes when it is closed, and plugs it into a bridge: what qemu-bridge-helper does.
///
/// # Errors
/// Of the kernel: if there is no such bridge, or it is not ours to configure.
pub(super) fn on_bridge(bridge: &str) -> io::Result<OwnedFd> {
    nix::net::if_::if_nametoindex(bridge)?;
    let (tap, mut request) = attach(PATTERN)?;
    let name = request.ifr_name;
    // SAFETY: the arguments are numbers; the result is checked.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut of_bridge = named(bridge)?;
    call(&socket, libc::SIOCGIFMTU, &mut of_bridge)?;
    of_bridge.ifr_name = name;
    call(&socket, libc::SIOCSIFMTU, &mut of_bridge)?;
    call(&socket, libc::SIOCGIFHWADDR, &mut request)?;
    // SAFETY: the kernel has filled in this member.
    unsafe { request.ifr_ifru.ifru_hwaddr.sa_data[0] = HIGH };
    call(&socket, libc::SIOCSIFHWADDR, &mut request)?;
    let mut plug = named(bridge)?;
    // SAFETY: the name is a C string, as the kernel gave it.
    let tap_name = unsafe { CStr::from_ptr(name.as_ptr()) };
    let tap_index = nix::net::if_::if_nametoindex(tap_name)?;
    plug.ifr_ifru.ifru_ifindex = tap_index.cast_signed();
    call(&socket, SIOCBRADDIF, &mut plug)?;
    let mut up = request;
    call(&socket, libc::SIOCGIFFLAGS, &mut up)?;
    // SAFETY: the kernel has filled in this member.
    unsafe { up.ifr_ifru.ifru_flags |= flags(libc::IFF_UP) };
    call(&socket, libc::SIOCSIFFLAGS, &mut up)?;
    Ok(tap.into())
}

fn attach(name: &str) -> io::Result<(File, libc::ifreq)> {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = named(name)?;
    // With headers for offloads, as QEMU opens it by itself: whether they are there is part of a VM's state.
    request.ifr_ifru.ifru_flags = flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    call(&tap, TUNSETIFF, &mut request)?;
    Ok((tap, request))
}

/// All of them are in the lower 16 bits.
fn flags(flags: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(flags).unwrap_or_default()
}

fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: it is made of numbers.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

fn call(descriptor: &impl AsRawFd, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all of these requests take a `struct ifreq`, and write no more than that.
    if unsafe { libc::ioctl(descriptor.as_raw_fd(), what, request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
