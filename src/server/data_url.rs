//! `data:` URLs of image files.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::image::ImageFormat;

/// `data:image/png;base64,…`
pub(super) fn data_url(format: ImageFormat, file: &[u8]) -> String {
    let mut url = format!("data:{};base64,", format.media_type());
    BASE64.encode_string(file, &mut url);
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_url_has_the_media_type_and_the_file() {
        let url = data_url(ImageFormat::Jpeg, b"\xff\xd8\xff");
        assert_eq!(url, "data:image/jpeg;base64,/9j/");
    }
}
