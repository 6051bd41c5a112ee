//! The prompt of a command: an argument, an option, or stdin.

use std::io::{self, IsTerminal, Read};

use clap::Args;

use crate::request::MAX_PROMPT_BYTES;

use super::error::CliError;

/// Bytes of a mark and a line break, which do not belong to the prompt.
const AROUND: usize = 5;

/// The prompt, in either of two places.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct PromptArgs {
    /// Prompt: what the image shows; - reads it from stdin
    prompt: Option<String>,

    /// The prompt, as an option
    #[arg(long = "prompt", value_name = "PROMPT", allow_hyphen_values = true)]
    prompt_option: Option<String>,
}

impl PromptArgs {
    /// The prompt, from stdin if it is `-`.
    pub(super) fn read(&self) -> Result<String, CliError> {
        let prompt = self.prompt.as_ref().or(self.prompt_option.as_ref());
        match prompt.map(String::as_str) {
            Some("-") => from_stdin(),
            given => Ok(given.unwrap_or_default().to_owned()),
        }
    }
}

/// Reads the prompt from stdin, without line breaks at its end.
fn from_stdin() -> Result<String, CliError> {
    let stdin = io::stdin().lock();
    if stdin.is_terminal() {
        tracing::info!("reading the prompt from the terminal: ctrl-d ends it");
    }
    read(stdin)
}

fn read(source: impl Read) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    let longest = MAX_PROMPT_BYTES + AROUND;
    source
        .take(longest as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(CliError::Stdin)?;
    if bytes.len() > longest {
        return Err(CliError::LongStdin);
    }
    let text = String::from_utf8(bytes).map_err(|error| CliError::StdinEncoding {
        at: error.utf8_error().valid_up_to(),
    })?;
    let prompt = text.strip_prefix(crate::BYTE_ORDER_MARK).unwrap_or(&text);
    let prompt = prompt.trim_end_matches(['\r', '\n']);
    if prompt.is_empty() {
        return Err(CliError::EmptyStdin);
    }
    Ok(prompt.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_on_stdin_ends_before_its_last_line_break() {
        for (text, prompt) in [
            ("a cat", "a cat"),
            ("a cat\n", "a cat"),
            ("a cat\r\n", "a cat"),
            ("\u{feff}a cat\n\n", "a cat"),
            (" a\ncat \n", " a\ncat "),
            ("-\n", "-"),
            (" ", " "),
        ] {
            assert_eq!(read(text.as_bytes()).unwrap(), prompt);
        }
        let longest = "a".repeat(MAX_PROMPT_BYTES);
        let text = format!("\u{feff}{longest}\r\n");
        assert_eq!(read(text.as_bytes()).unwrap(), longest);
    }

    #[test]
    fn what_is_no_prompt_is_refused() {
        for text in ["", "\n", "\u{feff}\r\n"] {
            let error = read(text.as_bytes()).unwrap_err();
            assert!(matches!(error, CliError::EmptyStdin), "{error}");
        }
        let error = read(b"a caf\xe9".as_slice()).unwrap_err();
        assert!(
            matches!(error, CliError::StdinEncoding { at: 5 }),
            "{error}"
        );
        // Without an end.
        let error = read(io::repeat(b'a')).unwrap_err();
        assert!(matches!(error, CliError::LongStdin), "{error}");
    }
}
