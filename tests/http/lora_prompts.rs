//! Adapters in prompts of the web UI's API, and its list of adapters.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{Reply, get, post_to};
use super::lora::fixture;
use super::real_model::{Server, model};
use super::{decode_png, from_base64, metadata};

const TXT2IMG: &str = "/sdapi/v1/txt2img";
const LORAS: &str = "/sdapi/v1/loras";
const REFRESH: &str = "/sdapi/v1/refresh-loras";

/// A folder with the adapters `ink` and `style/paper`.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content| fs::write(folder.path().join(name), content).unwrap();
    fs::create_dir(folder.path().join("style")).unwrap();
    write("ink.safetensors", fixture("twelve.safetensors"));
    write("style/paper.safetensors", fixture("second.safetensors"));
    folder
}

fn serve(folder: &Path, args: &[&str]) -> Server {
    let dir = folder.to_str().unwrap();
    let all = [&["--lora-dir", dir, "--enable-sdapi", "--no-warm-up"], args].concat();
    Server::start_with(Some(&model()), &all)
}

fn txt2img(server: &Server, prompt: &str) -> Reply {
    let body = json!({
        "prompt": prompt, "steps": 2, "width": 32, "height": 32, "seed": 7, "cfg_scale": 1,
    });
    post_to(server.address, TXT2IMG, &body)
}

fn image(reply: &Reply) -> Vec<u8> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    from_base64(reply.body["images"][0].as_str().unwrap())
}

/// The PNG file of the other API.
fn plain(server: &Server, prompt: &str, loras: &Value) -> Vec<u8> {
    let body = json!({
        "prompt": prompt, "num_inference_steps": 2, "size": "32x32", "seed": 7,
        "true_cfg_scale": 1, "loras": loras,
    });
    let reply = post_to(server.address, "/v1/images/generations", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap())
}

fn refusal(reply: &Reply) -> (u16, &str, &str) {
    let error = &reply.body["error"];
    assert_eq!(reply.body["detail"], error["message"]);
    let text = |key: &str| error[key].as_str().unwrap();
    (reply.status, text("param"), text("message"))
}

#[test]
fn a_tag_in_the_prompt_adds_an_adapter_and_is_no_part_of_the_prompt() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let ink = json!([{"name": "ink", "scale": 0.5}]);
    let expected = plain(&server, "a red fox", &ink);
    assert!(decode_png(&expected).2 != decode_png(&plain(&server, "a red fox", &json!([]))).2);
    for prompt in [
        "a red fox <lora:ink:0.5>",
        "<lora:ink:0.5> a red fox",
        "a <lora:ink:0.1:0.5> red fox",
        "a red <lyco:ink:te=1:unet=0.5> fox <lora:style/paper:0>",
    ] {
        let reply = txt2img(&server, prompt);
        assert!(image(&reply) == expected, "{prompt}");
        assert_eq!(reply.body["parameters"]["prompt"], "a red fox");
        let info: Value = serde_json::from_str(reply.body["info"].as_str().unwrap()).unwrap();
        let text = info["infotexts"][0].as_str().unwrap();
        assert_eq!(text, metadata(&expected).unwrap());
        assert!(text.starts_with("a red fox\nSteps: 2, "), "{text}");
        assert!(
            text.contains(", Lora: ink:0.5, Lora hashes: \"ink: "),
            "{text}"
        );
    }
    let both = json!([{"name": "ink"}, {"name": "style/paper", "scale": -0.3}]);
    let both = plain(&server, "a red fox", &both);
    let reply = txt2img(&server, "a red fox<lora:ink><lora:style/paper:-0.3>");
    assert!(image(&reply) == both);
}

