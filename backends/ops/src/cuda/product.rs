//! Linear layers and convolutions: one matrix product, on tensor cores or in f32 arithmetic.

use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::{DType, Shape, TensorMetadata};

use super::source::{CudaKernel, Launch, element};
use super::{allocate, has_tensor_cores, has_wgmma, is_aligned, with_contiguous_rows};
use crate::cubecl::KernelRuntime;

/// Source that all product kernels include.
const SIZES: &str = include_str!("kernels/product.cuh");

/// Sizes of `out = a · bᵀ`, with `a` `[rows, depth]`, `b` `[columns, depth]` and `out`
/// `[rows, columns]`.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    /// Row strides of the three matrices, in values.
    pub a_stride: usize,
    pub b_stride: usize,
    pub out_stride: usize,
    /// Set for a convolution: `a` is the weight, and `b` is the image, expanded by the kernel.
    pub image: Option<Image>,
}

/// Additional sizes of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    pub images: usize,
    pub height: usize,
    pub width: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Input channels in memory, including padding.
    pub channels: usize,
}

impl Product {
    fn info(&self) -> Vec<u64> {
        let image = self.image.unwrap_or(Image {
            images: 1,
            height: 0,
            width: 0,
            kernel: 0,
            channels: 0,
        });
        let pixels = image.height * image.width;
        [
            self.rows,
            self.columns,
            self.depth,
            self.a_stride,
            self.b_stride,
            self.out_stride,
            image.height,
            image.width,
            image.kernel,
            image.channels,
            pixels * image.channels,
            pixels * self.rows,
        ]
        .map(|size| size as u64)
        .to_vec()
    }

    fn launch<K>(&self, kernel: K, tile: [usize; 2]) -> Launch<K> {
        let tiles = self.rows.div_ceil(tile[0]) * self.columns.div_ceil(tile[1]);
        let images = self.image.map_or(1, |image| image.images);
        Launch {
            kernel,
            grid: [tiles as u32, images as u32, 1],
            info: self.info(),
        }
    }

    fn run_on_tensor_cores(
        &self,
        a: &CubeTensor<CudaRuntime>,
        b: &CubeTensor<CudaRuntime>,
        bias: Option<&CubeTensor<CudaRuntime>>,
        out: &CubeTensor<CudaRuntime>,
    ) {
        let (element, to, has_bias) = (name(a), name(out), bias.is_some());
        let buffers = buffers(a, b, bias, out);
        let wgmma = has_wgmma(a)
            .then(|| self.wgmma(element, to, has_bias, processors(a)))
            .flatten();
        match wgmma {
            Some(launch) => launch.run(&buffers),
            None => self.mma(element, to, has_bias, processors(a)).run(&buffers),
        }
    }

    /// Whether the product has a 128 × 128 tile for each of this many processors.
    fn fills(&self, processors: usize) -> bool {
        let images = self.image.map_or(1, |image| image.images);
        self.rows.div_ceil(128) * self.columns.div_ceil(128) * images >= processors
    }

    /// Launch on tensor cores, for matrices whose rows are 16-byte aligned. `processors` is the number
    /// of streaming multiprocessors, which selects the tile.
    pub fn mma(
        &self,
        element: &'static str,
        out: &'static str,
        has_bias: bool,
        processors: usize,
    ) -> Launch<ProductMma> {
        let wide = self.fills(processors);
        let kernel = ProductMma {
            element,
            out,
            has_bias,
            is_convolution: self.image.is_some(),
            wide,
        };
        self.launch(kernel, [kernel.tile(); 2])
    }

    /// Launch on tensor cores with Hopper's warpgroup instructions (wgmma), for matrices whose rows are
    /// 16-byte aligned. `None` if it would leave more than half of the processors idle.
    pub fn wgmma(
        &self,
        element: &'static str,
        out: &'static str,
        has_bias: bool,
        processors: usize,
    ) -> Option<Launch<ProductWgmma>> {
        let kernel = ProductWgmma {
            element,
            out,
            has_bias,
            is_convolution: self.image.is_some(),
        };
        let launch = self.launch(kernel, kernel.tile());
        (2 * launch.grid[0] as usize * launch.grid[1] as usize >= processors).then_some(launch)
    }

