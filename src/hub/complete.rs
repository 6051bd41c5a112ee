//! Whether a snapshot in the cache has every file that a model needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::id::is_plain_name;
use super::listing::Listing;

/// Folders with weights, and the stem of their files.
const WEIGHTS: [(&str, &str); 3] = [
    ("text_encoder", "model"),
    ("transformer", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
];

/// The shards of a component, by tensor.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// The files that a model needs and a snapshot lacks, with what is wrong with those that are there.
/// A listing tells their sizes. `weights` tells whether weights are needed.
pub(super) fn missing_files(
    snapshot: &Path,
    listing: Option<&Listing>,
    weights: bool,
) -> Vec<String> {
    let mut check = Check {
        snapshot,
        listing,
        missing: Vec::new(),
    };
    check.need("model_index.json");
    check.need("scheduler/scheduler_config.json");
    check.tokenizer();
    for (folder, stem) in WEIGHTS {
        check.need(&format!("{folder}/config.json"));
        if weights {
            check.weights(folder, stem);
        }
    }
    check.missing
}

struct Check<'a> {
    snapshot: &'a Path,
    listing: Option<&'a Listing>,
    missing: Vec<String>,
}

impl Check<'_> {
    /// Whether a file is there, whatever its size.
    fn has(&self, path: &str) -> bool {
        self.snapshot.join(path).exists()
    }

    /// Whether there is something of this name, such as a link to nowhere.
    fn has_entry(&self, path: &str) -> bool {
        self.snapshot.join(path).symlink_metadata().is_ok()
    }

    fn need(&mut self, path: &str) {
        let file = self.snapshot.join(path);
        let fault = match file.metadata() {
            Ok(found) => {
                let listed = self.listing.and_then(|listing| listing.size(path));
                let listed = listed.filter(|size| *size != found.len());
                let Some(size) = listed else { return };
                format!(" ({} of {size} bytes)", found.len())
            }
            Err(_) => match fs::read_link(&file) {
                Ok(target) => format!(" (a link to {}, which is not there)", target.display()),
                Err(_) => String::new(),
            },
        };
        self.missing.push(format!("{path}{fault}"));
    }

    fn tokenizer(&mut self) {
        if self.has_entry("tokenizer/tokenizer.json") {
            return self.need("tokenizer/tokenizer.json");
        }
        for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
            self.need(&format!("tokenizer/{name}"));
        }
    }

    /// Needs the shards of the index, or the file without shards, or the shards that the name of
    /// one of them counts.
    fn weights(&mut self, folder: &str, stem: &str) {
        let index = format!("{folder}/{stem}.safetensors.index.json");
        let single = format!("{folder}/{stem}.safetensors");
        if self.has_entry(&index) {
            self.need(&index);
            if !self.has(&index) {
                return;
            }
            match self.shards_of(&index) {
                Some(shards) => shards
                    .iter()
                    .for_each(|shard| self.need(&format!("{folder}/{shard}"))),
                None => self.missing.push(format!("{index} (not an index)")),
            }
        } else if !self.has_entry(&single)
            && let Some(count) = self.counted_shards(folder, stem)
        {
            for number in 1..=count {
                self.need(&format!(
                    "{folder}/{stem}-{number:05}-of-{count:05}.safetensors"
                ));
            }
        } else {
            self.need(&single);
        }
    }

    fn shards_of(&self, index: &str) -> Option<BTreeSet<String>> {
        let text = fs::read(self.snapshot.join(index)).ok()?;
        let index: ShardIndex = serde_json::from_slice(&text).ok()?;
        let shards: BTreeSet<String> = index.weight_map.into_values().collect();
        shards
            .iter()
            .all(|name| is_plain_name(name))
            .then_some(shards)
    }

    /// The number of shards in the name of one, as in `model-00001-of-00004.safetensors`.
    fn counted_shards(&self, folder: &str, stem: &str) -> Option<u32> {
        let entries = fs::read_dir(self.snapshot.join(folder)).ok()?;
        entries.flatten().find_map(|entry| {
            let name = entry.file_name();
            let numbers = name
                .to_str()?
                .strip_prefix(stem)?
                .strip_prefix('-')?
                .strip_suffix(".safetensors")?;
            let (_, count) = numbers.split_once("-of-")?;
            // Names have five digits.
            count.parse().ok().filter(|count| *count < 100_000)
        })
    }
}
