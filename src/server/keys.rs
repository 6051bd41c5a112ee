//! Which keys the object in a request may have.
//!
//! A key that says nothing is never refused: any key whose value is null, and a key of a feature that
//! kiln does not have, if its value leaves the feature off. A key that kiln does not know is refused
//! by name, because it may be misspelt.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, Object, ObjectBuilder, Schema, SchemaType};
use utoipa::{PartialSchema, ToSchema};

use super::body;
use super::invalid::InvalidBody;

/// Features of vLLM-Omni, and of other servers of image models, that kiln does not have.
pub(super) const FEATURES: &[Feature] = &[
    Feature::new("aspect_ratio", "use size"),
    Feature::new("bot_task", "the prompt is used as it is"),
    Feature::new("enable_teacache", "use cache"),
    Feature::new("extra_args", "give its parameters in extra_body"),
    Feature::new("extra_params", "give its parameters in extra_body"),
    Feature::new("flow_shift", "use shift"),
    Feature::new(
        "guidance_scale",
        "Qwen-Image has no distilled guidance; use true_cfg_scale",
    )
    .or_neutral(1.0),
    Feature::new("guidance_scale_2", "the model has one transformer").or_neutral(1.0),
    Feature::new("image", "images are generated from text only"),
    Feature::new("image_config", "use size"),
    Feature::new("image_size", "use size"),
    Feature::new("images", "images are generated from text only"),
    Feature::new(
        "infer_align_image_size",
        "images are generated from text only",
    ),
    Feature::new("layers", "an image has one layer").or_neutral(1.0),
    Feature::new("mask", "images are generated from text only"),
    Feature::new("mask_image", "images are generated from text only"),
    Feature::new("num_frames", "videos are not generated").or_neutral(1.0),
    Feature::new("prompt_extend", "the prompt is used as it is"),
    Feature::new("reference_image", "images are generated from text only"),
    Feature::new("resolution", "use size"),
    Feature::new("strength", "images are generated from text only"),
    Feature::new("system_prompt", "the prompt is used as it is"),
    Feature::new("use_system_prompt", "the prompt is used as it is"),
    Feature::new(
        "vae_use_slicing",
        "it holds for all requests; start the server with --vae-use-slicing",
    ),
    Feature::new(
        "vae_use_tiling",
        "it holds for all requests; start the server with --vae-use-tiling",
    ),
    Feature::new("watermark", "images have no watermark"),
];

/// A feature that kiln does not have. Its key is accepted with a value that leaves the feature off.
pub(super) struct Feature {
    key: &'static str,
    /// What to do instead.
    instead: &'static str,
    /// The number that asks for what happens anyway.
    neutral: Option<f64>,
}

impl Feature {
    pub(super) const fn new(key: &'static str, instead: &'static str) -> Self {
        Self {
            key,
            instead,
            neutral: None,
        }
    }

    const fn or_neutral(mut self, value: f64) -> Self {
        self.neutral = Some(value);
        self
    }

    fn is_off(&self, value: &Value) -> bool {
        let is_neutral = self.neutral.is_some() && value.as_f64() == self.neutral;
        is_neutral || is_empty(value)
    }

    /// The schema of a field with this key.
    fn schema(&self) -> Object {
        let mut values = empty_values();
        values.extend(self.neutral.map(|value| json!(value)));
        ObjectBuilder::new()
            .schema_type(SchemaType::AnyValue)
            .enum_values(Some(values))
            .description(Some(format!(
                "Accepted only if it asks for nothing: {}.",
                self.instead
            )))
            .build()
    }
}

/// Keys of a request that have no effect.
pub(super) struct Ineffective {
    /// Keys that do not concern images.
    pub(super) ignored: &'static [&'static str],
    pub(super) features: &'static [Feature],
    /// Whether an unknown key is accepted with any empty value. Otherwise only null is.
    pub(super) accepts_empty: bool,
    /// Ends the list of known keys in an error, for those that it leaves out.
    pub(super) others: &'static str,
}

