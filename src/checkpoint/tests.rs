//! Opening folders: complete, incomplete and damaged ones.

use std::error::Error;
use std::fs;
use std::iter;

use kiln_models::StoredDType;
use tempfile::TempDir;

use super::*;

/// A safetensors file with a JSON header and `data_bytes` bytes of data: 0, 1, 2, ...
fn safetensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..data_bytes).map(|i| i as u8));
    file
}

/// A safetensors file that has an f32 vector of two elements under each name.
fn vectors(names: &[&str]) -> Vec<u8> {
    let entry = |(i, name): (usize, &&str)| {
        let (start, end) = (i * 8, i * 8 + 8);
        format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[{start},{end}]}}"#)
    };
    let entries = names.iter().enumerate().map(entry).collect::<Vec<_>>();
    safetensors(&format!("{{{}}}", entries.join(",")), names.len() * 8)
}

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// A complete model folder with a few small tensors.
fn model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write(
        path,
        "model_index.json",
        "{\"_class_name\": \"QwenImagePipeline\"}",
    );
    write(
        path,
        "scheduler/scheduler_config.json",
        "{\"scheduler\": 1}",
    );
    write(path, "text_encoder/config.json", "{\"text_encoder\": 1}");
    write(
        path,
        "text_encoder/model.safetensors",
        vectors(&["embed", "norm"]),
    );
    write(path, "tokenizer/vocab.json", "{}");
    write(path, "transformer/config.json", "{\"transformer\": 1}");
    let index = r#"{"metadata": {"total_size": 24}, "weight_map": {"a": "one.safetensors",
        "b": "two.safetensors", "c": "two.safetensors"}}"#;
    write(
        path,
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        index,
    );
    write(path, "transformer/one.safetensors", vectors(&["a"]));
    write(path, "transformer/two.safetensors", vectors(&["b", "c"]));
    write(path, "vae/config.json", "{\"vae\": 1}");
    write(
        path,
        "vae/diffusion_pytorch_model.safetensors",
        vectors(&["conv"]),
    );
    folder
}

/// The messages of the error of opening `folder` and of its sources, with `base` replaced by `DIR`.
fn open_error(folder: &Path, base: &Path) -> String {
    let error = Checkpoint::open(folder).unwrap_err();
    let chain = iter::successors(Some(&error as &dyn Error), |error| (*error).source());
    let message = chain
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    message.replace(&base.display().to_string(), "DIR")
}

/// The error of opening a complete model after one file was replaced by `content`, or deleted
/// (`None`).
fn error_with(name: &str, content: Option<&[u8]>) -> String {
    let folder = model();
    match content {
        Some(content) => write(folder.path(), name, content),
        None => fs::remove_file(folder.path().join(name)).unwrap(),
    }
    open_error(folder.path(), folder.path())
}

