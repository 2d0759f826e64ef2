//! The only place that knows aya: loads the programs, attaches them, reads their records.

pub mod btf;
mod code;
pub mod door;
pub mod elf;
mod info;
pub mod load;
mod mappings;
pub mod ring;
mod tls;
mod uprobe;
