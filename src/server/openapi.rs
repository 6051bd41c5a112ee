//! `GET /openapi.json`, made from the types that requests are read into and answers written from,
//! and `GET /docs`, which shows it.

use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Number, OpenApi};

use crate::request::Limits;

use super::{chat, estimate, health, images, metrics, models, sdapi, status};

/// The page shows the document beside it, and takes nothing from elsewhere.
pub(super) const DOCS_PAGE: &str = include_str!("docs.html");

#[derive(OpenApi)]
#[openapi(
    info(
        title = "kiln",
        description = "Text-to-image with Qwen-Image, in the API of OpenAI.",
        license(name = "Apache-2.0"),
    ),
    paths(
        chat::chat_completions,
        images::generations,
        estimate::estimate,
        status::status,
        models::list,
        models::retrieve,
        models::version,
        health::health,
        health::live,
        health::ready,
        metrics::metrics,
    ),
    // The data of server-sent events, whose form a schema of the answer cannot say.
    components(schemas(
        chat::ChatCompletionChunk,
        images::PartialImageEvent,
        images::CompletedEvent
    ))
)]
struct Document;

/// The document for a server with these limits, with or without the API of AUTOMATIC1111's web UI.
///
/// # Panics
///
/// If the types have no JSON form; the tests call this.
pub(super) fn document(limits: &Limits, sdapi: bool) -> String {
    let mut document = Document::openapi();
    if sdapi {
        document.merge(sdapi::Document::openapi());
    }
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(
        "bearer",
        SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
    );
    if sdapi {
        let basic = SecurityScheme::Http(Http::new(HttpAuthScheme::Basic));
        components.add_security_scheme("basic", basic);
    }
    let sides = (limits.sizes.multiple, limits.sizes.max_side);
    for request in [
        "ChatRequest",
        "ExtraBody",
        "ImagesRequest",
        "Txt2ImgRequest",
    ] {
        let Some(RefOr::T(Schema::Object(request))) = components.schemas.get_mut(request) else {
            continue;
        };
        for (name, (minimum, maximum)) in [
            ("height", sides),
            ("width", sides),
            ("num_inference_steps", (1, limits.max_steps)),
            ("steps", (1, limits.max_steps)),
            ("num_outputs_per_prompt", (1, limits.max_num_images)),
            ("n", (1, limits.max_num_images)),
            ("batch_size", (1, limits.max_num_images)),
            ("n_iter", (1, limits.max_num_images)),
        ] {
            if let Some(RefOr::T(Schema::Object(field))) = request.properties.get_mut(name) {
                field.minimum = Some(Number::UInt(minimum));
                field.maximum = Some(Number::UInt(maximum));
            }
        }
    }
    document
        .to_json()
        .expect("the document has only strings as keys")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parsed() -> Value {
        let limits = Limits {
            max_steps: 77,
            ..Limits::for_any_model()
        };
        serde_json::from_str(&document(&limits, true)).unwrap()
    }

    #[test]
    fn requests_say_all_their_keys_and_take_no_others() {
        let document = parsed();
        for (name, keys) in [
            (
                "ChatRequest",
                ["messages", "extra_body", "true_cfg_scale", "temperature"],
            ),
            (
                "ImagesRequest",
                ["prompt", "response_format", "output_format", "user"],
            ),
        ] {
            let schema = &document["components"]["schemas"][name];
            assert_eq!(schema["additionalProperties"], false, "{name}");
            for key in keys {
                assert!(schema["properties"][key].is_object(), "{name}.{key}");
            }
            let steps = &schema["properties"]["num_inference_steps"];
            assert_eq!(steps["maximum"], 77, "{name}");
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = parsed();
        let mut waiting = vec![&document];
        let mut found = 0;
        while let Some(value) = waiting.pop() {
            match value {
                Value::Object(object) => {
                    if let Some(Value::String(reference)) = object.get("$ref") {
                        let pointer = reference.strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{reference}");
                        found += 1;
                    }
                    waiting.extend(object.values());
                }
                Value::Array(values) => waiting.extend(values),
                _ => {}
            }
        }
        assert!(found > 10, "only {found} references");
    }
}