/// The keys that an object in a request may have.
pub(super) struct Keys {
    /// Keys with an effect.
    pub(super) known: BTreeSet<String>,
    pub(super) ineffective: &'static Ineffective,
}

impl Keys {
    /// Removes the entries without an effect, and refuses keys that are not known. Messages put
    /// `place` before the key.
    pub(super) fn check(
        &self,
        object: &mut Map<String, Value>,
        place: &str,
    ) -> Result<(), InvalidBody> {
        let Ineffective {
            ignored,
            features,
            accepts_empty,
            others,
        } = self.ineffective;
        let mut unknown = None;
        object.retain(|key, value| {
            if value.is_null() || ignored.contains(&key.as_str()) {
                return false;
            }
            if self.known.contains(key) {
                return true;
            }
            let feature = features.iter().find(|feature| feature.key == key);
            let is_off = match feature {
                Some(feature) => feature.is_off(value),
                None => *accepts_empty && is_empty(value),
            };
            if !is_off && unknown.is_none() {
                let param = format!("{place}{key}");
                unknown = Some((param, feature));
            }
            false
        });
        match unknown {
            None => Ok(()),
            Some((param, Some(feature))) => Err(InvalidBody::Unavailable {
                param,
                instead: feature.instead,
            }),
            Some((param, None)) => {
                let known: Vec<&str> = self.known.iter().map(String::as_str).collect();
                let known = known.join(", ") + others;
                Err(InvalidBody::Unknown { param, known })
            }
        }
    }
}

/// Checks the keys of a request, and takes the entries out of it that may also stand in its object
/// `extra_body`, together with the entries of that object.
pub(super) fn take_nested(
    object: &mut Map<String, Value>,
    keys: &Keys,
    nested_keys: &Keys,
) -> Result<Map<String, Value>, InvalidBody> {
    const NAME: &str = "extra_body";
    keys.check(object, "")?;
    let mut taken = body::take(object, &nested_keys.known);
    match object.remove(NAME) {
        None => {}
        Some(Value::Object(mut nested)) => {
            nested_keys.check(&mut nested, "extra_body.")?;
            body::merge(&mut taken, nested, NAME)?;
        }
        Some(other) => return Err(InvalidBody::wrong_type(NAME, "an object", &other)),
    }
    Ok(taken)
}

/// Whether a value means that a feature is off.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.trim().is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

/// The values for which [`is_empty`] is true, apart from blank texts.
fn empty_values() -> Vec<Value> {
    vec![
        json!(null),
        json!(false),
        json!(0),
        json!(""),
        json!([]),
        json!({}),
    ]
}

/// The second type of a request that is read as one.
#[derive(ToSchema)]
pub(super) struct NoMoreFields {}