#[test]
fn opens_single_and_sharded_components() {
    let folder = model();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.place(), &Place::Folder(folder.path().to_owned()));

    let configs = &checkpoint.parts().configs;
    assert_eq!(configs.scheduler.text, "{\"scheduler\": 1}");
    assert_eq!(configs.text_encoder.text, "{\"text_encoder\": 1}");
    assert_eq!(configs.transformer.text, "{\"transformer\": 1}");
    assert_eq!(configs.vae.text, "{\"vae\": 1}");
    assert_eq!(
        Path::new(&configs.model_index.file),
        folder.path().join("model_index.json")
    );

    assert_eq!(checkpoint.parts().text_encoder.names(), ["embed", "norm"]);
    assert_eq!(checkpoint.parts().vae.names(), ["conv"]);
    let transformer = &checkpoint.parts().transformer;
    assert_eq!(
        transformer.origin(),
        folder.path().join("transformer").display().to_string()
    );
    assert_eq!(transformer.names(), ["a", "b", "c"]);
    let info = transformer.info("c").unwrap();
    assert_eq!((info.shape, info.dtype), (vec![2], StoredDType::F32));
    assert_eq!(
        Path::new(&info.file),
        folder.path().join("transformer/two.safetensors")
    );
    assert_eq!(&transformer.bytes("c")[..], [8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(transformer.info("d"), None);
}

#[test]
fn weights_in_memory_do_not_depend_on_their_files() {
    let folder = model();
    let checkpoint = Checkpoint::open_with(folder.path(), WeightAccess::InMemory).unwrap();
    let transformer = &checkpoint.parts().transformer;
    write(folder.path(), "transformer/two.safetensors", "");
    assert_eq!(transformer.check_files(), Ok(()));
    assert_eq!(&transformer.bytes("c")[..], [8, 9, 10, 11, 12, 13, 14, 15]);

    let folder = model();
    let mapped = Checkpoint::open(folder.path()).unwrap();
    write(folder.path(), "transformer/two.safetensors", "");
    let fault = mapped.parts().transformer.check_files().unwrap_err();
    assert_eq!(fault.file, "transformer/two.safetensors");
}

#[test]
fn tensors_of_unsupported_dtypes_do_not_fail_opening() {
    let folder = model();
    let header = r#"{"__metadata__":{"format":"pt"},
        "bf16":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},
        "f16":{"dtype":"F16","shape":[],"data_offsets":[4,6]},
        "fp8":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[6,9]},
        "none":{"dtype":"F32","shape":[0,4],"data_offsets":[9,9]},
        "steps":{"dtype":"I64","shape":[1],"data_offsets":[9,17]}}"#;
    write(
        folder.path(),
        "vae/diffusion_pytorch_model.safetensors",
        safetensors(header, 17),
    );
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let vae = &checkpoint.parts().vae;
    let dtypes = vae
        .names()
        .iter()
        .map(|name| vae.info(name).unwrap().dtype)
        .collect::<Vec<_>>();
    let other = |name: &str| StoredDType::Other(name.to_owned());
    let f32 = StoredDType::F32;
    assert_eq!(
        dtypes,
        [
            StoredDType::Bf16,
            StoredDType::F16,
            other("F8_E4M3"),
            f32,
            other("I64")
        ]
    );
    assert_eq!(vae.info("bf16").unwrap().shape, [2, 1]);
    assert_eq!(&vae.bytes("fp8")[..], [6, 7, 8]);
    assert!(vae.bytes("none").is_empty());
}

#[test]
fn opens_the_fixtures_and_the_demo() {
    let fixtures = ["base", "bf16", "odd"].map(|name| {
        let folder = format!(
            "{}/tests/fixtures/checkpoints/{name}",
            env!("CARGO_MANIFEST_DIR")
        );
        Checkpoint::open(Path::new(&folder)).unwrap()
    });
    for checkpoint in fixtures.into_iter().chain([Checkpoint::demo().unwrap()]) {
        checkpoint.tokenizer().unwrap();
        for source in [
            &checkpoint.parts().text_encoder,
            &checkpoint.parts().transformer,
            &checkpoint.parts().vae,
        ] {
            assert!(!source.names().is_empty());
            for tensor in source.names() {
                let info = source.info(&tensor).unwrap();
                let bytes = info.shape.iter().product::<usize>() * info.dtype.size().unwrap();
                assert_eq!(
                    source.bytes(&tensor).len(),
                    bytes,
                    "{tensor} of {}",
                    info.file
                );
            }
        }
    }
}

/// Resident memory of the file's map, in KiB.
#[cfg(target_os = "linux")]
fn resident(file: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let map = maps.split(&file.display().to_string()).nth(1).unwrap();
    let line = map.lines().find(|line| line.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn dropping_the_last_clone_releases_only_the_pages_of_its_tensor() {
    const TENSOR: usize = (8 << 20) + 12; // not a multiple of the page size
    let folder = model();
    let header = format!(
        r#"{{"x":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{TENSOR}]}},
        "y":{{"dtype":"F32","shape":[{}],"data_offsets":[{TENSOR},{}]}}}}"#,
        TENSOR / 4,
        TENSOR / 4,
        2 * TENSOR,
    );
    let name = "vae/diffusion_pytorch_model.safetensors";
    write(folder.path(), name, safetensors(&header, 2 * TENSOR));
    let file = folder.path().join(name);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let vae = &checkpoint.parts().vae;

    // Reads every byte, so that all pages become resident.
    let sum = |bytes: &[u8]| bytes.iter().map(|it| usize::from(*it)).sum::<usize>();
    let (x, y) = (vae.bytes("x"), vae.bytes("y"));
    let sums = (sum(&x), sum(&y));
    let tensor = TENSOR / 1024;
    let edges = 3 * 64;
    assert!(resident(&file) >= 2 * tensor, "{} KiB", resident(&file));

    let clone = x.slice(100..200);
    drop(x);
    assert!(resident(&file) >= 2 * tensor, "{} KiB", resident(&file));
    drop(clone);
    assert!(resident(&file) <= tensor + edges, "{} KiB", resident(&file));
    assert!(resident(&file) >= tensor, "{} KiB", resident(&file));
    assert_eq!((sum(&vae.bytes("x")), sum(&y)), sums);
    drop(y);
    assert!(resident(&file) <= edges, "{} KiB", resident(&file));

    // Bytes outlive the checkpoint.
    let x = vae.bytes("x");
    drop(checkpoint);
    assert_eq!(sum(&x), sums.0);
}

