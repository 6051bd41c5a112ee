//! Adapters over HTTP: the binary with a small model, and a folder of adapter files.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::client::{Reply, connect, get, json_with_headers, post_to, receive, send_raw};
use super::real_model::{Server, model};
use super::{decode_png, from_base64, metadata};

const IMAGES: &str = "/v1/images/generations";
const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

/// A layer of the model, whose input and output have 32 values.
const LAYER: &str = "transformer_blocks.0.attn.to_q";

/// An adapter file of the fixtures.
pub(super) fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora/adapters");
    fs::read(folder.join(name)).unwrap()
}

/// A safetensors file of f32 tensors, each of one value.
fn safetensors(tensors: &[(&str, &[usize], f32)]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape, value) in tensors {
        let start = data.len();
        let count = shape.iter().product();
        data.extend(std::iter::repeat_n(value.to_le_bytes(), count).flatten());
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

/// An adapter of one layer with these values in its factors.
fn lora(value: f32) -> Vec<u8> {
    let [down, up] = ["lora_A", "lora_B"].map(|part| format!("transformer.{LAYER}.{part}.weight"));
    safetensors(&[(&down, &[2, 32], value), (&up, &[32, 2], value)])
}

/// A folder with the adapters `ink` and `style/paper`.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("style")).unwrap();
    fs::write(
        folder.path().join("ink.safetensors"),
        fixture("twelve.safetensors"),
    )
    .unwrap();
    let paper = folder.path().join("style/paper.safetensors");
    fs::write(paper, fixture("second.safetensors")).unwrap();
    folder
}

/// Serves the small model as `base` with a folder of adapters.
fn serve(folder: &Path, args: &[&str]) -> Server {
    let mut all = vec![
        "--lora-dir",
        folder.to_str().unwrap(),
        "--served-model-name",
        "base",
    ];
    all.extend(["--no-warm-up"]);
    all.extend(args);
    Server::start_with(Some(&model()), &all)
}

/// The body of a small request with more keys.
fn body(extra: &Value) -> Value {
    let mut body = json!({
        "prompt": "a red fox", "size": "32x32", "num_inference_steps": 2, "seed": 7,
        "true_cfg_scale": 1,
    });
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

fn generate(server: &Server, extra: &Value) -> Reply {
    post_to(server.address, IMAGES, &body(extra))
}

/// The PNG file that a request gets.
fn image(server: &Server, extra: &Value) -> Vec<u8> {
    let reply = generate(server, extra);
    assert_eq!(reply.status, 200, "{extra}: {}", reply.body);
    from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap())
}

fn pixels(server: &Server, extra: &Value) -> Vec<u8> {
    decode_png(&image(server, extra)).2
}

/// Status, key and message of an error.
fn error(reply: &Reply) -> (u16, Option<&str>, &str) {
    let error = &reply.body["error"];
    let message = error["message"].as_str();
    let message = message.unwrap_or_else(|| panic!("no error: {}", reply.body));
    (reply.status, error["param"].as_str(), message)
}

fn ids(server: &Server) -> Vec<String> {
    let reply = get(server.address, "/v1/models");
    let cards = reply.body["data"].as_array().unwrap().clone();
    let ids = cards
        .iter()
        .map(|card| card["id"].as_str().unwrap().to_owned());
    ids.collect()
}

fn adapter_status(server: &Server) -> Value {
    get(server.address, "/v1/status").body["adapters"].clone()
}

