//! Text that the program prints, compared with the files in `tests/snapshots`.
//!
//! A difference fails the test and leaves a `.snap.new` file beside the old one. After a change that
//! is meant, `INSTA_UPDATE=always scripts/test.sh` writes the files anew; read their diff.

/// Compares a text with the file of that name.
pub(crate) fn assert_snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snapshots"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}
