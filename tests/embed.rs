//! The example of embedding kiln in another program, run as a test.

/// The example's source.
#[path = "../examples/embed.rs"]
#[expect(dead_code, reason = "the example's main function is not called")]
mod example;

use crate::http::decode_png;

#[test]
fn the_example_generates_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("circle.png");
    example::generate("a large red circle on a blue background", &path).unwrap();
    let file = std::fs::read(&path).unwrap();
    let (width, height, pixels) = decode_png(&file);
    assert_eq!((width, height), (128, 128));
    // The background is blue.
    assert!(pixels[2] > pixels[0], "{:?}", &pixels[..3]);
}
