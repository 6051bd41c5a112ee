//! Encodes images as PNG, JPEG and WebP files.
//!
//! Uses the crates `png`, `jpeg-encoder` and `webp` instead of `image`: the PNG encoder of `image`
//! 0.25 cannot write text chunks, and its WebP encoder is lossless only.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;

use kiln_models::job::{RgbImage, Size};
use png::text_metadata::{ITXtChunk, TEXtChunk};

/// Keyword of the PNG text chunk with the generation parameters; image tools look for this name.
const METADATA_KEYWORD: &str = "parameters";
/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

    /// Largest height or width of an image, in pixels, that the usual decoders read. libpng stops at
    /// this side unless it is told otherwise, and libjpeg a little below what a JPEG file can hold.
    pub fn max_side(self) -> usize {
        match self {
            Self::Png => 1_000_000,
            Self::Jpeg => 65_500,
            Self::Webp => 16_383,
        }
    }

    /// Checks that a file of this format can hold an image.
    pub fn check_size(self, size: Size) -> Result<(), SideTooLong> {
        let longest = size.height.max(size.width);
        if longest > self.max_side() {
            return Err(SideTooLong { format: self, size });
        }
        Ok(())
    }

    /// The name in messages.
    fn title(self) -> &'static str {
        match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::Webp => "WebP",
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

/// An image has more pixels a side than a file of the format can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a {} file has {} pixels a side at most, got {size}",
    format.title(),
    format.max_side()
)]
pub struct SideTooLong {
    pub format: ImageFormat,
    pub size: Size,
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
    #[error(transparent)]
    Side(#[from] SideTooLong),
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
    encoding.format.check_size(Size { height, width })?;
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
    if let Some(text) = metadata.map(chunk_text) {
        // tEXt chunks hold Latin-1 only, and not every reader knows iTXt chunks.
        if text.chars().all(|character| u32::from(character) < 256) {
            writer.write_text_chunk(&TEXtChunk::new(METADATA_KEYWORD, text.as_ref()))?;
        } else {
            writer.write_text_chunk(&ITXtChunk::new(METADATA_KEYWORD, text.as_ref()))?;
        }
    }
    writer.write_image_data(&image.pixels)?;
    writer.finish()?;
    Ok(file)
}

/// The text without what a PNG chunk cannot hold: it ends at the first NUL, its lines end with a line
/// feed, and other control characters but the tab have no meaning in it.
fn chunk_text(text: &str) -> Cow<'_, str> {
    let kept = |character: char| !character.is_control() || matches!(character, '\n' | '\t');
    if text.chars().all(kept) {
        return text.into();
    }
    let lines = text.replace("\r\n", "\n").replace('\r', "\n");
    lines.chars().filter(|&character| kept(character)).collect()
}

fn encode_jpeg(image: &RgbImage, quality: u8) -> Result<Vec<u8>, EncodeError> {
    let mut file = Vec::new();
    // The encoder's lowest quality is 1.
    let encoder = jpeg_encoder::Encoder::new(&mut file, quality.max(1));
    encoder.encode(
        &image.pixels,
        image.width as u16,
        image.height as u16,
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
    fn the_metadata_has_no_character_that_a_png_text_cannot_hold() {
        for (text, kept) in [
            ("a\0b\nSteps: 1", "ab\nSteps: 1"),
            ("雪\0\nSteps: 1", "雪\nSteps: 1"),
            ("a\r\nb\rc\td\nSteps: 1", "a\nb\nc\td\nSteps: 1"),
            ("\u{1b}[2J\u{7f}\u{9b}é\nSteps: 1", "[2Jé\nSteps: 1"),
        ] {
            let file = encode(&image(), Encoding::new(ImageFormat::Png), Some(text)).unwrap();
            let info = reader(file).info().clone();
            let latin = info
                .uncompressed_latin1_text
                .iter()
                .map(|it| it.text.clone());
            let utf8 = info.utf8_text.iter().map(|it| it.get_text().unwrap());
            assert_eq!(latin.chain(utf8).collect::<Vec<_>>(), [kept]);
        }
    }

    #[test]
    fn no_format_is_written_with_a_longer_side_than_decoders_read() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Webp] {
            let longest = format.max_side();
            for (height, width) in [(longest, 1), (1, longest)] {
                assert_eq!(format.check_size(Size { height, width }), Ok(()));
            }
            for (height, width) in [(longest + 1, 1), (1, longest + 1)] {
                let image = RgbImage {
                    height,
                    width,
                    pixels: vec![0; height * width * 3],
                };
                let error = encode(&image, Encoding::new(format), None).unwrap_err();
                let expected = format!(
                    "a {} file has {longest} pixels a side at most, got {width}x{height}",
                    format.title()
                );
                assert_eq!(error.to_string(), expected);
            }
        }
    }

    #[test]
    fn the_longest_jpeg_has_its_size_in_its_header() {
        let image = RgbImage {
            height: 1,
            width: 65_500,
            pixels: vec![0; 65_500 * 3],
        };
        let file = encode(&image, Encoding::new(ImageFormat::Jpeg), None).unwrap();
        // Start of frame: length, precision, height, width.
        let at = file
            .windows(2)
            .position(|it| it[0] == 0xff && (0xc0..=0xc2).contains(&it[1]));
        let header = &file[at.unwrap() + 2..];
        assert_eq!(header[3..5], 1_u16.to_be_bytes());
        assert_eq!(header[5..7], 65_500_u16.to_be_bytes());
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
