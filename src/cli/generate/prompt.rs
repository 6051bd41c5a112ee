//! A prompt from stdin.

use std::io::{self, IsTerminal, Read};

use crate::cli::error::CliError;
use crate::request::MAX_PROMPT_BYTES;

/// Bytes of a mark and a line break, which do not belong to the prompt.
const AROUND: usize = 5;

/// Reads the prompt from stdin, without line breaks at its end.
pub(super) fn from_stdin() -> Result<String, CliError> {
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