#[test]
fn an_adapter_changes_the_image_and_leaves_nothing_behind() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let base = image(&server, &json!({}));
    let ink = pixels(&server, &json!({"lora": {"name": "ink", "scale": 1}}));
    assert!(ink != decode_png(&base).2);
    let path = folder.path().join("ink.safetensors");
    for same in [
        json!({"lora": "ink"}),
        json!({"lora": ["ink"]}),
        json!({"loras": [{"lora_name": "ink"}]}),
        json!({"loras": [{"adapter": "ink", "lora_scale": 1.0, "lora_int_id": 7}]}),
        json!({"lora": {"name": "ink", "path": "ink.safetensors"}}),
        json!({"lora": {"name": "any", "local_path": "./ink.safetensors"}}),
        json!({"lora": {"lora_path": path}}),
        json!({"extra_body": {"lora": {"name": "ink"}}}),
        json!({"model": "ink"}),
        json!({"model": "base", "lora": "ink"}),
        json!({"model": "ink", "loras": ["ink"]}),
        json!({"lora": ["ink", {"name": "style/paper", "scale": 0}]}),
    ] {
        assert!(pixels(&server, &same) == ink, "{same}");
    }
    let others = [
        json!({"lora": {"name": "ink", "scale": 0.5}}),
        json!({"lora": {"name": "ink", "scale": -1}}),
        json!({"model": "ink", "loras": [{"name": "ink", "scale": 0.25}]}),
        json!({"lora": "style/paper"}),
        json!({"loras": ["ink", "style/paper"]}),
    ];
    let mut all = vec![ink, decode_png(&base).2];
    for other in others {
        let other_pixels = pixels(&server, &other);
        assert!(!all.contains(&other_pixels), "{other}");
        all.push(other_pixels);
    }
    // Combined in both orders, and with the model's name.
    let both = &all[6];
    assert!(pixels(&server, &json!({"model": "ink", "lora": "style/paper"})) == *both);
    // Without an adapter everything is as before.
    for none in [
        json!({}),
        json!({"lora": {}}),
        json!({"loras": []}),
        json!({"model": "x"}),
    ] {
        assert!(image(&server, &none) == base, "{none}");
    }
}

#[test]
fn chats_and_estimates_have_adapters_too() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let chat = |extra: Value| {
        let mut chat = json!({
            "messages": [{"role": "user", "content": "a red fox"}], "size": "32x32", "seed": 7,
            "num_inference_steps": 2,
        });
        chat.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        post_to(server.address, "/v1/chat/completions", &chat)
    };
    let pixels_of = |reply: &Reply| super::decode(&super::parts(reply)[0]).2;
    let ink = pixels(&server, &json!({"lora": "ink"}));
    for extra in [
        json!({"lora": {"name": "ink"}}),
        json!({"extra_body": {"loras": ["ink"]}}),
        json!({"model": "ink"}),
    ] {
        assert!(pixels_of(&chat(extra.clone())) == ink, "{extra}");
    }
    let reply = chat(json!({"model": "ink"}));
    assert_eq!(reply.body["model"], "ink");
    let refused = chat(json!({"lora": "nothing"}));
    assert_eq!(error(&refused).0, 400);
    for (lora, status) in [("ink", 200), ("nothing", 400)] {
        let asked = body(&json!({"lora": lora}));
        let reply = post_to(server.address, "/v1/images/estimate", &asked);
        assert_eq!(reply.status, status, "{}", reply.body);
    }
}

