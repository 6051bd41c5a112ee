//! The body of an images request.

use std::sync::LazyLock;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

use crate::request::Integer;

use super::super::body;
use super::super::choice::choice;
use super::super::fields::GenerationFields;
use super::super::invalid::InvalidBody;
use super::super::keys::{self, FEATURES, Ineffective, Keys, NoMoreFields};
use super::super::parsed::ParsedRequest;
use super::super::previews::Previews;

/// What an images request may have besides the keys that kiln reads.
const INEFFECTIVE: Ineffective = Ineffective {
    ignored: &[],
    features: FEATURES,
    accepts_empty: false,
    others: "",
};

static NESTED_KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    known: body::field_names::<GenerationFields>(),
    ineffective: &INEFFECTIVE,
});

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let mut known = body::field_names::<ImagesFields>();
    known.extend(NESTED_KEYS.known.iter().cloned());
    Keys {
        known,
        ineffective: &INEFFECTIVE,
    }
});

/// The keys of an images request besides [`GenerationFields`].
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "some fields are only checked")]
pub(super) struct ImagesFields {
    /// The prompt; may be empty.
    #[schema(value_type = String, required = true)]
    prompt: Option<String>,
    /// The name of an adapter adds this adapter. Any other name is accepted, as the server has one
    /// model. The response repeats it if the model or an adapter has it, and contains the model's first
    /// name otherwise.
    pub(super) model: Option<String>,
    /// `b64_json`, the default, returns the images in a JSON body, and `url` returns them there as
    /// `data:` URLs. `file` returns one image as the body itself, or several as a ZIP archive. Events
    /// of a stream always have `b64_json`.
    #[serde(default, deserialize_with = "choice")]
    pub(super) response_format: Option<ResponseFormat>,
    /// Number of steps if neither `num_inference_steps` nor a recipe gives one: 20 for `low`, 30 for
    /// `medium`, 50 for all others.
    #[serde(default, deserialize_with = "choice")]
    pub(super) quality: Option<Quality>,
    /// All images are opaque.
    #[serde(default, deserialize_with = "choice")]
    background: Option<Background>,
    /// Ignored: nothing is moderated.
    #[serde(default, deserialize_with = "choice")]
    moderation: Option<Moderation>,
    /// Ignored: describe the style in the prompt.
    #[serde(default, deserialize_with = "choice")]
    style: Option<Style>,
    /// Ignored.
    user: Option<String>,
    /// Ignored.
    safety_identifier: Option<String>,
    /// Respond with server-sent events: up to `partial_images` previews, then one event for each
    /// image.
    pub(super) stream: Option<bool>,
    /// Number of small previews of the first image, from 0 to 3; there may be fewer if there are few
    /// steps. Needs `stream`.
    #[schema(value_type = Option<u8>, maximum = 3)]
    partial_images: Option<Integer>,
    /// Only for jobs: URL to which the job is posted when it has ended. Its host must be one that the
    /// server was started with (`--webhook-host`).
    webhook: Option<String>,
    /// Further parameters of the generation. A parameter may be given both here and beside
    /// `extra_body` if the values are equal.
    #[schema(value_type = Option<ImagesExtraBody>)]
    extra_body: Option<IgnoredAny>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ResponseFormat {
    B64Json,
    Url,
    File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Quality {
    Auto,
    Low,
    Medium,
    High,
    Standard,
    Hd,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Background {
    Auto,
    Opaque,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Moderation {
    Auto,
    Low,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Style {
    Vivid,
    Natural,
}

impl Quality {
    /// Number of steps of a request without `num_inference_steps`; `None` for the default.
    fn num_inference_steps(self) -> Option<i128> {
        match self {
            Self::Low => Some(20),
            Self::Medium => Some(30),
            Self::Auto | Self::High | Self::Standard | Self::Hd => None,
        }
    }

    /// The quality in `OpenAI`'s terms.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::Auto | Self::High | Self::Standard | Self::Hd => "high",
        }
    }
}

/// The body of an images request.
pub(in super::super) struct ImagesRequest;

impl ToSchema for ImagesRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ImagesFields::schemas(schemas);
        GenerationFields::schemas(schemas);
    }
}

/// Parameters that may be given in `extra_body` or beside it.
struct ImagesExtraBody;

impl ToSchema for ImagesExtraBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        GenerationFields::schemas(schemas);
    }
}

