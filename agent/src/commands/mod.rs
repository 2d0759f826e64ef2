//! Commands that have a file of their own.

mod findings;
mod simulate;
mod variables;

pub use findings::Findings;
pub use simulate::Simulate;
pub use variables::slips;