    /// Launch in f32 arithmetic, for any element types and strides.
    pub fn fma(&self, elements: Elements, processors: usize) -> Launch<ProductFma> {
        let kernel = ProductFma {
            elements,
            is_convolution: self.image.is_some(),
            wide: self.fills(processors),
        };
        self.launch(kernel, [kernel.tile(); 2])
    }
}

/// A compilation of `product_mma.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProductMma {
    pub element: &'static str,
    pub out: &'static str,
    pub has_bias: bool,
    pub is_convolution: bool,
    /// Tiles of 128 × 128 instead of 64 × 64.
    pub wide: bool,
}

impl ProductMma {
    const STAGES: usize = 4;
    const DEPTH: usize = 32;

    fn tile(self) -> usize {
        if self.wide { 128 } else { 64 }
    }

    const WARPS: [u32; 2] = [2, 2];
}

impl CudaKernel for ProductMma {
    const NAME: &'static str = "product_mma";
    const TEXTS: &'static [&'static str] = &[SIZES, include_str!("kernels/product_mma.cu")];

    fn defines(&self) -> Vec<(&'static str, String)> {
        let [rows, columns] = Self::WARPS;
        vec![
            ("T", self.element.to_owned()),
            ("OUT", self.out.to_owned()),
            ("HAS_BIAS", u8::from(self.has_bias).to_string()),
            ("CONV", u8::from(self.is_convolution).to_string()),
            ("BM", self.tile().to_string()),
            ("BN", self.tile().to_string()),
            ("WARPS_M", rows.to_string()),
            ("WARPS_N", columns.to_string()),
            ("STAGES", Self::STAGES.to_string()),
        ]
    }

    fn threads(&self) -> u32 {
        32 * Self::WARPS.iter().product::<u32>()
    }

    fn shared_bytes(&self) -> usize {
        Self::STAGES * 2 * self.tile() * Self::DEPTH * 2
    }
}

/// A compilation of `product_wgmma.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProductWgmma {
    pub element: &'static str,
    pub out: &'static str,
    pub has_bias: bool,
    pub is_convolution: bool,
}

impl ProductWgmma {
    const STAGES: usize = 4;
    const DEPTH: usize = 64;

    /// Rows and columns of a tile. Convolutions have few channels, and 192 columns leave fewer
    /// processors idle in the last wave of blocks.
    fn tile(self) -> [usize; 2] {
        [128, if self.is_convolution { 192 } else { 256 }]
    }
}

impl CudaKernel for ProductWgmma {
    const NAME: &'static str = "product_wgmma";
    const TEXTS: &'static [&'static str] = &[
        SIZES,
        include_str!("kernels/wgmma.cuh"),
        include_str!("kernels/product_wgmma.cu"),
    ];

    fn defines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("T", self.element.to_owned()),
            ("OUT", self.out.to_owned()),
            ("HAS_BIAS", u8::from(self.has_bias).to_string()),
            ("CONV", u8::from(self.is_convolution).to_string()),
            ("BN", self.tile()[1].to_string()),
        ]
    }

    fn threads(&self) -> u32 {
        256
    }

    fn shared_bytes(&self) -> usize {
        Self::STAGES * self.tile().iter().sum::<usize>() * Self::DEPTH * 2
    }
}

/// CUDA element types of a product in f32 arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Elements {
    pub a: &'static str,
    pub b: &'static str,
    pub bias: Option<&'static str>,
    pub out: &'static str,
    /// Whether `a` is rounded to bf16 first.
    pub round_a: bool,
}

/// A compilation of `product_fma.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProductFma {
    pub elements: Elements,
    pub is_convolution: bool,
    /// Tiles of 128 × 128 instead of 64 × 64.
    pub wide: bool,
}

