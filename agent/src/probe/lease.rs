//! Files with probes are not rewritten under them. The kernel keeps a copy of each instruction that it replaced; in a
//! file that was overwritten in place it would go on with instructions of the old one, and the program would crash.
//!
//! So a read lease (fcntl(2), `F_SETLEASE`) is taken before a file is read: whoever opens it for writing waits, for
//! milliseconds, until its probes are gone. That is a matter of programs that overwrite (`cp`, some deployments);
//! package managers and linkers put a new file in the place of the old one, which disturbs nobody. Where there is no
//! lease to be had (another user's file without CAP_LEASE, NFS) the file is probed without.
//!
//! Bound: as many leases as there are probed files. Should the agent hang, the kernel ends the wait after
//! `/proc/sys/fs/lease-break-time` (45 s).

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::AsRawFd as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use super::uprobe::Link;

/// Longest time between two looks at whether the agent ends.
const TURN: Duration = Duration::from_millis(100);
/// `F_SETSIG`, `F_SETOWN_EX`, and its `F_OWNER_TID`.
const SET_SIGNAL: libc::c_int = 10;
const SET_OWNER: libc::c_int = 15;
const OF_THREAD: libc::c_int = 0;

/// A file as the kernel names it: device and inode; of files in overlays, when it was made and inode.
pub type Key = (u64, u64);

/// All leases. The kernel tells a thread of its own that one is in the way.
#[derive(Debug)]
pub struct Leases {
    held: Arc<Mutex<Held>>,
    thread: libc::pid_t,
    over: Arc<AtomicBool>,
    handle: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Held {
    files: HashMap<u64, Leased>,
    next: u64,
    /// Files whose probes are gone.
    broken: Vec<Key>,
}

#[derive(Debug)]
struct Leased {
    key: Key,
    // Before the file: the probes go first.
    links: Vec<Link>,
    file: File,
    /// The probes are attached.
    is_settled: bool,
}

/// The lease of one file, with its probes. Both go with it.
#[derive(Debug)]
pub struct Lease {
    held: Arc<Mutex<Held>>,
    number: u64,
}

impl Leases {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's, when it has no more threads.
    pub fn start() -> io::Result<Self> {
        let (held, over) = (Arc::<Mutex<Held>>::default(), Arc::<AtomicBool>::default());
        let (of_thread, ends) = (held.clone(), over.clone());
        let (send, receive) = mpsc::sync_channel(1);
        let handle = std::thread::Builder::new().name("leases".into()).spawn(move || {
            let signals = block();
            // SAFETY: no preconditions.
            let _ = send.send(unsafe { libc::gettid() });
            while !ends.load(Ordering::Relaxed) {
                if wait(&signals) {
                    lock(&of_thread).give_way();
                }
            }
        })?;
        let thread = receive.recv().map_err(io::Error::other)?;
        Ok(Self { held, thread, over, handle: Some(handle) })
    }

    /// Takes the lease of a file that is open for reading. `None` where there is none to be had.
    ///
    /// # Errors
    /// Somebody is writing the file.
    pub fn take(&self, file: &File, key: Key) -> io::Result<Option<Lease>> {
        /// `struct f_owner_ex`.
        #[repr(C)]
        struct Owner {
            kind: libc::c_int,
            id: libc::pid_t,
        }
        let file = file.try_clone()?;
        let fd = file.as_raw_fd();
        let owner = Owner { kind: OF_THREAD, id: self.thread };
        // The lock is kept: the thread must not look before the file is there.
        let mut held = lock(&self.held);
        // SAFETY: a valid descriptor, and a struct that outlives the call. The owner comes first: without one a lease
        // makes the whole process its owner.
        let done = unsafe {
            libc::fcntl(fd, SET_SIGNAL, libc::SIGRTMIN()) == 0
                && libc::fcntl(fd, SET_OWNER, &raw const owner) == 0
                && libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == 0
        };
        if !done {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Err(error) } else { Ok(None) };
        }
        held.next += 1;
        let number = held.next;
        held.files.insert(number, Leased { key, links: Vec::new(), file, is_settled: false });
        Ok(Some(Lease { held: self.held.clone(), number }))
    }

