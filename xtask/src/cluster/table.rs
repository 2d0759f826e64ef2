//! Results as a table and as JSON.

use std::fmt;

use serde_json::{Value, json};

/// Results, in the order in which they came.
#[derive(Debug, Default)]
pub struct Table(Vec<Row>);

#[derive(Debug)]
struct Row {
    what: String,
    goal: String,
    measured: String,
    value: Value,
    is_good: bool,
}

impl Table {
    /// Adds a result and prints it.
    pub fn add(&mut self, what: &str, goal: &str, measured: String, value: Value, is_good: bool) {
        println!("cluster: {} {what}: {measured}", if is_good { "ok    " } else { "FAILED" });
        self.0.push(Row { what: what.to_owned(), goal: goal.to_owned(), measured, value, is_good });
    }

    /// How many failed.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.0.iter().filter(|r| !r.is_good).count()
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let rows: Vec<Value> = self
            .0
            .iter()
            .map(|r| json!({"what": r.what, "goal": r.goal, "measured": r.measured, "value": r.value, "ok": r.is_good}))
            .collect();
        format!("{:#}\n", json!({"kubernetes": super::binaries::KUBERNETES, "results": rows}))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| what | goal | measured | |\n| --- | --- | --- | --- |")?;
        for row in &self.0 {
            let how = if row.is_good { "ok" } else { "FAILED" };
            writeln!(f, "| {} | {} | {} | {how} |", row.what, row.goal, row.measured)?;
        }
        Ok(())
    }
}
