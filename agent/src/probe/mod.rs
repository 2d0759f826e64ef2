//! The only place that knows aya: loads the programs, attaches them, reads their records.

pub mod btf;
mod info;
pub mod load;
pub mod ring;
