//! `apiscope doctor`: what this kernel, these privileges and these processes allow; which hook is used
//! and why; which process's TLS is or is not read. Facts are collected here, judged by [`Report::judge`],
//! drawn by [`Report::text`].

mod container;

use std::fs;

use serde::Serialize;

use crate::{
    config::{Config, DoorSetting},
    coverage::View,
    local,
    probe::{
        btf::Btf,
        door as probe,
        load::{self, TlsOffer, Wanted},
    },
    table,
};

/// Most processes that are listed.
const MAX_PROCESSES: usize = 512;

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Can plaintext traffic be captured at all?
    pub can_capture: bool,
    /// The hook that is used.
    pub door: Option<String>,
    /// Checks, in order.
    pub checks: Vec<Check>,
    /// Hooks, in the order in which they are tried.
    pub doors: Vec<Door>,
    /// Processes with a TLS library: as the running agent knows them, else what this user's agent would read.
    pub tls: View,
}

/// One fact and what it means.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Good, or at least no obstacle.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// What to do, where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// A way into the kernel.
#[derive(Debug, Clone, Serialize)]
pub struct Door {
    /// Its name.
    pub name: String,
    /// It is the one that is used.
    pub chosen: bool,
    /// Why, or why not.
    pub why: String,
}

/// Each door in order: it works or is there, or why not.
pub type Tried = Vec<(probe::Door, Result<(), String>)>;

/// What the judgement rests on.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `uname -r`.
    pub kernel: String,
    /// Effective capabilities.
    pub capabilities: u64,
    /// The kernel's types can be read, or why not.
    pub types: Result<(), String>,
    /// The doors.
    pub doors: Tried,
    /// Which TLS the chosen door's kernel side reads; `None` where no door works.
    pub tls: Option<TlsOffer>,
    /// Members that the programs need and the types lack.
    pub offsets: Result<(), String>,
    /// The kernel has the helper that the parser needs; `None` where its types do not tell.
    pub has_loops: Option<bool>,
    /// Content of `/sys/kernel/security/lockdown`.
    pub lockdown: Option<String>,
    /// Content of `/proc/sys/net/core/bpf_jit_enable`.
    pub jit: Option<String>,
    /// An agent that answers.
    pub agent: Option<String>,
    /// A configured collector and whether it can be reached.
    pub collector: Option<(String, Result<(), String>)>,
    /// The door that the configuration names.
    pub door: DoorSetting,
}

const SYS_ADMIN: u32 = 21;
const BPF: u32 = 39;
const PERFMON: u32 = 38;
const SYS_PTRACE: u32 = 19;

/// Looks at this machine.
#[must_use]
pub fn examine() -> Report {
    let mut report = Report::judge(&facts());
    let socket = crate::config::Config::load(None).unwrap_or_default().agent.socket;
    report.checks.extend(container::Facts::collect(local::snapshot(&socket).ok().as_ref()).checks());
    report.tls = match local::snapshot(&socket) {
        Ok(snapshot) => snapshot.tls_coverage,
        Err(_) => crate::probe::tls::look(),
    };
    report.tls.processes.truncate(MAX_PROCESSES);
    report
}

fn facts() -> Facts {
    let read = |path: &str| fs::read_to_string(path).ok().map(|s| s.trim().to_owned());
    let btf = Btf::from_kernel();
    let status = read("/proc/self/status").unwrap_or_default();
    let capabilities =
        status.lines().find_map(|l| l.strip_prefix("CapEff:")).and_then(|v| u64::from_str_radix(v.trim(), 16).ok());
    let config = Config::load(None).unwrap_or_default();
    let (socket, door) = (config.agent.socket, config.capture.door);
    let wanted = Wanted { server: true, client: true, ring_bytes: 1 << 20, door };
    let types = btf.as_ref().map_err(|e| format!("{e:#}"));
    let (doors, tls) = doors(&types, wanted);
    Facts {
        kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
        capabilities: capabilities.unwrap_or(0),
        offsets: types.clone().and_then(|b| load::settings(b, wanted).map(|_| ()).map_err(|e| format!("{e:#}"))),
        doors,
        tls,
        has_loops: types.as_ref().ok().and_then(|types| probe::has_loops(types)),
        types: types.map(|_| ()),
        door,
        lockdown: read("/sys/kernel/security/lockdown"),
        jit: read("/proc/sys/net/core/bpf_jit_enable"),
        agent: local::snapshot(&socket).ok().map(|s| format!("apiscope {} answers at {}", s.version, socket.display())),
        collector: collector(),
    }
}

/// Each door: tried by loading its programs, until the first of the wanted ones that works; the kernel's
/// verifier may need a second for one. Of those behind it only what they need is looked for.
fn doors(types: &Result<&Btf, String>, wanted: Wanted) -> (Tried, Option<TlsOffer>) {
    let mut tls = None;
    let named = probe::Door::wanted(wanted.door);
    let doors = probe::Door::ALL
        .map(|door| {
            let result = match types {
                Err(e) => Err(e.clone()),
                Ok(types) if tls.is_some() || !named.contains(&door) => door.offered(types).map(|_| ()),
                Ok(types) => load::Kernel::try_door(door, types, wanted)
                    .map(|offer| tls = Some(offer))
                    .map_err(|e| format!("{e:#}")),
            };
            (door, result)
        })
        .into();
    (doors, tls)
}

