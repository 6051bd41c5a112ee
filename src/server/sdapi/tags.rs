//! Adapters in prompts as the web UI writes them: `<lora:NAME>`, `<lora:NAME:WEIGHT>`,
//! `<lora:NAME:WEIGHT_OF_TEXT_ENCODER:WEIGHT>`, and the weights by name, `te=` and `unet=`.
//!
//! Only prompts of the web UI's API have them. Elsewhere such text is a part of the prompt.

use std::ops::Range;

use super::super::adapters::WrittenAdapter;
use super::super::invalid::InvalidBody;

/// Beginnings of a tag, in lower case. The web UI reads both as the same.
const BEGINNINGS: [&str; 2] = ["<lora:", "<lyco:"];

/// Takes the tags out of a prompt. Returns the rest, and the adapters of the tags in their order.
pub(super) fn take_adapters(prompt: &str) -> Result<(String, Vec<WrittenAdapter>), InvalidBody> {
    let mut rest = String::new();
    let mut adapters = Vec::new();
    let mut from = 0;
    while let Some(tag) = find(prompt, from) {
        let (before, after) = (&prompt[from..tag.start], &prompt[tag.end..]);
        rest.push_str(before);
        // The space before a tag goes with it, if there is another one behind it or nothing.
        if after.is_empty() || after.starts_with(char::is_whitespace) {
            rest.truncate(rest.trim_end().len());
        }
        if rest.is_empty() {
            let space = after.len() - after.trim_start().len();
            from = tag.end + space;
        } else {
            from = tag.end;
        }
        adapters.push(read(&prompt[tag])?);
    }
    rest.push_str(&prompt[from..]);
    Ok((rest, adapters))
}

/// Refuses a negative prompt with a tag: the web UI does not read it there.
pub(super) fn refuse_adapters(negative_prompt: &str) -> Result<(), InvalidBody> {
    find(negative_prompt, 0).map_or(Ok(()), |tag| {
        let tag = &negative_prompt[tag];
        let message = format!(
            "{tag} has no effect here: an adapter changes the whole image, so write it into prompt"
        );
        Err(InvalidBody::value("negative_prompt".to_owned(), &message))
    })
}

/// The first tag from a byte on.
fn find(prompt: &str, from: usize) -> Option<Range<usize>> {
    let starts = prompt[from..].match_indices('<').map(|(at, _)| from + at);
    let mut tags = starts.filter_map(|start| {
        let text = &prompt[start..];
        let begins = BEGINNINGS.iter().any(|beginning| {
            let head = text.get(..beginning.len());
            head.is_some_and(|head| head.eq_ignore_ascii_case(beginning))
        });
        let end = start + text.find('>')? + 1;
        begins.then_some(start..end)
    });
    tags.next()
}

