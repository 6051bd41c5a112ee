//! The settings files of `CubeCL` and burn.

use std::panic::catch_unwind;

use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use burn_std::config::BurnConfig;

use super::gate::kernels_are_off;

/// Has `CubeCL` and burn read their settings, which they would do later in a place where a file
/// that does not parse ends a thread; `KILN_KERNELS` is read too. The error is for people.
pub fn read_settings() -> Result<(), String> {
    kernels_are_off()?;
    let read = || {
        CubeClRuntimeConfig::get();
        BurnConfig::get();
    };
    catch_unwind(read).map_err(|payload| {
        let reason = payload.downcast_ref::<String>().map_or("", String::as_str);
        format!(
            "cubecl.toml or burn.toml, in the working folder or above it, does not parse; correct \
             or remove it. {reason}"
        )
    })
}