/// The configured collector, and whether something listens there.
fn collector() -> Option<(String, Result<(), String>)> {
    let endpoint = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok().filter(|e| !e.is_empty())?;
    let rest = endpoint.split("://").last().unwrap_or(&endpoint);
    let host = rest.split('/').next().unwrap_or(rest);
    let tls = endpoint.starts_with("https");
    let address = if host.rsplit(':').next().is_some_and(|p| p.parse::<u16>().is_ok()) {
        host.to_owned()
    } else {
        format!("{host}:{}", if tls { 443 } else { 80 })
    };
    let reached = std::net::ToSocketAddrs::to_socket_addrs(&address)
        .map_err(|e| e.to_string())
        .and_then(|mut all| all.next().ok_or_else(|| "the name has no address".to_owned()))
        .and_then(|a| {
            std::net::TcpStream::connect_timeout(&a, std::time::Duration::from_secs(2)).map_err(|e| e.to_string())
        })
        .map(|_| ());
    Some((endpoint, reached))
}

impl Report {
    /// Judges facts.
    #[must_use]
    pub fn judge(facts: &Facts) -> Self {
        let mut report = Self::default();
        let mut check = |name: &str, ok: bool, found: String, remedy: Option<&str>| {
            report.checks.push(Check { name: name.into(), ok, found, remedy: remedy.map(Into::into) });
        };
        check("kernel", true, facts.kernel.clone(), None);
        let has = |bit: u32| facts.capabilities >> bit & 1 != 0;
        let may_load = has(SYS_ADMIN) || (has(BPF) && has(PERFMON));
        check(
            "privileges to load programs",
            may_load,
            if may_load { "CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN".into() } else { "missing".into() },
            (!may_load).then_some("run as root, or give CAP_BPF and CAP_PERFMON"),
        );
        let may_look = has(SYS_PTRACE) || has(SYS_ADMIN);
        check(
            "privilege to name other users' processes",
            may_look,
            if may_look {
                "CAP_SYS_PTRACE".into()
            } else {
                "missing: services are named by the kernel's short name".into()
            },
            (!may_look).then_some("give CAP_SYS_PTRACE"),
        );
        match &facts.types {
            Ok(()) => check("kernel types (BTF)", true, crate::probe::btf::PATH.into(), None),
            Err(e) => check("kernel types (BTF)", false, e.clone(), Some("use a kernel with CONFIG_DEBUG_INFO_BTF=y")),
        }
        if facts.types.is_ok() {
            match &facts.offsets {
                Ok(()) => check("members of kernel structs", true, "all found".into(), None),
                Err(e) => {
                    check("members of kernel structs", false, e.clone(), Some("report this kernel to the project"))
                }
            }
        }
        match facts.has_loops {
            Some(false) => check("helper bpf_loop", false, probe::NO_LOOPS.into(), Some("use Linux 5.17 or later")),
            Some(true) => check("helper bpf_loop", true, "there".into(), None),
            None => {}
        }
        if let Some(lockdown) = &facts.lockdown {
            let strict = lockdown.contains("[confidentiality]");
            check(
                "lockdown",
                !strict,
                lockdown.clone(),
                strict.then_some("lockdown=confidentiality forbids reading memory: use integrity"),
            );
        }
        if let Some(jit) = &facts.jit {
            let on = jit != "0";
            check(
                "eBPF compiler",
                on,
                if on { "on".into() } else { "off: programs are interpreted".into() },
                (!on).then_some("sysctl net.core.bpf_jit_enable=1"),
            );
        }
        if let Some(TlsOffer { libraries, go, rustls, by_perf }) = &facts.tls {
            let read = if *by_perf {
                format!("read, by perf's uprobes: {}", crate::probe::uprobe::NO_MULTI)
            } else {
                "read".into()
            };
            const REMEDY: &str = "its connections are counted as unread; plaintext is captured all the same";
            for (name, offer) in
                [("TLS of libraries", libraries), ("TLS of Go programs", go), ("TLS of rustls", rustls)]
            {
                match offer {
                    Ok(()) => check(name, true, read.clone(), None),
                    Err(lack) => check(name, false, lack.lines().next().unwrap_or_default().into(), Some(REMEDY)),
                }
            }
        }
        if let Some(agent) = &facts.agent {
            check("running agent", true, agent.clone(), None);
        }
        match &facts.collector {
            None => check("collector", true, "none configured (OTEL_EXPORTER_OTLP_ENDPOINT)".into(), None),
            Some((endpoint, Ok(()))) => check("collector", true, format!("{endpoint} can be reached"), None),
            Some((endpoint, Err(e))) => check(
                "collector",
                false,
                format!("{endpoint}: {e}"),
                Some("start the collector, or correct OTEL_EXPORTER_OTLP_ENDPOINT"),
            ),
        }
        let wanted = probe::Door::wanted(facts.door);
        for (door, tried) in &facts.doors {
            let named = wanted.contains(door);
            let chosen = report.door.is_none() && named && tried.is_ok();
            let why = match tried {
                Err(lack) => lack.clone(),
                Ok(()) if !named => "there, but capture.door names another".into(),
                Ok(()) if !chosen => "not tried: one before it works".into(),
                Ok(()) => match door {
                    probe::Door::TpBtf => "one run for each message, no other system call touched",
                    probe::Door::Fexit => "one run for each message, on a trampoline",
                    probe::Door::Kprobe => "two runs for each message; state by address, and a bound on returns",
                }
                .into(),
            };
            if chosen {
                report.door = Some(door.name().into());
            }
            report.doors.push(Door { name: format!("{door}: {}", door.hooks()), chosen, why });
        }
        report.can_capture = report.door.is_some();
        report
    }

