//! The emulator: one guest at a time, its serial port as lines, its end or its deadline.
//!
//! Emulation is single-threaded (`thread=single`): with a thread per processor, attaching and detaching
//! probes (text patching) crashed or hung 8 of 30 guests, and none of 74 this way. A guest that panics
//! ends the emulator with status 0, so that only the end marker is a good end.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::Arch;
use crate::{place, step};

/// Last line of a guest that came to its end.
const END: &str = "@vm end";
/// Lines that wait to be looked at; then the emulator waits.
const LINES: usize = 1024;

/// An emulator that was found.
#[derive(Debug)]
pub struct Machine {
    program: PathBuf,
    arch: Arch,
    /// The guest's clock counts instructions, one a nanosecond.
    count: bool,
}

/// It, with a kernel and an image.
#[derive(Debug)]
pub struct Bootable<'a> {
    machine: &'a Machine,
    kernel: &'a Path,
    image: &'a Path,
}

/// What a guest said.
#[derive(Debug, Default)]
pub struct Run {
    /// Lines of its serial port.
    pub lines: Vec<String>,
    /// It came to its end marker, and nothing in between was an oops.
    pub ended: bool,
    /// Why not.
    pub why: String,
    /// How long it took.
    pub took: Duration,
}

impl Machine {
    /// The emulator for this processor.
    ///
    /// # Errors
    /// It is not installed.
    pub fn find(arch: Arch, count: bool) -> Result<Self> {
        let (name, package) = match arch {
            Arch::X86 => ("qemu-system-x86_64", "qemu-system-x86"),
            Arch::Arm64 => ("qemu-system-aarch64", "qemu-system-arm"),
        };
        let Some(program) = place::program(name) else {
            bail!(
                "{name} is not installed: install the package {package} (where a newer qemu-utils is in its way: \
                 apt-get install --allow-downgrades {package})"
            );
        };
        Ok(Self { program, arch, count })
    }

    /// With a kernel and an image.
    #[must_use]
    pub fn with<'a>(&'a self, kernel: &'a Path, image: &'a Path) -> Bootable<'a> {
        Bootable { machine: self, kernel, image }
    }
}

impl Bootable<'_> {
    /// Boots; every line goes to `watch` as it comes and to `serial.log` in `folder`. A guest that is not
    /// done at the deadline is killed.
    ///
    /// # Errors
    /// The emulator cannot be started.
    pub fn run(
        &self,
        settings: &str,
        deadline: Duration,
        accelerated: bool,
        folder: &Path,
        mut watch: impl FnMut(&str),
    ) -> Result<Run> {
        let mut command = self.command(settings, accelerated);
        command.args(["-serial", "stdio"]);
        // SAFETY: the call is async-signal-safe. The emulator ends with this command, however that ends.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
                    .map_err(Into::into)
            })
        };
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {}", step::shown(&command)))?;
        let (send, lines) = sync_channel(LINES);
        for stream in [
            child.stdout.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
            child.stderr.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
        ]
        .into_iter()
        .flatten()
        {
            let send = send.clone();
            thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        let mut log = File::create(folder.join("serial.log"))?;
        let mut run = Run::default();
        loop {
            match lines.recv_timeout(deadline.saturating_sub(started.elapsed())) {
                Ok(line) => {
                    writeln!(log, "{line}")?;
                    watch(&line);
                    run.lines.push(line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    child.kill().ok();
                    run.why = format!("hung: killed after {} s", deadline.as_secs());
                    break;
                }
            }
        }
        child.wait()?;
        run.took = started.elapsed();
        run.judge();
        Ok(run)
    }

    /// Boots with this terminal as the guest's.
    ///
    /// # Errors
    /// The emulator cannot be started.
    pub fn shell(&self) -> Result<()> {
        println!("a shell in the guest; `exit` ends it, Ctrl-A X kills the emulator");
        step::plainly(self.command("vm.shell", false).args(["-serial", "mon:stdio"]))
    }

    fn command(&self, settings: &str, accelerated: bool) -> Command {
        let (console, machine): (&str, &[&str]) = match self.machine.arch {
            Arch::X86 => ("ttyS0", &["-cpu", "max"]),
            // Pointer authentication in full costs half the guest's time.
            Arch::Arm64 => ("ttyAMA0", &["-M", "virt,gic-version=3", "-cpu", "max,pauth-impdef=on"]),
        };
        let mut command = Command::new(&self.machine.program);
        if self.machine.count {
            command.args(["-icount", "shift=0,sleep=off"]);
        }
        command
            .args(machine)
            .args(["-accel", if accelerated { "kvm" } else { "tcg,thread=single" }])
            .args(["-smp", "2", "-m", "2G", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.image)
            .arg("-append")
            // The kernel hands NAME=value words to the first process as variables: where the agent is, and how
            // long the verifier may take on this processor.
            .arg(format!(
                "console={console} panic=-1 oops=panic quiet APISCOPE=/apiscope APISCOPE_READY_S=600 {settings}"
            ));
        command
    }
}

impl Run {
    /// A good end is the marker, and no oops before it.
    fn judge(&mut self) {
        let bad = self.lines.iter().find(|l| {
            ["Oops", "Kernel panic", "BUG:", "WARNING: CPU", "the guest's own code failed"]
                .iter()
                .any(|b| l.contains(b))
        });
        if let Some(line) = bad {
            self.why = format!("the kernel said: {line}");
        } else if self.why.is_empty() && !self.lines.iter().any(|l| l == END) {
            let last = self.lines.iter().rev().find(|l| !l.is_empty()).map_or("nothing", String::as_str);
            self.why = format!("ended without its end marker; it last said: {last}");
        }
        self.ended = self.why.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(lines: &[&str]) -> Run {
        let mut run = Run { lines: lines.iter().map(|l| (*l).to_owned()).collect(), ..Run::default() };
        run.judge();
        run
    }

    #[test]
    fn only_the_marker_is_a_good_end() {
        assert!(judged(&["@vm test load ok 1.0", "@vm end"]).ended);
        assert!(!judged(&["@vm test load ok 1.0"]).ended);
        assert!(judged(&[]).why.contains("nothing"));
        let oops = judged(&["[    3.1] Oops: int3: 0000", "@vm end"]);
        assert!(!oops.ended && oops.why.contains("Oops"));
    }
}
