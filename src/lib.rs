//! `kiln` serves Qwen-Image text-to-image from one binary, on any burn backend.
//!
//! A request takes one path: [`request`] checks it, [`tokenizer`] turns its prompts into token ids,
//! [`engine`] runs it on the thread that owns the pipeline, [`image`] encodes the result. [`server`]
//! and [`cli`] receive requests. [`compare`] measures how much two runs differ, [`mod@bench`] how
//! long they take.
//!
//! A program that embeds kiln opens a model with [`runtime::Runtime::open`] and gives its pipeline
//! to an [`engine::Engine`]; `examples/embed.rs` does it.

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod engine;
pub mod hub;
pub mod image;
pub mod kernel_cache;
pub mod request;
pub mod runtime;
pub mod server;
pub mod tokenizer;
pub mod version;

/// Types of the models' interface: jobs, noise, images, [`ModelInfo`](kiln_models::pipeline::ModelInfo).
pub use kiln_models;

/// An error and its causes on one line.
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
