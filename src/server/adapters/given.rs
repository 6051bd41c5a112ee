//! The keys `lora` and `loras` of a request.

use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::super::invalid::InvalidBody;
use super::super::keys::is_empty;

/// Keys of an adapter's name, of its file and of its scale. Those of vLLM-Omni are aliases.
const NAMES: &[&str] = &["name", "lora_name", "adapter"];
const FILES: &[&str] = &["path", "local_path", "lora_path", "lora_local_path"];
const SCALES: &[&str] = &["scale", "lora_scale"];
/// Keys without a meaning here.
const IGNORED: &[&str] = &["int_id", "lora_int_id"];

const KNOWN: &str = "name, lora_name, adapter, path, local_path, lora_path, lora_local_path, scale, \
                     lora_scale";

/// An adapter as a client writes it: its name, its file, or both.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct WrittenAdapter {
    pub(in super::super) name: Option<String>,
    pub(super) file: Option<WrittenFile>,
    pub(in super::super) scale: Option<f64>,
    /// Key of the name in the request.
    pub(super) param: String,
}

/// The file of an adapter as a client writes it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct WrittenFile {
    pub(super) path: String,
    /// Its key in the request.
    pub(super) param: String,
}

impl WrittenAdapter {
    /// An adapter by its name.
    pub(in super::super) fn named(name: &str, scale: Option<f64>, param: &str) -> Self {
        Self {
            name: Some(name.to_owned()),
            file: None,
            scale,
            param: param.to_owned(),
        }
    }
}

/// Reads `lora` and `loras`, of which a request may have one. Returns its key too.
pub(in super::super) fn written_adapters(
    lora: Option<&Value>,
    loras: Option<&Value>,
) -> Result<(&'static str, Vec<WrittenAdapter>), InvalidBody> {
    let given = |value: Option<&Value>| value.is_some_and(|value| !is_empty(value));
    match (lora, loras) {
        (Some(one), Some(other)) if given(lora) && given(loras) && one != other => {
            Err(InvalidBody::conflict("lora", "loras"))
        }
        (_, Some(value)) if given(loras) && !given(lora) => Ok(("loras", all("loras", value)?)),
        (Some(value), _) if given(lora) => Ok(("lora", all("lora", value)?)),
        _ => Ok(("lora", Vec::new())),
    }
}

fn all(param: &str, value: &Value) -> Result<Vec<WrittenAdapter>, InvalidBody> {
    let Value::Array(values) = value else {
        return Ok(vec![one(param, value)?]);
    };
    let values = values.iter().enumerate();
    let written = values.map(|(index, value)| one(&format!("{param}[{index}]"), value));
    written.collect()
}

fn one(param: &str, value: &Value) -> Result<WrittenAdapter, InvalidBody> {
    match value {
        Value::String(name) => Ok(WrittenAdapter::named(name, None, param)),
        Value::Object(object) => from_object(param, object),
        other => {
            let expected = "the name of an adapter, or an object with its name and scale";
            Err(InvalidBody::wrong_type(param, expected, other))
        }
    }
}

fn from_object(param: &str, object: &Map<String, Value>) -> Result<WrittenAdapter, InvalidBody> {
    let lists = [NAMES, FILES, SCALES, IGNORED];
    for (key, value) in object {
        if !value.is_null() && !lists.iter().any(|keys| keys.contains(&key.as_str())) {
            return Err(InvalidBody::Unknown {
                param: format!("{param}.{key}"),
                known: KNOWN.to_owned(),
            });
        }
    }
    let text = |found: Option<(&str, &Value)>| match found {
        None => Ok(None),
        Some((key, Value::String(text))) => Ok(Some((format!("{param}.{key}"), text.clone()))),
        Some((key, other)) => {
            let param = format!("{param}.{key}");
            Err(InvalidBody::wrong_type(&param, "a string", other))
        }
    };
    let name = text(aliased(param, object, NAMES)?)?;
    let file = text(aliased(param, object, FILES)?)?;
    let scale = match aliased(param, object, SCALES)? {
        None => None,
        Some((key, value)) => Some(value.as_f64().ok_or_else(|| {
            InvalidBody::wrong_type(&format!("{param}.{key}"), "a number", value)
        })?),
    };
    let Some((param, _)) = name.as_ref().or(file.as_ref()) else {
        return Err(InvalidBody::missing(&format!("{param}.name")));
    };
    Ok(WrittenAdapter {
        param: param.clone(),
        name: name.map(|(_, name)| name),
        file: file.map(|(param, path)| WrittenFile { path, param }),
        scale,
    })
}

/// The value under one of these keys, and the key. Those that are given must be equal.
fn aliased<'a>(
    param: &str,
    object: &'a Map<String, Value>,
    keys: &[&'static str],
) -> Result<Option<(&'static str, &'a Value)>, InvalidBody> {
    let given = |key: &&'static str| Some((*key, object.get(*key)?));
    let mut given = keys
        .iter()
        .filter_map(given)
        .filter(|(_, it)| !it.is_null());
    let Some((first, value)) = given.next() else {
        return Ok(None);
    };
    match given.find(|(_, other)| *other != value) {
        Some((other, _)) => {
            let path = |key| format!("{param}.{key}");
            Err(InvalidBody::conflict(&path(first), &path(other)))
        }
        None => Ok(Some((first, value))),
    }
}

