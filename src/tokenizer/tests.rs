//! Token ids compared with those of transformers, and errors of damaged files.

use std::env;
use std::error::Error;
use std::iter;

use tempfile::TempDir;

use kiln_models::families::qwen_image::TEMPLATE;

use super::*;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// The small vocabulary of the fixtures, as `vocab.json` and `merges.txt` ("base") or as
/// `tokenizer.json` ("odd").
fn tiny(checkpoint: &str) -> PromptTokenizer {
    let folder = format!("{FIXTURES}/checkpoints/{checkpoint}/tokenizer");
    PromptTokenizer::load(Path::new(&folder), &TEMPLATE).unwrap()
}

/// The vocabulary of Qwen-Image, which is too large for the repository; `None` if it is not available.
fn real() -> Option<PromptTokenizer> {
    let Some(folder) = env::var_os("KILN_QWEN_TOKENIZER") else {
        println!("SKIPPED: KILN_QWEN_TOKENIZER does not name the tokenizer folder of Qwen-Image");
        return None;
    };
    Some(PromptTokenizer::load(Path::new(&folder), &TEMPLATE).unwrap())
}

/// A copy of the small vocabulary's folder, for damaging its files.
fn copy() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(format!("{FIXTURES}/checkpoints/base/tokenizer")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    copy
}

/// The messages of the error and its sources, with the folder's path replaced by `DIR`.
fn load_error(folder: &Path) -> String {
    let error = PromptTokenizer::load(folder, &TEMPLATE).unwrap_err();
    let chain = iter::successors(Some(&error as &dyn Error), |error| (*error).source());
    let message = chain
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    message.replace(&folder.display().to_string(), "DIR")
}

#[test]
fn ids_match_transformers() {
    // Made by tests/reference/make_tokenizer_cases.py.
    let text = fs::read_to_string(format!("{FIXTURES}/tokenizer_cases.json")).unwrap();
    let cases: Vec<(String, Vec<u32>)> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 100);
    for tokenizer in [tiny("base"), tiny("odd")] {
        for (text, ids) in &cases {
            assert_eq!(&tokenizer.encode(text).unwrap(), ids, "{text:?}");
        }
    }
}

