//! Folders with the configurations of a model and no weights, for random weights of a shape.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Writes the demo model's configurations to a folder, after `change` of each. Its first argument is
/// the path of the file within the folder.
pub(crate) fn write_demo_shape(folder: &Path, change: impl Fn(&str, &mut Value)) {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for file in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "transformer/config.json",
        "vae/config.json",
    ] {
        let text = fs::read(demo.join(file)).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        change(file, &mut config);
        let path = folder.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, config.to_string()).unwrap();
    }
}
