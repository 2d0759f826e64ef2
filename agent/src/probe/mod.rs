//! The only place that knows aya: loads the programs, attaches them, reads their records.

pub mod btf;
pub mod door;
mod info;
pub mod load;
pub mod ring;
