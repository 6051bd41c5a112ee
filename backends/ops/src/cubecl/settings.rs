//! The settings files of `CubeCL` and burn.

use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

use burn_cubecl::cubecl::config::cache::CacheConfig;
use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use burn_std::config::BurnConfig;

use super::gate::switch;

/// Has `CubeCL` and burn read their settings, which they would do later in a place where a file
/// that does not parse ends a thread; `KILN_KERNELS` is read too. The error is for people.
///
/// Compiled kernels and the choice among them are kept in `cache`, or nowhere if that is no folder;
/// `None` leaves that to `CubeCL`, and so do settings that name a place. What counts is the first
/// call in a process, as there is one set of settings for all devices.
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
        keep_in(&mut settings, cache);
    }
    CubeClRuntimeConfig::storage()
        .lock()
        .get_or_insert_with(|| Arc::new(settings));
    Ok(())
}

fn keep_in(settings: &mut CubeClRuntimeConfig, cache: &Path) {
    // Its default, which is also what a file that says "target" asks for.
    if matches!(settings.autotune.cache, CacheConfig::Target) {
        settings.autotune.cache = CacheConfig::File(cache.to_owned());
    }
    // Choices that cannot be written are not kept; kernels that cannot be would end a thread.
    if settings.compilation.cache.is_none() && cache.is_dir() {
        settings.compilation.cache = Some(CacheConfig::File(cache.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn settings_that_name_a_place_are_left() {
        let folder = env::temp_dir();
        let mut settings = CubeClRuntimeConfig::default();
        settings.autotune.cache = CacheConfig::Global;
        settings.compilation.cache = Some(CacheConfig::Local);
        keep_in(&mut settings, &folder);
        assert!(matches!(settings.autotune.cache, CacheConfig::Global));
        assert!(matches!(
            settings.compilation.cache,
            Some(CacheConfig::Local)
        ));
    }

    #[test]
    fn kernels_are_kept_where_there_is_a_folder() {
        for (folder, kept) in [(env::temp_dir(), true), ("no such folder".into(), false)] {
            let mut settings = CubeClRuntimeConfig::default();
            keep_in(&mut settings, &folder);
            assert_eq!(settings.autotune.cache.root(), folder);
            assert_eq!(settings.compilation.cache.is_some(), kept);
        }
    }
}