impl ProductFma {
    const DEPTH: usize = 16;

    fn tile(self) -> usize {
        if self.wide { 128 } else { 64 }
    }
}

impl CudaKernel for ProductFma {
    const NAME: &'static str = "product_fma";
    const TEXTS: &'static [&'static str] = &[SIZES, include_str!("kernels/product_fma.cu")];

    fn defines(&self) -> Vec<(&'static str, String)> {
        let elements = self.elements;
        vec![
            ("A", elements.a.to_owned()),
            ("B", elements.b.to_owned()),
            ("BIAS", elements.bias.unwrap_or("float").to_owned()),
            ("OUT", elements.out.to_owned()),
            ("HAS_BIAS", u8::from(elements.bias.is_some()).to_string()),
            ("CONV", u8::from(self.is_convolution).to_string()),
            ("ROUND_A", u8::from(elements.round_a).to_string()),
            ("TILE", self.tile().to_string()),
        ]
    }

    fn threads(&self) -> u32 {
        256
    }

    fn shared_bytes(&self) -> usize {
        2 * Self::DEPTH * (self.tile() + 4) * size_of::<f32>()
    }
}

/// A compilation of `rearrange.cu`, which moves channels last and pads them to a multiple of 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelsLast {
    pub element: &'static str,
}

impl ChannelsLast {
    /// Launch for an input `[outer, channels, inner]`, and the padded number of channels.
    pub fn launch(self, outer: usize, channels: usize, inner: usize) -> (Launch<Self>, usize) {
        let padded = channels.next_multiple_of(8);
        let launch = Launch {
            kernel: self,
            grid: [
                inner.div_ceil(32) as u32,
                padded.div_ceil(32) as u32,
                outer as u32,
            ],
            info: [outer, channels, padded, inner]
                .map(|size| size as u64)
                .to_vec(),
        };
        (launch, padded)
    }
}

impl CudaKernel for ChannelsLast {
    const NAME: &'static str = "channels_last";
    const TEXTS: &'static [&'static str] = &[include_str!("kernels/rearrange.cu")];

    fn defines(&self) -> Vec<(&'static str, String)> {
        vec![("T", self.element.to_owned())]
    }

    fn threads(&self) -> u32 {
        256
    }

    fn shared_bytes(&self) -> usize {
        32 * 33 * 2
    }
}

/// Computes [`crate::FusedOps::fused_linear`].
pub(super) fn linear(
    x: &CubeTensor<CudaRuntime>,
    weight: &CubeTensor<CudaRuntime>,
    bias: Option<&CubeTensor<CudaRuntime>>,
) -> CubeTensor<CudaRuntime> {
    let (x, weight) = (with_contiguous_rows(x), with_contiguous_rows(weight));
    let bias = bias.map(|bias| into_contiguous(bias.clone()));
    let [tokens, depth] = x.shape().dims();
    let [columns, _] = weight.shape().dims();
    let dtype = x.dtype;
    let out = allocate(&x, Shape::from([tokens, columns]), dtype);
    if tokens == 0 {
        return out;
    }
    // A bf16 weight has f32 activations rounded to bf16, so the product runs in bf16.
    let rounds = weight.dtype == DType::BF16 && dtype != DType::BF16;
    let x = if rounds && dtype == DType::F32 && has_tensor_cores(&x) {
        with_contiguous_rows(&cast(x, DType::BF16))
    } else {
        x
    };
    let product = Product {
        rows: tokens,
        columns,
        depth,
        a_stride: x.meta.strides()[0],
        b_stride: weight.meta.strides()[0],
        out_stride: columns,
        image: None,
    };
    let tensor_cores = has_tensor_cores(&x)
        && x.dtype != DType::F32
        && x.dtype == weight.dtype
        && depth.is_multiple_of(8)
        && [&x, &weight].into_iter().all(is_aligned);
    if tensor_cores {
        let bias = bias.map(|bias| cast(bias, x.dtype));
        product.run_on_tensor_cores(&x, &weight, bias.as_ref(), &out);
    } else {
        let elements = Elements {
            a: name(&x),
            b: name(&weight),
            bias: bias.as_ref().map(name),
            out: name(&out),
            round_a: rounds && x.dtype != DType::BF16,
        };
        let launch = product.fma(elements, processors(&x));
        launch.run(&buffers(&x, &weight, bias.as_ref(), &out));
    }
    out
}

