//! Commands that have a file of their own.

mod findings;
mod simulate;

pub use findings::Findings;
pub use simulate::Simulate;