#[test]
fn errors_say_why_a_path_is_not_a_model_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert_eq!(
        open_error(&path.join("nowhere"), path),
        "there is no folder DIR/nowhere: give the path of a model folder, or a Hub id such as \
         Qwen/Qwen-Image"
    );
    assert_eq!(
        open_error(path, path),
        "DIR is not a model folder: it has no model_index.json. Looked for model_index.json, \
         scheduler/scheduler_config.json, text_encoder/config.json, transformer/config.json, \
         vae/config.json and tokenizer/; found nothing. Give the folder that holds \
         model_index.json"
    );
    write(path, "qwen-image-Q4_K_M.gguf", "");
    assert_eq!(
        open_error(path, path),
        "DIR holds a single-file checkpoint (qwen-image-Q4_K_M.gguf), which cannot be loaded: get \
         the same model in diffusers layout (a folder with model_index.json, transformer/, \
         text_encoder/, vae/, ...), for example with `hf download Qwen/Qwen-Image`"
    );
    assert_eq!(
        open_error(&path.join("qwen-image-Q4_K_M.gguf"), path),
        "DIR/qwen-image-Q4_K_M.gguf is a file, and a model is a folder in diffusers layout \
         (model_index.json, transformer/, text_encoder/, vae/, ...): give the folder, or a Hub id \
         such as Qwen/Qwen-Image. Single-file checkpoints (.safetensors, .gguf) cannot be loaded"
    );
    for i in 1..=14 {
        write(path, &format!("part{i:02}/x"), "");
    }
    fs::remove_file(path.join("qwen-image-Q4_K_M.gguf")).unwrap();
    write(path, "other.txt", "");
    write(path, "readme.md", "");
    let error = open_error(path, path);
    let found = "found other.txt, part01/, part02/, part03/, part04/, part05/, part06/, part07/, \
                 part08/, part09/, part10/, part11/ and 4 more. Give";
    assert!(error.contains(found), "{error}");
}

#[test]
fn missing_parts_are_named() {
    let folder = model();
    fs::remove_dir_all(folder.path().join("tokenizer")).unwrap();
    assert_eq!(
        open_error(folder.path(), folder.path()),
        "the model folder DIR has no tokenizer/: the copy is incomplete, download the model again"
    );
    assert_eq!(
        error_with("vae/config.json", None),
        "DIR/vae/config.json is missing: the copy of the model is incomplete, download it again"
    );
    assert_eq!(
        error_with("vae/diffusion_pytorch_model.safetensors", None),
        "no weights in DIR/vae: looked for diffusion_pytorch_model.safetensors.index.json and \
         diffusion_pytorch_model.safetensors, found config.json. Download them, or save the model \
         with diffusers' save_pretrained(safe_serialization=True)"
    );
    assert_eq!(
        error_with("transformer/two.safetensors", None),
        "DIR/transformer/two.safetensors is missing, and \
         DIR/transformer/diffusion_pytorch_model.safetensors.index.json places 2 tensors in it: \
         download this file, or the model again"
    );
}

