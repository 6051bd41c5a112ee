//! The configuration files of `CubeCL` and burn, and the folder of the kernel cache.

use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

use burn_cubecl::cubecl::config::cache::CacheConfig;
use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use burn_std::config::BurnConfig;

use super::gate::switch;

/// Loads the settings of `CubeCL` and burn, and reads `KILN_KERNELS`. Otherwise both would load their
/// settings on a device thread, which a file that does not parse would end.
///
/// Compiled kernels and autotune results are cached in the folder `cache`; compiled kernels are not
/// cached if it does not exist. `None`, and settings that name a cache, leave this to `CubeCL`. Only
/// the first call in a process has an effect: all devices share one set of settings.
///
/// # Errors
/// Returns a message for the user if a settings file does not parse or `KILN_KERNELS` is invalid.
pub fn read_settings(cache: Option<&Path>) -> Result<(), String> {
    switch()?;
    let read = || {
        BurnConfig::get();
        CubeClRuntimeConfig::from_current_dir().override_from_env()
    };
    let mut settings = catch_unwind(read).map_err(|payload| {
        let reason = payload.downcast_ref::<String>().map_or("", String::as_str);
        format!(
            "cubecl.toml or burn.toml, in the working folder or above it, does not parse; correct \
             or remove it. {reason}"
        )
    })?;
    if let Some(cache) = cache {
        set_cache(&mut settings, cache);
    }
    CubeClRuntimeConfig::storage()
        .lock()
        .get_or_insert_with(|| Arc::new(settings));
    Ok(())
}

fn set_cache(settings: &mut CubeClRuntimeConfig, cache: &Path) {
    // `Target` is the default; a file that sets "target" looks the same.
    if matches!(settings.autotune.cache, CacheConfig::Target) {
        settings.autotune.cache = CacheConfig::File(cache.to_owned());
    }
    // CubeCL ignores an autotune cache that cannot be written, but a compilation cache that cannot
    // be written ends the device thread.
    if settings.compilation.cache.is_none() && cache.is_dir() {
        settings.compilation.cache = Some(CacheConfig::File(cache.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn settings_that_name_a_cache_are_kept() {
        let folder = env::temp_dir();
        let mut settings = CubeClRuntimeConfig::default();
        settings.autotune.cache = CacheConfig::Global;
        settings.compilation.cache = Some(CacheConfig::Local);
        set_cache(&mut settings, &folder);
        assert!(matches!(settings.autotune.cache, CacheConfig::Global));
        assert!(matches!(
            settings.compilation.cache,
            Some(CacheConfig::Local)
        ));
    }

    #[test]
    fn compiled_kernels_are_cached_only_in_an_existing_folder() {
        for (folder, cached) in [(env::temp_dir(), true), ("no such folder".into(), false)] {
            let mut settings = CubeClRuntimeConfig::default();
            set_cache(&mut settings, &folder);
            assert_eq!(settings.autotune.cache.root(), folder);
            assert_eq!(settings.compilation.cache.is_some(), cached);
        }
    }
}
