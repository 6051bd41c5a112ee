//! Arguments of step caches: those of one request, and those of a server's default.

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use crate::request::{
    CacheChoice, GivenCache, InvalidCache, StepCaches, mag_ratios, only_mag_ratios,
};

use super::error::CliError;

/// Work that the steps of a request may leave out.
#[expect(clippy::doc_markdown, reason = "clap prints the comment as it is")]
#[derive(Debug, Clone, Args)]
pub(super) struct StepCacheArgs {
    /// Step cache: off, balanced, fast, dbcache, magcache, or JSON [default: off]
    ///
    /// Reuses what earlier steps computed, which is faster and changes the image; needs at least 8
    /// steps. Of 50 steps of Qwen-Image balanced computes 30 and fast 24. dbcache decides at each step,
    /// as Cache-DiT does. JSON has a mode and its settings, as in a request to the server:
    /// '{"mode": "dbcache", "max_warmup_steps": 8}'.
    #[arg(long, value_name = "CACHE", value_parser = parse_cache)]
    cache: Option<CacheChoice>,

    /// Part of the steps, from 0 to 1, after which guidance takes half the time [default: 1]
    ///
    /// Later steps reuse the difference that the negative prompt made, which changes the image. 1 gates
    /// no step; other values need at least 8 steps.
    #[arg(long, value_name = "PART", allow_negative_numbers = true)]
    pub(super) cfg_gate_step: Option<f64>,
}

impl StepCacheArgs {
    pub(super) fn given(&self) -> Option<GivenCache> {
        let choice = self.cache.clone()?;
        Some(GivenCache {
            choice,
            param: "--cache",
        })
    }
}

fn parse_cache(text: &str) -> Result<CacheChoice, String> {
    let value = if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|error| format!("no valid JSON: {error}"))?
    } else {
        Value::from(text)
    };
    let choice = CacheChoice::from_json(&value).map_err(|error| error.to_string())?;
    choice.ok_or_else(|| "give a name, such as balanced".to_owned())
}

/// The step cache of requests that name none, with the names of vLLM-Omni.
#[derive(Debug, Args)]
#[command(next_help_heading = "Step cache")]
#[expect(clippy::doc_markdown, reason = "clap prints the comments as they are")]
pub(super) struct CacheDefaultArgs {
    /// Step cache of requests that name none
    ///
    /// Requests choose for themselves with cache, and turn the default off with "cache": "off".
    /// cache_dit is the request's dbcache and mag_cache its magcache; balanced and fast are as in
    /// requests. A default is not applied to requests with fewer than 8 steps. The caches tea_cache,
    /// sea_cache and step_cache of vLLM-Omni are not available.
    #[arg(long, value_enum, default_value_t = CacheBackend::None, value_name = "BACKEND")]
    cache_backend: CacheBackend,

    /// Settings of --cache-backend as a JSON object
    ///
    /// For cache_dit those of Cache-DiT, such as '{"Fn_compute_blocks": 1, "max_warmup_steps": 8}', for
    /// mag_cache mag_threshold, mag_max_skip_steps and mag_retention_ratio. With mag_ratios, which any
    /// backend takes, these are the ratios of the model; kiln bench --calibrate-cache measures them.
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    cache_config: Option<Map<String, Value>>,

    /// Log which steps the step cache of each request computed
    #[arg(long)]
    pub(super) enable_cache_dit_summary: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum CacheBackend {
    None,
    CacheDit,
    MagCache,
    Balanced,
    Fast,
    #[value(hide = true)]
    TeaCache,
    #[value(hide = true)]
    SeaCache,
    #[value(hide = true)]
    StepCache,
}

impl CacheDefaultArgs {
    /// The default, and ratios that replace the model's.
    pub(super) fn caches(&self) -> Result<StepCaches, CliError> {
        use CacheBackend::{SeaCache, StepCache, TeaCache};
        let backend = self.cache_backend;
        if matches!(backend, TeaCache | SeaCache | StepCache) {
            let backend = backend.name();
            return Err(CliError::CacheBackend { backend });
        }
        backend
            .caches(self.cache_config.as_ref().unwrap_or(&Map::new()))
            .map_err(|error| CliError::CacheConfig {
                backend: backend.name(),
                error,
            })
    }
}

impl CacheBackend {
    fn caches(self, config: &Map<String, Value>) -> Result<StepCaches, InvalidCache> {
        let default = match self {
            Self::CacheDit => CacheChoice::of_cache_dit_config(config)?,
            Self::MagCache => CacheChoice::of_mag_cache_config(config)?,
            other => {
                only_mag_ratios(config)?;
                match other {
                    Self::Balanced => CacheChoice::Balanced,
                    Self::Fast => CacheChoice::Fast,
                    _ => CacheChoice::Off,
                }
            }
        };
        Ok(StepCaches {
            default,
            mag_ratios: mag_ratios(config)?,
            blocks: None,
        })
    }

    /// The name on the command line.
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("must be a JSON object, such as {\"max_warmup_steps\": 8}".to_owned()),
        Err(error) => Err(format!("no valid JSON: {error}")),
    }
}
