//! The `apiscope` command.
fn main() {}
