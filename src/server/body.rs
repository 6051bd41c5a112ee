//! Reads the JSON object in the body of a request.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;
use utoipa::PartialSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{Object, Schema};

use super::App;
use super::error::ApiError;
use super::invalid::InvalidBody;

/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Extracts the JSON object in the body of a request.
pub(super) struct JsonObject(pub(super) Map<String, Value>);

impl FromRequest<Arc<App>> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        if media_type(request.headers()).is_none() {
            return Err(ApiError::ContentType);
        }
        read_object(request, app).await.map(Self)
    }
}

/// Reads the JSON object in the body of a request. A missing content type counts as JSON.
pub(super) async fn read_object(
    request: Request,
    app: &Arc<App>,
) -> Result<Map<String, Value>, ApiError> {
    let headers = request.headers();
    if media_type(headers).is_some_and(|name| !name.eq_ignore_ascii_case("application/json")) {
        return Err(ApiError::ContentType);
    }
    if let Some(encoding) = content_encoding(headers) {
        return Err(ApiError::ContentEncoding { encoding });
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
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(ApiError::Utf16);
    }
    let text = bytes
        .strip_prefix(crate::BYTE_ORDER_MARK.as_bytes())
        .unwrap_or(&bytes);
    match serde_json::from_slice(text).map_err(ApiError::Json)? {
        Value::Object(object) => Ok(object),
        _ => Err(ApiError::NotAnObject),
    }
}

/// The content type without its parameters, if there is one.
fn media_type(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(CONTENT_TYPE)?;
    // A value that is not text is no media type that a client may send.
    let value = value.to_str().unwrap_or("?");
    let name = value.split(';').next().unwrap_or_default().trim();
    (!name.is_empty()).then_some(name)
}

/// The content encoding of a body that is not sent as it is.
fn content_encoding(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(CONTENT_ENCODING).iter();
    let values: Vec<_> = values.map(|value| value.to_str().unwrap_or("?")).collect();
    let mut names = values.iter().flat_map(|value| value.split(','));
    let is_plain = |name: &str| {
        let name = name.trim();
        name.is_empty() || name.eq_ignore_ascii_case("identity")
    };
    (!names.all(is_plain)).then(|| values.join(", "))
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

/// The schema of a struct.
///
/// # Panics
///
/// If the type is not a struct.
pub(super) fn object_schema<T: PartialSchema>() -> Object {
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
}
