//! Files and folders: what is opened, and what is refused before or while it is read.

use std::fs;

use super::*;

fn open_path(path: &Path) -> Result<LoraFile, LoraError> {
    LoraFile::open(path, &targets(), &LoraOptions::default())
}

#[track_caller]
fn refusal(path: &Path) -> String {
    let error = open_path(path).unwrap_err().to_string();
    let folder = path.parent().unwrap().display().to_string();
    assert!(!error.contains(&folder), "{error}");
    error
}

/// The message of the error of a file of this name and content.
fn refusal_of(name: &str, content: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    let refusal = refusal(&path);
    let beginning = format!("the adapter {name} cannot be loaded: ");
    refusal.strip_prefix(&beginning).unwrap().to_owned()
}

#[test]
fn a_file_is_opened_and_read() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["one.safetensors", "blob-without-extension"] {
        let path = folder.path().join(name);
        fs::write(&path, one_layer().bytes()).unwrap();
        let file = open_path(&path).unwrap();
        let adapter = file.read("style").unwrap();
        assert_eq!(adapter.name(), "style");
        assert_eq!(*adapter.changes(), one_layer().changes());
        // The adapter needs the file no more.
        fs::write(&path, "").unwrap();
        assert_eq!(*adapter.changes(), one_layer().changes());
        assert_eq!(LoraFile::files(&path), std::slice::from_ref(&path));
    }
}

#[test]
fn files_that_are_no_safetensors() {
    let pickle = "the file is a pickle of PyTorch, which can run code when it is read: convert it to \
                  safetensors";
    for name in ["x.pt", "x.pth", "x.bin", "x.ckpt", "x.PT"] {
        assert_eq!(refusal_of(name, &one_layer().bytes()), pickle);
    }
    for content in [&b"PK\x03\x04 archive/data.pkl"[..], b"\x80\x02}q\x00."] {
        assert_eq!(refusal_of("x.safetensors", content), pickle);
    }
    assert_eq!(
        refusal_of("x.safetensors", b""),
        "the file is empty: copy or download it again"
    );
    assert_eq!(
        refusal_of(
            "x.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid"
        ),
        "the file is a Git LFS pointer, not the adapter itself: run `git lfs pull`"
    );
    assert_eq!(
        refusal_of("x.safetensors", b"{\"a\": 1}  and more text"),
        "it is not a safetensors file (it does not begin with a header): give a safetensors file"
    );
    assert!(
        refusal_of("x.safetensors", b"\x08\0\0\0\0\0\0\0{\"a\":1} ")
            .starts_with("it is not a safetensors file (its header is invalid: ")
    );
    let whole = one_layer().bytes();
    for bytes in [1, 7, 8, 100, whole.len() - 1] {
        let refusal = refusal_of("x.safetensors", &whole[..bytes]);
        assert!(
            refusal.contains(&format!("the file has {bytes} bytes where")),
            "{refusal}"
        );
    }
    let mut long = whole.to_vec();
    long.push(0);
    assert!(refusal_of("x.safetensors", &long).contains("where its header needs"));
}

#[test]
fn paths_that_are_no_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("absent.safetensors");
    let cannot = |name: &str, why: &str| format!("the adapter {name} cannot be loaded: {why}");
    assert_eq!(
        refusal(&path),
        cannot("absent.safetensors", "there is no such file")
    );
    fs::write(folder.path().join("file"), "x").unwrap();
    let path = folder.path().join("file/below.safetensors");
    let error = open_path(&path).unwrap_err();
    assert!(matches!(error.fault, LoraFault::Missing), "{error}");

    let path = folder.path().join("empty");
    fs::create_dir(&path).unwrap();
    let layout = "give a safetensors file, or a folder with adapter_config.json and \
                  adapter_model.safetensors, as PEFT saves it";
    let no_config = format!("the folder has no adapter_config.json: {layout}");
    assert_eq!(refusal(&path), cannot("empty", &no_config));
    fs::write(path.join(PEFT_CONFIG), "{}").unwrap();
    let no_weights = format!("the folder has no adapter_model.safetensors: {layout}");
    assert_eq!(refusal(&path), cannot("empty", &no_weights));
    fs::write(path.join("adapter_model.bin"), "x").unwrap();
    assert!(refusal(&path).contains("is a pickle of PyTorch"));
    assert_eq!(
        LoraFile::files(&path),
        [path.join(PEFT_WEIGHTS), path.join(PEFT_CONFIG)]
    );
}

