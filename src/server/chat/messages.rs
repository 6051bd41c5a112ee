//! Finds the prompt in a list of chat messages.

use serde_json::Value;

use super::super::invalid::InvalidBody;

/// The text of the last user message. All other messages are ignored.
///
/// Text parts are joined by one space, as vLLM-Omni joins them. Nothing is trimmed.
pub(super) fn prompt(messages: Option<&Value>) -> Result<String, InvalidBody> {
    let messages = match messages {
        None | Some(Value::Null) => {
            return Err(InvalidBody::Missing {
                param: "messages".to_owned(),
            });
        }
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(InvalidBody::wrong_type("messages", "a list", other)),
    };
    let mut last = None;
    for (index, message) in messages.iter().enumerate() {
        let at = format!("messages.{index}");
        let Value::Object(fields) = message else {
            return Err(InvalidBody::wrong_type(&at, "an object", message));
        };
        match fields.get("role") {
            Some(Value::String(role)) if role == "user" => {
                last = Some((format!("{at}.content"), fields.get("content")));
            }
            Some(Value::String(_)) => {}
            None => {
                return Err(InvalidBody::Missing {
                    param: format!("{at}.role"),
                });
            }
            Some(role) => {
                return Err(InvalidBody::wrong_type(
                    &format!("{at}.role"),
                    "a string",
                    role,
                ));
            }
        }
    }
    let (at, content) = last.ok_or(InvalidBody::NoUserMessage)?;
    match content {
        None | Some(Value::Null) => Err(InvalidBody::Missing { param: at }),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) if parts.is_empty() => Err(InvalidBody::NoParts { param: at }),
        Some(Value::Array(parts)) => {
            let texts: Result<Vec<&str>, InvalidBody> = parts
                .iter()
                .enumerate()
                .map(|(index, part)| part_text(&format!("{at}.{index}"), part))
                .collect();
            Ok(texts?.join(" "))
        }
        Some(other) => Err(InvalidBody::wrong_type(
            &at,
            "a string or a list of text parts",
            other,
        )),
    }
}

/// Reads `"text"`, `{"type": "text", "text": "text"}` or `{"text": "text"}`, as vLLM-Omni does, and
/// `{"type": "input_text", "text": "text"}`, as in `OpenAI`'s Responses API.
fn part_text<'a>(at: &str, part: &'a Value) -> Result<&'a str, InvalidBody> {
    let fields = match part {
        Value::String(text) => return Ok(text),
        Value::Object(fields) => fields,
        other => return Err(InvalidBody::wrong_type(at, "an object or a string", other)),
    };
    let is_text = match fields.get("type") {
        None => fields.contains_key("text"),
        Some(kind) => kind == "text" || kind == "input_text",
    };
    if !is_text {
        return Err(InvalidBody::NotText {
            param: at.to_owned(),
        });
    }
    let at = format!("{at}.text");
    match fields.get("text") {
        Some(Value::String(text)) => Ok(text),
        None => Err(InvalidBody::Missing { param: at }),
        Some(other) => Err(InvalidBody::wrong_type(&at, "a string", other)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_user_message_is_the_prompt() {
        let messages = json!([
            {"role": "system", "content": "You paint."},
            {"role": "user", "content": "a dog"},
            {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            {"role": "user", "content": " a cat\n"},
            {"role": "assistant", "content": "Gladly."},
        ]);
        assert_eq!(prompt(Some(&messages)).unwrap(), " a cat\n");
    }

    #[test]
    fn text_parts_are_joined_by_one_space() {
        let messages = json!([
            {"role": "user", "content": [{"type": "text", "text": "a cat,"}, "in the", {"text": "rain"}]},
        ]);
        assert_eq!(prompt(Some(&messages)).unwrap(), "a cat, in the rain");
    }

    #[test]
    fn the_text_parts_of_the_responses_api_are_text() {
        let messages = json!([
            {"role": "user", "content": [
                {"type": "input_text", "text": "a cat"}, {"type": "text", "text": "in the rain"},
            ]},
        ]);
        assert_eq!(prompt(Some(&messages)).unwrap(), "a cat in the rain");
        let messages = json!([
            {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]},
        ]);
        let error = prompt(Some(&messages)).unwrap_err();
        assert_eq!(error.param(), "messages.0.content.0");
    }

    #[test]
    fn an_empty_prompt_is_one() {
        assert_eq!(
            prompt(Some(&json!([{"role": "user", "content": ""}]))).unwrap(),
            ""
        );
    }
}