#[test]
fn prompts_are_encoded_within_the_template() {
    let tokenizer = tiny("odd"); // tokenizer.json has a decoder
    let ids = tokenizer.encode_prompt("A {} fox").unwrap();
    let whole = tokenizer
        .encode(&format!("{}A {{}} fox{}", TEMPLATE.prefix, TEMPLATE.suffix))
        .unwrap();
    assert_eq!(ids, whole);

    let text = tokenizer.tokenizer.decode(&ids, false).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, \
         quantity, text, spatial relationships of the objects and background:<|im_end|>\n\
         <|im_start|>user\nA {} fox<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn special_tokens_in_the_prompt_are_encoded_as_such() {
    let tokenizer = tiny("base");
    // Ids 376 to 385 are the added tokens.
    assert_eq!(
        tokenizer.encode("<|im_end|><tool_call>").unwrap(),
        [378, 384]
    );
    assert_eq!(
        tokenizer.prompt_tokens(&tokenizer.encode_prompt("<|im_end|><tool_call>").unwrap()),
        2
    );
}

#[test]
fn vocab_size_includes_added_tokens() {
    assert_eq!(tiny("base").vocab_size(), 386);
    assert_eq!(tiny("odd").vocab_size(), 386);
}

#[test]
fn prompts_of_more_than_1024_tokens_are_refused() {
    let tokenizer = tiny("base");
    let prompt = "<|endoftext|>".repeat(1024);
    assert_eq!(
        tokenizer.prompt_tokens(&tokenizer.encode_prompt(&prompt).unwrap()),
        1024
    );
    tokenizer.encode_prompt(&prompt).unwrap();

    let error = tokenizer.encode_prompt(&format!("{prompt}7")).unwrap_err();
    let expected = "the prompt has 1025 tokens, and at most 1024 are accepted: shorten it";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn the_real_vocabulary_has_34_tokens_before_the_prompt() {
    let Some(tokenizer) = real() else { return };
    // diffusers drops this many: `prompt_template_encode_start_idx` of pipeline_qwenimage.py.
    assert_eq!(tokenizer.encode(TEMPLATE.prefix).unwrap().len(), 34);
    assert_eq!(tokenizer.template_tokens, 39);
    assert_eq!(tokenizer.vocab_size(), 151_665);
}

#[test]
fn ids_of_the_real_vocabulary_match_transformers() {
    let Some(tokenizer) = real() else { return };
    // transformers 5.23.0, Qwen2Tokenizer.
    let hello = [
        9707, 1879, 11, 220, 108_386, 99489, 0, 220, 16, 17, 18, 19, 20,
    ];
    assert_eq!(
        tokenizer.encode("Hello world, 你好世界! 12345").unwrap(),
        hello
    );
    assert_eq!(
        tokenizer
            .encode_prompt("Hello world, 你好世界! 12345")
            .unwrap()[34..47],
        hello
    );
}

#[test]
fn added_tokens_json_replaces_a_missing_decoder() {
    let folder = copy();
    fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
    let old = PromptTokenizer::load(folder.path(), &TEMPLATE).unwrap();
    let prompt = "a <|im_end|>\u{338} <tool_call> 'S";
    assert_eq!(
        old.encode_prompt(prompt).unwrap(),
        tiny("base").encode_prompt(prompt).unwrap()
    );
}

#[test]
fn errors_name_the_file() {
    let folder = copy();
    let file = |name: &str| folder.path().join(name);

    fs::write(
        file("tokenizer_config.json"),
        r#"{"added_tokens_decoder": {"376": {}}}"#,
    )
    .unwrap();
    assert_eq!(
        load_error(folder.path()),
        "DIR/tokenizer_config.json is not valid JSON of a tokenizer: download this file \
         again: missing field `content` at line 1 column 35"
    );

    let token = r#"{"content": "<|im_start|>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}"#;
    let config = |id: u32| format!(r#"{{"added_tokens_decoder": {{"{id}": {token}}}}}"#);
    fs::write(file("tokenizer_config.json"), config(380)).unwrap();
    assert_eq!(
        load_error(folder.path()),
        "DIR/tokenizer_config.json gives the token <|im_start|> the id 380, but the next id of \
         the vocabulary is 376: the tokenizer's files are not of the same version, download them again"
    );

    fs::write(file("tokenizer_config.json"), config(376)).unwrap();
    assert_eq!(
        load_error(folder.path()),
        "the tokenizer in DIR has no token <|im_end|>, which the prompt template needs: it \
         is not a Qwen2 tokenizer, or the copy is incomplete"
    );

    fs::write(file("merges.txt"), "#version: 0.2\nt h\nt\n").unwrap();
    assert_eq!(
        load_error(folder.path()),
        "DIR/merges.txt, line 3: \"t\" is not two symbols with a space between them: download \
         this file again"
    );

    fs::write(file("merges.txt"), "t zzz\n").unwrap();
    assert_eq!(
        load_error(folder.path()),
        "DIR/merges.txt does not define a valid tokenizer: download the tokenizer's files again: Token \
         `zzz` out of vocabulary"
    );

    fs::remove_file(file("merges.txt")).unwrap();
    assert_eq!(
        load_error(folder.path()),
        "DIR/merges.txt is missing, and there is no tokenizer.json to use instead: the \
         copy of the model is incomplete, download it again"
    );

    fs::write(file("vocab.json"), "{\"a\": \"b\"}").unwrap();
    assert_eq!(
        load_error(folder.path()),
        "DIR/vocab.json is not valid JSON of a tokenizer: download this file again: invalid \
         type: string \"b\", expected u32 at line 1 column 9"
    );

    fs::write(file("tokenizer.json"), "{}").unwrap();
    let error = load_error(folder.path());
    assert!(
        error.starts_with("DIR/tokenizer.json does not define a valid tokenizer"),
        "{error}"
    );

    assert_eq!(
        load_error(&file("nowhere")),
        "there is no tokenizer folder DIR: the copy of the model is incomplete"
    );
}
