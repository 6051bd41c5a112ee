//! Generation parameters in a chat request: at the top level, where `extra_body=` of the
//! `OpenAI` SDK puts them, or in a literal object `extra_body`, which curl users write.

use serde_json::{Map, Value};

use crate::request::{GenerationParams, InvalidRequest};

use super::invalid::InvalidBody;

/// The keys that mean something, in either place.
const KNOWN: &[&str] = &[
    "height",
    "width",
    "size",
    "num_inference_steps",
    "true_cfg_scale",
    "cfg_scale",
    "seed",
    "negative_prompt",
    "num_outputs_per_prompt",
    "n",
];

/// What the chat API of `OpenAI` also defines. It says nothing about an image, so it is ignored.
const IGNORED: &[&str] = &[
    "audio",
    "extra_body",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "modalities",
    "model",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
];

/// A request's parameters, and under which names they came.
#[derive(Debug, PartialEq)]
pub(super) struct ChatParams {
    /// The prompt is still empty.
    pub(super) generation: GenerationParams,
    size_given: bool,
    images_key: &'static str,
}

impl ChatParams {
    pub(super) fn parse(body: &Map<String, Value>) -> Result<Self, InvalidBody> {
        match body.get("stream") {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::Bool(true)) => return Err(InvalidBody::Stream),
            Some(other) => return Err(InvalidBody::wrong_type("stream", "a boolean", other)),
        }
        let fields = Fields::new(body)?;
        let (scale_key, scale) = fields.get_either("true_cfg_scale", "cfg_scale")?;
        let (images_key, images) = fields.get_either("num_outputs_per_prompt", "n")?;
        let mut generation = GenerationParams {
            prompt: String::new(),
            negative_prompt: string("negative_prompt", fields.get("negative_prompt")?)?,
            true_cfg_scale: number(scale_key, scale)?,
            height: integer("height", fields.get("height")?)?,
            width: integer("width", fields.get("width")?)?,
            num_inference_steps: integer(
                "num_inference_steps",
                fields.get("num_inference_steps")?,
            )?,
            num_images: integer(images_key, images)?,
            seed: integer("seed", fields.get("seed")?)?,
        };
        let size = size(fields.get("size")?)?;
        if let Some((width, height)) = size {
            for (name, side, given) in [
                ("width", width, generation.width),
                ("height", height, generation.height),
            ] {
                if given.is_some_and(|given| given != side) {
                    return Err(conflict("size", name.to_owned()));
                }
            }
            (generation.width, generation.height) = (Some(width), Some(height));
        }
        Ok(Self {
            generation,
            size_given: size.is_some(),
            images_key,
        })
    }

    /// What the client called the parameter that an error blames.
    pub(super) fn wire_name(&self, error: &InvalidRequest) -> &'static str {
        match error.param() {
            "height" | "width" if self.size_given => "size",
            "num_images" => self.images_key,
            name => name,
        }
    }
}

/// Both places where parameters are looked for. A null is as good as nothing.
struct Fields<'a> {
    top: &'a Map<String, Value>,
    nested: Option<&'a Map<String, Value>>,
}

impl<'a> Fields<'a> {
    fn new(top: &'a Map<String, Value>) -> Result<Self, InvalidBody> {
        let nested = match top.get("extra_body") {
            None | Some(Value::Null) => None,
            Some(Value::Object(nested)) => Some(nested),
            Some(other) => return Err(InvalidBody::wrong_type("extra_body", "an object", other)),
        };
        let known = |key: &str| KNOWN.contains(&key);
        if let Some(key) = top
            .keys()
            .find(|key| !known(key) && !IGNORED.contains(&key.as_str()))
        {
            let known = format!("{}, and those of OpenAI's chat API", KNOWN.join(", "));
            return Err(InvalidBody::Unknown {
                param: key.clone(),
                known,
            });
        }
        if let Some(key) = nested.and_then(|nested| nested.keys().find(|key| !known(key))) {
            let param = format!("extra_body.{key}");
            return Err(InvalidBody::Unknown {
                param,
                known: KNOWN.join(", "),
            });
        }
        Ok(Self { top, nested })
    }

    fn get(&self, name: &str) -> Result<Option<&'a Value>, InvalidBody> {
        let top = self.top.get(name).filter(|value| !value.is_null());
        let nested = self.nested.and_then(|nested| nested.get(name));
        match (top, nested.filter(|value| !value.is_null())) {
            (Some(top), Some(nested)) if !same(top, nested) => {
                Err(conflict(name, format!("extra_body.{name}")))
            }
            (top, nested) => Ok(top.or(nested)),
        }
    }

    /// The value under either name, with the name that it came under.
    fn get_either(
        &self,
        name: &'static str,
        alias: &'static str,
    ) -> Result<(&'static str, Option<&'a Value>), InvalidBody> {
        match (self.get(name)?, self.get(alias)?) {
            (Some(value), Some(other)) if !same(value, other) => {
                Err(conflict(name, alias.to_owned()))
            }
            (None, Some(value)) => Ok((alias, Some(value))),
            (value, _) => Ok((name, value)),
        }
    }
}

fn conflict(param: &str, other: String) -> InvalidBody {
    InvalidBody::Conflict {
        param: param.to_owned(),
        other,
    }
}