/// Computes [`crate::FusedOps::conv2d_same`].
pub(super) fn conv2d_same(
    x: &CubeTensor<CudaRuntime>,
    weight: &CubeTensor<CudaRuntime>,
    bias: &CubeTensor<CudaRuntime>,
) -> CubeTensor<CudaRuntime> {
    let dtype = x.dtype;
    let x = into_contiguous(x.clone());
    let weight = into_contiguous(cast(weight.clone(), dtype));
    let bias = into_contiguous(cast(bias.clone(), dtype));
    let [images, channels, height, width] = x.shape().dims();
    let [channels_out, _, kernel, _] = weight.shape().dims();
    let (pixels, taps) = (height * width, kernel * kernel);
    let out = allocate(
        &x,
        Shape::from([images, channels_out, height, width]),
        dtype,
    );
    let image = |channels| Image {
        images,
        height,
        width,
        kernel,
        channels,
    };
    if dtype != DType::F32 && has_tensor_cores(&x) {
        let (x, padded) = channels_last(&x, images, channels, pixels);
        let (weight, _) = channels_last(&weight, channels_out, channels, taps);
        let depth = taps * padded;
        let product = Product {
            rows: channels_out,
            columns: pixels,
            depth,
            a_stride: depth,
            b_stride: padded,
            out_stride: pixels,
            image: Some(image(padded)),
        };
        product.run_on_tensor_cores(&weight, &x, Some(&bias), &out);
    } else {
        let depth = channels * taps;
        let product = Product {
            rows: channels_out,
            columns: pixels,
            depth,
            a_stride: depth,
            b_stride: pixels,
            out_stride: pixels,
            image: Some(image(channels)),
        };
        let elements = Elements {
            a: name(&weight),
            b: name(&x),
            bias: Some(name(&bias)),
            out: name(&out),
            round_a: false,
        };
        let launch = product.fma(elements, processors(&x));
        launch.run(&buffers(&weight, &x, Some(&bias), &out));
    }
    out
}

/// Transposes `[outer, channels, inner]` to `[outer, inner, padded]`, where `padded` is the number of
/// channels rounded up to a multiple of 8. Returns the tensor and `padded`.
fn channels_last(
    x: &CubeTensor<CudaRuntime>,
    outer: usize,
    channels: usize,
    inner: usize,
) -> (CubeTensor<CudaRuntime>, usize) {
    let (launch, padded) = ChannelsLast { element: name(x) }.launch(outer, channels, inner);
    let out = allocate(x, Shape::from([outer, inner, padded]), x.dtype);
    launch.run(&[x, &out]);
    (out, padded)
}

/// The buffers of a product in the order of the kernel's arguments.
fn buffers<'a>(
    a: &'a CubeTensor<CudaRuntime>,
    b: &'a CubeTensor<CudaRuntime>,
    bias: Option<&'a CubeTensor<CudaRuntime>>,
    out: &'a CubeTensor<CudaRuntime>,
) -> Vec<&'a CubeTensor<CudaRuntime>> {
    [a, b].into_iter().chain(bias).chain([out]).collect()
}

fn name(x: &CubeTensor<CudaRuntime>) -> &'static str {
    element(x.dtype).expect("models compute in f32, bf16 and f16")
}

/// Number of streaming multiprocessors of the device, or 1 while the gate forces large tiles.
fn processors(x: &CubeTensor<CudaRuntime>) -> usize {
    if CudaRuntime::gate().forces_large_tiles() {
        return 1;
    }
    let count = x.client.properties().hardware.num_streaming_multiprocessors;
    count.map_or(1, |count| count as usize)
}