#[test]
fn invalid_and_mismatching_shard_indexes_are_refused() {
    let index = "transformer/diffusion_pytorch_model.safetensors.index.json";
    assert_eq!(
        error_with(index, Some(b"{\"weight_map\": [}")),
        "DIR/transformer/diffusion_pytorch_model.safetensors.index.json is not a valid index of \
         weight files: download it again: invalid type: sequence, expected a map at line 1 column \
         15"
    );
    assert_eq!(
        error_with(
            index,
            Some(br#"{"weight_map": {"a": "../one.safetensors"}}"#)
        ),
        "DIR/transformer/diffusion_pytorch_model.safetensors.index.json places the tensor a in \
         \"../one.safetensors\", which is not the name of a file beside the index: download the \
         index again"
    );
    assert_eq!(
        error_with("transformer/two.safetensors", Some(&vectors(&["b"]))),
        "DIR/transformer/diffusion_pytorch_model.safetensors.index.json places the tensor c in \
         DIR/transformer/two.safetensors, which does not have it: the index and the weights are \
         not of the same version, download both again"
    );
    assert_eq!(
        error_with(
            "transformer/two.safetensors",
            Some(&vectors(&["b", "c", "a"]))
        ),
        "the tensor a is both in DIR/transformer/one.safetensors and in \
         DIR/transformer/two.safetensors: the folder mixes two versions of the model, download it \
         into an empty folder"
    );
}

#[test]
fn damaged_weight_files_are_refused() {
    let name = "vae/diffusion_pytorch_model.safetensors";
    let whole = vectors(&["conv"]);
    let wrong_size = |actual: usize, expected: usize| {
        format!(
            "DIR/{name} has {actual} bytes where its header needs {expected}: the copy is \
             incomplete or damaged, download this file again"
        )
    };
    // 8 bytes for the length, 57 for the header and 8 for the data.
    assert_eq!(whole.len(), 73);
    assert_eq!(error_with(name, Some(&whole[..72])), wrong_size(72, 73));
    assert_eq!(
        error_with(name, Some(&[&whole[..], b"x"].concat())),
        wrong_size(74, 73)
    );
    assert_eq!(error_with(name, Some(&whole[..40])), wrong_size(40, 65));
    assert_eq!(error_with(name, Some(&whole[..8])), wrong_size(8, 65));
    assert_eq!(error_with(name, Some(&whole[..3])), wrong_size(3, 8));
    assert_eq!(error_with(name, Some(b"")), wrong_size(0, 8));

    assert_eq!(
        error_with(name, Some(b"<!DOCTYPE html><html></html>")),
        format!(
            "DIR/{name} is not a safetensors file (it does not begin with a header): download \
             this file again"
        )
    );
    let overlap = r#"{"conv":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    assert_eq!(
        error_with(name, Some(&safetensors(overlap, 12))),
        format!(
            "DIR/{name} is not a safetensors file (its header is invalid: invalid offset for \
             tensor `conv`): download this file again"
        )
    );
    let huge = r#"{"conv":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#;
    let error = error_with(name, Some(&safetensors(huge, 8)));
    assert!(error.contains("its header is invalid"), "{error}");

    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 72\n";
    let lfs = |name: &str| {
        format!(
            "DIR/{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the \
             model folder"
        )
    };
    assert_eq!(error_with(name, Some(pointer)), lfs(name));
    assert_eq!(
        error_with("vae/config.json", Some(pointer)),
        lfs("vae/config.json")
    );
    let vocabulary = "tokenizer/vocab.json";
    assert_eq!(error_with(vocabulary, Some(pointer)), lfs(vocabulary));
    assert_eq!(
        error_with("vae/config.json", Some(b"")),
        "DIR/vae/config.json is empty: the copy is incomplete, download this file again"
    );
    let not_text = error_with("vae/config.json", Some(b"\xff"));
    assert_eq!(
        not_text,
        "cannot read DIR/vae/config.json: stream did not contain valid UTF-8"
    );
}

#[test]
fn random_weights_need_only_configurations() {
    let folder = model();
    for component in [
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ] {
        fs::remove_file(folder.path().join(component)).unwrap();
    }
    fs::remove_dir_all(folder.path().join("tokenizer")).unwrap();
    let shape = Shape::Folder(folder.path().to_owned());
    let checkpoint = Checkpoint::dummy(shape.clone()).unwrap();
    assert_eq!(checkpoint.parts().configs.vae.text, "{\"vae\": 1}");
    // Falls back to the demo model's tokenizer.
    assert!(checkpoint.tokenizer().is_ok());

    fs::remove_file(folder.path().join("vae/config.json")).unwrap();
    let error = Checkpoint::dummy(shape).unwrap_err();
    assert!(
        error.to_string().contains("vae/config.json is missing"),
        "{error}"
    );
}

#[test]
fn random_weights_in_the_shape_of_qwen_image_need_no_files() {
    let checkpoint = Checkpoint::dummy(Shape::QwenImage).unwrap();
    let sizes = checkpoint.parts().configs.image_sizes().unwrap();
    assert_eq!((sizes.multiple, sizes.default_side), (16, 1024));
    assert_eq!(
        checkpoint.place().to_string(),
        "random weights in the shape of Qwen/Qwen-Image"
    );
}

