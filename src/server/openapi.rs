//! `GET /openapi.json`, which describes the routes, and `GET /docs`, a page that shows it.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::routing::get;
use utoipa::openapi::schema::Schema;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{OpenApi, RefOr};
use utoipa::{Number, OpenApi as _};

use crate::request::{Limits, MAX_SHIFT, MAX_TRUE_CFG_SCALE, MIN_SHIFT};

use super::{App, chat, images};

/// The page reads the document from the same server, and nothing from others.
const DOCS_PAGE: &str = include_str!("docs.html");

const DOCS_POLICY: &str =
    "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'";

/// Enums of requests, whose values may also be an empty text.
const CHOICES: &[&str] = &[
    "Background",
    "CacheName",
    "GeneratorDevice",
    "Moderation",
    "OutputFormat",
    "Quality",
    "ResponseFormat",
    "ScmPolicyName",
    "ScmPresetName",
    "Style",
];

/// The part of the document that no route adds.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "kiln",
        description = "Text-to-image with Qwen-Image, in the API of OpenAI.",
        license(name = "Apache-2.0"),
    ),
    // The data of server-sent events, which the schema of a response cannot describe.
    components(schemas(
        chat::ChatCompletionChunk,
        images::PartialImageEvent,
        images::CompletedEvent
    ))
)]
struct Document;

/// The document before any route is added.
pub(super) fn without_routes() -> OpenApi {
    Document::openapi()
}

/// Describes a scheme of HTTP authentication that routes of the document name.
pub(super) fn add_security_scheme(document: &mut OpenApi, name: &str, scheme: HttpAuthScheme) {
    let components = document.components.get_or_insert_default();
    let scheme = SecurityScheme::Http(Http::new(scheme));
    components.add_security_scheme(name, scheme);
}

/// Serves the document of all other routes, and the page. The document has the limits of requests
/// once the model is loaded.
pub(super) fn routes(document: OpenApi) -> Router<Arc<App>> {
    let document = Arc::new(document);
    let document = async move |State(app): State<Arc<App>>| {
        let limits = app.loaded().map(|app| &app.limits);
        let text = to_json(OpenApi::clone(&document), limits);
        ([(CONTENT_TYPE, "application/json")], text)
    };
    let page = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, DOCS_POLICY),
    ];
    Router::new()
        .route("/openapi.json", get(document))
        .route("/docs", get(async move || (page, DOCS_PAGE)))
}

/// Writes the document as JSON.
///
/// # Panics
///
/// If the types have no JSON form; the tests call this.
fn to_json(mut document: OpenApi, limits: Option<&Limits>) -> String {
    // axum marks a parameter that may contain slashes with an asterisk; OpenAPI has no such mark.
    let paths = std::mem::take(&mut document.paths.paths).into_iter();
    document.paths.paths = paths
        .map(|(path, item)| (path.replace("{*", "{"), item))
        .collect();
    if let Some(limits) = limits {
        add_limits(&mut document, limits);
    }
    let components = document.components.get_or_insert_default();
    for choice in CHOICES {
        if let Some(RefOr::T(Schema::Object(choice))) = components.schemas.get_mut(*choice) {
            choice.enum_values.get_or_insert_default().push("".into());
        }
    }
    document
        .to_json()
        .expect("the document has only strings as keys")
}

/// Adds the server's limits to the schemas of requests.
fn add_limits(document: &mut OpenApi, limits: &Limits) {
    let components = document.components.get_or_insert_default();
    let sides = (limits.sizes.multiple, limits.sizes.max_side);
    for request in [
        "ChatRequest",
        "ExtraBody",
        "ImageJobRequest",
        "ImagesExtraBody",
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
        for (name, (minimum, maximum)) in [
            ("true_cfg_scale", (0.0, MAX_TRUE_CFG_SCALE)),
            ("cfg_scale", (0.0, MAX_TRUE_CFG_SCALE)),
            ("shift", (MIN_SHIFT, MAX_SHIFT)),
        ] {
            if let Some(RefOr::T(Schema::Object(field))) = request.properties.get_mut(name) {
                field.minimum = Some(Number::Float(minimum));
                field.maximum = Some(Number::Float(maximum));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::Settings;
    use super::*;

    fn parsed() -> Value {
        let limits = Limits {
            max_steps: 77,
            ..Limits::for_any_model()
        };
        let settings = Settings {
            sdapi: true,
            ..Settings::new("m")
        };
        let app = Arc::new(App::new(settings));
        let document = super::super::routes::routes(&app).into_openapi();
        serde_json::from_str(&to_json(document, Some(&limits))).unwrap()
    }

    #[test]
    fn schemas_of_requests_list_all_keys_and_allow_others_only_as_null() {
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
            let other = &schema["additionalProperties"]["enum"];
            assert_eq!(other, &serde_json::json!([null]), "{name}");
            for key in keys {
                assert!(schema["properties"][key].is_object(), "{name}.{key}");
            }
            let steps = &schema["properties"]["num_inference_steps"];
            assert_eq!(steps["maximum"], 77, "{name}");
            for (key, minimum, maximum) in [
                ("true_cfg_scale", 0.0, 20.0),
                ("cfg_scale", 0.0, 20.0),
                ("shift", 0.001, 100.0),
            ] {
                let field = &schema["properties"][key];
                assert_eq!(field["minimum"], minimum, "{name}.{key}");
                assert_eq!(field["maximum"], maximum, "{name}.{key}");
            }
        }
    }

    #[test]
    fn every_choice_may_be_empty() {
        let document = parsed();
        for name in CHOICES {
            let values = document["components"]["schemas"][name]["enum"].as_array();
            assert_eq!(values.unwrap().last().unwrap(), "", "{name}");
        }
    }

    #[test]
    fn every_reference_has_a_target() {
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
