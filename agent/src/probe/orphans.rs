//! Sessions without a socket whose process is gone: nothing on the kernel side ends them, since nobody frees what a
//! killed process leaves.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use agent_ebpf::{PID_MASK, PID_SHIFT, WITHOUT_SOCKET};

/// `BPF_MAP_DELETE_ELEM`, `BPF_MAP_GET_NEXT_KEY` of bpf(2).
const DELETE: libc::c_long = 3;
const NEXT_KEY: libc::c_long = 4;
/// Time between two looks.
const PAUSE: Duration = Duration::from_secs(30);
/// Most keys that are looked at in one go: what a map holds at most.
const MAX_KEYS: usize = 65_536;

/// The map of plaintexts.
#[derive(Debug)]
pub struct Orphans {
    map: OwnedFd,
    next: Instant,
}

impl Orphans {
    /// Looks after `map`.
    #[must_use]
    pub fn new(map: OwnedFd) -> Self {
        Self { map, next: Instant::now() + PAUSE }
    }

    /// Removes the sessions of processes that are not there, from time to time.
    pub fn remove(&mut self, is_there: impl Fn(u32) -> bool) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + PAUSE;
        let mut gone = Vec::new();
        let (mut before, mut key) = (None, 0);
        for _ in 0..MAX_KEYS {
            if self.call(NEXT_KEY, before.as_ref(), Some(&mut key)).is_err() {
                break;
            }
            gone.extend(process(key).filter(|pid| !is_there(*pid)).map(|_| key));
            before = Some(key);
        }
        for key in &gone {
            // One that ended in between is as good as removed.
            let _ = self.call(DELETE, Some(key), None);
        }
        if !gone.is_empty() {
            log::debug!("{} TLS sessions of processes that are gone were removed", gone.len());
        }
    }

    fn call(&self, command: libc::c_long, key: Option<&u64>, next: Option<&mut u64>) -> io::Result<()> {
        #[repr(C)]
        struct Attributes {
            map: u32,
            pad: u32,
            key: u64,
            next: u64,
            flags: u64,
        }
        let mut attributes = Attributes {
            map: u32::try_from(self.map.as_raw_fd()).map_err(io::Error::other)?,
            pad: 0,
            key: key.map_or(0, |key| std::ptr::from_ref(key) as u64),
            next: next.map_or(0, |next| std::ptr::from_mut(next) as u64),
            flags: 0,
        };
        // SAFETY: key and next key are 8 bytes each, as the map's are, and live until the end of the call.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attributes, std::mem::size_of::<Attributes>()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Whose session this is, if it has no socket.
fn process(key: u64) -> Option<u32> {
    (key & WITHOUT_SOCKET != 0).then(|| u32::try_from(key >> PID_SHIFT & PID_MASK).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_in_the_number() {
        assert_eq!(process(WITHOUT_SOCKET | 4_194_303 << PID_SHIFT | 12345), Some(4_194_303));
        assert_eq!(process(3 << 48 | 7), None);
    }
}