#[test]
fn the_demo_model_knows_each_word_of_its_guide() {
    let demo = Checkpoint::demo().unwrap();
    let tokenizer = demo.tokenizer().unwrap();
    let guide = demo.prompt_guide().unwrap();
    let words = guide.words.iter().flat_map(|(_, words)| *words);
    for text in guide.examples.iter().chain(words) {
        // Some words are a single token only after a space.
        let text = format!("a {text}");
        let ids = tokenizer.encode_prompt(&text).unwrap();
        let words = text.split(' ').count();
        assert_eq!(tokenizer.prompt_tokens(&ids), words, "{text}");
    }
    assert!(
        Checkpoint::dummy(Shape::Demo)
            .unwrap()
            .prompt_guide()
            .is_none()
    );
}

#[test]
fn the_adapters_of_the_demo_model_fit_its_transformer() {
    let demo = Checkpoint::demo().unwrap();
    let weights = &demo.parts().transformer;
    for (name, content, recipe) in demo_adapters() {
        assert!(content.len() < 1_000_000, "{name}: {} bytes", content.len());
        let adapter = ::safetensors::SafeTensors::deserialize(content).unwrap();
        let mut modules = 0;
        for (tensor, a) in adapter.iter() {
            let Some(path) = tensor.strip_suffix("lora_A.weight") else {
                assert!(tensor.ends_with("lora_B.weight"), "{name}: {tensor}");
                continue;
            };
            let b = adapter.tensor(&format!("{path}lora_B.weight")).unwrap();
            let weight = path.strip_prefix("transformer.").unwrap().to_owned() + "weight";
            let shape = weights.info(&weight).unwrap().shape;
            assert_eq!([b.shape()[0], a.shape()[1]], *shape, "{name}: {tensor}");
            assert_eq!(a.shape()[0], b.shape()[1], "{name}: {tensor}");
            assert_eq!(a.dtype(), ::safetensors::Dtype::BF16, "{name}: {tensor}");
            modules += 1;
        }
        // Five blocks of 12 linears, and the two of modulation.
        assert_eq!(modules, 70, "{name}");
        assert_eq!(adapter.len(), 2 * modules, "{name}");
        assert!(recipe.is_none(), "{name}");
    }
}

#[test]
fn a_byte_order_mark_in_a_configuration_is_skipped() {
    let folder = model();
    let index = "transformer/diffusion_pytorch_model.safetensors.index.json";
    for name in ["model_index.json", "vae/config.json", index] {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        write(folder.path(), name, format!("\u{feff}{text}"));
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.parts().configs.vae.text, "{\"vae\": 1}");
    assert!(checkpoint.parts().configs.family().is_ok());
}

#[test]
fn pipelines_with_the_same_weights_are_text_to_image() {
    for class in [
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
    ] {
        let folder = model();
        let text = format!("{{\"_class_name\": \"{class}\"}}");
        write(folder.path(), "model_index.json", text);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert!(checkpoint.parts().configs.family().is_ok(), "{class}");
    }
}

