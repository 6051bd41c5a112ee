//! Encodes prompts as token ids for the text encoder.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use kiln_models::config::{ConfigError, ConfigText};
use kiln_models::families::PromptTemplate;
use serde::de::DeserializeOwned;
use tokenizers::AddedToken;
use tokenizers::SplitDelimiterBehavior;
use tokenizers::Tokenizer;
use tokenizers::models::bpe::BPE;
use tokenizers::models::bpe::Merges;
use tokenizers::models::bpe::Vocab;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::Split;
use tokenizers::pre_tokenizers::split::SplitPattern;

/// Splits text into words before byte-pair merging: `PRETOKENIZE_REGEX` of transformers'
/// `tokenization_qwen2.py`.
const SPLIT_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The tokenizer of Qwen2 with the prompt template of a model family.
#[derive(Debug)]
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    template: &'static PromptTemplate,
    /// Number of tokens of the template with an empty prompt.
    template_tokens: usize,
}

/// Why the tokenizer cannot be loaded, or cannot encode a prompt.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("there is no tokenizer folder {path}: the copy of the model is incomplete")]
    FolderMissing { path: PathBuf },

    #[error(
        "{path} is missing, and there is no tokenizer.json to use instead: the copy of the model is \
         incomplete, download it again"
    )]
    FileMissing { path: PathBuf },

    #[error("cannot read {path}")]
    Io { path: PathBuf, source: io::Error },

    #[error("{path} is not valid JSON of a tokenizer: download this file again")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },

    #[error(
        "{path}, line {line}: {text:?} is not two symbols with a space between them: download this \
         file again"
    )]
    MergesLine {
        path: PathBuf,
        line: usize,
        text: String,
    },

    #[error("{path} does not define a valid tokenizer: download the tokenizer's files again")]
    Invalid {
        path: PathBuf,
        source: tokenizers::Error,
    },

    #[error(
        "{path} gives the token {token} the id {expected}, but the next id of the vocabulary is \
         {actual}: the tokenizer's files are not of the same version, download them again"
    )]
    AddedTokenId {
        path: PathBuf,
        token: String,
        expected: u32,
        actual: u32,
    },

    #[error(
        "the tokenizer in {path} has no token {token}, which the prompt template needs: it is not a \
         Qwen2 tokenizer, or the copy is incomplete"
    )]
    TemplateToken { path: PathBuf, token: &'static str },

    #[error("the prompt has {tokens} tokens, and at most {limit} are accepted: shorten it")]
    PromptTooLong { tokens: usize, limit: usize },

    #[error("the prompt cannot be split into tokens")]
    Encode { source: tokenizers::Error },

    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl PromptTokenizer {
    /// Loads the tokenizer folder of a checkpoint: `tokenizer.json` if it exists, otherwise
    /// `vocab.json`, `merges.txt` and the added tokens of `tokenizer_config.json` or
    /// `added_tokens.json`.
    pub fn load(folder: &Path, template: &'static PromptTemplate) -> Result<Self, TokenizerError> {
        if !folder.is_dir() {
            return Err(TokenizerError::FolderMissing {
                path: folder.to_owned(),
            });
        }
        let json = folder.join("tokenizer.json");
        if json.exists() {
            let json = ConfigText {
                text: read(&json)?,
                file: json.display().to_string(),
            };
            return Self::from_json(&json, template);
        }
        Self::new(from_vocabulary(folder)?, template, folder)
    }

    /// Builds the tokenizer from the contents of a `tokenizer.json`.
    pub fn from_json(
        json: &ConfigText,
        template: &'static PromptTemplate,
    ) -> Result<Self, TokenizerError> {
        let loaded: Result<Tokenizer, _> = json.text.parse();
        let mut tokenizer = loaded.map_err(|source| TokenizerError::Invalid {
            path: json.file.clone().into(),
            source,
        })?;
        // The file may hold padding and truncation of an earlier call; the reference overrides both.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|source| TokenizerError::Encode { source })?;
        Self::new(tokenizer, template, json.file.as_ref())
    }

    /// `path` is the path of the tokenizer in messages.
    fn new(
        tokenizer: Tokenizer,
        template: &'static PromptTemplate,
        path: &Path,
    ) -> Result<Self, TokenizerError> {
        for &token in template.special_tokens {
            if tokenizer.token_to_id(token).is_none() {
                return Err(TokenizerError::TemplateToken {
                    path: path.to_owned(),
                    token,
                });
            }
        }
        let mut tokenizer = Self {
            tokenizer,
            template,
            template_tokens: 0,
        };
        tokenizer.template_tokens = tokenizer.encode_template("")?.len();
        Ok(tokenizer)
    }

    /// Encodes the template with the prompt in it.
    ///
    /// The text of a special token within the prompt is encoded as that token, as in the reference.
    ///
    /// # Errors
    /// If the prompt has more tokens than the template allows.
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        let ids = self.encode_template(prompt)?;
        let tokens = self.prompt_tokens(&ids);
        let limit = self.template.max_prompt_tokens;
        if tokens > limit {
            return Err(TokenizerError::PromptTooLong { tokens, limit });
        }
        Ok(ids)
    }

    /// The template that surrounds every prompt.
    pub fn template(&self) -> &'static PromptTemplate {
        self.template
    }

    /// Number of tokens of the prompt among the ids of [`Self::encode_prompt`].
    pub fn prompt_tokens(&self, ids: &[u32]) -> usize {
        // Saturating: the prompt's text may merge with the template's last line break.
        ids.len().saturating_sub(self.template_tokens)
    }

    /// The largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        let vocabulary = self.tokenizer.get_vocab(true);
        vocabulary.values().max().map_or(0, |id| *id as usize + 1)
    }

    fn encode_template(&self, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        let PromptTemplate { prefix, suffix, .. } = self.template;
        self.encode(&format!("{prefix}{prompt}{suffix}"))
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, true);
        encoding
            .map(|it| it.get_ids().to_vec())
            .map_err(|source| TokenizerError::Encode { source })
    }
}

