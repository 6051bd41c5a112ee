//! Qwen-Image's networks and the pipeline that runs them, generic over the burn backend.
//!
//! Data flows one way: token ids → [`text_encoder`] → prompt embeddings; seed → [`noise`] → latents;
//! number of steps and image size → [`sampling`] → the modulation table of the [`transformer`]; then
//! the denoising loop of [`session`]; then [`vae`] → pixels. [`families`] holds what differs between
//! models.
//!
//! The networks are burn modules, so `num_params`, `Display`, visitors and mappers work on them. The
//! crate opens no files, speaks no HTTP and starts no threads. Weights come through
//! [`source::TensorSource`], and the rest of the program uses [`pipeline::Pipeline`] only.

pub mod adapter;
mod cache;
pub mod config;
mod denoiser;
mod device;
pub mod families;
mod finite;
pub mod flops;
pub mod guidance;
pub mod job;
mod layers;
pub mod loading;
pub mod memory;
pub mod noise;
pub mod pipeline;
pub mod sampling;
pub mod session;
pub mod source;
mod state;
pub mod step_cache;
pub mod testing;
pub mod text_encoder;
pub mod transformer;
pub mod vae;
mod weights;

pub use device::panic_message;
pub use finite::{NotFinite, Stage};
pub use source::{FileFault, FileProblem, StoredDType, TensorInfo, TensorSource};
pub use weights::{LoadError, Precision};
