//! Arguments of adapters.

use std::path::PathBuf;

use clap::Args;

use crate::adapters::AdapterSettings;

/// The adapters that a server has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Adapters")]
#[expect(clippy::doc_markdown, reason = "clap prints the comments as they are")]
#[expect(
    clippy::struct_field_names,
    reason = "the fields are named like the options"
)]
pub(super) struct LoraServeArgs {
    /// Folder of LoRA adapters that requests may name
    ///
    /// The file style/ink.safetensors in it is the adapter style/ink, and so is a folder style/ink as
    /// PEFT saves it. Other files are never read.
    #[arg(long, value_name = "DIR")]
    lora_dir: Option<PathBuf>,

    /// Bytes of adapters that are kept in host memory, such as 512MiB or 4G
    ///
    /// The adapter that was used last is dropped last. Requests whose adapters do not fit beside those in
    /// use wait.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4GiB")]
    lora_host_cache: u64,

    /// Bytes of adapters that are kept on the device, such as 512MiB or 4G
    ///
    /// Adapters of running requests are never dropped: a request whose adapters do not fit beside them
    /// waits, and one whose adapters do not fit at all is refused.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "2GiB")]
    pub(super) lora_cache: u64,

    /// Let clients change the list of adapters with POST /v1/load_lora_adapter and
    /// /v1/unload_lora_adapter
    ///
    /// Clients can list files of the folder only. With --api-key they need a key.
    #[arg(long)]
    pub(super) enable_lora_updates: bool,

    /// Accept adapters that also change the text encoder, and leave these changes out
    ///
    /// By default such adapters are refused.
    #[arg(long)]
    lora_ignore_text_encoder: bool,
}

impl LoraServeArgs {
    pub(super) fn settings(&self) -> AdapterSettings {
        AdapterSettings {
            dir: self.lora_dir.clone(),
            host_cache_bytes: self.lora_host_cache,
            ignore_text_encoder: self.lora_ignore_text_encoder,
        }
    }
}

/// Units of a size, with their powers of two; those with a `B` alone are powers of ten.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KIB", 1 << 10),
    ("KB", 1_000),
    ("M", 1 << 20),
    ("MIB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GIB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TIB", 1 << 40),
    ("TB", 1_000_000_000_000),
];

/// Reads a number of bytes, such as `1048576`, `1MiB` or `1.5G`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "give a number of bytes, such as 1048576, 512MiB or 1.5G".to_owned();
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit = unit.trim().to_uppercase();
    let unit = UNITS.iter().find(|(name, _)| *name == unit);
    let (_, unit) = unit.ok_or_else(wrong)?;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(*unit).ok_or_else(wrong);
    }
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = number * *unit as f64;
    let is_size = bytes.is_finite() && bytes < u64::MAX as f64;
    if is_size {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("512MiB", 512 << 20),
            ("4G", 4 << 30),
            ("4 gib", 4 << 30),
            ("1.5k", 1536),
            ("2GB", 2_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1X", "1e3", "1.2.3", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