/// Builds the same tokenizer as transformers' `Qwen2Tokenizer`, from `vocab.json` and `merges.txt`.
fn from_vocabulary(folder: &Path) -> Result<Tokenizer, TokenizerError> {
    let vocab_path = folder.join("vocab.json");
    let merges_path = folder.join("merges.txt");
    let vocab: Vocab = read_json(&vocab_path)?;
    let merges = parse_merges(&merges_path, &read(&merges_path)?)?;
    // Building fails if the vocabulary lacks the parts or the result of a merge.
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .map_err(|source| TokenizerError::Invalid {
            path: merges_path,
            source,
        })?;

    // fancy-regex is pure Rust; the reference uses Oniguruma. Both gave equal ids for every Unicode
    // character within other text and for 6,000 unusual strings (real vocabulary, transformers
    // 5.23.0 with tokenizers 0.23.3).
    let pattern = SplitPattern::Regex(SPLIT_PATTERN.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map_err(|source| TokenizerError::Encode { source })?;
    let add_prefix_space = false;
    let trim_offsets = true;
    let use_regex = false;
    let byte_level = ByteLevel::new(add_prefix_space, trim_offsets, use_regex);

    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(NFC))
        .map_err(|source| TokenizerError::Encode { source })?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), byte_level.into()])));
    add_tokens(&mut tokenizer, folder)?;
    Ok(tokenizer)
}

/// The part of `tokenizer_config.json` that affects token ids.
#[derive(serde::Deserialize)]
struct TokenizerConfig {
    added_tokens_decoder: Option<BTreeMap<u32, AddedToken>>,
}

fn add_tokens(tokenizer: &mut Tokenizer, folder: &Path) -> Result<(), TokenizerError> {
    let config_path = folder.join("tokenizer_config.json");
    let old_path = folder.join("added_tokens.json");
    let config: TokenizerConfig = read_json(&config_path)?;
    let (path, tokens) = if let Some(tokens) = config.added_tokens_decoder {
        (config_path, tokens)
    } else if old_path.exists() {
        // The older file has no flags. In the newer one all of Qwen's added tokens match text before
        // normalisation, which `special` implies.
        let ids: BTreeMap<String, u32> = read_json(&old_path)?;
        let special = |(content, id)| (id, AddedToken::from(content, true));
        (old_path, ids.into_iter().map(special).collect())
    } else {
        return Ok(());
    };
    for (expected, token) in tokens {
        // A new token gets the next free id; `tokens` is ordered by id.
        let content = token.content.clone();
        tokenizer
            .add_tokens([token])
            .map_err(|source| TokenizerError::Invalid {
                path: path.clone(),
                source,
            })?;
        let actual = tokenizer.token_to_id(&content);
        if let Some(actual) = actual.filter(|id| *id != expected) {
            return Err(TokenizerError::AddedTokenId {
                path,
                token: content,
                expected,
                actual,
            });
        }
    }
    Ok(())
}

/// Parses lines of two symbols each. The first line may be a comment with the version.
fn parse_merges(path: &Path, text: &str) -> Result<Merges, TokenizerError> {
    let is_version = |line: &str| line.starts_with("#version");
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !is_version(line) && !line.is_empty());
    lines
        .map(|(index, line)| match line.split_once(' ') {
            Some((left, right))
                if !left.is_empty() && !right.is_empty() && !right.contains(' ') =>
            {
                Ok((left.to_owned(), right.to_owned()))
            }
            _ => Err(TokenizerError::MergesLine {
                path: path.to_owned(),
                line: index + 1,
                text: line.to_owned(),
            }),
        })
        .collect()
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, TokenizerError> {
    serde_json::from_str(&read(path)?).map_err(|source| TokenizerError::Json {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, TokenizerError> {
    let text = fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => TokenizerError::FileMissing {
            path: path.to_owned(),
        },
        _ => TokenizerError::Io {
            path: path.to_owned(),
            source,
        },
    })?;
    Ok(crate::without_mark(text))
}
