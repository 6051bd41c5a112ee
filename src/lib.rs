//! `kiln` serves text-to-image generation with Qwen-Image from one binary, on any burn backend.
//!
//! The path of a request:
//!
//! 1. [`server`] or [`cli`] reads it.
//! 2. [`request`] checks it against the limits.
//! 3. [`tokenizer`] encodes its prompts as token ids.
//! 4. [`engine`] runs it on the thread that owns the pipeline.
//! 5. [`image`] encodes the generated images as files.
//!
//! [`jobs`] keeps the state of requests by id.
//!
//! [`runtime`] loads a model: [`hub`] resolves its name to a folder, [`checkpoint`] opens its files,
//! [`mod@backend`] loads it onto a device, and [`kernel_cache`] keeps compiled GPU kernels.
//!
//! [`compare`] compares the same run on several backends, [`mod@bench`] times runs; both measure
//! with [`measure`].
//!
//! [`adapters`] lists the adapters that requests may name, and keeps their weights.
//!
//! [`files`] writes every file that a user named, and [`telemetry`] sends traces.
//!
//! A program that embeds kiln opens a model with [`runtime::Runtime::open`] and gives its pipeline
//! to an [`engine::Engine`]; `examples/embed.rs` does it.

pub mod adapters;
pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod engine;
pub mod files;
pub mod hub;
pub mod image;
pub mod jobs;
pub mod kernel_cache;
pub mod measure;
pub mod request;
pub mod runtime;
pub mod server;
#[cfg(unix)]
mod signals;
pub mod telemetry;
pub mod tokenizer;
pub mod version;

/// Types of the models' interface: jobs, noise, images, [`ModelInfo`](kiln_models::pipeline::ModelInfo).
pub use kiln_models;

/// What programs on Windows write before a text in UTF-8.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// The text without a byte order mark at its start.
fn without_mark(text: String) -> String {
    text.strip_prefix(BYTE_ORDER_MARK)
        .map(str::to_owned)
        .unwrap_or(text)
}

/// Formats an error and its causes on one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