impl PartialSchema for ImagesExtraBody {
    fn schema() -> RefOr<Schema> {
        let description = "Parameters of the generation.";
        keys::merged_schema::<GenerationFields, NoMoreFields>(&INEFFECTIVE, description)
    }
}

impl PartialSchema for ImagesRequest {
    fn schema() -> RefOr<Schema> {
        let description = "Images to generate.";
        keys::merged_schema::<ImagesFields, GenerationFields>(&INEFFECTIVE, description)
    }
}

/// An images request that has been read.
#[derive(Debug)]
pub(in super::super) struct Parsed {
    pub(super) fields: ImagesFields,
    pub(in super::super) request: ParsedRequest,
    pub(super) previews: Previews,
}

impl Parsed {
    /// The name of the model in the request.
    pub(in super::super) fn model(&self) -> Option<&str> {
        self.fields.model.as_deref()
    }
}

/// The body of a request for a job.
#[derive(Debug)]
pub(in super::super) struct JobBody {
    pub(in super::super) request: ParsedRequest,
    /// The name of the model in the request.
    pub(in super::super) model: Option<String>,
    pub(in super::super) webhook: Option<String>,
}

impl Parsed {
    /// This request, whose answer has the images.
    pub(super) fn without_webhook(self) -> Result<Self, InvalidBody> {
        match self.fields.webhook {
            None => Ok(self),
            Some(_) => Err(InvalidBody::Unavailable {
                param: "webhook".to_owned(),
                instead: "only jobs have one: send the request to /v1/images/jobs",
            }),
        }
    }

    /// This request as a job.
    pub(in super::super) fn into_job(self) -> Result<JobBody, InvalidBody> {
        let unavailable = |param: &str, instead| InvalidBody::Unavailable {
            param: param.to_owned(),
            instead,
        };
        if self.fields.stream == Some(true) {
            let instead = "a job has no stream; follow it at /v1/images/jobs/ID with the header \
                           Accept: text/event-stream";
            return Err(unavailable("stream", instead));
        }
        if self.request.deadline.is_some() {
            let instead = "a job has no deadline; cancel it when it is no longer wanted";
            return Err(unavailable("deadline_ms", instead));
        }
        Ok(JobBody {
            request: self.request,
            model: self.fields.model,
            webhook: self.fields.webhook,
        })
    }
}

/// The schema of [`JobBody`]: an [`ImagesRequest`] without what concerns only its answer.
pub(in super::super) struct JobBodySchema;

impl ToSchema for JobBodySchema {
    fn name() -> std::borrow::Cow<'static, str> {
        "ImageJobRequest".into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ImagesRequest::schemas(schemas);
    }
}

impl PartialSchema for JobBodySchema {
    fn schema() -> RefOr<Schema> {
        let mut object = body::object_schema::<ImagesRequest>();
        for name in ["stream", "partial_images", "deadline_ms", "response_format"] {
            object.properties.remove(name);
        }
        object.description = Some("Images to generate as a job.".to_owned());
        RefOr::T(Schema::Object(object))
    }
}

/// Reads the body of an images request.
pub(in super::super) fn parse(mut object: Map<String, Value>) -> Result<Parsed, InvalidBody> {
    let generation = keys::take_nested(&mut object, &KEYS, &NESTED_KEYS)?;
    let generation: GenerationFields = body::read(generation)?;
    let mut fields: ImagesFields = body::read(object)?;
    let previews = previews_of(&fields)?;
    let prompt = fields.prompt.take();
    let prompt = prompt.ok_or_else(|| InvalidBody::missing("prompt"))?;
    let mut request = generation.parse(prompt, "prompt")?;
    request.params.fallback_steps = fields.quality.and_then(Quality::num_inference_steps);
    Ok(Parsed {
        fields,
        request,
        previews,
    })
}

fn previews_of(fields: &ImagesFields) -> Result<Previews, InvalidBody> {
    let is_stream = fields.stream == Some(true);
    if is_stream && fields.response_format == Some(ResponseFormat::File) {
        return Err(InvalidBody::conflict("response_format", "stream"));
    }
    let Some(Integer(got)) = fields.partial_images else {
        return Ok(Previews::Never);
    };
    let (min, max) = (0, 3);
    let param = "partial_images";
    match usize::try_from(got) {
        Ok(0) => Ok(Previews::Never),
        Ok(1..=3) if !is_stream => Err(InvalidBody::needs_stream(param)),
        Ok(count @ 1..=3) => Ok(Previews::Count(count)),
        _ => Err(InvalidBody::Range {
            param,
            min,
            max,
            got,
        }),
    }
}
