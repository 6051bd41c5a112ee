//! kiln's version, and what it was built from. `build.rs` finds these values.

/// The package's version: `0.1.0`.
pub const PACKAGE: &str = env!("CARGO_PKG_VERSION");

/// The package's version, with the commit and its date where they are known:
/// `0.1.0 (a1b2c3d 2026-11-27)`.
pub const VERSION: &str = env!("KILN_BUILD_VERSION");

/// The package's version and the commit, without spaces, commas and colons: `0.1.0-a1b2c3d`.
pub const TAG: &str = env!("KILN_BUILD_TAG");

/// The program and [`TAG`], as the text in PNG files names what made them: `kiln 0.1.0-a1b2c3d`.
pub const PROGRAM: &str = concat!("kiln ", env!("KILN_BUILD_TAG"));

/// [`VERSION`], then a line with the features and one with burn's version.
pub const LONG_VERSION: &str = concat!(
    env!("KILN_BUILD_VERSION"),
    "\nfeatures: ",
    env!("KILN_BUILD_FEATURES"),
    "\nburn: ",
    env!("KILN_BUILD_BURN"),
);

/// The burn release that the models run on: `0.21.0`.
pub const BURN: &str = env!("KILN_BUILD_BURN");

/// First digits of the commit's hash. `None` if kiln was built outside of a git repository.
pub fn commit() -> Option<&'static str> {
    not_empty(env!("KILN_BUILD_COMMIT"))
}

/// The commit's date in UTC, as year-month-day.
pub fn date() -> Option<&'static str> {
    not_empty(env!("KILN_BUILD_DATE"))
}

/// The features that were compiled in: backends first.
pub fn features() -> Vec<&'static str> {
    env!("KILN_BUILD_FEATURES")
        .split(", ")
        .filter(|name| !name.is_empty())
        .collect()
}

fn not_empty(text: &'static str) -> Option<&'static str> {
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_begins_with_the_packages_version() {
        for text in [VERSION, TAG, LONG_VERSION] {
            assert!(text.starts_with(PACKAGE), "{text}");
        }
        assert!(!TAG.contains([' ', ',', ':']), "{TAG}");
        assert!(TAG.ends_with(commit().unwrap_or(PACKAGE)), "{TAG}");
        assert_eq!(VERSION.lines().count(), 1);
        assert_eq!(LONG_VERSION.lines().count(), 3);
    }

    #[test]
    fn burn_and_the_features_are_known() {
        assert!(BURN.starts_with("0."), "{BURN}");
        assert_eq!(features().contains(&"flex"), cfg!(feature = "flex"));
        assert_eq!(features().contains(&"cuda"), cfg!(feature = "cuda"));
        assert_eq!(features().contains(&"nats"), cfg!(feature = "nats"));
        assert_eq!(features().contains(&"otel"), cfg!(feature = "otel"));
    }
}