/// Equal, or the same number written as an integer and as a fraction.
fn same(a: &Value, b: &Value) -> bool {
    let written_apart = a.is_f64() != b.is_f64() && a.as_f64() == b.as_f64();
    a == b || (a.is_number() && b.is_number() && written_apart)
}

fn string(name: &str, value: Option<&Value>) -> Result<Option<String>, InvalidBody> {
    match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(InvalidBody::wrong_type(name, "a string", other)),
    }
}

fn number(name: &str, value: Option<&Value>) -> Result<Option<f64>, InvalidBody> {
    let Some(value) = value else { return Ok(None) };
    match value.as_f64() {
        Some(number) => Ok(Some(number)),
        None => Err(InvalidBody::wrong_type(name, "a number", value)),
    }
}

fn integer(name: &str, value: Option<&Value>) -> Result<Option<i128>, InvalidBody> {
    let Some(value) = value else { return Ok(None) };
    match (value.as_i64(), value.as_u64()) {
        (Some(integer), _) => Ok(Some(integer.into())),
        (None, Some(integer)) => Ok(Some(integer.into())),
        (None, None) => Err(InvalidBody::wrong_type(name, "an integer", value)),
    }
}

/// Width and height of `"1024x768"`; the x may be a capital.
fn size(value: Option<&Value>) -> Result<Option<(i128, i128)>, InvalidBody> {
    let Some(text) = string("size", value)? else {
        return Ok(None);
    };
    let side = |digits: &str| {
        let only_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<i128>().ok().filter(|_| only_digits)
    };
    let sides = text.split_once(['x', 'X']);
    let sides = sides.and_then(|(width, height)| Some((side(width)?, side(height)?)));
    sides.map(Some).ok_or(InvalidBody::Size { got: text })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: &Value) -> Result<GenerationParams, InvalidBody> {
        ChatParams::parse(body.as_object().unwrap()).map(|params| params.generation)
    }

    fn blamed(body: &Value) -> String {
        parse(body).unwrap_err().param().to_owned()
    }

    #[test]
    fn both_places_and_the_aliases_are_read() {
        let body = json!({
            "model": "any", "temperature": 0.7, "height": 512, "n": 2, "seed": u64::MAX,
            "extra_body": {"width": 256, "cfg_scale": 3, "num_inference_steps": 8,
                "negative_prompt": ""},
        });
        let expected = GenerationParams {
            prompt: String::new(),
            negative_prompt: Some(String::new()),
            true_cfg_scale: Some(3.0),
            height: Some(512),
            width: Some(256),
            num_inference_steps: Some(8),
            num_images: Some(2),
            seed: Some(u64::MAX.into()),
        };
        assert_eq!(parse(&body).unwrap(), expected);
    }

    #[test]
    fn size_is_width_by_height() {
        for size in ["1024x768", "1024X768"] {
            let params = parse(&json!({"size": size})).unwrap();
            assert_eq!((params.width, params.height), (Some(1024), Some(768)));
        }
        for size in [
            "", "x", "1024", "1024x", "x768", "1024*768", "-4x4", "+4x4", "4x4x4", "4.0x4",
        ] {
            assert_eq!(
                parse(&json!({"size": size})),
                Err(InvalidBody::Size { got: size.into() })
            );
        }
    }

    #[test]
    fn the_same_value_twice_is_no_conflict() {
        let body = json!({
            "seed": 1, "true_cfg_scale": 4, "size": "64x32", "height": 32, "n": null,
            "extra_body": {"seed": 1, "true_cfg_scale": 4.0, "num_outputs_per_prompt": 2},
        });
        let params = parse(&body).unwrap();
        assert_eq!((params.seed, params.num_images), (Some(1), Some(2)));
        assert_eq!((params.width, params.height), (Some(64), Some(32)));
    }

    #[test]
    fn different_values_are_a_conflict() {
        assert_eq!(
            blamed(&json!({"height": 1, "extra_body": {"height": 2}})),
            "height"
        );
        assert_eq!(
            blamed(&json!({"cfg_scale": 1, "extra_body": {"true_cfg_scale": 2}})),
            "true_cfg_scale"
        );
        assert_eq!(
            blamed(&json!({"n": 1, "num_outputs_per_prompt": 2})),
            "num_outputs_per_prompt"
        );
        assert_eq!(blamed(&json!({"size": "64x64", "width": 32})), "size");
        let big = u64::MAX;
        assert_eq!(
            blamed(&json!({"seed": big, "extra_body": {"seed": big - 1}})),
            "seed"
        );
    }

    #[test]
    fn errors_name_what_the_client_wrote() {
        let limits = crate::request::Limits::for_any_model();
        let blamed = |body: &Value| {
            let params = ChatParams::parse(body.as_object().unwrap()).unwrap();
            let noise = kiln_models::noise::NoiseGenerator::Cpu;
            let request =
                crate::request::GenerationRequest::new(params.generation.clone(), &limits, noise);
            params.wire_name(&request.unwrap_err())
        };
        assert_eq!(blamed(&json!({"size": "0x64"})), "size");
        assert_eq!(blamed(&json!({"width": 0})), "width");
        assert_eq!(blamed(&json!({"n": 0})), "n");
        assert_eq!(
            blamed(&json!({"num_outputs_per_prompt": 0})),
            "num_outputs_per_prompt"
        );
    }
}
