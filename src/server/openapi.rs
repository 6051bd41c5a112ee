//! `GET /openapi.json`, which describes the routes, and `GET /docs`, a page that shows it.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
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

/// Serves the document of all other routes, and the page.
pub(super) fn routes(document: OpenApi, limits: &Limits) -> Router<Arc<App>> {
    let document = Bytes::from(to_json(document, limits));
    let document = async move || ([(CONTENT_TYPE, "application/json")], document);
    let page = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, DOCS_POLICY),
    ];
    Router::new()
        .route("/openapi.json", get(document))
        .route("/docs", get(async move || (page, DOCS_PAGE)))
}

/// Adds the server's limits to the schemas of requests.
///
/// # Panics
///
/// If the types have no JSON form; the tests call this.
fn to_json(mut document: OpenApi, limits: &Limits) -> String {
    // axum marks a parameter that may contain slashes with an asterisk; OpenAPI has no such mark.
    let paths = std::mem::take(&mut document.paths.paths).into_iter();
    document.paths.paths = paths
        .map(|(path, item)| (path.replace("{*", "{"), item))
        .collect();
    let components = document.components.get_or_insert_default();
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
    document
        .to_json()
        .expect("the document has only strings as keys")
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
        let document = super::super::routes::routes(&settings).into_openapi();
        serde_json::from_str(&to_json(document, &limits)).unwrap()
    }

    #[test]
    fn schemas_of_requests_list_all_keys_and_allow_no_others() {
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
