//! Tests of the store with files in a temporary folder.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::request::ScheduleOrigin;

use super::*;

const LAYER: &str = "transformer_blocks.0.attn.to_q";

/// A safetensors file of f32 tensors.
fn safetensors(metadata: &Value, tensors: &[(&str, [usize; 2], f32)]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    if !metadata.is_null() {
        header.insert("__metadata__".to_owned(), metadata.clone());
    }
    for (name, shape, value) in tensors {
        let start = data.len();
        data.extend((0..shape[0] * shape[1]).flat_map(|_| value.to_le_bytes()));
        let tensor = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), tensor);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// An adapter of one layer, whose down factor has these values.
fn lora(value: f32) -> Vec<u8> {
    lora_with(&Value::Null, value)
}

fn lora_with(metadata: &Value, value: f32) -> Vec<u8> {
    let (down, up) = (
        format!("transformer.{LAYER}.lora_A.weight"),
        format!("transformer.{LAYER}.lora_B.weight"),
    );
    safetensors(metadata, &[(&down, [2, 4], value), (&up, [6, 2], 1.0)])
}

/// Writes files into a new folder. A later write has a later time.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (file, content) in files {
        write(folder.path(), file, content);
    }
    folder
}

fn write(folder: &Path, file: &str, content: &[u8]) {
    let path = folder.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn open_with(folder: Option<&Path>, embedded: &[EmbeddedAdapter]) -> AdapterStore {
    let settings = AdapterSettings {
        dir: folder.map(Path::to_owned),
        ..AdapterSettings::default()
    };
    let target = AdapterTarget {
        path: LAYER.to_owned(),
        d_in: 4,
        d_out: 6,
    };
    AdapterStore::open(settings, vec![target], 1, embedded).unwrap()
}

fn open(folder: &TempDir) -> AdapterStore {
    open_with(Some(folder.path()), &[])
}

fn names(store: &AdapterStore) -> Vec<String> {
    let catalogue = store.catalogue();
    catalogue.iter().map(|info| info.name.clone()).collect()
}

/// The first value of the adapter's down factor.
fn value(adapter: &Adapter) -> f32 {
    let mut matrices = adapter.changes()[LAYER].factors.matrices();
    let bytes = &matrices.next().unwrap().bytes;
    f32::from_le_bytes(bytes[..4].try_into().unwrap())
}

fn message<T>(outcome: Result<T, AdapterError>) -> String {
    outcome.map(drop).unwrap_err().to_string()
}

#[test]
fn files_and_folders_of_peft_are_listed_by_their_path() {
    let peft = safetensors(
        &Value::Null,
        &[
            (
                &format!("base_model.model.{LAYER}.lora_A.weight"),
                [2, 4],
                1.0,
            ),
            (
                &format!("base_model.model.{LAYER}.lora_B.weight"),
                [6, 2],
                1.0,
            ),
        ],
    );
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]});
    let folder = folder(&[
        ("ink.safetensors", &lora(1.0)),
        ("style/paper.v1.SAFETENSORS", &lora(1.0)),
        (
            "style/peft/adapter_config.json",
            config.to_string().as_bytes(),
        ),
        ("style/peft/adapter_model.safetensors", &peft),
        (".cache/hidden.safetensors", &lora(1.0)),
        ("style/.hidden.safetensors", &lora(1.0)),
        ("readme.md", b"text"),
    ]);
    let store = open(&folder);
    assert_eq!(names(&store), ["ink", "style/paper.v1", "style/peft"]);
    assert_eq!(store.unusable(), []);
    let ink = store.catalogue().get("ink").unwrap().clone();
    assert_eq!((ink.modules, ink.rank, ink.bytes), (1, Some(2), 80));
    assert_eq!(ink.hash.len(), 12);
    assert_eq!(store.listed()[1].file(), "style/paper.v1.SAFETENSORS");
    for name in names(&store) {
        assert_eq!(store.get(&name).unwrap().name(), name);
    }
}