/// Adapters: one or several, each by its name or as an object.
#[derive(ToSchema)]
#[schema(as = Loras)]
#[serde(untagged)]
#[expect(dead_code, reason = "only for the document: adapters are read by hand")]
pub(in super::super) enum LorasField {
    One(LoraField),
    Several(Vec<LoraField>),
}

/// An adapter: its name, or an object.
#[derive(ToSchema)]
#[schema(as = Lora)]
#[serde(untagged)]
#[expect(dead_code, reason = "only for the document: adapters are read by hand")]
pub(in super::super) enum LoraField {
    /// A name that `GET /v1/models` lists.
    Name(String),
    Object(LoraObject),
}

/// An adapter and its scale. It needs a `name`, a `path`, or an alias of one of them.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only for the document: adapters are read by hand")]
pub(in super::super) struct LoraObject {
    /// A name that `GET /v1/models` lists.
    name: Option<String>,
    /// Alias of `name`.
    lora_name: Option<String>,
    /// Alias of `name`.
    adapter: Option<String>,
    /// File of a listed adapter in the server's folder, relative to it or absolute. It comes before
    /// the name; no other file is read.
    path: Option<String>,
    /// Alias of `path`.
    local_path: Option<String>,
    /// Alias of `path`.
    lora_path: Option<String>,
    /// Alias of `path`.
    lora_local_path: Option<String>,
    /// Multiplies the changes of the adapter, 1 by default. 0 leaves the adapter out.
    #[schema(minimum = -8, maximum = 8)]
    scale: Option<f64>,
    /// Alias of `scale`.
    lora_scale: Option<f64>,
    /// Ignored.
    #[schema(value_type = Option<serde_json::Value>)]
    int_id: Option<()>,
    /// Ignored.
    #[schema(value_type = Option<serde_json::Value>)]
    lora_int_id: Option<()>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(
        lora: Value,
    ) -> Result<Vec<(Option<String>, Option<String>, Option<f64>)>, InvalidBody> {
        let (_, written) = written_adapters(Some(&lora), None)?;
        let parts = written.into_iter();
        let path = |file: Option<WrittenFile>| file.map(|file| file.path);
        Ok(parts.map(|it| (it.name, path(it.file), it.scale)).collect())
    }

    #[test]
    fn every_alias_is_read() {
        let name = |scale| (Some("ink".to_owned()), None, scale);
        let file = |scale| (None, Some("ink".to_owned()), scale);
        assert_eq!(read(json!("ink")), Ok(vec![name(None)]));
        for key in NAMES {
            assert_eq!(read(json!({*key: "ink"})), Ok(vec![name(None)]), "{key}");
        }
        for key in FILES {
            let given = json!({*key: "ink", "scale": 0.5});
            assert_eq!(read(given), Ok(vec![file(Some(0.5))]), "{key}");
        }
        for key in SCALES {
            let given = json!({"name": "ink", *key: -1, "int_id": 7, "lora_int_id": "x"});
            assert_eq!(read(given), Ok(vec![name(Some(-1.0))]), "{key}");
        }
        let both = json!(["ink", {"adapter": "ink", "scale": 2}]);
        assert_eq!(read(both), Ok(vec![name(None), name(Some(2.0))]));
    }

    #[test]
    fn both_keys_are_one_list() {
        let ink = json!({"name": "ink"});
        let read = |lora: Value, loras: Value| {
            let written = written_adapters(Some(&lora), Some(&loras));
            written.map(|(key, written)| (key, written.len()))
        };
        assert_eq!(read(ink.clone(), json!([])), Ok(("lora", 1)));
        assert_eq!(read(json!(null), json!([ink, ink])), Ok(("loras", 2)));
        assert_eq!(read(json!({}), ink.clone()), Ok(("loras", 1)));
        assert_eq!(read(ink.clone(), ink.clone()), Ok(("lora", 1)));
        let error = read(ink, json!(["paper"])).unwrap_err();
        assert_eq!(error.param(), "lora");
    }

    #[test]
    fn errors_name_the_place() {
        for (lora, param) in [
            (json!(7), "lora"),
            (json!([7]), "lora[0]"),
            (json!(["ink", []]), "lora[1]"),
            (json!({"name": 7}), "lora.name"),
            (json!({"name": "ink", "adapter": "paper"}), "lora.name"),
            (json!({"scale": 1}), "lora.name"),
            (json!({"name": "ink", "scale": "1"}), "lora.scale"),
            (json!([{"name": "ink", "weight": 1}]), "lora[0].weight"),
        ] {
            assert_eq!(read(lora.clone()).unwrap_err().param(), param, "{lora}");
        }
    }
}
