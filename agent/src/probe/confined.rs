//! Does this kernel end confined processes when a probed function returns?
//!
//! From Linux 6.11 on the return from a probed function makes a system call of its own on x86_64 (`uretprobe`, 335), and
//! a seccomp filter that is older than it ends the process for that. From 6.14 on (and in stable kernels that took the
//! same change) seccomp lets it pass. Which of them a kernel between the two is, is tried out: a child of the agent
//! confines itself and returns from a probed function.

use std::{fs::File, io};

use super::uprobe::{self, Place, Program, offset_of, target};

/// Versions that may: from the first to before the second.
const SUSPECTS: [(u32, u32); 2] = [(6, 11), (6, 14)];

/// Would a probed return end a process whose filter knows no new system calls? Asks for a child, on kernels for which
/// the version does not say it.
pub fn ends_confined(program: &Program) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    cfg!(target_arch = "x86_64")
        && is_suspect(&release)
        && try_out(program).unwrap_or_else(|e| {
            log::warn!("whether probes end confined processes could not be tried out: {e}");
            true
        })
}

fn is_suspect(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    SUSPECTS[0] <= version && version < SUSPECTS[1]
}

/// Probes [`target`] and calls it in confinement.
fn try_out(program: &Program) -> io::Result<bool> {
    let file = File::open("/proc/self/exe")?;
    let offset = offset_of(target as extern "C" fn() as usize as u64)
        .ok_or_else(|| io::Error::other("the agent does not find its own code"))?;
    let link = uprobe::attach(program, &file, &[Place { offset, cookie: 0 }], true)?;
    let ended = is_ended_in_confinement(target);
    drop(link);
    ended
}

/// Calls `f` in a child whose filter ends it at system calls that are not known; true when it was.
fn is_ended_in_confinement(f: extern "C" fn()) -> io::Result<bool> {
    const LOAD: u16 = 0x20;
    const JUMP_NOT_BELOW: u16 = 0x35;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // Numbers 335 to 423 are none that a libc makes.
    let mut steps = [
        step(LOAD, 0, 0, 0),
        step(JUMP_NOT_BELOW, 0, 1, 335),
        step(JUMP_NOT_BELOW, 0, 1, 424),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: 5, filter: steps.as_mut_ptr() };
    // SAFETY: the child calls nothing but system calls and `f`, and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: as above; the program outlives the calls.
        unsafe {
            let confined = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0;
            if confined {
                f();
            }
            libc::_exit(i32::from(!confined));
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: our own child.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFSIGNALED(status) {
        return Ok(true);
    }
    if libc::WEXITSTATUS(status) == 0 { Ok(false) } else { Err(io::Error::other("seccomp refused the filter")) }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for release in ["6.11.0-19-generic", "6.12.9", "6.13.1-arch1-1"] {
            assert!(is_suspect(release), "{release}");
        }
        for release in ["6.10.14", "6.14.0", "5.15.0-91-generic", "6.18.44-fc-v669", "7.0", ""] {
            assert!(!is_suspect(release), "{release}");
        }
    }

    #[test]
    fn the_filter_ends_what_it_does_not_know_alone() {
        extern "C" fn unknown() {
            // SAFETY: a number without a call.
            unsafe { libc::syscall(400) };
        }
        extern "C" fn known() {
            // SAFETY: no preconditions.
            unsafe { libc::syscall(libc::SYS_getpid) };
        }
        assert!(is_ended_in_confinement(unknown).expect("a child"));
        assert!(!is_ended_in_confinement(known).expect("a child"));
        assert!(!is_ended_in_confinement(target).expect("a child"));
    }

    #[test]
    fn its_own_code_is_found() {
        let here = offset_of(target as extern "C" fn() as usize as u64).expect("mapped");
        assert!(here < std::fs::metadata("/proc/self/exe").expect("there").len());
        assert_eq!(offset_of(1), None);
    }
}
