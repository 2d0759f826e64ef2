//! A Debian package (`deb(5)`): an `ar` archive of a version, control files and files.

use anyhow::Result;

use super::{
    Program,
    archive::{self, Entry},
};
/// The agent as a service of systemd: root's name, four capabilities, a read-only system.
const UNIT: &str = "\
[Unit]
Description=API telemetry from the kernel
Documentation=https://github.com/apiscope/apiscope
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/usr/bin/apiscope run --quiet
EnvironmentFile=-/etc/default/apiscope
Restart=on-failure
RestartSec=5
RuntimeDirectory=apiscope
StateDirectory=apiscope
StateDirectoryMode=0700
# bpf(2); tracepoints and functions; /proc of other users' processes; files that only their owner may read.
CapabilityBoundingSet=CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_DAC_READ_SEARCH
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectControlGroups=yes
ProtectKernelModules=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
MemoryMax=512M

[Install]
WantedBy=multi-user.target
";

const DEFAULTS: &str = "\
# Variables of the agent, for example:
#OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318
#OTEL_RESOURCE_ATTRIBUTES=deployment.environment.name=prod
";

const CONFIG: &str = "\
# apiscope's configuration; `apiscope config print` shows every setting with its default.
";

/// Installed, not started: who installs decides when a machine is looked at.
const AFTER_INSTALL: &str = "\
#!/bin/sh
set -e
if [ \"$1\" = configure ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    if [ -n \"$2\" ]; then
        systemctl try-restart apiscope.service || true
    else
        echo 'apiscope is installed; start it with: systemctl enable --now apiscope'
    fi
fi
";

const BEFORE_REMOVE: &str = "\
#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now apiscope.service || true
fi
";

const AFTER_REMOVE: &str = "\
#!/bin/sh
set -e
if [ \"$1\" = purge ]; then
    rm -rf /var/lib/apiscope
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
";

const MAINTAINER: &str = "apiscope <maintainers@apiscope.invalid>";

/// Makes the package.
///
/// # Errors
/// A path is too long for a tar archive.
pub fn build(program: &Program, sbom: &[u8]) -> Result<Vec<u8>> {
    let copyright = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: apiscope\n\n\
         Files: *\nCopyright: 2026 the authors of apiscope\nLicense: Apache-2.0\n \
         On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.\n";
    let day = &program.mail_date;
    let changelog = format!(
        "apiscope ({}) unstable; urgency=medium\n\n  * Commit {}.\n\n -- {MAINTAINER}  {day}\n",
        env!("CARGO_PKG_VERSION"),
        program.revision
    );
    let folders = [
        "etc/",
        "etc/apiscope/",
        "etc/default/",
        "usr/",
        "usr/bin/",
        "usr/lib/",
        "usr/lib/systemd/",
        "usr/lib/systemd/system/",
        "usr/share/",
        "usr/share/doc/",
        "usr/share/doc/apiscope/",
    ];
    let files = [
        Entry::file("etc/apiscope/config.toml", 0o644, CONFIG),
        Entry::file("etc/default/apiscope", 0o644, DEFAULTS),
        Entry::file("usr/bin/apiscope", 0o755, program.bytes.clone()),
        Entry::file("usr/lib/systemd/system/apiscope.service", 0o644, UNIT),
        Entry::file("usr/share/doc/apiscope/changelog.gz", 0o644, archive::gzip(changelog.as_bytes())?),
        Entry::file("usr/share/doc/apiscope/copyright", 0o644, copyright),
        Entry::file("usr/share/doc/apiscope/sbom.cdx.json", 0o644, sbom),
    ];
    let mut tree: Vec<Entry> = folders.iter().map(|f| Entry::folder(f)).collect();
    tree.extend(files.iter().cloned());
    let kib = files.iter().map(|f| f.content.len()).sum::<usize>().div_ceil(1024);
    let control = format!(
        "Package: apiscope\nVersion: {}\nArchitecture: {}\nMaintainer: {MAINTAINER}\n\
         Installed-Size: {kib}\nSection: net\nPriority: optional\nHomepage: {}\n\
         Description: API telemetry from the kernel\n \
         Sees every HTTP API of a machine by eBPF, without touching an application,\n \
         and exports endpoints, rates, errors and latencies as OpenTelemetry. Metadata\n \
         only: no body, credential or query value leaves the capture path.\n",
        env!("CARGO_PKG_VERSION"),
        program.arch,
        env!("CARGO_PKG_REPOSITORY"),
    );
    let control = [
        Entry::file("control", 0o644, control),
        Entry::file("conffiles", 0o644, "/etc/apiscope/config.toml\n/etc/default/apiscope\n"),
        Entry::file("postinst", 0o755, AFTER_INSTALL),
        Entry::file("prerm", 0o755, BEFORE_REMOVE),
        Entry::file("postrm", 0o755, AFTER_REMOVE),
    ];
    let pack = |entries: &[Entry]| archive::gzip(&archive::tar(entries, "./", program.time)?);
    let mut out = b"!<arch>\n".to_vec();
    for (name, content) in
        [("debian-binary", b"2.0\n".to_vec()), ("control.tar.gz", pack(&control)?), ("data.tar.gz", pack(&tree)?)]
    {
        out.extend_from_slice(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", program.time, 0, 0, 100_644, content.len()).as_bytes(),
        );
        out.extend_from_slice(&content);
        if content.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    Ok(out)
}
