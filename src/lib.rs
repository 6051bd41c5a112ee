//! `kiln` serves Qwen-Image text-to-image from one binary, on any burn backend.
//!
//! A request goes down one way: [`request`] checks it, [`tokenizer`] turns its prompts into ids,
//! [`engine`] runs it on the thread that owns the pipeline, [`image`] encodes what comes out;
//! [`jobs`] keeps track of requests by id.
//! [`server`] and [`cli`] are the two doors. [`compare`] says how far apart two runs are,
//! [`mod@bench`] how long they take.

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod engine;
pub mod hub;
pub mod image;
pub mod jobs;
pub mod kernel_cache;
pub mod request;
pub mod server;
pub mod tokenizer;

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
