//! Image files. PNG for now.

use kiln_models::painter::RgbImage;

/// The bytes of an 8-bit RGB PNG file.
///
/// Fast settings: at level 6, libpng's default, encoding an image costs as much as a denoising
/// step on a good GPU.
pub fn encode_png(image: &RgbImage) -> Result<Vec<u8>, png::EncodingError> {
    let mut file = Vec::new();
    // No side is above 2^31: the request's limits are far below.
    let mut encoder = png::Encoder::new(&mut file, image.width as u32, image.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.pixels)?;
    writer.finish()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_reads_back_as_it_was() {
        let pixels: Vec<u8> = (0..32 * 48 * 3).map(|i: u32| (i * i % 251) as u8).collect();
        let image = RgbImage {
            height: 32,
            width: 48,
            pixels: pixels.clone(),
        };
        let file = encode_png(&image).unwrap();

        let mut reader = png::Decoder::new(std::io::Cursor::new(file))
            .read_info()
            .unwrap();
        assert_eq!((reader.info().height, reader.info().width), (32, 48));
        let mut read = vec![0; pixels.len()];
        reader.next_frame(&mut read).unwrap();
        assert_eq!(read, pixels);
    }

    #[test]
    fn too_few_pixels_are_an_error() {
        let image = RgbImage {
            height: 4,
            width: 4,
            pixels: vec![0; 47],
        };
        assert!(encode_png(&image).is_err());
    }
}
