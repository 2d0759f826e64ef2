//! The list in a file: what an agent knew before it was restarted. Written to a file beside and renamed, so that
//! there is always a whole one; a damaged one is kept under another name, and said.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::{Ages, Change, Inventory, VERSION, changes};
use crate::aggregate::{EndpointView, Moved};

/// Longest file that is read, bytes.
pub const MAX_FILE: u64 = 256 << 20;

/// Keeps the list of an agent: what was known at its start, and what it saw since.
#[derive(Debug, Default)]
pub struct Keeper {
    /// What earlier runs knew, under the routes of now.
    before: Inventory,
    /// The list at the last look, for what changed since.
    last: Option<Inventory>,
    file: Option<PathBuf>,
    ages: Ages,
}

impl Keeper {
    /// Begins with what `file` has. One that cannot be read is kept beside as `….damaged`, and the list begins anew.
    #[must_use]
    pub fn open(file: Option<&Path>) -> Self {
        let mut keeper = Self { file: file.map(Path::to_owned), ..Self::default() };
        keeper.before.apiscope_inventory = VERSION;
        let Some(path) = file else { return keeper };
        match read(path) {
            Ok(Some(inventory)) => keeper.before = inventory,
            Ok(None) => {}
            Err(e) => {
                let kept = beside(path, "damaged");
                match fs::rename(path, &kept) {
                    Ok(()) => {
                        log::warn!("{e:#}: the inventory begins anew; the old file is kept as {}", kept.display());
                    }
                    Err(rename) => {
                        // Overwriting what could not be read might lose it.
                        log::warn!("{e:#}, nor be moved away ({rename}): the inventory begins anew and is not kept");
                        keeper.file = None;
                    }
                }
            }
        }
        keeper
    }

    /// The list now: of earlier runs and of this one. `moves` are the routes that were renamed since the last call.
    pub fn now(&mut self, views: &[EndpointView], moves: &[Moved], now: u64) -> Inventory {
        if !moves.is_empty() {
            self.before.reroute(moves);
            if let Some(last) = &mut self.last {
                last.reroute(moves);
            }
        }
        let mut inventory = Inventory::new(views, now);
        inventory.merge(&self.before);
        inventory.made = now;
        inventory.age(now, self.ages);
        inventory
    }

    /// What changed since the last call, which is when `inventory` is remembered.
    pub fn changes(&mut self, inventory: &Inventory) -> Vec<Change> {
        let before = self.last.replace(inventory.clone());
        changes(before.as_ref().unwrap_or(&self.before), inventory)
    }

    /// Writes the list into the file, where there is one.
    ///
    /// # Errors
    /// The file cannot be written; the one that was there is still whole.
    pub fn save(&self, inventory: &Inventory) -> anyhow::Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        write(path, inventory).with_context(|| format!("failed to write the inventory {}", path.display()))
    }
}

/// Reads the JSON form.
///
/// # Errors
/// It is not JSON, no inventory, or one of a later version.
pub fn parse(bytes: &[u8]) -> anyhow::Result<Inventory> {
    let mut inventory: Inventory = serde_json::from_slice(bytes).context("no inventory in JSON")?;
    match inventory.apiscope_inventory {
        VERSION => {}
        later if later > VERSION => bail!("the inventory has version {later}; this apiscope reads up to {VERSION}"),
        other => bail!("the inventory has version {other}, which never was"),
    }
    inventory.tidy();
    Ok(inventory)
}

fn read(path: &Path) -> anyhow::Result<Option<Inventory>> {
    let context = || format!("the inventory {} cannot be read", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(context),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).with_context(context)?;
    if bytes.len() as u64 > MAX_FILE {
        bail!("the inventory {} is longer than {} MiB", path.display(), MAX_FILE >> 20);
    }
    parse(&bytes).map(Some).with_context(context)
}

fn write(path: &Path, inventory: &Inventory) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(folder)?;
    }
    let new = beside(path, "new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(inventory)?)?;
    // Without this a power cut may leave the new name with nothing in it.
    file.sync_all()?;
    fs::rename(&new, path)?;
    Ok(())
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::entry, *};

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("apiscope-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("writable");
        path
    }

    fn view(requests: u64) -> EndpointView {
        let json = serde_json::json!({ "service": "shop", "side": "server", "method": "GET", "route": "/a",
            "route_source": "learned", "requests": requests, "errors": 0, "rate": 0.0, "statuses": { "200": requests },
            "auth": {}, "p50_ns": 1, "p90_ns": 1, "p99_ns": 1, "request_size_p50": 1, "response_size_p50": 1,
            "request_bytes": 1, "response_bytes": 1, "callers": 1, "first_seen": 5, "last_seen": 6 });
        serde_json::from_value(json).expect("a view")
    }

    #[test]
    fn a_restart_adds_up() {
        let folder = folder("restart");
        let file = folder.join("inventory.json");
        let mut first = Keeper::open(Some(&file));
        let list = first.now(&[view(3)], &[], 10);
        first.save(&list).expect("written");
        let mut second = Keeper::open(Some(&file));
        let list = second.now(&[view(4)], &[], 20);
        assert_eq!((list.endpoints.len(), list.endpoints[0].requests), (1, 7));
        assert!(second.changes(&list).is_empty(), "it is known");
        assert_eq!(second.now(&[view(5)], &[], 30).endpoints[0].requests, 8, "what was before is added once");
        fs::remove_dir_all(folder).expect("removable");
    }

    #[test]
    fn a_damaged_file_is_kept() {
        let folder = folder("damaged");
        let file = folder.join("inventory.json");
        for bad in ["{\"apiscope_inventory\":1,\"made\":", "{\"apiscope_inventory\":9,\"made\":1,\"endpoints\":[]}"] {
            fs::write(&file, bad).expect("written");
            let mut keeper = Keeper::open(Some(&file));
            assert!(keeper.now(&[], &[], 1).endpoints.is_empty());
            assert_eq!(fs::read_to_string(beside(&file, "damaged")).expect("kept"), bad);
            keeper.save(&keeper.before).expect("written");
            assert!(read(&file).expect("whole").is_some());
        }
        fs::remove_dir_all(folder).expect("removable");
    }

    #[test]
    fn written_and_read_again() {
        let list = Inventory {
            apiscope_inventory: VERSION,
            made: 7,
            endpoints: vec![entry("/a/{int}", 4), entry("/\u{202e}\"<b>", 1)],
            ..Inventory::default()
        };
        let mut sorted = list.clone();
        sorted.tidy();
        assert_eq!(parse(&serde_json::to_vec(&list).expect("JSON")).expect("whole"), sorted);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in ".{0,300}") {
            let _ = parse(text.as_bytes());
        }
    }
}
