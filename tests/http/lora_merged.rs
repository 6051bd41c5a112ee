//! A server whose model has an adapter merged into it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{Reply, get, post_to};
use super::lora::fixture;
use super::real_model::{Server, model};
use super::{decode_png, from_base64, metadata};

const IMAGES: &str = "/v1/images/generations";

/// A folder with the adapters `ink`, which has a recipe, and `paper`.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).unwrap();
    write("ink.safetensors", &fixture("modulation.safetensors"));
    write(
        "ink.json",
        br#"{"name": "quick", "steps": 3, "shift": 3, "true_cfg_scale": 1}"#,
    );
    write("paper.safetensors", &fixture("second.safetensors"));
    write("other.safetensors", &fixture("twelve.safetensors"));
    write("other.json", br#"{"name": "slow", "steps": 9, "shift": 2}"#);
    folder
}

fn serve(folder: &Path, args: &[&str]) -> Server {
    let dir = folder.to_str().unwrap();
    let all = [
        &["--lora-dir", dir, "--enable-lora-updates", "--no-warm-up"],
        args,
    ]
    .concat();
    Server::start_with(Some(&model()), &all)
}

fn generate(server: &Server, more: &Value) -> Reply {
    let mut body = json!({
        "prompt": "a red fox", "size": "32x32", "seed": 7, "negative_prompt": " ",
    });
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    post_to(server.address, IMAGES, &body)
}

fn image(reply: &Reply) -> Vec<u8> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap())
}

/// Asserts that 8-bit values differ by rounding only.
fn assert_close(a: &[u8], b: &[u8]) {
    let (a, b) = (decode_png(a).2, decode_png(b).2);
    assert_eq!(a.len(), b.len());
    let largest = a.iter().zip(&b).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(largest <= Some(1), "off by {largest:?}");
}

#[test]
fn a_merged_adapter_is_in_every_image_with_its_recipe() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let merged = serve(folder.path(), &["--lora-merge", "ink:0.7"]);
    let ink = json!({"name": "ink", "scale": 0.7});
    let paper = json!({"name": "paper", "scale": 0.4});

    let expected = generate(&server, &json!({"loras": [ink]}));
    let reply = generate(&merged, &json!({}));
    assert_close(&image(&reply), &image(&expected));
    assert!(decode_png(&image(&reply)).2 != decode_png(&image(&generate(&server, &json!({})))).2);
    assert_eq!(reply.body["num_inference_steps"], 3);
    assert_eq!(reply.body["schedule"], expected.body["schedule"]);
    assert_eq!(reply.body["schedule"]["origin"], "sidecar");
    assert_eq!(reply.body["schedule"]["name"], "quick");
    assert_eq!(reply.body["merged_adapter"], ink);
    assert_eq!(reply.body.get("adapters"), None);
    let text = metadata(&image(&reply)).unwrap();
    assert!(text.contains(", Merged lora: ink:0.7, "), "{text}");
    assert!(text.contains("CFG scale: 1, "), "{text}");
    assert!(!text.contains(" Lora: "), "{text}");

    // Beside others.
    let expected = generate(&server, &json!({"loras": [ink, paper]}));
    let reply = generate(&merged, &json!({"loras": [paper]}));
    assert_close(&image(&reply), &image(&expected));
    let text = metadata(&image(&reply)).unwrap();
    assert!(
        text.contains(", Lora: paper:0.4, Lora hashes: \"paper: "),
        "{text}"
    );
    assert!(text.contains(", Merged lora: ink:0.7, "), "{text}");

    // What the request says comes first, as with any recipe.
    let own = json!({"num_inference_steps": 2, "true_cfg_scale": 4});
    let reply = generate(&merged, &own);
    assert_eq!(reply.body["num_inference_steps"], 2);
    let reply = generate(&merged, &json!({"lora": "other"}));
    assert_eq!(reply.status, 400, "{}", reply.body);
    let message = reply.body["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("different recipes, slow and quick"),
        "{message}"
    );
}

#[test]
fn a_merged_adapter_is_reported_and_cannot_be_named() {
    let folder = folder();
    let server = serve(folder.path(), &["--lora-merge", "ink"]);
    let status = get(server.address, "/v1/status").body;
    let adapters = &status["adapters"];
    assert_eq!(adapters["merged"]["name"], "ink");
    assert_eq!(adapters["merged"]["scale"], 1.0);
    assert_eq!(adapters["merged"]["hash"].as_str().unwrap().len(), 12);
    assert_eq!(status["defaults"]["num_inference_steps"], 3);
    assert_eq!(status["defaults"]["true_cfg_scale"], 1.0);
    assert_eq!(status["model_recipe"]["name"], "quick");
    let usable = adapters["usable"].as_array().unwrap().iter();
    let usable: Vec<&Value> = usable.map(|adapter| &adapter["name"]).collect();
    assert_eq!(usable, ["other", "paper"]);
    let models = get(server.address, "/v1/models").body["data"].clone();
    let models = models
        .as_array()
        .unwrap()
        .iter()
        .map(|card| card["id"].clone());
    assert_eq!(models.collect::<Vec<Value>>(), ["base", "other", "paper"]);

    for named in [
        json!({"lora": "ink"}),
        json!({"loras": [{"name": "paper"}, {"name": "ink", "scale": 0}]}),
        json!({"lora": {"name": "ink", "scale": -1}}),
        json!({"model": "ink"}),
    ] {
        let reply = generate(&server, &named);
        assert_eq!(reply.status, 400, "{named}: {}", reply.body);
        let message = reply.body["error"]["message"].as_str().unwrap();
        let expected = "adapter \"ink\" is merged into the model by --lora-merge";
        assert!(message.starts_with(expected), "{named}: {message}");
    }
    let load = json!({"lora_name": "ink"});
    let reply = post_to(server.address, "/v1/load_lora_adapter", &load);
    assert_eq!(reply.status, 400, "{}", reply.body);
    let reply = post_to(server.address, "/v1/refresh_lora_adapters", &json!({}));
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(
        get(server.address, "/v1/status").body["adapters"]["usable"],
        adapters["usable"]
    );
    assert_eq!(generate(&server, &json!({"model": "base"})).status, 200);
}
