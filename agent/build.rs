//! Refuses to build the agent around an eBPF object that is not what the sources in the tree give.
//!
//! The object is not compiled here: `cargo xtask build --ebpf` does, with a toolchain of its own, and the
//! tree keeps the result. So `cargo build` needs stable Rust alone, and says in one line what to run when
//! the programs were edited.

use std::path::Path;

#[path = "../xtask/src/sources.rs"]
#[expect(dead_code, reason = "xtask writes the manifest, this only reads it")]
mod sources;

fn main() {
    let krate = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent-ebpf");
    for name in ["src", "Cargo.toml", "Cargo.lock", sources::OBJECT, sources::MANIFEST] {
        println!("cargo::rerun-if-changed=../agent-ebpf/{name}");
    }
    println!("cargo::rerun-if-changed=../xtask/src/sources.rs");
    if let Err(line) = sources::verify(&krate) {
        println!("cargo::error={line}");
    }
}
