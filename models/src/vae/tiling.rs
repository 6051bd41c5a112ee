//! How images are decoded: whole, one at a time, or in tiles.

use crate::job::Decoding;

/// How the tiles of an image are decoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TilingMode {
    /// With all that their pixels depend on, so that the image is the same as if it were decoded
    /// whole.
    #[default]
    Exact,
    /// Each by itself and blended with its neighbours, as in diffusers, which changes the image.
    Blended,
}

impl TilingMode {
    pub const ALL: [Self; 2] = [Self::Exact, Self::Blended];

    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Blended => "blended",
        }
    }
}

/// The tiles of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tiling {
    /// The image is cut into equal tiles of at most this height and width, which are decoded exactly.
    Exact { size: usize },
    /// Tiles of diffusers' `enable_tiling`.
    Blended(Blending),
}

/// Overlapping tiles, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blending {
    /// Height and width of a tile.
    pub size: usize,
    /// Distance between the edges of neighbouring tiles; a tile overlaps the next one by
    /// `size - stride`.
    pub stride: usize,
}

/// The tiles of diffusers: 256 pixels every 192.
impl Default for Blending {
    fn default() -> Self {
        Self {
            size: 256,
            stride: 192,
        }
    }
}

/// Why a tile geometry cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TilingError {
    #[error("the VAE tile size ({size}) must be at least {scale} pixels")]
    Exact { size: usize, scale: usize },
    #[error(
        "the VAE tile size ({size}) and stride ({stride}) must be at least {scale} pixels, \
         and the stride at most the size"
    )]
    Blended {
        size: usize,
        stride: usize,
        scale: usize,
    },
}

impl Tiling {
    /// Exact tiles of at most 512 pixels: 1.18 times the work of the whole image.
    pub const DEFAULT: Self = Self::Exact { size: 512 };

    pub fn mode(self) -> TilingMode {
        match self {
            Self::Exact { .. } => TilingMode::Exact,
            Self::Blended(_) => TilingMode::Blended,
        }
    }

    /// Largest height and width of a tile.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::Exact { size } | Self::Blended(Blending { size, .. }) => size,
        }
    }

    /// Checks that size and stride are at least one latent of `scale` pixels.
    ///
    /// # Errors
    /// If they are smaller, or if the stride is above the size.
    pub(crate) fn check(self, scale: usize) -> Result<(), TilingError> {
        match self {
            Self::Exact { size } if size < scale => Err(TilingError::Exact { size, scale }),
            Self::Blended(Blending { size, stride }) if stride < scale || size < stride => {
                Err(TilingError::Blended {
                    size,
                    stride,
                    scale,
                })
            }
            _ => Ok(()),
        }
    }

    /// Exact tiles of at most this size. Blended tiles stay, because their size changes the image.
    fn at_most(self, limit: usize) -> Self {
        match self {
            Self::Exact { size } => Self::Exact {
                size: size.min(limit),
            },
            blended @ Self::Blended(_) => blended,
        }
    }
}

/// How a batch of latents is decoded: settings that trade speed for memory. Slicing and exact tiles do
/// not change the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VaeSettings {
    /// Decodes one image at a time.
    pub use_slicing: bool,
    /// Decodes images that are larger than one tile in tiles.
    pub tiling: Option<Tiling>,
    /// The tiles of a job with [`Decoding::Tiled`] where [`VaeSettings::tiling`] names none.
    pub automatic_tiling: Tiling,
}

/// Whole images; a job with [`Decoding::Tiled`] has exact tiles of the size that it names.
impl Default for VaeSettings {
    fn default() -> Self {
        Self {
            use_slicing: false,
            tiling: None,
            automatic_tiling: Tiling::Exact { size: usize::MAX },
        }
    }
}

impl VaeSettings {
    /// The settings for the images of a job.
    #[must_use]
    pub fn of(self, decoding: Decoding) -> Self {
        let tiling = match decoding {
            Decoding::AsSet | Decoding::Sliced => self.tiling,
            Decoding::Tiled(size) => {
                let tiling = self.tiling.unwrap_or(self.automatic_tiling);
                Some(tiling.at_most(size))
            }
        };
        Self {
            use_slicing: self.use_slicing || decoding != Decoding::AsSet,
            tiling,
            ..self
        }
    }

    /// The tiles of an image of this height and width in latents; `None` if it is decoded whole.
    pub(crate) fn tiling_of(&self, latents: [usize; 2], scale: usize) -> Option<Tiling> {
        let longest = latents[0].max(latents[1]);
        self.tiling.filter(|tiling| longest > tiling.size() / scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_may_have_smaller_exact_tiles_than_were_set_and_the_blended_tiles_that_were_set() {
        let tiling = |tiling, automatic_tiling, decoding| {
            let settings = VaeSettings {
                tiling,
                automatic_tiling,
                ..VaeSettings::default()
            };
            settings.of(decoding).tiling
        };
        let exact = |size| Tiling::Exact { size };
        let any = exact(usize::MAX);
        let blended = Tiling::Blended(Blending::default());
        for (set, automatic, decoding, expected) in [
            (None, any, Decoding::AsSet, None),
            (None, any, Decoding::Sliced, None),
            (None, any, Decoding::Tiled(1024), Some(exact(1024))),
            (None, exact(256), Decoding::Tiled(1024), Some(exact(256))),
            (Some(exact(512)), any, Decoding::AsSet, Some(exact(512))),
            (
                Some(exact(512)),
                any,
                Decoding::Tiled(1024),
                Some(exact(512)),
            ),
            (Some(exact(512)), any, Decoding::Tiled(64), Some(exact(64))),
            (None, blended, Decoding::Tiled(64), Some(blended)),
            (Some(blended), blended, Decoding::Sliced, Some(blended)),
        ] {
            assert_eq!(tiling(set, automatic, decoding), expected, "{decoding:?}");
        }
    }
}