/// Opening a pipe would wait for a writer for ever.
#[cfg(unix)]
#[test]
fn pipes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe.safetensors");
    let made = std::process::Command::new("mkfifo")
        .arg(&path)
        .status()
        .unwrap();
    assert!(made.success());
    assert!(refusal(&path).ends_with("it is neither a file nor a folder"));
}

#[test]
fn files_over_the_limit_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.safetensors");
    // A hole takes no space.
    fs::File::create(&path)
        .unwrap()
        .set_len(MAX_FILE_BYTES + 1)
        .unwrap();
    assert!(refusal(&path).ends_with(
        "the file has 4294967297 bytes, and the most is 4294967296: use a smaller adapter"
    ));
}

/// A LoHa of rank 23 has 600 times more values in its dense form than in its file.
#[test]
fn factors_that_need_too_much_memory_are_not_read() {
    let (d_in, d_out, rank) = (12288, 3072, 23);
    let layer = |block: usize| AdapterTarget {
        path: format!("transformer_blocks.{block}.img_mlp.net.2"),
        d_in,
        d_out,
    };
    let targets: Vec<AdapterTarget> = (0..57).map(layer).collect();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for target in &targets {
        for (name, shape) in [
            ("w1_a", [d_out, rank]),
            ("w1_b", [rank, d_in]),
            ("w2_a", [d_out, rank]),
            ("w2_b", [rank, d_in]),
        ] {
            let start = end;
            end += 2 * shape[0] * shape[1];
            let tensor = serde_json::json!({
                "dtype": "BF16", "shape": shape, "data_offsets": [start, end],
            });
            header.insert(format!("{}.hada_{name}", target.path), tensor);
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    fs::write(&path, &bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();

    let open = |targets: &[AdapterTarget]| LoraFile::open(&path, targets, &LoraOptions::default());
    assert_eq!(
        open(&targets).unwrap_err().to_string(),
        "the adapter x.safetensors cannot be loaded: in memory its factors need 8606711808 bytes, and \
         the most is 8589934592: use a smaller adapter"
    );
}

#[test]
fn a_file_that_was_replaced_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let with_alpha = |alpha| {
        one_layer()
            .with(format!("{QUERY}.alpha"), Tensor::scalar(alpha))
            .bytes()
    };
    fs::write(&path, with_alpha(1.0)).unwrap();
    let file = open_path(&path).unwrap();
    assert!(file.read("x").is_ok());
    for content in [
        one_layer().bytes(),
        one_layer().with_metadata("a", "b").bytes(),
        with_alpha(2.0),
        with_alpha(1.0).slice(..500),
        Bytes::from_static(b"x"),
    ] {
        fs::write(&path, content).unwrap();
        let fault = file.read("x").unwrap_err().fault;
        let refused = matches!(
            fault,
            LoraFault::Changed | LoraFault::WrongSize { .. } | LoraFault::NotSafetensors(_)
        );
        assert!(refused, "{fault}");
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(
        file.read("x").unwrap_err().fault,
        LoraFault::Missing
    ));
    fs::write(&path, with_alpha(1.0)).unwrap();
    assert!(file.read("x").is_ok());
}

#[test]
fn a_configuration_that_was_replaced_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join(PEFT_CONFIG);
    fs::write(folder.path().join(PEFT_WEIGHTS), one_layer().bytes()).unwrap();
    fs::write(&config, r#"{"r": 4, "lora_alpha": 1}"#).unwrap();
    let file = open_path(folder.path()).unwrap();
    assert!(file.read("x").is_ok());
    fs::write(&config, r#"{"r": 4, "lora_alpha": 2}"#).unwrap();
    assert!(matches!(
        file.read("x").unwrap_err().fault,
        LoraFault::Changed
    ));
    fs::remove_file(&config).unwrap();
    assert!(file.read("x").is_err());
}
