//! Images on the terminal.

use std::io::{self, IsTerminal, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use icy_sixel::SixelImage;
use kiln_models::job::RgbImage;

use crate::image::{Encoding, ImageFormat, encode};

use super::error::CliError;
use super::generate::Show;
use super::terminal::{Protocol, Terminal};

/// Width and height of a terminal that does not report them, or was not asked, in pixels.
const DEFAULT_PIXELS: (usize, usize) = (640, 480);
/// Bytes of Base64 in one chunk of kitty's protocol.
const KITTY_CHUNK: usize = 4096;

/// Shows images on the terminal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    protocol: Protocol,
    pixels: (usize, usize),
}

impl Screen {
    /// The screen that images are shown on, if any. With [`Show::Auto`] the command must be
    /// interactive, and stdout and stderr a terminal that can show images; the terminal is asked
    /// here, once.
    pub(super) fn find(show: Show, is_interactive: bool) -> Option<Self> {
        let protocol = match show {
            Show::Never => return None,
            Show::Kitty => Protocol::Kitty,
            Show::Iterm2 => Protocol::Iterm2,
            Show::Sixel => Protocol::Sixel,
            Show::Auto => {
                let is_terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
                if !is_interactive || !is_terminal {
                    return None;
                }
                let Terminal { protocol, pixels } = Terminal::ask()?;
                return Some(Self {
                    protocol,
                    pixels: pixels.unwrap_or(DEFAULT_PIXELS),
                });
            }
        };
        Some(Self {
            protocol,
            pixels: DEFAULT_PIXELS,
        })
    }

    /// Writes an image to stderr, as progress and the log.
    pub(super) fn show(&self, image: &RgbImage) -> Result<(), CliError> {
        let text = self.text(image)?;
        let mut stderr = io::stderr().lock();
        // The image is in its file already: a closed terminal is no failure.
        drop(
            stderr
                .write_all(text.as_bytes())
                .and_then(|()| stderr.flush()),
        );
        Ok(())
    }

    fn text(&self, image: &RgbImage) -> Result<String, CliError> {
        let image = reduced(image, self.pixels);
        let png = || encode(&image, Encoding::new(ImageFormat::Png), None);
        let text = match self.protocol {
            Protocol::Kitty => kitty(&png()?),
            Protocol::Iterm2 => iterm2(&png()?),
            Protocol::Sixel => sixel(&image)?,
        };
        Ok(text + "\n")
    }
}

/// Transmits a PNG file and shows it, with the terminal's responses suppressed.
fn kitty(png: &[u8]) -> String {
    let data = STANDARD.encode(png);
    let count = data.len().div_ceil(KITTY_CHUNK);
    let chunk = |index: usize| {
        let start = index * KITTY_CHUNK;
        let chunk = &data[start..data.len().min(start + KITTY_CHUNK)];
        let first = if index == 0 { "a=T,f=100,q=2," } else { "" };
        let more = u8::from(index + 1 < count);
        format!("\x1b_G{first}m={more};{chunk}\x1b\\")
    };
    (0..count).map(chunk).collect()
}

fn iterm2(png: &[u8]) -> String {
    let (size, data) = (png.len(), STANDARD.encode(png));
    format!("\x1b]1337;File=inline=1;size={size}:{data}\x07")
}

fn sixel(image: &RgbImage) -> Result<String, CliError> {
    let pixels = image.pixels.as_chunks::<3>().0;
    let rgba = pixels
        .iter()
        .flat_map(|[red, green, blue]| [*red, *green, *blue, u8::MAX]);
    SixelImage::try_from_rgba(rgba.collect(), image.width, image.height)
        .and_then(|image| image.encode())
        .map_err(CliError::Sixel)
}

