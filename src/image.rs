//! Image files: PNG, JPEG and WebP.

use kiln_models::job::RgbImage;
use png::text_metadata::{ITXtChunk, TEXtChunk};

/// Name of the PNG text that says how an image was made; image tools look for it.
const METADATA_KEYWORD: &str = "parameters";
/// Largest height or width of a WebP file.
pub const MAX_WEBP_SIDE: usize = 16_383;

/// What images are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    Png,
    Jpeg,
    Webp,
}

impl ImageFormat {
    /// By the extension of a file name, whatever its case.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }

    /// The usual extension, which is also `OpenAI`'s name for the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }

    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

/// How an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    pub format: ImageFormat,
    /// From 0 to 100: the quality of JPEG and WebP. A PNG keeps every pixel; up to 66 more time is
    /// spent on a smaller file.
    pub quality: u8,
}

impl Encoding {
    pub const fn new(format: ImageFormat) -> Self {
        let quality = 100;
        Self { format, quality }
    }
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("the PNG encoder failed")]
    Png(#[from] png::EncodingError),
    #[error("the JPEG encoder failed")]
    Jpeg(#[from] jpeg_encoder::EncodingError),
    #[error("the WebP encoder failed: {0}")]
    Webp(String),
    #[error("an image of {height}x{width} has {values} values")]
    Size {
        height: usize,
        width: usize,
        values: usize,
    },
}

/// The bytes of an image file. `metadata`, the text that says how the image was made, goes into
/// PNG files only.
pub fn encode(
    image: &RgbImage,
    encoding: Encoding,
    metadata: Option<&str>,
) -> Result<Vec<u8>, EncodeError> {
    let (height, width, values) = (image.height, image.width, image.pixels.len());
    if values != height * width * 3 {
        return Err(EncodeError::Size {
            height,
            width,
            values,
        });
    }
    match encoding.format {
        ImageFormat::Png => encode_png(image, encoding.quality, metadata),
        ImageFormat::Jpeg => encode_jpeg(image, encoding.quality),
        ImageFormat::Webp => encode_webp(image, encoding.quality),
    }
}

fn encode_png(
    image: &RgbImage,
    quality: u8,
    metadata: Option<&str>,
) -> Result<Vec<u8>, EncodeError> {
    let mut file = Vec::new();
    // No side is above 2^31: the request's limits are far below.
    let mut encoder = png::Encoder::new(&mut file, image.width as u32, image.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // At 1024 x 1024 the fast settings take some 5 ms of a core, the balanced ones 500 for a file
    // that is hardly smaller: they are for those who ask.
    encoder.set_compression(match quality {
        0..=66 => png::Compression::Balanced,
        _ => png::Compression::Fast,
    });
    let mut writer = encoder.write_header()?;
    if let Some(text) = metadata {
        // A plain text chunk is Latin-1, and not all readers know the other kind.
        if text.chars().all(|character| u32::from(character) < 256) {
            writer.write_text_chunk(&TEXtChunk::new(METADATA_KEYWORD, text))?;
        } else {
            writer.write_text_chunk(&ITXtChunk::new(METADATA_KEYWORD, text))?;
        }
    }
    writer.write_image_data(&image.pixels)?;
    writer.finish()?;
    Ok(file)
}

fn encode_jpeg(image: &RgbImage, quality: u8) -> Result<Vec<u8>, EncodeError> {
    let mut file = Vec::new();
    // The encoder's scale begins at 1.
    let encoder = jpeg_encoder::Encoder::new(&mut file, quality.max(1));
    let side = |side: usize| u16::try_from(side).unwrap_or(u16::MAX);
    encoder.encode(
        &image.pixels,
        side(image.width),
        side(image.height),
        jpeg_encoder::ColorType::Rgb,
    )?;
    Ok(file)
}

fn encode_webp(image: &RgbImage, quality: u8) -> Result<Vec<u8>, EncodeError> {
    let encoder = webp::Encoder::from_rgb(&image.pixels, image.width as u32, image.height as u32);
    let file = encoder
        .encode_simple(false, f32::from(quality))
        .map_err(|error| EncodeError::Webp(format!("{error:?}")))?;
    Ok(file.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two colours with a soft border, so that a lossy format comes close.
    fn image() -> RgbImage {
        let pixel = |x: usize| {
            let share = (x * 5).min(240) as u8;
            [share, 40, 240 - share]
        };
        let pixels = (0..32 * 48).flat_map(|i| pixel(i % 48)).collect();
        RgbImage {
            height: 32,
            width: 48,
            pixels,
        }
    }

    fn reader(file: Vec<u8>) -> png::Reader<std::io::Cursor<Vec<u8>>> {
        png::Decoder::new(std::io::Cursor::new(file))
            .read_info()
            .unwrap()
    }

    #[test]
    fn a_png_reads_back_as_it_was_at_every_quality() {
        let image = image();
        for quality in [0, 50, 100] {
            let encoding = Encoding {
                format: ImageFormat::Png,
                quality,
            };
            let mut reader = reader(encode(&image, encoding, None).unwrap());
            assert_eq!((reader.info().height, reader.info().width), (32, 48));
            let mut read = vec![0; image.pixels.len()];
            reader.next_frame(&mut read).unwrap();
            assert_eq!(read, image.pixels);
            assert!(reader.info().uncompressed_latin1_text.is_empty());
        }
    }

    #[test]
    fn metadata_is_plain_text_where_latin_1_will_do() {
        let png = |text| {
            let file = encode(&image(), Encoding::new(ImageFormat::Png), Some(text)).unwrap();
            reader(file).info().clone()
        };
        let info = png("a café\nSteps: 1");
        assert_eq!(info.uncompressed_latin1_text[0].keyword, "parameters");
        assert_eq!(info.uncompressed_latin1_text[0].text, "a café\nSteps: 1");
        let info = png("雪\nSteps: 1");
        assert!(info.uncompressed_latin1_text.is_empty());
        assert_eq!(info.utf8_text[0].keyword, "parameters");
        assert_eq!(info.utf8_text[0].get_text().unwrap(), "雪\nSteps: 1");
    }

    #[test]
    fn jpeg_and_webp_are_smaller_with_less_quality() {
        for (format, start) in [
            (ImageFormat::Jpeg, b"\xff\xd8\xff".as_slice()),
            (ImageFormat::Webp, b"RIFF"),
        ] {
            let sizes = [0, 50, 100].map(|quality| {
                let file = encode(&image(), Encoding { format, quality }, None).unwrap();
                assert!(file.starts_with(start), "{format:?}");
                file.len()
            });
            assert!(sizes.is_sorted(), "{format:?}: {sizes:?}");
            assert!(sizes[0] < sizes[2], "{format:?}: {sizes:?}");
        }
    }

    #[test]
    fn a_webp_shows_the_image() {
        let image = image();
        let file = encode(&image, Encoding::new(ImageFormat::Webp), None).unwrap();
        let decoded = webp::Decoder::new(&file).decode().unwrap();
        assert_eq!((decoded.height(), decoded.width()), (32, 48));
        let apart = image.pixels.iter().zip(decoded.iter());
        let worst = apart.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst < 16, "a value is off by {worst}");
    }

    #[test]
    fn too_few_pixels_are_an_error_in_every_format() {
        let image = RgbImage {
            height: 4,
            width: 4,
            pixels: vec![0; 47],
        };
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Webp] {
            assert!(encode(&image, Encoding::new(format), None).is_err());
        }
    }
}