    /// Files whose probes are gone since the last call: they are to be looked at as new.
    #[must_use]
    pub fn broken(&self) -> Vec<Key> {
        std::mem::take(&mut lock(&self.held).broken)
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(handle) = self.handle.take() {
            // A panic there was reported by its own thread.
            let _ = handle.join();
        }
    }
}

impl Lease {
    /// Keeps the probes of the file for as long as the lease, which somebody may wait for already.
    pub fn keep(&self, links: Vec<Link>) {
        let mut held = lock(&self.held);
        if let Some(leased) = held.files.get_mut(&self.number) {
            leased.links = links;
            leased.is_settled = true;
        }
        held.give_way();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let leased = lock(&self.held).files.remove(&self.number);
        // Not under the lock: the kernel takes its time, and may take it for many files at once.
        if let Some(leased) = leased {
            leased.release();
        }
    }
}

impl Held {
    /// Gives up the leases that somebody waits for.
    fn give_way(&mut self) {
        let waited_for = |leased: &Leased| {
            // SAFETY: a valid descriptor. While a lease is in the way its kind is what it is to become.
            leased.is_settled && unsafe { libc::fcntl(leased.file.as_raw_fd(), libc::F_GETLEASE) } != libc::F_RDLCK
        };
        let numbers: Vec<u64> = self.files.iter().filter(|(_, l)| waited_for(l)).map(|(n, _)| *n).collect();
        for number in numbers {
            if let Some(leased) = self.files.remove(&number) {
                log::debug!("a file with probes is about to be written: they are gone");
                self.broken.push(leased.key);
                leased.release();
            }
        }
    }
}

impl Leased {
    fn release(self) {
        let Self { links, file, .. } = self;
        drop(links);
        // SAFETY: a valid descriptor. Other descriptors of the same file may keep it open: it is said, not implied.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks the signals of leases for this thread, which they are directed to: the one that was asked for, and the one
/// that comes when too many of those wait.
fn block() -> libc::sigset_t {
    // SAFETY: a set is made before it is used.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGRTMIN());
        libc::sigaddset(&raw mut signals, libc::SIGIO);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        signals
    }
}

/// Waits for a signal, at most [`TURN`]. False when none came.
fn wait(signals: &libc::sigset_t) -> bool {
    let nanos = libc::c_long::try_from(TURN.as_nanos()).unwrap_or(libc::c_long::MAX);
    let time = libc::timespec { tv_sec: 0, tv_nsec: nanos };
    // SAFETY: both outlive the call.
    unsafe { libc::sigtimedwait(signals, std::ptr::null_mut(), &raw const time) > 0 }
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, time::Instant};

    use super::*;

    #[test]
    fn a_writer_waits_until_the_probes_are_gone() {
        let path = std::env::temp_dir().join(format!("apiscope-lease-{}", std::process::id()));
        std::fs::write(&path, "old").expect("written");
        let leases = Leases::start().expect("a thread");
        let key = (7, 7);
        let lease = leases.take(&File::open(&path).expect("there"), key).expect("nobody writes").expect("a lease");
        let write = {
            let path = path.clone();
            std::thread::spawn(move || {
                let started = Instant::now();
                OpenOptions::new().write(true).open(path).map(|file| (file, started.elapsed())).expect("opened")
            })
        };
        // The probes are being attached.
        std::thread::sleep(Duration::from_millis(300));
        assert!(!write.is_finished() && leases.broken().is_empty());
        lease.keep(Vec::new());
        let (file, waited) = write.join().expect("no panic");
        assert!(waited >= Duration::from_millis(200) && waited < Duration::from_secs(5), "{waited:?}");
        assert_eq!(leases.broken(), [key]);
        // While it is written there is no lease.
        assert!(leases.take(&File::open(&path).expect("there"), key).is_err());
        drop(file);
        let lease = leases.take(&File::open(&path).expect("there"), key).expect("nobody writes").expect("a lease");
        lease.keep(Vec::new());
        let started = Instant::now();
        std::fs::write(&path, "new").expect("written");
        assert!(started.elapsed() < Duration::from_secs(5));
        assert_eq!(leases.broken(), [key]);
        drop(lease);
        std::fs::remove_file(path).expect("removable");
    }
}