/// The image scaled down by a whole factor, each pixel the mean of a square, until it fits into the
/// terminal's width and three quarters of its height, so that the lines around it stay visible.
fn reduced(image: &RgbImage, (max_width, max_height): (usize, usize)) -> RgbImage {
    let fits = |side: usize, max: usize| side.div_ceil(max.max(1));
    let square = fits(image.width, max_width)
        .max(fits(image.height, max_height * 3 / 4))
        .clamp(1, image.width.min(image.height));
    let (height, width) = (image.height / square, image.width / square);
    let mut pixels = Vec::with_capacity(height * width * 3);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let rows = y * square..(y + 1) * square;
                let sum: usize = rows
                    .flat_map(|row| (x * square..(x + 1) * square).map(move |column| (row, column)))
                    .map(|(row, column)| {
                        usize::from(image.pixels[(row * image.width + column) * 3 + channel])
                    })
                    .sum();
                pixels.push(((sum + square * square / 2) / (square * square)) as u8);
            }
        }
    }
    RgbImage {
        height,
        width,
        pixels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image whose red is the column and whose green is the row.
    fn image(height: usize, width: usize) -> RgbImage {
        let pixel = |index: usize| [(index % width) as u8, (index / width) as u8, 7];
        let pixels = (0..height * width).flat_map(pixel).collect();
        RgbImage {
            height,
            width,
            pixels,
        }
    }

    #[test]
    fn images_are_reduced_until_they_fit() {
        let image = image(100, 200);
        assert_eq!(reduced(&image, (200, 134)), image);
        let half = reduced(&image, (199, 1000));
        assert_eq!((half.height, half.width), (50, 100));
        // The mean of columns 0 and 1 is rounded up, as is that of rows.
        assert_eq!(half.pixels[..6], [1, 1, 7, 3, 1, 7]);
        let third = reduced(&image, (1000, 60));
        assert_eq!((third.height, third.width), (33, 66));
        let least = reduced(&image, (0, 0));
        assert_eq!((least.height, least.width), (1, 2));
    }

    #[test]
    fn kitty_gets_the_file_in_chunks() {
        let png: Vec<u8> = (0..7000_u32).map(|value| value as u8).collect();
        let text = kitty(&png);
        let chunks: Vec<(&str, &str)> = text
            .split_terminator("\x1b\\")
            .map(|chunk| {
                chunk
                    .strip_prefix("\x1b_G")
                    .unwrap()
                    .split_once(';')
                    .unwrap()
            })
            .collect();
        let controls: Vec<&str> = chunks.iter().map(|(control, _)| *control).collect();
        assert_eq!(controls, ["a=T,f=100,q=2,m=1", "m=1", "m=0"]);
        assert!(chunks.iter().all(|(_, data)| data.len() <= KITTY_CHUNK));
        let data: String = chunks.iter().map(|(_, data)| *data).collect();
        assert_eq!(STANDARD.decode(data).unwrap(), png);
    }

    #[test]
    fn iterm2_gets_the_file_and_its_size() {
        let text = iterm2(&[1, 2, 3, 4]);
        assert_eq!(text, "\x1b]1337;File=inline=1;size=4:AQIDBA==\x07");
    }

    #[test]
    fn sixels_show_the_image() {
        let image = image(60, 80);
        let text = sixel(&image).unwrap();
        assert!(
            text.starts_with("\x1bP") && text.ends_with("\x1b\\"),
            "{text:?}"
        );
        let decoded = SixelImage::decode(text.as_bytes()).unwrap();
        assert_eq!(decoded.dimensions(), (80, 60));
        let shown = decoded.pixels.as_chunks::<4>().0;
        let meant = image.pixels.as_chunks::<3>().0;
        let apart = shown.iter().zip(meant).flat_map(|(shown, meant)| {
            (0..3).map(|channel| f64::from(shown[channel].abs_diff(meant[channel])))
        });
        let mean = apart.sum::<f64>() / (60.0 * 80.0 * 3.0);
        assert!(mean < 6.0, "values are off by {mean}");
    }
}