    /// The report for a person.
    #[must_use]
    pub fn text(&self, colour: bool) -> String {
        let paint =
            |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
        let mut out = String::new();
        for check in &self.checks {
            let mark = if check.ok { paint("32", "ok  ") } else { paint("1;31", "LACK") };
            out += &format!("{mark} {}: {}\n", check.name, check.found);
            if let Some(remedy) = &check.remedy {
                out += &format!("     -> {remedy}\n");
            }
        }
        out += "\nhooks, in the order in which they are tried\n";
        for door in &self.doors {
            out += &format!(
                "{} {}: {}\n",
                if door.chosen { paint("32", "used") } else { "  - ".into() },
                door.name,
                door.why
            );
        }
        let tls = &self.tls.processes;
        out += &format!("\nprocesses with TLS: {}\n", if tls.is_empty() { "none found" } else { "" });
        out += &table::tls_processes(tls, colour);
        if self.tls.closed_processes > 0 {
            out += &format!(
                "{} processes may not be looked at: CAP_SYS_PTRACE would tell what they use\n",
                self.tls.closed_processes
            );
        }
        out += if self.can_capture {
            "\nplaintext HTTP can be captured here\n"
        } else {
            "\nnothing can be captured here: see the lines marked LACK, and the reasons of the hooks\n"
        };
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            kernel: "6.18".into(),
            capabilities: u64::MAX,
            types: Ok(()),
            doors: probe::Door::ALL.map(|door| (door, Ok(()))).into(),
            tls: Some(TlsOffer { libraries: Ok(()), go: Ok(()), rustls: Ok(()), by_perf: false }),
            offsets: Ok(()),
            has_loops: Some(true),
            lockdown: None,
            jit: None,
            agent: None,
            collector: None,
            door: DoorSetting::Auto,
        }
    }

    fn without(mut facts: Facts, doors: &[usize]) -> Facts {
        for &i in doors {
            facts.doors[i].1 = Err(format!("no {}", facts.doors[i].0));
        }
        facts
    }

    #[test]
    fn the_door_and_its_reasons() {
        assert_eq!(Report::judge(&good()).door.as_deref(), Some("tp_btf"));
        let old = Report::judge(&without(good(), &[0]));
        assert!(old.can_capture && old.door.as_deref() == Some("fexit") && old.doors[0].why == "no tp_btf");
        assert_eq!(Report::judge(&without(good(), &[0, 1])).door.as_deref(), Some("kprobe"));
        let none = Report::judge(&without(good(), &[0, 1, 2]));
        assert!(!none.can_capture && none.text(false).contains("nothing can be captured"));
        let named = Report::judge(&Facts { door: DoorSetting::Kprobe, ..good() });
        assert!(named.doors[2].chosen && !named.doors[0].chosen && named.doors[0].why.contains("capture.door"));
        let nobody = Report::judge(&Facts { capabilities: 0, ..without(good(), &[0, 1, 2]) });
        assert!(!nobody.can_capture && nobody.text(false).contains("give CAP_BPF and CAP_PERFMON"));
        let old = without(Facts { has_loops: Some(false), ..good() }, &[0, 1, 2]);
        assert!(Report::judge(&old).text(false).contains("LACK helper bpf_loop: this kernel has no bpf_loop"));
        let no_types =
            without(Facts { types: Err("no BTF".into()), offsets: Err("no BTF".into()), ..good() }, &[0, 1, 2]);
        let text = Report::judge(&no_types).text(false);
        assert!(text.contains("CONFIG_DEBUG_INFO_BTF") && !text.contains('\x1b'));
    }

    #[test]
    fn a_collector_that_is_away_is_said() {
        let facts = Facts { collector: Some(("http://x:1".into(), Err("refused".into()))), ..good() };
        let report = Report::judge(&facts);
        assert!(report.can_capture && report.text(false).contains("LACK collector: http://x:1: refused"));
    }
}