#[test]
fn adapters_are_listed_with_the_model_that_they_change() {
    let folder = folder();
    fs::write(folder.path().join("base.safetensors"), lora(0.1)).unwrap();
    fs::write(folder.path().join("bad.safetensors"), b"").unwrap();
    fs::write(
        folder.path().join("ink.json"),
        r#"{"steps": 3, "true_cfg_scale": 1}"#,
    )
    .unwrap();
    let server = serve(folder.path(), &["--lora-host-cache", "1MiB"]);
    // `base` is the model.
    assert_eq!(ids(&server), ["base", "ink", "style/paper"]);
    let models = get(server.address, "/v1/models").body["data"].clone();
    assert_eq!(models[0].get("parent"), None);
    assert_eq!(models[2]["parent"], "base");
    assert_eq!(models[2]["root"], "style/paper.safetensors");
    let card = get(server.address, "/v1/models/style/paper");
    assert_eq!((card.status, &card.body), (200, &models[2]));
    let nothing = get(server.address, "/v1/models/nothing");
    assert_eq!(
        error(&nothing),
        (
            404,
            Some("model"),
            "there is no model \"nothing\"; this server has base, ink, style/paper"
        )
    );

    image(&server, &json!({"model": "ink"}));
    let status = adapter_status(&server);
    assert_eq!(
        status["unusable"],
        json!([{"name": "bad", "reason": "the file is empty: copy or download it again"}])
    );
    assert_eq!(status["updates"], false);
    let usable = status["usable"].as_array().unwrap();
    let names: Vec<&Value> = usable.iter().map(|it| &it["name"]).collect();
    assert_eq!(names, ["base", "ink", "style/paper"]);
    let ink = &usable[1];
    assert_eq!((&ink["modules"], &ink["rank"]), (&json!(24), &json!(4)));
    assert_eq!(ink["file"], "ink.safetensors");
    assert_eq!(ink["hash"].as_str().unwrap().len(), 12);
    assert_eq!(ink["recipe"]["num_inference_steps"], 3);
    assert_eq!(ink["recipe"]["origin"], "sidecar");
    assert_eq!(usable[2]["recipe"], Value::Null);
    let cache = &status["host_cache"];
    assert_eq!(cache["max_bytes"], 1 << 20);
    assert_eq!((&cache["entries"], &cache["loads"]), (&json!(1), &json!(1)));
    assert_eq!(cache["bytes"], ink["bytes"]);
}

#[test]
fn an_image_says_the_models_name_and_an_answer_the_one_that_was_asked_for() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let reply = generate(&server, &json!({"model": "ink"}));
    assert_eq!(reply.body["model"], "ink");
    let file = from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap());
    let text = metadata(&file).unwrap();
    assert!(text.contains("Model: base"), "{text}");
}

/// Refuses each request with status 400, this key and this message.
fn assert_refused(server: &Server, cases: &[(Value, &str, String)]) {
    for (extra, param, message) in cases {
        let reply = generate(server, extra);
        let expected = (400, Some(*param), message.as_str());
        assert_eq!(error(&reply), expected, "{extra}");
    }
    image(server, &json!({}));
}

#[test]
fn names_and_paths_that_are_not_listed_are_refused() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let unlisted = |path: &str| {
        let message = format!(
            "lora.path: {path:?} is not the file of an adapter that GET /v1/models lists: give the name \
             of one"
        );
        (
            json!({"lora": {"name": "ink", "path": path}}),
            "lora.path",
            message,
        )
    };
    let unknown = |name: &str| {
        let message = format!("there is no adapter {name:?}: available are ink, style/paper");
        (json!({"lora": {"name": name}}), "lora", message)
    };
    let outside = folder.path().parent().unwrap().join("x.safetensors");
    let conflict = "lora.name and lora.path were given different values: give only one of them";
    assert_refused(
        &server,
        &[
            unknown("nothing"),
            unknown("Ink"),
            unknown("ink.safetensors"),
            unknown("../x"),
            unknown("/etc/passwd"),
            unknown(""),
            unlisted("../x"),
            unlisted("style/../ink"),
            unlisted("/etc/passwd"),
            unlisted(outside.to_str().unwrap()),
            unlisted("nothing"),
            unlisted(""),
            (
                json!({"lora": {"name": "ink", "path": "style/paper"}}),
                "lora.name",
                conflict.to_owned(),
            ),
        ],
    );
}

