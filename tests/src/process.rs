//! Programs that tests start, and where their files are while they run.

use std::{
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use crate::{free_port, program, ready, tls};

/// A process that ends with the value.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Deref for Guard {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

/// A folder that goes with the value.
pub struct Folder(PathBuf);

impl Folder {
    /// Makes it, below the system's for temporary files, with a name of this process's own.
    ///
    /// # Panics
    /// It cannot be made.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("apiscope-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    /// The path of a file in it, as text.
    #[must_use]
    pub fn at(&self, name: &str) -> String {
        self.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

/// A process that ends with its test, and then the folder that goes with it: it may write there to its end.
pub struct Process {
    /// The process.
    pub child: Guard,
    /// Its own folder.
    pub folder: Folder,
    /// Where it listens on 127.0.0.1.
    pub port: u16,
}

impl Process {
    /// Starts a server: `command` gets its folder and its port. It is there when something listens.
    ///
    /// # Panics
    /// It does not start, or does not listen within 20 s.
    #[must_use]
    pub fn listening(name: &str, command: impl FnOnce(&Path, u16) -> Command) -> Self {
        let process = Self::spawn(name, |folder, port| {
            let mut command = command(folder, port);
            command.stdout(Stdio::null());
            command
        });
        tls::wait_for(process.port);
        process
    }

    /// Starts a server that prints `ready`.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn ready(name: &str, command: impl FnOnce(&Path, u16) -> Command) -> Self {
        let mut process = Self::spawn(name, |folder, port| {
            let mut command = command(folder, port);
            command.stdout(Stdio::piped());
            command
        });
        ready(&mut process.child);
        process
    }

    /// Starts a program, which need not listen.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn spawn(name: &str, command: impl FnOnce(&Path, u16) -> Command) -> Self {
        let port = free_port();
        let folder = Folder::new(&format!("{name}-{port}"));
        let child = command(&folder, port)
            .current_dir(&*folder)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{name} does not start: {e}"));
        Self { child: Guard(child), folder, port }
    }

    /// As the agent names it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Runs a client in the server's folder.
    ///
    /// # Panics
    /// It fails.
    pub fn client<S: AsRef<std::ffi::OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = S>) -> Output {
        let out = Command::new(program(name))
            .args(arguments)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .output()
            .expect("it starts");
        let said = || String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{name}: {} {}", out.status, said());
        out
    }
}
