//! Commands that have a file of their own.

mod findings;
mod inventory;
mod policy;
mod simulate;
mod variables;

pub use findings::Findings;
pub use inventory::InventoryCommand;
pub use policy::Policy;
pub use simulate::Simulate;
pub use variables::slips;

/// Nobody reads the output any more: `head` has seen enough.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