#[test]
fn adapters_that_do_not_fit_together_or_are_none_are_refused() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let nine: Vec<String> = (0..9).map(|index| format!("a{index}")).collect();
    let cases = [
        (
            json!({"lora": {"name": "ink", "scale": 9}}),
            "lora",
            "the scale of adapter \"ink\" must be from -8 to 8, got 9",
        ),
        (
            json!({"lora": {"name": "ink", "scale": "NaN"}}),
            "lora.scale",
            "lora.scale must be a number, got a string",
        ),
        (
            json!({"loras": ["ink", "ink"]}),
            "loras",
            "adapter \"ink\" is in the request twice: give it once",
        ),
        (
            json!({"loras": nine}),
            "loras",
            "a request may have 8 adapters at most, got 9",
        ),
        (
            json!({"lora": {"name": "ink", "weight": 1}}),
            "lora.weight",
            "unknown parameter lora.weight; known are name, lora_name, adapter, path, local_path, \
             lora_path, lora_local_path, scale, lora_scale",
        ),
        (
            json!({"lora": "ink", "loras": ["style/paper"]}),
            "lora",
            "lora and loras were given different values: give only one of them",
        ),
        (
            json!({"lora": 7}),
            "lora",
            "lora must be the name of an adapter, or an object with its name and scale, got 7",
        ),
    ];
    let cases = cases.map(|(extra, param, message)| (extra, param, message.to_owned()));
    assert_refused(&server, &cases);
    // JSON has no such numbers.
    let seven = body(&json!({"lora": {"name": "ink", "scale": 7}})).to_string();
    for scale in ["1e999", "NaN", "Infinity"] {
        let text = seven.replace("\"scale\":7", &format!("\"scale\":{scale}"));
        let headers = "Content-Type: application/json\r\n";
        let content = (headers, text.as_bytes());
        let reply = receive(send_raw(connect(server.address), "POST", IMAGES, content));
        assert_eq!(reply.status, 400, "{}", reply.body);
    }
    assert_eq!(generate(&server, &json!({"lora": ""})).status, 200);
}

/// Files that are refused: name, content, and the reason.
#[expect(clippy::too_many_lines, reason = "one entry for each reason")]
fn refused_files() -> Vec<(&'static str, Vec<u8>, String)> {
    let [a, b] = ["lora_A", "lora_B"].map(|part| format!("transformer.{LAYER}.{part}.weight"));
    let pair: [(&str, &[usize], f32); 2] = [(&a, &[2, 32], 0.1), (&b, &[32, 2], 0.1)];
    let with = |key: &str, shape: &[usize]| safetensors(&[pair[0], pair[1], (key, shape, 0.1)]);
    let only = |key: &str| safetensors(&[(key, &[2, 32], 0.1)]);
    let of_rank = |rank| safetensors(&[(&a, &[rank, 32], 0.1), (&b, &[32, rank], 0.1)]);
    let whole = lora(0.1);
    let bytes = whole.len();
    let header = bytes - 2 * 64 * 4;
    let incomplete = |has: usize, needs: usize| {
        format!(
            "the file has {has} bytes where its header needs {needs}: the copy is incomplete or \
             damaged, copy or download it again"
        )
    };
    let foreign = |key: &str, family: &str| {
        let key = format!("it has the key {key}, which names no linear layer of this model");
        format!("{key}{family}: use an adapter for Qwen-Image")
    };
    let rank = |rank: usize| {
        format!("it has the key {a} of rank {rank}: ranks from 1 to 512 can be loaded")
    };
    let unknown = "transformer.x.lora_A.weight";
    let flux = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight";
    let sdxl = "lora_unet_input_blocks_1_1_proj_in.lora_down.weight";
    let wan = "diffusion_model.blocks.0.self_attn.q.lora_A.weight";
    let text = "lora_te1_x.lora_down.weight";
    let (dora, bias) = (
        format!("transformer.{LAYER}.dora_scale"),
        format!("transformer.{LAYER}.diff_b"),
    );
    let pickle = b"\x80\x02}q\x00.".to_vec();
    vec![
        ("unknown-key", with(unknown, &[2, 32]), foreign(unknown, "")),
        (
            "lone-a",
            safetensors(&pair[..1]),
            format!(
                "it has the key {a} without lora_B (lora_up) for the same layer: the file is incomplete"
            ),
        ),
        (
            "shape",
            safetensors(&[pair[0], (&b, &[16, 2], 0.1)]),
            format!(
                "it has the key {b} of shape [16, 2] where [32, 2] is needed: use an adapter for this model"
            ),
        ),
        ("rank-0", of_rank(0), rank(0)),
        ("rank-513", of_rank(513), rank(513)),
        (
            "empty",
            Vec::new(),
            "the file is empty: copy or download it again".to_owned(),
        ),
        ("cut-header", whole[..20].to_vec(), incomplete(20, header)),
        (
            "cut",
            whole[..bytes - 4].to_vec(),
            incomplete(bytes - 4, bytes),
        ),
        (
            "flux",
            only(flux),
            foreign(flux, ". It seems to be made for Flux"),
        ),
        (
            "sdxl",
            only(sdxl),
            foreign(
                sdxl,
                ". It seems to be made for SDXL or Stable Diffusion 1.5",
            ),
        ),
        (
            "wan",
            only(wan),
            foreign(wan, ". It seems to be made for Wan"),
        ),
        (
            "text-encoder",
            with(text, &[2, 32]),
            format!(
                "it has {text}: changes of the text encoder cannot be loaded. \
                 --lora-ignore-text-encoder leaves them out"
            ),
        ),
        (
            "dora",
            with(&dora, &[32, 1]),
            format!(
                "it has {dora}: DoRA cannot be loaded. Merge it into the model with PEFT, or use an \
                 adapter that was trained as a plain LoRA"
            ),
        ),
        (
            "bias",
            with(&bias, &[32]),
            format!(
                "it has {bias}: changes of biases cannot be loaded. Use an adapter that was trained \
                 without biases"
            ),
        ),
        (
            "pickle",
            pickle,
            "the file is a pickle of PyTorch, which can run code when it is read: convert it to \
             safetensors"
                .to_owned(),
        ),
    ]
}

