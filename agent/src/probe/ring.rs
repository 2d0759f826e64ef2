//! Reads the ring of records.

use std::{
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use aya::maps::{MapData, RingBuf};

/// Rest between two looks at a ring that is in use: short enough that 8 MiB last at a million records
/// a second, long enough that a look finds many.
const BUSY_REST: Duration = Duration::from_millis(4);
/// Longest rest when nothing happens; the kernel side cuts it short when much does.
const IDLE_REST: Duration = Duration::from_millis(50);

/// The records of the kernel side, in order.
pub struct Reader {
    ring: RingBuf<MapData>,
    last_seen: Instant,
}

impl Reader {
    /// Reads `ring`.
    pub fn new(ring: RingBuf<MapData>) -> Self {
        Self { ring, last_seen: Instant::now() }
    }

    /// Hands every waiting record to `take`; returns how many there were. At most `limit`, so that the
    /// caller comes to its other work.
    pub fn drain(&mut self, limit: usize, mut take: impl FnMut(&[u8])) -> usize {
        let mut n = 0;
        while n < limit {
            let Some(record) = self.ring.next() else { break };
            take(&record);
            n += 1;
        }
        if n > 0 {
            self.last_seen = Instant::now();
        }
        n
    }

    /// Rests until it is worth to look again.
    pub fn rest(&self) {
        if self.last_seen.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(BUSY_REST);
            return;
        }
        let mut poll = libc::pollfd { fd: self.ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let ms = libc::c_int::try_from(IDLE_REST.as_millis()).unwrap_or(50);
        // SAFETY: one valid pollfd. An interruption is as good as a time-out.
        unsafe { libc::poll(&raw mut poll, 1, ms) };
    }
}
