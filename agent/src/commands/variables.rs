//! `APISCOPE_*` variables that look like a slip of one that exists. They are pointed at, not refused: Kubernetes puts
//! variables of this form into every pod that runs beside a service called `apiscope`.

use clap::Command;

/// Variables of the agent that no flag stands for.
const OTHERS: [&str; 1] = [apiscope::proto::credential::KEY_VARIABLE];
/// Most letters that differ in a slip.
const SLIP: usize = 2;

/// Every variable that a flag of `command` or of its subcommands reads.
fn known(command: &Command, names: &mut Vec<String>) {
    names.extend(command.get_arguments().filter_map(|a| Some(a.get_env()?.to_string_lossy().into_owned())));
    command.get_subcommands().for_each(|c| known(c, names));
}

/// The variables of `set` that are not known but nearly are, each with the one that was probably meant.
pub fn slips(command: &Command, set: impl Iterator<Item = String>) -> Vec<(String, String)> {
    let mut names: Vec<String> = OTHERS.map(Into::into).into();
    known(command, &mut names);
    set.filter(|name| name.starts_with("APISCOPE_") && !names.contains(name))
        .filter_map(|name| {
            let distance = |known: &String| strsim::damerau_levenshtein(known, &name);
            let nearest = names.iter().min_by_key(|known| distance(known))?;
            (distance(nearest) <= SLIP).then(|| (name.clone(), nearest.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::{Arg, Command};

    use super::*;

    #[test]
    fn slips_and_others() {
        let command = Command::new("x").subcommand(Command::new("run").arg(Arg::new("side").env("APISCOPE_SIDE")));
        let set = ["APISCOPE_SIED", "APISCOPE_SIDE", "APISCOPE_SERVICE_HOST", "APISCOPE_PRINCIPAL_KYE", "SIDE"];
        let found = slips(&command, set.into_iter().map(Into::into));
        let meant: Vec<_> = found.iter().map(|(_, meant)| meant.as_str()).collect();
        assert_eq!(meant, ["APISCOPE_SIDE", "APISCOPE_PRINCIPAL_KEY"]);
    }
}