/// The status and each request have the reason, and the server lives on.
#[test]
fn files_are_refused_with_the_key() {
    let mut refused = refused_files();
    let folder = folder();
    for (name, content, _) in &refused {
        fs::write(folder.path().join(format!("{name}.safetensors")), content).unwrap();
    }
    let reason = "old.pt is a pickle file, which can run any code when it is read: convert it to \
                  .safetensors";
    fs::write(folder.path().join("old.pt"), b"\x80").unwrap();
    refused.push(("old.pt", Vec::new(), reason.to_owned()));
    refused.sort_unstable();
    let server = serve(folder.path(), &["--enable-lora-updates"]);
    assert_eq!(ids(&server), ["base", "ink", "style/paper"]);
    let expected: Vec<Value> = refused
        .iter()
        .map(|(name, _, reason)| json!({"name": name, "reason": reason}))
        .collect();
    assert_eq!(adapter_status(&server)["unusable"], json!(expected));
    for (name, _, reason) in &refused {
        let message = format!("the adapter {name:?} cannot be used: {reason}");
        for (extra, param) in [
            (json!({"lora": name}), "lora"),
            (json!({"model": name}), "model"),
        ] {
            let reply = generate(&server, &extra);
            assert_eq!(error(&reply), (400, Some(param), message.as_str()));
        }
        let reply = post_to(server.address, LOAD, &json!({"lora_name": name}));
        let message = if *name == "old.pt" { reason } else { &message };
        assert_eq!(error(&reply), (400, None, message.as_str()));
    }
    image(&server, &json!({"lora": "ink"}));
}

