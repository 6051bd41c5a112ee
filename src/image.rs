//! Encodes images as PNG, JPEG and WebP files.
//!
//! Uses the crates `png`, `jpeg-encoder` and `webp` instead of `image`: the PNG encoder of `image`
//! 0.25 cannot write text chunks, and its WebP encoder is lossless only.

use kiln_models::job::RgbImage;
use png::text_metadata::{ITXtChunk, TEXtChunk};

/// Keyword of the PNG text chunk with the generation parameters; image tools look for this name.
const METADATA_KEYWORD: &str = "parameters";
/// Largest height or width of a WebP image, in pixels.
pub const MAX_WEBP_SIDE: usize = 16_383;

/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    Png,
    Jpeg,
    Webp,
}

impl ImageFormat {
    /// The format of a file extension, ignoring case.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }

    /// The usual file extension, which is also the name of the format in `OpenAI`'s API.
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

/// Format and quality of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    pub format: ImageFormat,
    /// Quality of JPEG and WebP, from 0 to 100. PNG is always lossless; up to 66 its compression is
    /// slower and the file smaller.
    pub quality: u8,
}

impl Encoding {
    pub const fn new(format: ImageFormat) -> Self {
        let quality = 100;
        Self { format, quality }
    }
}

/// Why an image cannot be encoded.
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

/// Encodes an image as a file. `metadata`, the text of the generation parameters, is written to PNG
/// files only.
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
    // The limits of a request keep both sides far below 2^31.
    let mut encoder = png::Encoder::new(&mut file, image.width as u32, image.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // At 1024 x 1024 fast compression takes about 5 ms of one core, balanced compression 500 ms for
    // a slightly smaller file.
    encoder.set_compression(match quality {
        0..=66 => png::Compression::Balanced,
        _ => png::Compression::Fast,
    });
    let mut writer = encoder.write_header()?;
    if let Some(text) = metadata {
        // tEXt chunks hold Latin-1 only, and not every reader knows iTXt chunks.
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
    // The encoder's lowest quality is 1.
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

    /// A smooth gradient, so that lossy formats lose little.
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
    fn png_is_lossless_at_every_quality() {
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
    fn metadata_is_a_text_chunk_if_it_is_latin_1() {
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
    fn lower_quality_makes_jpeg_and_webp_smaller() {
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
    fn webp_decodes_to_a_similar_image() {
        let image = image();
        let file = encode(&image, Encoding::new(ImageFormat::Webp), None).unwrap();
        let decoded = webp::Decoder::new(&file).decode().unwrap();
        assert_eq!((decoded.height(), decoded.width()), (32, 48));
        let apart = image.pixels.iter().zip(decoded.iter());
        let worst = apart.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst < 16, "a value is off by {worst}");
    }

    #[test]
    fn a_wrong_number_of_values_is_an_error_in_every_format() {
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
