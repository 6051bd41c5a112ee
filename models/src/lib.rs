//! Qwen-Image's networks and the pipeline that joins them, generic over the burn backend.
//!
//! Data goes down this list once: token ids → [`text_encoder`] → prompt embeddings; seed →
//! [`noise`] → latents; steps and size → [`scheduler`] → the [`transformer`]'s modulation table;
//! then the denoising loop of `session`, and [`vae`] to pixels. What
//! differs between models is in [`families`]. There are no files here, no
//! HTTP, no threads; weights come through [`source::TensorSource`], and [`pipeline::Pipeline`] is
//! all that the rest of the program sees.

mod cache;
pub mod config;
mod denoiser;
mod device;
pub mod families;
pub mod flops;
pub mod guidance;
pub mod job;
pub mod loading;
pub mod noise;
pub mod pipeline;
pub mod scheduler;
pub mod session;
pub mod source;
pub mod testing;
pub mod text_encoder;
pub mod transformer;
pub mod vae;
mod weights;

pub use device::panic_message;
pub use source::{StoredDType, TensorInfo, TensorSource};
pub use weights::{LoadError, Precision};