/// Values are read with the weights, so the first request finds those that are not finite.
#[test]
fn an_adapter_with_values_that_are_not_finite_is_refused_from_then_on() {
    let folder = folder();
    fs::write(folder.path().join("nan.safetensors"), lora(f32::NAN)).unwrap();
    let server = serve(folder.path(), &[]);
    assert_eq!(ids(&server), ["base", "ink", "nan", "style/paper"]);
    let message = format!(
        "the adapter \"nan\" cannot be used: it has the key transformer.{LAYER}.lora_A.weight, which has \
         a value that is not a finite number"
    );
    for param in [None, Some("lora")] {
        let reply = generate(&server, &json!({"lora": "nan"}));
        assert_eq!(error(&reply), (400, param, message.as_str()));
        assert_eq!(ids(&server), ["base", "ink", "style/paper"]);
    }
    image(&server, &json!({"lora": "ink"}));
}

#[cfg(unix)]
#[test]
fn links_out_of_the_folder_are_refused() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.safetensors");
    fs::write(&secret, lora(0.1)).unwrap();
    let folder = folder();
    std::os::unix::fs::symlink(&secret, folder.path().join("link.safetensors")).unwrap();
    let server = serve(folder.path(), &["--enable-lora-updates"]);
    assert_eq!(ids(&server), ["base", "ink", "style/paper"]);
    let reason = "it is a link to a file outside the folder of adapters: copy that file here";
    let message = format!("the adapter \"link\" cannot be used: {reason}");
    let reply = generate(&server, &json!({"lora": "link"}));
    assert_eq!(error(&reply), (400, Some("lora"), message.as_str()));
    let reply = post_to(server.address, LOAD, &json!({"lora_name": "link"}));
    assert_eq!(error(&reply), (400, None, reason));
    for path in [
        secret.to_str().unwrap(),
        "../secret.safetensors",
        "/etc/passwd",
    ] {
        let load = json!({"lora_name": "x", "lora_path": path});
        let message = format!(
            "{path:?} is not in the folder of adapters: give the path of a file from there, relative \
             to it"
        );
        let reply = post_to(server.address, LOAD, &load);
        assert_eq!(error(&reply), (400, None, message.as_str()));
    }
    // A listed file that becomes a link is gone.
    fs::remove_file(folder.path().join("ink.safetensors")).unwrap();
    std::os::unix::fs::symlink(&secret, folder.path().join("ink.safetensors")).unwrap();
    let reply = generate(&server, &json!({"lora": "ink"}));
    assert_eq!(error(&reply).0, 409, "{}", reply.body);
}

#[test]
fn a_file_that_was_changed_is_refused_until_it_is_loaded_again() {
    let folder = folder();
    let path = folder.path().join("ink.safetensors");
    let server = serve(folder.path(), &["--enable-lora-updates"]);
    let old = pixels(&server, &json!({"lora": "ink"}));
    let changed = "the file of the adapter \"ink\" was changed after the server listed it: load it \
                   again with POST /v1/load_lora_adapter and load_inplace, or restart the server";
    // Replaced by another file; cut; gone. The weights are in memory each time.
    let replaced = folder.path().join("new");
    fs::write(&replaced, lora(0.3)).unwrap();
    fs::rename(&replaced, &path).unwrap();
    assert_eq!(
        error(&generate(&server, &json!({"lora": "ink"}))),
        (409, None, changed)
    );
    fs::write(&path, &lora(0.3)[..100]).unwrap();
    assert_eq!(
        error(&generate(&server, &json!({"model": "ink"}))),
        (409, None, changed)
    );
    fs::remove_file(&path).unwrap();
    let gone = "the file of the adapter \"ink\" is gone: put it back and load it again with POST \
                /v1/load_lora_adapter and load_inplace, or choose another adapter";
    assert_eq!(
        error(&generate(&server, &json!({"lora": "ink"}))),
        (409, None, gone)
    );

    let inplace = json!({"lora_name": "ink", "load_inplace": true});
    let reply = post_to(server.address, LOAD, &inplace);
    let missing = "the folder of adapters has no file \"ink\"";
    assert_eq!(error(&reply), (404, None, missing));
    fs::write(&path, lora(0.3)).unwrap();
    assert_eq!(post_to(server.address, LOAD, &inplace).status, 200);
    assert!(pixels(&server, &json!({"lora": "ink"})) != old);
    fs::write(&path, fixture("twelve.safetensors")).unwrap();
    assert_eq!(post_to(server.address, LOAD, &inplace).status, 200);
    assert!(pixels(&server, &json!({"lora": "ink"})) == old);
}