#[test]
fn a_recipe_comes_from_the_sidecar_before_the_header() {
    let header = json!({"kiln.schedule": r#"{"steps": 4, "shift": 3}"#});
    let folder = folder(&[
        ("both.safetensors", &lora_with(&header, 1.0)),
        ("both.json", br#"{"steps": 8, "shift": 3}"#),
        ("header.safetensors", &lora_with(&header, 1.0)),
        ("neither.safetensors", &lora(1.0)),
        ("wrong.safetensors", &lora(1.0)),
        ("wrong.json", b"{"),
    ]);
    let store = open(&folder);
    let recipe = |name: &str| {
        let recipe = store.catalogue().get(name).unwrap().recipe.clone();
        recipe.map(|(recipe, origin)| (recipe.steps.unwrap(), origin))
    };
    assert_eq!(recipe("both"), Some((8, ScheduleOrigin::Sidecar)));
    assert_eq!(recipe("header"), Some((4, ScheduleOrigin::Header)));
    assert_eq!(recipe("neither"), None);
    let reason = store.why_unusable("wrong").unwrap();
    assert!(reason.starts_with("wrong.json: "), "{reason}");
}

#[test]
fn what_cannot_be_used_has_a_reason() {
    let whole = lora(1.0);
    let other = safetensors(
        &Value::Null,
        &[("double_blocks.0.x.lora_A.weight", [2, 4], 1.0)],
    );
    let folder = folder(&[
        ("a b.safetensors", &whole),
        ("cut.safetensors", &whole[..whole.len() - 1]),
        ("empty.safetensors", b""),
        ("old.pt", b"\x80\x02"),
        ("other.safetensors", &other),
        ("twice.safetensors", &whole),
        ("twice/adapter_config.json", b"{}"),
        ("twice/adapter_model.safetensors", &whole),
        ("unsafe/adapter_config.json", b"{}"),
        ("unsafe/adapter_model.bin", b"\x80\x02"),
    ]);
    let store = open(&folder);
    assert_eq!(names(&store), [""; 0]);
    let expected = [
        (
            "a b",
            "the name of an adapter has letters from A to Z, digits and . _ - / only, not ' '",
        ),
        ("cut", "where its header needs"),
        ("empty", "the file is empty"),
        (
            "old.pt",
            "old.pt is a pickle file, which can run any code when it is read: convert it",
        ),
        ("other", "double_blocks.0.x.lora_A.weight"),
        (
            "twice",
            "twice and another file both have the name twice: rename one of them",
        ),
        (
            "unsafe",
            "the folder unsafe has adapter_config.json and no adapter_model.safetensors",
        ),
    ];
    let unusable = store.unusable();
    assert_eq!(unusable.len(), expected.len(), "{unusable:?}");
    for ((name, reason), (expected_name, part)) in unusable.iter().zip(expected) {
        assert_eq!(name, expected_name);
        assert!(reason.contains(part), "{name}: {reason}");
        assert!(
            !reason.contains(folder.path().to_str().unwrap()),
            "{reason}"
        );
    }
}

#[cfg(unix)]
#[test]
fn links_do_not_lead_out_of_the_folder() {
    use std::os::unix::fs::symlink;

    let outside = folder(&[
        ("secret.safetensors", &lora(1.0)),
        ("more/x.safetensors", &lora(1.0)),
    ]);
    let peft = [
        ("adapter_config.json", b"{}".to_vec()),
        ("adapter_model.safetensors", lora(1.0)),
    ];
    let folder = folder(&[
        ("ink.safetensors", &lora(1.0)),
        ("peft/adapter_config.json", &peft[0].1),
        ("plain.safetensors", &lora(1.0)),
    ]);
    let link = |from: &str, to: &Path| symlink(to, folder.path().join(from)).unwrap();
    link("alias.safetensors", &folder.path().join("ink.safetensors"));
    link("loop", folder.path());
    link(
        "file.safetensors",
        &outside.path().join("secret.safetensors"),
    );
    link("folder", &outside.path().join("more"));
    link("gone.safetensors", Path::new("nowhere"));
    link(
        "peft/adapter_model.safetensors",
        &outside.path().join("secret.safetensors"),
    );
    link("plain.json", &outside.path().join("secret.safetensors"));
    let store = open(&folder);
    assert_eq!(names(&store), ["alias", "ink", "plain"]);
    let file = "it is a link to a file outside the folder of adapters: copy that file here";
    let expected = [
        ("file", file),
        (
            "folder",
            "it is a link to a folder outside the folder of adapters: copy that folder here",
        ),
        ("gone", "it is a link to a file that is not there"),
        ("peft", file),
    ];
    let unusable = store.unusable();
    let found: Vec<_> = unusable
        .iter()
        .map(|(name, it)| (name.as_str(), it.as_str()))
        .collect();
    assert_eq!(found, expected);
    assert_eq!(message(store.add("x", "file.safetensors", false)), file);
    assert!(message(store.add("x", "folder/x.safetensors", false)).contains("outside the folder"));

    // A listed file that becomes a link is another file.
    fs::remove_file(folder.path().join("ink.safetensors")).unwrap();
    link(
        "ink.safetensors",
        &outside.path().join("secret.safetensors"),
    );
    assert!(message(store.get("ink")).contains("\"ink\" is gone"));
    assert!(message(store.get("alias")).contains("\"alias\" is gone"));
}

#[test]
fn a_file_that_is_not_the_listed_one_is_refused() {
    let folder = folder(&[("ink.safetensors", &lora(1.0))]);
    let store = open(&folder);
    let path = folder.path().join("ink.safetensors");
    let held = store.get("ink").unwrap();
    let changed = "the file of the adapter \"ink\" was changed after the server listed it: load it \
                   again with POST /v1/load_lora_adapter and load_inplace, or restart the server";
    // Of the same size, beside it and renamed; cut; gone.
    write(folder.path(), "new", &lora(2.0));
    fs::rename(folder.path().join("new"), &path).unwrap();
    assert_eq!(message(store.get("ink")), changed);
    fs::write(&path, &lora(2.0)[..20]).unwrap();
    assert_eq!(message(store.get("ink")), changed);
    fs::remove_file(&path).unwrap();
    assert!(message(store.get("ink")).starts_with("the file of the adapter \"ink\" is gone"));
    // Whoever has the weights keeps them.
    assert_eq!(value(&held), 1.0);

    fs::write(&path, lora(3.0)).unwrap();
    store.add("ink", "ink", true).unwrap();
    assert_eq!(value(&store.get("ink").unwrap()), 3.0);
    assert_eq!(value(&held), 1.0);
    let touched = SystemTime::now() + Duration::from_secs(5);
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(touched)
        .unwrap();
    assert_eq!(message(store.get("ink")), changed);
    store.rescan().unwrap();
    assert_eq!(value(&store.get("ink").unwrap()), 3.0);
}

#[test]
fn a_scan_keeps_the_weights_of_files_that_are_the_same() {
    let folder = folder(&[
        ("ink.safetensors", &lora(1.0)),
        ("old.safetensors", &lora(1.0)),
    ]);
    let store = open(&folder);
    let held = [store.get("ink").unwrap(), store.get("old").unwrap()];
    fs::remove_file(folder.path().join("old.safetensors")).unwrap();
    write(folder.path(), "new.safetensors", &lora(2.0));
    store.rescan().unwrap();
    assert_eq!(names(&store), ["ink", "new"]);
    assert!(Arc::ptr_eq(&held[0], &store.get("ink").unwrap()));
    drop(held);
    assert_eq!(store.cache_use().entries, 1);
    assert_eq!(message(store.get("old")), "there is no adapter \"old\"");
}

#[test]
fn adapters_are_added_and_removed() {
    let folder = folder(&[("style/ink.safetensors", &lora(1.0))]);
    let store = open(&folder);
    let listed = "the adapter \"style/ink\" is loaded already: give load_inplace true to replace it, \
                  or another name";
    assert_eq!(message(store.add("style/ink", "style/ink", false)), listed);
    // Under another name, by each way to write a file.
    for (name, file) in [
        ("a", "style/ink"),
        ("b", "style/ink.safetensors"),
        ("c", "./style/ink.safetensors"),
        (
            "d",
            folder
                .path()
                .join("style/ink.safetensors")
                .to_str()
                .unwrap(),
        ),
    ] {
        store.add(name, file, false).unwrap();
        assert_eq!(store.get(name).unwrap().name(), name);
    }
    store.remove("style/ink").unwrap();
    assert_eq!(
        message(store.remove("style/ink")),
        "there is no adapter \"style/ink\""
    );
    assert!(store.is_removed("style/ink"));
    store.rescan().unwrap();
    assert_eq!(names(&store), ["a", "b", "c", "d"]);
    store.add("style/ink", "style/ink", false).unwrap();
    assert!(!store.is_removed("style/ink"));
    store.remove("a").unwrap();
    // What is not usable is not listed, and the list stays as it is.
    write(folder.path(), "style/ink.safetensors", b"");
    let error = message(store.add("style/ink", "style/ink", true));
    assert!(
        error.starts_with("the adapter \"style/ink\" cannot be used: the file is empty"),
        "{error}"
    );
    assert_eq!(names(&store), ["b", "c", "d", "style/ink"]);
}

#[test]
fn a_removed_name_is_free_once_its_file_is_gone() {
    let folder = folder(&[("ink.safetensors", &lora(1.0))]);
    let store = open(&folder);
    store.remove("ink").unwrap();
    fs::remove_file(folder.path().join("ink.safetensors")).unwrap();
    store.rescan().unwrap();
    write(folder.path(), "ink.safetensors", &lora(2.0));
    store.rescan().unwrap();
    assert_eq!(names(&store), ["ink"]);
}

#[test]
fn only_files_below_the_folder_can_be_added() {
    let outside = folder(&[("secret.safetensors", &lora(1.0))]);
    let folder = folder(&[("ink.safetensors", &lora(1.0)), ("old.ckpt", b"\x80")]);
    let store = open(&folder);
    let path = outside.path().join("secret.safetensors");
    let path = path.to_str().unwrap();
    let sibling = outside.path().file_name().unwrap().to_str().unwrap();
    for file in [
        path,
        "/etc/passwd",
        "../x",
        &format!("../{sibling}/secret.safetensors"),
        "style/../../x",
        "..",
        "/",
        "",
        ".hidden",
    ] {
        let expected = format!(
            "{file:?} is not in the folder of adapters: give the path of a file from there, \
             relative to it"
        );
        assert_eq!(message(store.add("x", file, false)), expected);
        assert_eq!(store.name_of_file(file), None, "{file}");
    }
    assert_eq!(
        message(store.add("x", "nothing", false)),
        "the folder of adapters has no file \"nothing\""
    );
    assert!(message(store.add("x", "old.ckpt", false)).contains("pickle"));
    for (name, part) in [
        ("../x", "no empty part"),
        ("/x", "no empty part"),
        ("", "no empty part"),
        ("a//b", "no empty part"),
        (".x", "begins with a dot"),
        ("a b", "not ' '"),
        ("é", "not 'é'"),
        ("a\\b", "not '\\\\'"),
        (&"x".repeat(201), "200 characters at most"),
    ] {
        let error = message(store.add(name, "ink", false));
        assert!(error.contains(part), "{name}: {error}");
    }
    assert_eq!(
        message(open_with(None, &[]).add("x", "ink", false)),
        "the server has no folder of adapters: start it with --lora-dir"
    );
}

#[test]
fn a_listed_file_has_a_name() {
    let folder = folder(&[
        ("style/ink.safetensors", &lora(1.0)),
        ("bad.safetensors", b""),
    ]);
    let store = open(&folder);
    let ink = Some("style/ink".to_owned());
    let path = folder.path().join("style/ink.safetensors");
    for file in [
        "style/ink",
        "style/ink.safetensors",
        "./style/ink",
        path.to_str().unwrap(),
    ] {
        assert_eq!(store.name_of_file(file), ink, "{file}");
    }
    for file in ["ink", "bad.safetensors", "style", "style/ink.json"] {
        assert_eq!(store.name_of_file(file), None, "{file}");
    }
}

#[test]
fn adapters_in_the_binary_are_listed_unless_a_file_has_their_name() {
    let bytes: &'static [u8] = Box::leak(lora(1.0).into_boxed_slice());
    let sidecar = Some(r#"{"steps": 4}"#);
    let embedded = [
        ("ink.safetensors", bytes, sidecar),
        ("wash.safetensors", bytes, None),
    ];
    let store = open_with(None, &embedded);
    assert_eq!(names(&store), ["ink", "wash"]);
    assert!(store.catalogue().get("ink").unwrap().recipe.is_some());
    assert_eq!(value(&store.get("ink").unwrap()), 1.0);
    store.remove("ink").unwrap();
    store.rescan().unwrap();
    assert_eq!(names(&store), ["wash"]);
    store.add("ink", "ink", false).unwrap();
    assert_eq!(names(&store), ["ink", "wash"]);

    let folder = folder(&[("ink.safetensors", &lora(2.0))]);
    let store = open_with(Some(folder.path()), &embedded);
    assert_eq!(names(&store), ["ink", "wash"]);
    assert_eq!(value(&store.get("ink").unwrap()), 2.0);
}

#[test]
fn an_adapter_with_values_that_are_not_finite_is_not_usable_any_more() {
    let folder = folder(&[("ink.safetensors", &lora(f32::NAN))]);
    let store = open(&folder);
    let error = message(store.get("ink"));
    let reason = format!(
        "it has the key transformer.{LAYER}.lora_A.weight, which has a value that is not a finite \
         number"
    );
    assert_eq!(
        error,
        format!("the adapter \"ink\" cannot be used: {reason}")
    );
    assert_eq!(names(&store), [""; 0]);
    assert_eq!(store.unusable(), [("ink".to_owned(), reason)]);
    write(folder.path(), "ink.safetensors", &lora(1.0));
    store.add("ink", "ink", false).unwrap();
    assert_eq!(value(&store.get("ink").unwrap()), 1.0);
}

#[test]
fn a_folder_that_cannot_be_read_is_an_error() {
    let folder = folder(&[("ink.safetensors", &lora(1.0))]);
    let open = |dir: &Path| {
        let settings = AdapterSettings {
            dir: Some(dir.to_owned()),
            ..AdapterSettings::default()
        };
        AdapterStore::open(settings, Vec::new(), 1, &[])
    };
    for dir in ["nothing", "ink.safetensors"] {
        assert!(message(open(&folder.path().join(dir))).contains("cannot be read"));
    }
    let store = self::open(&folder);
    let path = folder.path().to_owned();
    drop(folder);
    let error = message(store.rescan());
    assert!(!error.contains(path.to_str().unwrap()), "{error}");
    assert_eq!(names(&store), ["ink"]);
}
