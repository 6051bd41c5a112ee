//! Reads the JSON object in the body of a request, and checks its keys.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;
use utoipa::PartialSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, Object, Schema};

use super::App;
use super::error::ApiError;
use super::invalid::InvalidBody;

/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Keys that vLLM-Omni accepts and kiln refuses, and what to use instead.
const UNAVAILABLE: &[(&str, &str)] = &[
    (
        "guidance_scale",
        "Qwen-Image has no distilled guidance; use true_cfg_scale",
    ),
    ("lora", "adapters cannot be loaded"),
    (
        "vae_use_slicing",
        "it holds for all requests; start the server with --vae-use-slicing",
    ),
    (
        "vae_use_tiling",
        "it holds for all requests; start the server with --vae-use-tiling",
    ),
];

/// The keys that an endpoint accepts.
pub(super) struct Keys {
    /// Keys with an effect.
    pub(super) known: BTreeSet<String>,
    /// Keys that `OpenAI` defines and that do not concern images.
    pub(super) ignored: &'static [&'static str],
}

impl Keys {
    /// Refuses all other keys. Messages put `place` before the key.
    pub(super) fn check(
        &self,
        object: &Map<String, Value>,
        place: &str,
    ) -> Result<(), InvalidBody> {
        let taken = |key: &str| self.known.contains(key) || self.ignored.contains(&key);
        let Some(key) = object.keys().find(|key| !taken(key)) else {
            return Ok(());
        };
        let param = format!("{place}{key}");
        if let Some((_, instead)) = UNAVAILABLE.iter().find(|(name, _)| name == key) {
            return Err(InvalidBody::Unavailable { param, instead });
        }
        let known: Vec<&str> = self.known.iter().map(String::as_str).collect();
        let mut known = known.join(", ");
        if !self.ignored.is_empty() {
            known.push_str(", and the others of OpenAI's API");
        }
        Err(InvalidBody::Unknown { param, known })
    }
}

/// Extracts the JSON object in the body of a request.
pub(super) struct JsonObject(pub(super) Map<String, Value>);

impl FromRequest<Arc<App>> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let content_type = request.headers().get(CONTENT_TYPE);
        let media_type = content_type
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .unwrap_or_default();
        if !media_type.trim().eq_ignore_ascii_case("application/json") {
            return Err(ApiError::ContentType);
        }
        let max = app.settings.max_body_bytes;
        // Of a body that is announced as larger, nothing is read: a client that waits for
        // "100 Continue" sends none of it.
        if request.body().size_hint().lower() > max as u64 {
            return Err(ApiError::BodyTooLarge { max });
        }
        let bytes = timeout(BODY_TIMEOUT, Bytes::from_request(request, app))
            .await
            .map_err(|_| ApiError::SlowBody)?
            .map_err(|rejection| {
                if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                    ApiError::BodyTooLarge { max }
                } else {
                    ApiError::Body(rejection)
                }
            })?;
        match serde_json::from_slice(&bytes).map_err(ApiError::Json)? {
            Value::Object(object) => Ok(Self(object)),
            _ => Err(ApiError::NotAnObject),
        }
    }
}

/// Names of the fields in a type's schema.
pub(super) fn field_names<T: PartialSchema>() -> BTreeSet<String> {
    object_schema::<T>().properties.into_keys().collect()
}

/// Removes the entries with these keys from an object and returns them.
pub(super) fn take(object: &mut Map<String, Value>, keys: &BTreeSet<String>) -> Map<String, Value> {
    let present: Vec<String> = object
        .keys()
        .filter(|key| keys.contains(*key))
        .cloned()
        .collect();
    present
        .into_iter()
        .filter_map(|key| object.remove_entry(&key))
        .collect()
}

/// Adds the entries of `nested` to the object that contains it under the key `name`. `null` counts
/// as absent.
pub(super) fn merge(
    object: &mut Map<String, Value>,
    nested: Map<String, Value>,
    name: &str,
) -> Result<(), InvalidBody> {
    for (key, value) in nested {
        match object.get(&key) {
            _ if value.is_null() => {}
            None | Some(Value::Null) => {
                object.insert(key, value);
            }
            Some(given) if same(given, &value) => {}
            Some(_) => return Err(InvalidBody::conflict(&key, &format!("{name}.{key}"))),
        }
    }
    Ok(())
}

/// Whether values are equal; `1` and `1.0` are.
fn same(a: &Value, b: &Value) -> bool {
    let written_apart = a.is_f64() != b.is_f64() && a.as_f64() == b.as_f64();
    a == b || (a.is_number() && b.is_number() && written_apart)
}

/// Reads an object into a type. The error names the key that does not fit.
pub(super) fn read<T: DeserializeOwned>(object: Map<String, Value>) -> Result<T, InvalidBody> {
    serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
        let param = error.path().to_string();
        InvalidBody::value(param, &error.into_inner().to_string())
    })
}

/// The schema of a request that is read as two types, plus ignored keys.
pub(super) fn merged_schema<A: PartialSchema, B: PartialSchema>(
    ignored: &[&str],
    description: &str,
) -> RefOr<Schema> {
    let (mut merged, other) = (object_schema::<A>(), object_schema::<B>());
    merged.properties.extend(other.properties);
    merged.required.extend(other.required);
    for key in ignored {
        let schema = utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::SchemaType::AnyValue)
            .description(Some("Ignored: it does not concern images."));
        merged
            .properties
            .entry((*key).to_owned())
            .or_insert_with(|| schema.into());
    }
    merged.description = Some(description.to_owned());
    merged.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(false)));
    RefOr::T(Schema::Object(merged))
}

/// # Panics
///
/// If the type is not a struct.
fn object_schema<T: PartialSchema>() -> Object {
    match T::schema() {
        RefOr::T(Schema::Object(object)) => object,
        _ => unreachable!("requests are read as structs"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_is_nested_is_added_unless_it_contradicts() {
        let mut body = object(json!({"seed": 1, "n": null, "true_cfg_scale": 4}));
        let nested = json!({"seed": 1, "n": 2, "true_cfg_scale": 4.0, "height": 64, "width": null});
        merge(&mut body, object(nested), "extra_body").unwrap();
        let expected = json!({"seed": 1, "n": 2, "true_cfg_scale": 4, "height": 64});
        assert_eq!(Value::Object(body.clone()), expected);
        let error = merge(&mut body, object(json!({"height": 32})), "extra_body").unwrap_err();
        assert_eq!(
            error.to_string(),
            "height and extra_body.height were given different values: give only one of them"
        );
    }

    #[test]
    fn large_integers_are_not_compared_as_fractions() {
        let mut body = object(json!({"seed": u64::MAX}));
        let nested = object(json!({"seed": u64::MAX - 1}));
        assert!(merge(&mut body, nested, "extra_body").is_err());
    }

    #[test]
    fn unknown_keys_are_refused_with_the_known_ones() {
        let keys = Keys {
            known: BTreeSet::from(["a".to_owned(), "b".to_owned()]),
            ignored: &["user"],
        };
        assert!(keys.check(&object(json!({"a": 1, "user": 2})), "").is_ok());
        let error = keys.check(&object(json!({"c": 1})), "extra_body.");
        assert_eq!(
            error.unwrap_err().to_string(),
            "unknown parameter extra_body.c; known are a, b, and the others of OpenAI's API"
        );
        let error = keys
            .check(&object(json!({"guidance_scale": 1})), "")
            .unwrap_err();
        assert!(error.to_string().contains("true_cfg_scale"), "{error}");
    }
}
