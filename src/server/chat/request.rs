//! The body of a chat request.

use std::num::NonZeroUsize;
use std::sync::LazyLock;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

use crate::request::Integer;

use super::super::body;
use super::super::fields::GenerationFields;
use super::super::invalid::InvalidBody;
use super::super::keys::{self, Keys};
use super::super::parsed::ParsedRequest;
use super::super::previews::Previews;
use super::events::ChatEvents;
use super::ignored::INEFFECTIVE;
use super::messages;

static NESTED_KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let mut known = body::field_names::<GenerationFields>();
    known.extend(body::field_names::<AnswerFields>());
    Keys {
        known,
        ineffective: &INEFFECTIVE,
    }
});

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let mut known = body::field_names::<ChatFields>();
    known.extend(NESTED_KEYS.known.iter().cloned());
    Keys {
        known,
        ineffective: &INEFFECTIVE,
    }
});

/// The keys of a chat request besides [`GenerationFields`].
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ChatFields {
    /// The prompt is the text of the last message with the role `user`; all other messages are
    /// ignored. Its content is a string, or a list of text parts that are joined by one space.
    #[schema(value_type = Vec<ChatMessage>, required = true)]
    messages: Option<Value>,
    /// The name of an adapter adds this adapter. Any other name is accepted, as the server has one
    /// model. The response repeats it if the model or an adapter has it, and contains the model's first
    /// name otherwise.
    model: Option<String>,
    /// Respond with server-sent events: the position in the queue, every step, previews if
    /// `preview_every` is set, the images, and `[DONE]`.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Further parameters of the generation. A parameter may be given both here and beside
    /// `extra_body` if the values are equal.
    #[schema(value_type = Option<ExtraBody>)]
    #[serde(rename = "extra_body")]
    _extra_body: Option<IgnoredAny>,
}

/// Options of a stream.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
struct StreamOptions {
    /// Send a chunk with the usage before `[DONE]`.
    include_usage: Option<bool>,
}

/// Parameters of the answer's form.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct AnswerFields {
    /// If it is a list with `text`, `message.content` of the answer is a text, which is empty, and the
    /// images are only in `message.images`. Other values are ignored.
    modalities: Option<Value>,
    /// Send a small preview of the first image each time this number of steps is over. Needs
    /// `stream`.
    #[schema(value_type = Option<i64>, minimum = 1)]
    preview_every: Option<Integer>,
}

/// Parameters that may be given in `extra_body` or beside it.
struct ExtraBody;

impl ToSchema for ExtraBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        GenerationFields::schemas(schemas);
    }
}

impl PartialSchema for ExtraBody {
    fn schema() -> RefOr<Schema> {
        let description = "Parameters of the generation.";
        keys::merged_schema::<AnswerFields, GenerationFields>(&INEFFECTIVE, description)
    }
}

/// A message of a chat.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only for the document: messages are read by hand")]
struct ChatMessage {
    role: String,
    content: Option<ChatContent>,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only for the document: messages are read by hand")]
enum ChatContent {
    Text(String),
    Parts(Vec<TextPart>),
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "only for the document: messages are read by hand")]
struct TextPart {
    /// `text`, or `input_text`.
    r#type: String,
    text: String,
}

/// The body of a chat request.
pub(super) struct ChatRequest;

impl ToSchema for ChatRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ChatFields::schemas(schemas);
        GenerationFields::schemas(schemas);
    }
}

impl PartialSchema for ChatRequest {
    fn schema() -> RefOr<Schema> {
        let description = "A chat that is answered with images.";
        keys::merged_schema::<ChatFields, ExtraBody>(&INEFFECTIVE, description)
    }
}

/// A chat request that has been read.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) model: Option<String>,
    pub(super) request: ParsedRequest,
    pub(super) previews: Previews,
    /// Whether the content of the answer's message is a text, and not a list of the images.
    pub(super) wants_text: bool,
    /// `None` for a single JSON response.
    pub(super) stream: Option<ChatEvents>,
}

/// Reads the body of a chat request.
pub(super) fn parse(mut object: Map<String, Value>) -> Result<Parsed, InvalidBody> {
    let mut generation = keys::take_nested(&mut object, &KEYS, &NESTED_KEYS)?;
    let chat: ChatFields = body::read(object)?;
    let answer = body::take(&mut generation, &body::field_names::<AnswerFields>());
    let answer: AnswerFields = body::read(answer)?;
    let previews = previews_of(&answer)?;
    let fields: GenerationFields = body::read(generation)?;
    let prompt = messages::prompt(chat.messages.as_ref())?;
    let stream = chat.stream.unwrap_or_default().then(|| ChatEvents {
        with_usage: chat
            .stream_options
            .and_then(|options| options.include_usage)
            .unwrap_or_default(),
    });
    if stream.is_none() && previews != Previews::Never {
        return Err(InvalidBody::needs_stream("preview_every"));
    }
    Ok(Parsed {
        model: chat.model,
        request: fields.parse(prompt, "messages")?,
        previews,
        wants_text: answer.wants_text(),
        stream,
    })
}

impl AnswerFields {
    fn wants_text(&self) -> bool {
        let modalities = self.modalities.as_ref().and_then(Value::as_array);
        modalities.is_some_and(|modalities| modalities.iter().any(|modality| modality == "text"))
    }
}

fn previews_of(fields: &AnswerFields) -> Result<Previews, InvalidBody> {
    let Some(Integer(interval)) = fields.preview_every else {
        return Ok(Previews::Never);
    };
    // Any interval beyond the number of steps means the same.
    let interval = usize::try_from(interval.min(i128::from(u32::MAX))).ok();
    let interval = interval.and_then(NonZeroUsize::new);
    interval
        .map(Previews::Every)
        .ok_or_else(|| InvalidBody::value("preview_every".to_owned(), "must be at least 1"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cat(extra: Value) -> Map<String, Value> {
        let mut body = json!({"messages": [{"role": "user", "content": "a cat"}]});
        let Value::Object(extra) = extra else {
            panic!("an object")
        };
        let mut body = body.as_object_mut().unwrap().clone();
        body.extend(extra);
        body
    }

    #[test]
    fn both_places_are_read_together() {
        let body = cat(json!({
            "model": "any", "temperature": 0.7, "height": 512, "n": 2,
            "extra_body": {"width": 256, "cfg_scale": 3, "negative_prompt": ""},
        }));
        let parsed = parse(body).unwrap();
        assert_eq!(parsed.model.as_deref(), Some("any"));
        let params = parsed.request.params;
        assert_eq!(params.prompt, "a cat");
        assert_eq!((params.height, params.width), (Some(512), Some(256)));
        assert_eq!(params.num_images, Some(2));
        assert_eq!(params.true_cfg_scale, Some(3.0));
        assert_eq!(params.negative_prompt.as_deref(), Some(""));
    }

    #[test]
    fn modalities_with_text_ask_for_a_text() {
        for (extra, wants_text) in [
            (json!({}), false),
            (json!({"modalities": ["image", "text"]}), true),
            (json!({"extra_body": {"modalities": ["text"]}}), true),
            (json!({"modalities": ["image"]}), false),
            (json!({"modalities": "text"}), false),
            (json!({"modalities": [7, null]}), false),
        ] {
            assert_eq!(
                parse(cat(extra.clone())).unwrap().wants_text,
                wants_text,
                "{extra}"
            );
        }
    }

    #[test]
    fn aliases_conflict_across_the_places() {
        let body = cat(json!({"cfg_scale": 1, "extra_body": {"true_cfg_scale": 2}}));
        assert_eq!(parse(body).unwrap_err().param(), "true_cfg_scale");
    }
}