/// The schema of a request that is read as two types, plus keys without an effect.
pub(super) fn merged_schema<A: PartialSchema, B: PartialSchema>(
    ineffective: &Ineffective,
    description: &str,
) -> RefOr<Schema> {
    let (mut merged, other) = (body::object_schema::<A>(), body::object_schema::<B>());
    merged.properties.extend(other.properties);
    merged.required.extend(other.required);
    for key in ineffective.ignored {
        let schema = ObjectBuilder::new()
            .schema_type(SchemaType::AnyValue)
            .description(Some("Ignored: it does not concern images."));
        merged
            .properties
            .entry((*key).to_owned())
            .or_insert_with(|| schema.into());
    }
    for feature in ineffective.features {
        let schema = feature.schema();
        merged
            .properties
            .insert(feature.key.to_owned(), schema.into());
    }
    let unknown = if ineffective.accepts_empty {
        empty_values()
    } else {
        vec![json!(null)]
    };
    let unknown = ObjectBuilder::new()
        .schema_type(SchemaType::AnyValue)
        .enum_values(Some(unknown));
    merged.description = Some(description.to_owned());
    merged.additional_properties = Some(Box::new(AdditionalProperties::RefOr(RefOr::T(
        unknown.into(),
    ))));
    RefOr::T(Schema::Object(merged))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INEFFECTIVE: Ineffective = Ineffective {
        ignored: &["user"],
        features: FEATURES,
        accepts_empty: false,
        others: ", and others",
    };

    fn object(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    fn keys(ineffective: &'static Ineffective) -> Keys {
        Keys {
            known: BTreeSet::from(["a".to_owned(), "extra_body".to_owned()]),
            ineffective,
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_the_known_ones() {
        let keys = keys(&INEFFECTIVE);
        let mut body = object(json!({"a": 1, "user": 2}));
        assert!(keys.check(&mut body, "").is_ok());
        assert_eq!(body, object(json!({"a": 1})));
        let error = keys.check(&mut object(json!({"c": 1})), "extra_body.");
        assert_eq!(
            error.unwrap_err().to_string(),
            "unknown parameter extra_body.c; known are a, extra_body, and others"
        );
        let error = keys
            .check(&mut object(json!({"guidance_scale": 7.5})), "")
            .unwrap_err();
        assert!(error.to_string().contains("true_cfg_scale"), "{error}");
    }

    #[test]
    fn null_is_never_an_unknown_key() {
        let mut body = object(json!({"a": null, "c": null, "lora": null, "user": null}));
        keys(&INEFFECTIVE).check(&mut body, "").unwrap();
        assert!(body.is_empty(), "{body:?}");
    }

    #[test]
    fn every_feature_may_be_off_and_none_on() {
        let keys = keys(&INEFFECTIVE);
        for feature in FEATURES {
            let check = |value: Value| keys.check(&mut object(json!({feature.key: value})), "");
            for value in empty_values() {
                assert_eq!(check(value.clone()), Ok(()), "{}: {value}", feature.key);
            }
            for value in [
                json!(true),
                json!(2),
                json!("x"),
                json!([1]),
                json!({"x": 1}),
            ] {
                let error = check(value.clone()).unwrap_err();
                assert_eq!(error.param(), feature.key, "{value}");
            }
            assert_eq!(check(json!(1)).is_ok(), feature.neutral == Some(1.0));
        }
    }

    #[test]
    fn an_unknown_key_with_an_empty_value_is_refused_unless_an_api_accepts_it() {
        const LENIENT: Ineffective = Ineffective {
            accepts_empty: true,
            ..INEFFECTIVE
        };
        for value in [json!(""), json!(false), json!([])] {
            let mut body = object(json!({"c": value}));
            assert!(keys(&INEFFECTIVE).check(&mut body.clone(), "").is_err());
            assert!(keys(&LENIENT).check(&mut body, "").is_ok(), "{value}");
        }
        let mut body = object(json!({"c": 1}));
        assert!(keys(&LENIENT).check(&mut body, "").is_err());
    }

    #[test]
    fn entries_of_extra_body_are_taken_with_those_beside_it() {
        let nested = Keys {
            known: BTreeSet::from(["a".to_owned()]),
            ineffective: &INEFFECTIVE,
        };
        let take = |body: Value| take_nested(&mut object(body), &keys(&INEFFECTIVE), &nested);
        let one = object(json!({"a": 1}));
        assert_eq!(take(json!({"extra_body": {"a": 1, "user": 1}})), Ok(one));
        for body in [json!({"extra_body": {}}), json!({"extra_body": null})] {
            assert_eq!(take(body), Ok(Map::new()));
        }
        let blamed = |body: Value| take(body).unwrap_err().param().to_owned();
        assert_eq!(blamed(json!({"extra_body": {"c": 1}})), "extra_body.c");
        assert_eq!(blamed(json!({"a": 2, "extra_body": {"a": 1}})), "a");
        for value in [json!([]), json!("a=1"), json!(1)] {
            assert_eq!(blamed(json!({"extra_body": value})), "extra_body");
        }
    }
}