/// Reads a tag. The weight of the text encoder has no effect: no adapter changes it.
fn read(tag: &str) -> Result<WrittenAdapter, InvalidBody> {
    let refused = |message: &str| {
        let message = format!("{tag} {message}");
        Err(InvalidBody::value("prompt".to_owned(), &message))
    };
    let inner = &tag[BEGINNINGS[0].len()..tag.len() - 1];
    let (mut places, mut unet, mut text_encoder) = (Vec::new(), None, None);
    for part in inner.split(':') {
        match part.split_once('=') {
            Some(("unet", value)) => unet = Some(value),
            Some(("te", value)) => text_encoder = Some(value),
            Some(("dyn", _)) => {
                return refused("gives dyn, which is not available: leave it out");
            }
            _ => places.push(part),
        }
    }
    let (name, weights) = match places.as_slice() {
        [] | ["", ..] => return refused("has no name: write <lora:NAME:WEIGHT>"),
        [_, _, _, _, ..] => return refused("has too many parts: write <lora:NAME:WEIGHT>"),
        [name, weights @ ..] => (name, weights),
    };
    // As in the web UI, one weight is that of both.
    let written = [
        weights.first().copied(),
        text_encoder,
        weights.get(1).copied(),
        unet,
    ];
    let mut scale = None;
    for weight in written.into_iter().flatten() {
        match weight.trim().parse::<f64>() {
            Ok(weight) if weight.is_finite() => scale = Some(weight),
            _ => return refused("has a weight that is not a number: write <lora:NAME:WEIGHT>"),
        }
    }
    Ok(WrittenAdapter::named(name.trim(), scale, "prompt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(prompt: &str) -> (String, Vec<(String, Option<f64>)>) {
        let (rest, adapters) = take_adapters(prompt).unwrap();
        let adapters = adapters.into_iter().map(|it| (it.name.unwrap(), it.scale));
        (rest, adapters.collect())
    }

    #[test]
    fn a_tag_has_a_name_and_weights_in_every_form_of_the_web_ui() {
        for (tag, name, scale) in [
            ("<lora:ink>", "ink", None),
            ("<lora:ink:0.8>", "ink", Some(0.8)),
            ("<lora:ink:-1>", "ink", Some(-1.0)),
            ("<lora:ink:0>", "ink", Some(0.0)),
            ("<lora:ink:.5>", "ink", Some(0.5)),
            ("<lora:ink: 0.8 >", "ink", Some(0.8)),
            ("<lora:ink:0.2:0.7>", "ink", Some(0.7)),
            ("<lora:ink:te=0.2:unet=0.7>", "ink", Some(0.7)),
            ("<lora:ink:unet=0.7:te=0.2>", "ink", Some(0.7)),
            ("<lora:ink:te=0.2>", "ink", Some(0.2)),
            ("<lora:ink:0.4:unet=0.7>", "ink", Some(0.7)),
            ("<LoRA:ink:2>", "ink", Some(2.0)),
            ("<lyco:ink:2>", "ink", Some(2.0)),
            ("<lora:style/ink-v1.0_b:1>", "style/ink-v1.0_b", Some(1.0)),
            ("<lora:a=b:1>", "a=b", Some(1.0)),
        ] {
            let (rest, adapters) = taken(&format!("a cat {tag}, ink"));
            assert_eq!(adapters, [(name.to_owned(), scale)], "{tag}");
            assert_eq!(rest, "a cat , ink", "{tag}");
        }
    }

    #[test]
    fn a_tag_leaves_one_space_between_words() {
        for (prompt, rest) in [
            ("a cat <lora:ink:1>", "a cat"),
            ("<lora:ink:1> a cat", "a cat"),
            ("<lora:ink:1>a cat", "a cat"),
            ("a <lora:ink:1> cat", "a cat"),
            ("a<lora:ink:1>cat", "acat"),
            ("a cat,<lora:ink:1><lora:paper> on a mat", "a cat, on a mat"),
            ("<lora:ink:1> <lora:paper>", ""),
            ("<lora:ink>", ""),
            ("雪 <lora:ink> 狐", "雪 狐"),
        ] {
            assert_eq!(taken(prompt).0, rest, "{prompt}");
        }
        let (_, adapters) = taken("<lora:ink:1><lora:paper>");
        let ink = ("ink".to_owned(), Some(1.0));
        assert_eq!(adapters, [ink, ("paper".to_owned(), None)]);
    }

    #[test]
    fn other_text_stays_as_it_is() {
        for prompt in [
            "",
            " a  cat ",
            "a <b> c",
            "<lora>",
            "<lora:ink",
            "lora:ink:1>",
            "<hypernet:ink:1>",
            "< lora:ink:1>",
            "<loraink:1>",
            "1 < 2 <lo",
            "<雪:1>",
        ] {
            assert_eq!(taken(prompt), (prompt.to_owned(), Vec::new()));
            assert_eq!(refuse_adapters(prompt), Ok(()));
        }
    }

    #[test]
    fn what_a_tag_cannot_say_is_refused() {
        for (prompt, reason) in [
            ("<lora::1>", "has no name"),
            ("<lora:>", "has no name"),
            ("<lora:ink:strong>", "a weight that is not a number"),
            ("<lora:ink:nan>", "a weight that is not a number"),
            ("<lora:ink:1:inf>", "a weight that is not a number"),
            ("<lora:ink:te=x:1>", "a weight that is not a number"),
            ("<lora:ink:1:1:1>", "too many parts"),
            ("<lora:ink:1:dyn=4>", "gives dyn"),
        ] {
            let error = take_adapters(prompt).unwrap_err();
            assert_eq!(error.param(), "prompt");
            let error = error.to_string();
            assert!(error.starts_with(&format!("prompt: {prompt} ")), "{error}");
            assert!(error.contains(reason), "{error}");
        }
        let error = refuse_adapters("blurry <lora:ink:1>").unwrap_err();
        assert_eq!(error.param(), "negative_prompt");
        assert!(
            error
                .to_string()
                .contains("<lora:ink:1> has no effect here")
        );
    }
}