#[test]
fn adapters_are_loaded_and_unloaded() {
    let folder = folder();
    let server = serve(folder.path(), &["--enable-lora-updates"]);
    let load = |body: Value| post_to(server.address, LOAD, &body);
    let unload = |body: Value| post_to(server.address, UNLOAD, &body);
    let text = |reply: &Reply| String::from_utf8(reply.bytes.clone()).unwrap();
    let ink = pixels(&server, &json!({"lora": "ink"}));

    fs::write(folder.path().join("new.safetensors"), lora(0.3)).unwrap();
    let unknown = generate(&server, &json!({"lora": "new"}));
    assert_eq!(error(&unknown).0, 400);
    let reply = load(json!({"lora_name": "new"}));
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(
        text(&reply),
        "Success: LoRA adapter 'new' added successfully."
    );
    assert_eq!(ids(&server), ["base", "ink", "new", "style/paper"]);
    let new = pixels(&server, &json!({"lora": "new"}));
    // Under another name; vLLM's clients send absolute paths.
    let path = folder.path().join("ink.safetensors");
    assert_eq!(
        load(json!({"lora_name": "my/ink", "lora_path": path})).status,
        200
    );
    assert!(pixels(&server, &json!({"model": "my/ink"})) == ink);

    let reply = load(json!({"lora_name": "ink", "lora_path": "new"}));
    let listed = "the adapter \"ink\" is loaded already: give load_inplace true to replace it, or \
                  another name";
    assert_eq!(error(&reply), (400, None, listed));
    let inplace = json!({"lora_name": "ink", "lora_path": "new", "load_inplace": true});
    assert_eq!(load(inplace).status, 200);
    assert!(pixels(&server, &json!({"lora": "ink"})) == new);

    let reply = unload(json!({"lora_name": "ink", "lora_int_id": 3}));
    assert_eq!(reply.status, 200);
    assert_eq!(
        text(&reply),
        "Success: LoRA adapter 'ink' removed successfully."
    );
    assert_eq!(ids(&server), ["base", "my/ink", "new", "style/paper"]);
    let known = "there is no adapter \"ink\": available are my/ink, new, style/paper";
    assert_eq!(
        error(&generate(&server, &json!({"lora": "ink"}))),
        (400, Some("lora"), known)
    );
    // As the model it was asked for before: nobody gets the base model instead.
    let reply = generate(&server, &json!({"model": "ink"}));
    let model = "there is no model \"ink\"; this server has base, my/ink, new, style/paper";
    assert_eq!(error(&reply), (404, Some("model"), model));
    let reply = unload(json!({"lora_name": "ink"}));
    assert_eq!(error(&reply), (404, None, "there is no adapter \"ink\""));

    for (body, param, message) in [
        (json!({}), "lora_name", "lora_name is required"),
        (
            json!({"lora_name": ""}),
            "lora_name",
            "lora_name is required",
        ),
        (json!({"lora_name": 1}), "lora_name", ""),
        (json!({"lora_name": "x", "path": "y"}), "path", ""),
    ] {
        for reply in [load(body.clone()), unload(body.clone())] {
            let (status, named, text) = error(&reply);
            assert_eq!((status, named), (400, Some(param)), "{body}: {text}");
            assert!(message.is_empty() || text == message, "{text}");
        }
    }
    let reply = load(json!({"lora_name": "../x", "lora_path": "ink"}));
    let name = "the name of an adapter has no empty part, and none that begins with a dot";
    assert_eq!(error(&reply), (400, None, name));
}