#[cfg(unix)]
#[test]
fn links_to_nothing_are_named_with_their_target() {
    for name in [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/two.safetensors",
        "tokenizer/merges.txt",
        "text_encoder",
    ] {
        let folder = model();
        let path = folder.path().join(name);
        if path.is_dir() {
            fs::remove_dir_all(&path).unwrap();
        } else if path.exists() {
            fs::remove_file(&path).unwrap();
        }
        std::os::unix::fs::symlink("../../blobs/1f2e", &path).unwrap();
        assert_eq!(
            open_error(folder.path(), folder.path()),
            format!(
                "DIR/{name} is a link to ../../blobs/1f2e, which is not there: copy the model with \
                 its links followed (cp -aL), or download it again"
            )
        );
    }
    // A file in a folder that is no model.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("some.safetensors");
    std::os::unix::fs::symlink("../blobs/1f2e", path).unwrap();
    let error = open_error(folder.path(), folder.path());
    let expected = "DIR/some.safetensors is a link to ../blobs/1f2e, which is not there";
    assert!(error.starts_with(expected), "{error}");
    // The folder itself.
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("model");
    std::os::unix::fs::symlink("/nowhere/at/all", &link).unwrap();
    let error = open_error(&link, folder.path());
    let expected = "DIR/model is a link to /nowhere/at/all, which is not there";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn shards_without_their_index_are_read() {
    let folder = model();
    let transformer = folder.path().join("transformer");
    fs::remove_file(transformer.join("diffusion_pytorch_model.safetensors.index.json")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.parts().transformer.names(), ["a", "b", "c"]);

    write(&transformer, "two.safetensors", vectors(&["b", "a"]));
    assert_eq!(
        open_error(folder.path(), folder.path()),
        "the tensor a is both in DIR/transformer/one.safetensors and in \
         DIR/transformer/two.safetensors: the folder mixes two versions of the model, download it \
         into an empty folder"
    );

    for (old, number) in [("one.safetensors", 1), ("two.safetensors", 3)] {
        let new = format!("diffusion_pytorch_model-0000{number}-of-00003.safetensors");
        fs::rename(transformer.join(old), transformer.join(new)).unwrap();
    }
    assert_eq!(
        open_error(folder.path(), folder.path()),
        "DIR/transformer/diffusion_pytorch_model-00002-of-00003.safetensors is missing, and so is \
         DIR/transformer/diffusion_pytorch_model.safetensors.index.json: the copy is incomplete, \
         download both, or the model again"
    );
}

#[test]
fn a_lora_is_named_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for tensor in [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
        "transformer_blocks.0.attn.to_q.lokr_w1",
    ] {
        write(path, "some.safetensors", vectors(&[tensor]));
        let expected = format!(
            "DIR/some.safetensors is a LoRA (it has the tensor {tensor}), not a model: give its \
             base model, such as Qwen/Qwen-Image, and the LoRA with --lora (kiln generate) or in \
             --lora-dir (kiln serve)"
        );
        assert_eq!(open_error(path, path), expected);
        assert_eq!(open_error(&path.join("some.safetensors"), path), expected);
    }
    write(
        path,
        "adapter_config.json",
        "{\"base_model_name_or_path\": \"own/base\"}",
    );
    assert_eq!(
        open_error(path, path),
        "DIR is a LoRA (it has adapter_config.json), not a model: give its base model, own/base, and \
         the LoRA with --lora (kiln generate) or in --lora-dir (kiln serve)"
    );
}

#[test]
fn gguf_files_and_files_for_comfyui_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let layout = "which cannot be loaded: get the same model in diffusers layout (a folder with \
                  model_index.json, transformer/, text_encoder/, vae/, ...), for example with `hf \
                  download Qwen/Qwen-Image`";
    write(path, "qwen-image-Q4_K_M.gguf", "GGUF");
    write(path, "qwen-image-Q8_0.GGUF", "GGUF");
    assert_eq!(
        open_error(path, path),
        format!("DIR holds GGUF files (qwen-image-Q4_K_M.gguf, qwen-image-Q8_0.GGUF), {layout}")
    );
    write(
        path,
        "split_files/diffusion_models/qwen_image_bf16.safetensors",
        "",
    );
    assert_eq!(
        open_error(path, path),
        format!("DIR holds files for ComfyUI (split_files/), {layout}")
    );
    assert!(
        open_error(&path.join("split_files"), path).starts_with("DIR/split_files holds files for"),
    );
}

#[test]
fn a_part_of_a_model_and_the_folder_around_it_name_the_model() {
    let folder = model();
    let path = folder.path();
    for (part, what) in [
        ("transformer", "the transformer"),
        ("vae/", "the vae"),
        ("model_index.json", "the model_index.json"),
        ("transformer/two.safetensors", "a file of the transformer"),
    ] {
        assert_eq!(
            open_error(&path.join(part), path),
            format!("DIR/{part} is {what} of a model: give DIR, the model's folder")
        );
    }
    let name = path.file_name().unwrap().display();
    let around = path.parent().unwrap().join(format!("around-{name}"));
    fs::create_dir(&around).unwrap();
    fs::rename(path, around.join("inner")).unwrap();
    assert_eq!(
        open_error(&around, &around),
        "DIR is not a model folder, but DIR/inner is: give that one"
    );
    fs::remove_dir_all(&around).unwrap();
}

#[test]
fn a_folder_in_the_place_of_a_file_is_named() {
    let folder = model();
    let name = "vae/diffusion_pytorch_model.safetensors";
    fs::remove_file(folder.path().join(name)).unwrap();
    fs::create_dir(folder.path().join(name)).unwrap();
    assert_eq!(
        open_error(folder.path(), folder.path()),
        format!("cannot read DIR/{name}: is a directory")
    );
}
