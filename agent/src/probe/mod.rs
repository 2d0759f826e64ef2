//! The only place that knows aya: loads the programs, attaches them, reads their records.

pub mod btf;
mod code;
mod confined;
pub mod door;
pub mod elf;
mod go;
pub mod gopclntab;
mod info;
mod lease;
mod library;
pub mod load;
mod mappings;
mod orphans;
mod perf;
pub mod ring;
mod rustls;
pub mod tls;
pub(crate) mod uprobe;
