//! New executable mappings of all processes, as the kernel tells perf of them: one software event on each
//! CPU that counts nothing. Asks for PERFMON alone, costs nothing where nothing is mapped.
//!
//! Layouts: perf_event_open(2), a stable ABI.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::info::page_size;

/// Bytes of each CPU's ring; a power of two of pages of 4 KiB and of 64 KiB.
const RING: usize = 128 << 10;
/// Offsets of `data_head` and `data_tail` in `struct perf_event_mmap_page`.
const HEAD: usize = 1024;
const TAIL: usize = 1032;
/// `PERF_RECORD_LOST`, `PERF_RECORD_MMAP2`.
const LOST: u32 = 2;
const MMAP2: u32 = 10;
/// Offset of the file's name in a `PERF_RECORD_MMAP2`.
const NAME: usize = 72;
/// Bits of `struct perf_event_attr`: exclude_kernel, mmap, watermark, mmap2.
const BITS: u64 = 1 << 5 | 1 << 8 | 1 << 14 | 1 << 23;

/// A process mapped a file to run it.
#[derive(Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Process.
    pub pid: u32,
    /// The file, as the process names it.
    pub path: String,
}

/// The events of all CPUs.
pub struct Mappings {
    rings: Vec<Ring>,
}

struct Ring {
    fd: OwnedFd,
    pages: *mut u8,
    /// Bytes of a page: the first is the header.
    page: usize,
}

// SAFETY: the pages are this value's own.
unsafe impl Send for Ring {}

impl Mappings {
    /// Starts to listen.
    ///
    /// # Errors
    /// The kernel's: `EACCES` without CAP_PERFMON, `EMFILE` and the like.
    pub fn open() -> io::Result<Self> {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
        let mut rings = Vec::new();
        for range in online.trim().split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let parse = |text: &str| text.parse::<i32>().map_err(io::Error::other);
            for cpu in parse(first)?..=parse(last)? {
                rings.push(Ring::open(cpu)?);
            }
        }
        Ok(Self { rings })
    }

    /// Waits at most `time` and hands over what came. True when some was lost.
    pub fn wait(&mut self, time: Duration, mut take: impl FnMut(Mapping)) -> bool {
        let mut polls: Vec<libc::pollfd> = self
            .rings
            .iter()
            .map(|r| libc::pollfd { fd: r.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 })
            .collect();
        let ms = libc::c_int::try_from(time.as_millis()).unwrap_or(100);
        // SAFETY: as many entries as are said. An interruption is as good as a time-out.
        unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, ms) };
        let mut lost = false;
        for ring in &mut self.rings {
            lost |= ring.drain(&mut take);
        }
        lost
    }
}

impl Ring {
    fn open(cpu: i32) -> io::Result<Self> {
        // struct perf_event_attr, version 5: type, size, config, period, sample type, read format, bits,
        // wake-up at the first byte.
        let mut attributes = [0u64; 14];
        attributes[0] = 1 | 112 << 32;
        attributes[1] = 9;
        attributes[5] = BITS;
        attributes[6] = 1;
        // SAFETY: the struct is as long as it says.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), -1, cpu, -1, 8 /* close on exec */)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).map_err(io::Error::other)?) };
        let page = page_size();
        // SAFETY: a new mapping.
        let pages = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                page + RING,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if pages == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, pages: pages.cast(), page })
    }

    fn drain(&mut self, take: &mut impl FnMut(Mapping)) -> bool {
        // SAFETY: both lie in the first page, aligned; the kernel writes the first, this side the second.
        let (head, tail) = unsafe {
            (AtomicU64::from_ptr(self.pages.add(HEAD).cast()), AtomicU64::from_ptr(self.pages.add(TAIL).cast()))
        };
        let end = head.load(Ordering::Acquire);
        let mut at = tail.load(Ordering::Relaxed);
        let mut lost = false;
        while at < end {
            let header = self.copy(at, 8);
            let size = usize::from(u16::from_le_bytes([header[6], header[7]]));
            if size < 8 {
                at = end;
                break;
            }
            let record = self.copy(at, size);
            lost |= kind(&record) == LOST;
            if let Some(mapping) = parse(&record) {
                take(mapping);
            }
            at += size as u64;
        }
        tail.store(at, Ordering::Release);
        lost
    }

    fn copy(&self, at: u64, len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| {
                let place = self.page + (at as usize + i) % RING;
                // SAFETY: within the ring's pages.
                unsafe { self.pages.add(place).read_volatile() }
            })
            .collect()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`, used by nothing else.
        unsafe { libc::munmap(self.pages.cast(), self.page + RING) };
    }
}

fn kind(record: &[u8]) -> u32 {
    record.get(..4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Reads a record; `None` where it is of another kind, or of no file.
fn parse(record: &[u8]) -> Option<Mapping> {
    if kind(record) != MMAP2 {
        return None;
    }
    let pid = u32::from_ne_bytes(record.get(8..12)?.try_into().ok()?);
    let name = record.get(NAME..)?;
    let name = &name[..memchr::memchr(0, name)?];
    (name.first() == Some(&b'/') && !name.starts_with(b"//"))
        .then(|| Mapping { pid, path: String::from_utf8_lossy(name).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_read() {
        let mut record = vec![0u8; NAME];
        record[0] = 10;
        record[8] = 77;
        record.extend_from_slice(b"/lib/libssl.so.3\0\0\0\0");
        assert_eq!(parse(&record), Some(Mapping { pid: 77, path: "/lib/libssl.so.3".into() }));
        for cut in 0..record.len() {
            let _ = parse(&record[..cut]);
        }
        record[NAME] = b'[';
        assert_eq!(parse(&record), None);
    }
}