#[test]
fn updates_are_off_unless_they_are_enabled_and_need_the_key() {
    let folder = folder();
    let body = json!({"lora_name": "ink"});
    let server = serve(folder.path(), &[]);
    for path in [LOAD, UNLOAD] {
        let reply = post_to(server.address, path, &body);
        let message = format!(
            "there is nothing at {path}: the server was started without --enable-lora-updates"
        );
        assert_eq!(error(&reply), (404, None, message.as_str()));
    }
    assert_eq!(ids(&server), ["base", "ink", "style/paper"]);
    drop(server);
    let server = serve(
        folder.path(),
        &["--enable-lora-updates", "--api-key", "secret"],
    );
    assert_eq!(post_to(server.address, UNLOAD, &body).status, 401);
    let headers = "Authorization: Bearer secret\r\n";
    assert_eq!(
        json_with_headers(server.address, UNLOAD, headers, &body).status,
        200
    );
}

/// Adapters that change the text encoder too are usable if their changes of it may be left out.
#[test]
fn changes_of_the_text_encoder_may_be_ignored() {
    let folder = folder();
    let [a, b] = ["lora_A", "lora_B"].map(|part| format!("transformer.{LAYER}.{part}.weight"));
    let file = safetensors(&[
        (&a, &[2, 32], 0.3),
        (&b, &[32, 2], 0.3),
        ("lora_te1_x.lora_down.weight", &[2, 32], 0.1),
    ]);
    fs::write(folder.path().join("both.safetensors"), file).unwrap();
    fs::write(folder.path().join("plain.safetensors"), lora(0.3)).unwrap();
    let server = serve(folder.path(), &["--lora-ignore-text-encoder"]);
    let both = pixels(&server, &json!({"lora": "both"}));
    assert!(both == pixels(&server, &json!({"lora": "plain"})));
}

/// The adapters of eight clients do not fit into the cache together.
#[test]
fn clients_with_other_adapters_wait_for_room() {
    const CLIENTS: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    for client in 0..CLIENTS {
        let file = lora(0.1 * (client + 1) as f32);
        fs::write(folder.path().join(format!("a{client}.safetensors")), file).unwrap();
    }
    // Each takes 512 bytes. Room for two, and for none.
    for bytes in [1100, 100] {
        let bytes_text = bytes.to_string();
        let server = serve(folder.path(), &["--lora-host-cache", &bytes_text]);
        let alone: Vec<Vec<u8>> = (0..CLIENTS)
            .map(|client| pixels(&server, &json!({"lora": format!("a{client}")})))
            .collect();
        let most = thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    let (server, alone) = (&server, &alone);
                    scope.spawn(move || {
                        for _ in 0..3 {
                            let lora = json!({"lora": format!("a{client}")});
                            assert!(pixels(server, &lora) == alone[client], "{client}");
                        }
                    })
                })
                .collect();
            let mut most = 0;
            while clients.iter().any(|client| !client.is_finished()) {
                let used = adapter_status(&server)["host_cache"]["bytes"].clone();
                most = most.max(used.as_u64().unwrap());
            }
            clients
                .into_iter()
                .for_each(|client| client.join().unwrap());
            most
        });
        // One that is larger than the cache is there alone.
        assert!(most <= bytes.max(512), "{most} of {bytes}");
        let cache = adapter_status(&server)["host_cache"].clone();
        assert!(cache["bytes"].as_u64().unwrap() <= bytes);
        assert_eq!(cache["max_bytes"], bytes);
    }
}

#[test]
fn a_folder_of_the_command_line_must_exist() {
    let missing: PathBuf = tempfile::tempdir().unwrap().path().join("nothing");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["serve", "--port", "0", "--lora-dir"])
        .arg(&missing)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(log.contains("the folder of adapters"), "{log}");
    assert!(log.contains("nothing cannot be read"), "{log}");
}