#[test]
fn a_tag_that_cannot_be_followed_is_refused() {
    let folder = folder();
    fs::write(folder.path().join("torn.safetensors"), b"torn").unwrap();
    let server = serve(folder.path(), &[]);
    let known = "available are ink, style/paper";
    for (prompt, message) in [
        (
            "a <lora:none:1>",
            &*format!("there is no adapter \"none\": {known}"),
        ),
        (
            "a <lora:../ink:1>",
            &*format!("there is no adapter \"../ink\": {known}"),
        ),
        (
            "a <lora:paper:1>",
            &*format!("there is no adapter \"paper\": {known}"),
        ),
        (
            "a <lora:ink:9>",
            "the scale of adapter \"ink\" must be from -8 to 8, got 9",
        ),
        (
            "a <lora:ink:x>",
            "prompt: <lora:ink:x> has a weight that is not a number",
        ),
        (
            "<lora:ink> <lora:ink>",
            "adapter \"ink\" is in the request twice",
        ),
        ("<lora:torn:1>", "the adapter \"torn\" cannot be used: "),
    ] {
        let reply = txt2img(&server, prompt);
        let (status, param, found) = refusal(&reply);
        assert_eq!((status, param), (400, "prompt"), "{prompt}");
        assert!(found.starts_with(message), "{prompt}: {found}");
    }
    let body = json!({"prompt": "a", "negative_prompt": "b <lora:ink:1>", "steps": 1});
    let reply = post_to(server.address, TXT2IMG, &body);
    let (status, param, message) = refusal(&reply);
    assert_eq!((status, param), (400, "negative_prompt"));
    assert!(message.contains("write it into prompt"), "{message}");
    // sd.cpp's way to name adapters.
    let body = json!({"prompt": "a", "lora": [{"path": "ink.safetensors"}], "steps": 1});
    let reply = post_to(server.address, TXT2IMG, &body);
    let (status, param, message) = refusal(&reply);
    assert_eq!((status, param), (400, "lora"));
    assert!(message.contains("<lora:NAME:WEIGHT>"), "{message}");
    assert_eq!(txt2img(&server, "a red fox").status, 200);
}

#[test]
fn only_the_api_of_the_web_ui_reads_tags() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let prompt = "a red fox <lora:ink:1> <lora:none:1>";
    let text = metadata(&plain(&server, prompt, &json!([]))).unwrap();
    assert!(text.starts_with(&format!("{prompt}\n")), "{text}");
    assert!(!text.contains("Lora"), "{text}");
    let body = json!({
        "messages": [{"role": "user", "content": prompt}],
        "extra_body": {"num_inference_steps": 1, "size": "32x32", "negative_prompt": prompt},
    });
    let reply = post_to(server.address, "/v1/chat/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.body.get("adapters"), None);
    let content = &reply.body["choices"][0]["message"]["content"][0];
    let url = content["image_url"]["url"].as_str().unwrap();
    let file = from_base64(url.strip_prefix("data:image/png;base64,").unwrap());
    let text = metadata(&file).unwrap();
    assert!(
        text.starts_with(&format!("{prompt}\nNegative prompt: {prompt}\n")),
        "{text}"
    );
}

#[test]
fn adapters_are_listed_and_the_folder_is_read_again() {
    let folder = folder();
    let server = serve(folder.path(), &[]);
    let list = || get(server.address, LORAS).body.as_array().unwrap().clone();
    let names = || -> Vec<Value> { list().iter().map(|lora| lora["name"].clone()).collect() };
    assert_eq!(names(), ["ink", "style/paper"]);
    let paper = list().remove(1);
    assert_eq!(paper["alias"], "style/paper");
    assert_eq!(paper["path"], "style/paper.safetensors");
    assert!(paper["metadata"].is_object());

    fs::rename(
        folder.path().join("ink.safetensors"),
        folder.path().join("pen.safetensors"),
    )
    .unwrap();
    let header = folder.path().join("with_header.safetensors");
    fs::write(header, fixture("header.safetensors")).unwrap();
    assert_eq!(names(), ["ink", "style/paper"]);
    let reply = post_to(server.address, REFRESH, &json!({}));
    assert_eq!((reply.status, reply.body), (200, Value::Null));
    assert_eq!(names(), ["pen", "style/paper", "with_header"]);
    // The text of an object is the object, as in the web UI.
    let metadata = &list()[2]["metadata"]["lora_adapter_metadata"];
    assert!(metadata.is_object(), "{metadata}");
    assert_eq!(txt2img(&server, "a <lora:pen>").status, 200);
    assert_eq!(txt2img(&server, "a <lora:ink>").status, 400);
    let text = get(server.address, LORAS).body.to_string();
    assert!(!text.contains(folder.path().to_str().unwrap()), "{text}");
}
