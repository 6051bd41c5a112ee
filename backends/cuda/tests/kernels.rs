//! Compares each kernel of `kiln_ops::cuda` with sums in f64. Kernels are launched through NVIDIA's
//! driver, with an allocation of its own for every buffer. `scripts/test-cuda.sh` runs the tests
//! without a GPU on a stand-in device, which also detects out-of-bounds accesses, races and reads of
//! uninitialised memory.
//!
//! On that device, `KILN_SEEDS` is the number of random orders of blocks and warps to test; 1 by
//! default.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(unsafe_code, reason = "the driver is called directly")]

use std::env;
use std::ffi::{CString, c_void};
use std::iter;
use std::path::PathBuf;

use cudarc::driver::result::{self, ctx, device, function, module, primary_ctx, stream};
use cudarc::driver::sys::{CUdevice_attribute, CUdeviceptr, CUfunction_attribute, CUstream};
use cudarc::nvrtc::result as nvrtc;
use half::{bf16, f16};
use kiln_ops::TokenRun;
use kiln_ops::cuda::{
    Attention, AttentionMma, AttentionWgmma, ChannelsLast, CudaKernel, Elements, Elementwise,
    ElementwiseOp, Image, Launch, Product,
};

/// An element type of the kernels.
trait Element: Copy {
    /// Name in CUDA C++.
    const NAME: &'static str;
    /// Tolerance of a sum of products that is rounded to the type, relative to the largest magnitude.
    const TOLERANCE: f64;
    fn from_f32(value: f32) -> Self;
    fn to_f64(self) -> f64;
}

impl Element for f32 {
    const NAME: &'static str = "float";
    const TOLERANCE: f64 = 1e-5;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f64(self) -> f64 {
        self.into()
    }
}

impl Element for bf16 {
    const NAME: &'static str = "__nv_bfloat16";
    const TOLERANCE: f64 = 1e-2;
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f64(self) -> f64 {
        self.to_f64()
    }
}

impl Element for f16 {
    const NAME: &'static str = "__half";
    const TOLERANCE: f64 = 2e-3;
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f64(self) -> f64 {
        self.to_f64()
    }
}

/// The first GPU.
struct Gpu {
    stream: CUstream,
    architecture: i32,
}

impl Gpu {
    fn open() -> Self {
        result::init().unwrap();
        let device = device::get(0).unwrap();
        // SAFETY: `get` returned the device; its context stays retained until the process ends.
        unsafe {
            ctx::set_current(primary_ctx::retain(device).unwrap()).unwrap();
            let attribute = |name| device::get_attribute(device, name).unwrap();
            let major = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
            let minor = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
            Self {
                stream: stream::create(stream::StreamKind::NonBlocking).unwrap(),
                architecture: attribute(major) * 10 + attribute(minor),
            }
        }
    }

    fn has_tensor_cores(&self) -> bool {
        self.architecture >= 80
    }

    fn has_wgmma(&self) -> bool {
        self.architecture == 90
    }

    /// Runs a kernel whose buffers are `inputs` and then an output of `len` values, once per seed.
    /// Returns the output, which has to be bitwise identical for all seeds.
    fn run<K: CudaKernel, T: Element>(
        &self,
        launch: &Launch<K>,
        inputs: &[Vec<u8>],
        len: usize,
    ) -> Vec<T> {
        let seeds = env::var("KILN_SEEDS").map_or(1, |seeds| seeds.parse().unwrap());
        let ptx = self.compile(&launch.kernel.source());
        let mut first: Option<Vec<u8>> = None;
        for seed in 0..seeds {
            // SAFETY: the tests of this program run on one thread.
            unsafe { env::set_var("SIM_SEED", format!("{seed}")) };
            let output = self.launch(launch, &ptx, inputs, len * size_of::<T>());
            let first = first.get_or_insert_with(|| output.clone());
            assert!(
                *first == output,
                "{:?}: the output with seed {seed} differs from that with seed 0",
                launch.kernel
            );
        }
        let bytes = first.unwrap();
        let values = bytes.chunks_exact(size_of::<T>());
        // SAFETY: a chunk has the size of a value, and every bit pattern is a valid value.
        values
            .map(|value| unsafe { value.as_ptr().cast::<T>().read_unaligned() })
            .collect()
    }

    fn compile(&self, source: &str) -> Vec<std::ffi::c_char> {
        let suffix = if self.architecture >= 90 { "a" } else { "" };
        let cuda = env::var_os("CUDA_PATH").map_or_else(|| "/usr/local/cuda".into(), PathBuf::from);
        let options = [
            format!("--gpu-architecture=sm_{}{suffix}", self.architecture),
            format!("--include-path={}/include", cuda.display()),
        ];
        let program = nvrtc::create_program(&CString::new(source).unwrap(), None).unwrap();
        // SAFETY: the program was just created.
        unsafe {
            nvrtc::compile_program(program, &options).unwrap_or_else(|error| {
                let log = nvrtc::get_program_log(program).unwrap();
                let log: String = log.iter().map(|byte| *byte as u8 as char).collect();
                panic!("{error:?}: {log}");
            });
            nvrtc::get_ptx(program).unwrap()
        }
    }

    fn launch<K: CudaKernel>(
        &self,
        launch: &Launch<K>,
        ptx: &[std::ffi::c_char],
        inputs: &[Vec<u8>],
        output_bytes: usize,
    ) -> Vec<u8> {
        // SAFETY: the buffers have the sizes that the launch requires, and live until it has completed.
        unsafe {
            let module = module::load_data(ptx.as_ptr().cast()).unwrap();
            let name = CString::new(K::NAME).unwrap();
            let function = module::get_function(module, name).unwrap();
            let shared = launch.kernel.shared_bytes();
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function::set_function_attribute(function, attribute, shared as i32).unwrap();

            let mut buffers: Vec<CUdeviceptr> = Vec::new();
            for input in inputs {
                let buffer = result::malloc_async(self.stream, input.len()).unwrap();
                result::memcpy_htod_async(buffer, input, self.stream).unwrap();
                buffers.push(buffer);
            }
            let output = result::malloc_async(self.stream, output_bytes).unwrap();
            buffers.push(output);
            let info = launch.info.as_ptr().cast_mut().cast::<c_void>();
            let pointers = buffers
                .iter_mut()
                .map(|buffer| (&raw mut *buffer).cast::<c_void>());
            let mut arguments: Vec<*mut c_void> = pointers.chain(iter::once(info)).collect();
            let [x, y, z] = launch.grid;
            let block = (launch.kernel.threads(), 1, 1);
            result::launch_kernel(
                function,
                (x, y, z),
                block,
                shared as u32,
                self.stream,
                &mut arguments,
            )
            .unwrap_or_else(|error| panic!("{:?}: {error:?}", launch.kernel));
            let mut bytes = vec![0_u8; output_bytes];
            result::memcpy_dtoh_async(&mut bytes, output, self.stream).unwrap();
            stream::synchronize(self.stream).unwrap();
            for buffer in buffers {
                result::free_async(buffer, self.stream).unwrap();
            }
            result::module::unload(module).unwrap();
            bytes
        }
    }
}

/// Creates pseudo-random values from `-2 scale` to `2 scale`, rounded to `T`: in f64, and as bytes.
fn input<T: Element>(seed: u32, len: usize, scale: f32) -> (Vec<f64>, Vec<u8>) {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut values = Vec::with_capacity(len);
    let mut bytes = Vec::with_capacity(len * size_of::<T>());
    for _ in 0..len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = T::from_f32(scale * ((state >> 16) as f32 / 16384.0 - 2.0));
        values.push(value.to_f64());
        // SAFETY: elements are plain numbers.
        bytes.extend(unsafe {
            std::slice::from_raw_parts((&raw const value).cast::<u8>(), size_of::<T>())
        });
    }
    (values, bytes)
}

fn assert_close<T: Element>(what: &str, tested: &[T], expected: &[f64]) {
    assert_eq!(tested.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f64, |a, x| a.max(x.abs()));
    for (index, (tested, expected)) in tested.iter().zip(expected).enumerate() {
        let difference = (tested.to_f64() - expected).abs();
        // False for NaN.
        let is_close = difference <= T::TOLERANCE * largest;
        assert!(
            is_close,
            "{what}: value {index} is {}, expected {expected}: off by {:.1e} of {largest}",
            tested.to_f64(),
            difference / largest
        );
    }
}

/// Rows, columns and depth; most are not multiples of a tile.
const PRODUCTS: [[usize; 3]; 6] = [
    [1, 3, 8],
    [65, 70, 40],
    [130, 33, 136],
    [16, 257, 64],
    [129, 130, 200],
    [140, 264, 520],
];

fn product(rows: usize, columns: usize, depth: usize) -> Product {
    Product {
        rows,
        columns,
        depth,
        a_stride: depth,
        b_stride: depth,
        out_stride: columns,
        image: None,
    }
}

fn expected_product(
    a: &[f64],
    b: &[f64],
    bias: &[f64],
    [rows, columns, depth]: [usize; 3],
) -> Vec<f64> {
    (0..rows * columns)
        .map(|index| {
            let (row, column) = (index / columns, index % columns);
            let (a, b) = (&a[row * depth..][..depth], &b[column * depth..][..depth]);
            bias[column] + a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>()
        })
        .collect()
}

fn linear_on_tensor_cores<T: Element>(gpu: &Gpu) {
    for shape in PRODUCTS {
        let [rows, columns, depth] = shape;
        let (a, a_bytes) = input::<T>(1, rows * depth, 1.0);
        let (b, b_bytes) = input::<T>(2, columns * depth, 1.0);
        let (bias, bias_bytes) = input::<T>(3, columns, 1.0);
        let expected = expected_product(&a, &b, &bias, shape);
        // Numbers of processors that select the large and the small tiles.
        for processors in [1, 1000] {
            let launch = product(rows, columns, depth).mma(T::NAME, T::NAME, true, processors);
            let inputs = [a_bytes.clone(), b_bytes.clone(), bias_bytes.clone()];
            let tested = gpu.run::<_, T>(&launch, &inputs, rows * columns);
            assert_close(&format!("{shape:?} {processors}"), &tested, &expected);
        }
        if gpu.has_wgmma() {
            let product = product(rows, columns, depth);
            let inputs = [a_bytes, b_bytes, bias_bytes];
            let launch = product.wgmma(T::NAME, T::NAME, true, 1).unwrap();
            let tested = gpu.run::<_, T>(&launch, &inputs, rows * columns);
            assert_close(&format!("{shape:?} wgmma"), &tested, &expected);
            // Without a bias, and with an output of another type.
            let none = vec![0.0; columns];
            let expected = expected_product(&a, &b, &none, shape);
            let launch = product.wgmma(T::NAME, f32::NAME, false, 1).unwrap();
            let tested = gpu.run::<_, f32>(&launch, &inputs[..2], rows * columns);
            assert_close(&format!("{shape:?} wgmma to f32"), &tested, &expected);
        }
    }
}

#[test]
fn linear_bf16() {
    let gpu = Gpu::open();
    if gpu.has_tensor_cores() {
        linear_on_tensor_cores::<bf16>(&gpu);
    }
}

#[test]
fn linear_f16() {
    let gpu = Gpu::open();
    if gpu.has_tensor_cores() {
        linear_on_tensor_cores::<f16>(&gpu);
    }
}

#[test]
fn linear_f32() {
    let gpu = Gpu::open();
    for shape in PRODUCTS.into_iter().chain([[67, 5, 33]]) {
        let [rows, columns, depth] = shape;
        let (a, a_bytes) = input::<f32>(1, rows * depth, 1.0);
        let (b, b_bytes) = input::<bf16>(2, columns * depth, 1.0);
        let (bias, bias_bytes) = input::<f16>(3, columns, 1.0);
        let rounded: Vec<f64> = a.iter().map(|x| bf16::from_f64(*x).to_f64()).collect();
        for processors in [1, 1000] {
            let elements = Elements {
                a: f32::NAME,
                b: bf16::NAME,
                bias: Some(f16::NAME),
                out: f32::NAME,
                round_a: true,
            };
            let launch = product(rows, columns, depth).fma(elements, processors);
            let inputs = [a_bytes.clone(), b_bytes.clone(), bias_bytes.clone()];
            let tested = gpu.run::<_, f32>(&launch, &inputs, rows * columns);
            let expected = expected_product(&rounded, &b, &bias, shape);
            assert_close(&format!("{shape:?} {processors}"), &tested, &expected);
        }
    }
}

/// Images, input channels, output channels, height, width and side of the kernel.
const CONVOLUTIONS: [[usize; 6]; 4] = [
    [1, 16, 33, 5, 7, 3],
    [2, 3, 70, 9, 8, 1],
    [1, 40, 3, 16, 17, 3],
    [1, 8, 8, 1, 1, 5],
];

fn expected_convolution(x: &[f64], weight: &[f64], bias: &[f64], shape: [usize; 6]) -> Vec<f64> {
    let [images, d_in, d_out, height, width, kernel] = shape;
    let mut out = Vec::with_capacity(images * d_out * height * width);
    for image in 0..images {
        for o in 0..d_out {
            for index in 0..height * width {
                let mut sum = bias[o];
                for tap in 0..kernel * kernel {
                    let y = (index / width + tap / kernel).wrapping_sub(kernel / 2);
                    let x_place = (index % width + tap % kernel).wrapping_sub(kernel / 2);
                    if y >= height || x_place >= width {
                        continue;
                    }
                    for i in 0..d_in {
                        sum += weight[(o * d_in + i) * kernel * kernel + tap]
                            * x[((image * d_in + i) * height + y) * width + x_place];
                    }
                }
                out.push(sum);
            }
        }
    }
    out
}

#[test]
fn convolution_f32() {
    let gpu = Gpu::open();
    for shape in CONVOLUTIONS {
        let [images, d_in, d_out, height, width, kernel] = shape;
        let (x, x_bytes) = input::<f32>(1, images * d_in * height * width, 1.0);
        let (weight, weight_bytes) = input::<f32>(2, d_out * d_in * kernel * kernel, 1.0);
        let (bias, bias_bytes) = input::<f32>(3, d_out, 1.0);
        let depth = d_in * kernel * kernel;
        let convolution = Product {
            rows: d_out,
            columns: height * width,
            depth,
            a_stride: depth,
            b_stride: height * width,
            out_stride: height * width,
            image: Some(Image {
                images,
                height,
                width,
                kernel,
                channels: d_in,
            }),
        };
        let elements = Elements {
            a: f32::NAME,
            b: f32::NAME,
            bias: Some(f32::NAME),
            out: f32::NAME,
            round_a: false,
        };
        let expected = expected_convolution(&x, &weight, &bias, shape);
        for processors in [1, 1000] {
            let launch = convolution.fma(elements, processors);
            let inputs = [weight_bytes.clone(), x_bytes.clone(), bias_bytes.clone()];
            let tested = gpu.run::<_, f32>(&launch, &inputs, expected.len());
            assert_close(&format!("{shape:?} {processors}"), &tested, &expected);
        }
    }
}

#[test]
fn convolution_bf16() {
    let gpu = Gpu::open();
    if !gpu.has_tensor_cores() {
        return;
    }
    for shape in CONVOLUTIONS {
        let [images, d_in, d_out, height, width, kernel] = shape;
        let (pixels, taps) = (height * width, kernel * kernel);
        let (x, x_bytes) = input::<bf16>(1, images * d_in * pixels, 1.0);
        let (weight, weight_bytes) = input::<bf16>(2, d_out * d_in * taps, 1.0);
        let (bias, bias_bytes) = input::<bf16>(3, d_out, 1.0);
        let to_last = |outer, inner, bytes: Vec<u8>| {
            let kernel = ChannelsLast {
                element: bf16::NAME,
            };
            let (launch, padded) = kernel.launch(outer, d_in, inner);
            let last = gpu.run::<_, bf16>(&launch, &[bytes], outer * inner * padded);
            let bytes: Vec<u8> = last.iter().flat_map(|value| value.to_le_bytes()).collect();
            (bytes, padded)
        };
        let (x_bytes, padded) = to_last(images, pixels, x_bytes);
        let (weight_bytes, _) = to_last(d_out, taps, weight_bytes);
        let depth = taps * padded;
        let convolution = Product {
            rows: d_out,
            columns: pixels,
            depth,
            a_stride: depth,
            b_stride: padded,
            out_stride: pixels,
            image: Some(Image {
                images,
                height,
                width,
                kernel,
                channels: padded,
            }),
        };
        let expected = expected_convolution(&x, &weight, &bias, shape);
        for processors in [1, 1000] {
            let launch = convolution.mma(bf16::NAME, bf16::NAME, true, processors);
            let inputs = [weight_bytes.clone(), x_bytes.clone(), bias_bytes.clone()];
            let tested = gpu.run::<_, bf16>(&launch, &inputs, expected.len());
            assert_close(&format!("{shape:?} {processors}"), &tested, &expected);
        }
        if gpu.has_wgmma() {
            let launch = convolution.wgmma(bf16::NAME, bf16::NAME, true, 1).unwrap();
            let inputs = [weight_bytes, x_bytes, bias_bytes];
            let tested = gpu.run::<_, bf16>(&launch, &inputs, expected.len());
            assert_close(&format!("{shape:?} wgmma"), &tested, &expected);
        }
    }
}

/// A case of attention: lengths of the sequences, query heads, key/value heads, head dimension, and
/// whether it is causal.
type AttentionCase<'a> = (&'a [usize], usize, usize, usize, bool);

const ATTENTIONS: [AttentionCase<'static>; 11] = [
    (&[1], 1, 1, 32, false),
    (&[15, 16, 17, 64], 3, 1, 32, false),
    (&[100], 1, 1, 80, true),
    (&[65, 1, 130], 4, 2, 128, true),
    (&[70], 2, 2, 40, false),
    (&[33], 1, 1, 192, false),
    (&[67, 3], 1, 1, 384, false),
    (&[130], 24, 24, 16, false),
    (&[5, 70], 1, 1, 8, true),
    (&[300, 129], 2, 1, 64, true),
    (&[257, 40], 3, 3, 128, false),
];

fn expected_attention(
    qkv: [&[f64]; 3],
    (lengths, heads, kv_heads, width, causal): AttentionCase,
) -> Vec<f64> {
    let [query, key, value] = qkv;
    let tokens: usize = lengths.iter().sum();
    let mut out = vec![0.0; tokens * heads * width];
    let mut start = 0;
    for length in lengths {
        for token in start..start + length {
            for head in 0..heads {
                let kv_head = head * kv_heads / heads;
                let end = if causal { token + 1 } else { start + length };
                let query = &query[(token * heads + head) * width..][..width];
                let place = |other: usize| (other * kv_heads + kv_head) * width;
                let scores: Vec<f64> = (start..end)
                    .map(|other| {
                        let key = &key[place(other)..][..width];
                        let product: f64 = query.iter().zip(key).map(|(a, b)| a * b).sum();
                        product / (width as f64).sqrt()
                    })
                    .collect();
                let top = scores.iter().fold(f64::NEG_INFINITY, |a, x| a.max(*x));
                let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in 0..width {
                    let sum: f64 = (start..end)
                        .zip(&weights)
                        .map(|(other, weight)| weight * value[place(other) + column])
                        .sum();
                    out[(token * heads + head) * width + column] = sum / total;
                }
            }
        }
        start += length;
    }
    out
}

fn attention<T: Element>(gpu: &Gpu, case: AttentionCase, scale: f32) {
    let (lengths, heads, kv_heads, width, causal) = case;
    let tokens: usize = lengths.iter().sum();
    let (query, query_bytes) = input::<T>(1, tokens * heads * width, scale);
    let (key, key_bytes) = input::<T>(2, tokens * kv_heads * width, scale);
    let (value, value_bytes) = input::<T>(3, tokens * kv_heads * width, scale);
    let sizes = Attention {
        heads,
        kv_heads,
        head_dim: width,
        strides: [
            [heads * width, width],
            [kv_heads * width, width],
            [kv_heads * width, width],
        ],
    };
    let mut starts = vec![0];
    for length in lengths {
        starts.push(starts[starts.len() - 1] + length);
    }
    let inputs = [query_bytes, key_bytes, value_bytes];
    let expected = expected_attention([&query, &key, &value], case);
    let mma = AttentionMma {
        element: T::NAME,
        head_dim: width,
        causal,
    };
    let tested = gpu.run::<_, T>(&mma.launch(&sizes, &starts), &inputs, expected.len());
    assert_close(&format!("{case:?} up to {scale}"), &tested, &expected);
    if gpu.has_wgmma() && AttentionWgmma::has_width(width) {
        let wgmma = AttentionWgmma {
            element: T::NAME,
            head_dim: width,
            causal,
        };
        let tested = gpu.run::<_, T>(&wgmma.launch(&sizes, &starts), &inputs, expected.len());
        assert_close(
            &format!("{case:?} up to {scale}, wgmma"),
            &tested,
            &expected,
        );
    }
}

#[test]
fn attention_bf16() {
    let gpu = Gpu::open();
    if gpu.has_tensor_cores() {
        for case in ATTENTIONS {
            attention::<bf16>(&gpu, case, 1.0);
        }
    }
}

#[test]
fn attention_f16() {
    let gpu = Gpu::open();
    if gpu.has_tensor_cores() {
        for case in ATTENTIONS {
            attention::<f16>(&gpu, case, 1.0);
        }
    }
}

/// Values far beyond the range of f16: no intermediate result may overflow.
#[test]
fn attention_of_large_values() {
    let gpu = Gpu::open();
    if gpu.has_tensor_cores() {
        attention::<bf16>(&gpu, (&[100, 17], 3, 3, 80, false), 5e4);
        attention::<bf16>(&gpu, (&[150], 1, 1, 128, false), 5e4);
    }
}

fn elementwise<T: Element>(gpu: &Gpu) {
    // Widths that are and are not multiples of a vector.
    for (tokens, dim) in [(5, 64), (3, 1), (70, 37), (1, 4099)] {
        let count = tokens * dim;
        let (a, a_bytes) = input::<T>(1, count, 2.0);
        let (b, b_bytes) = input::<T>(2, count, 2.0);
        let (gate, gate_bytes) = input::<f32>(3, 2 * dim, 1.0);
        let of = |op| Elementwise {
            element: T::NAME,
            op,
        };

        let launch = of(ElementwiseOp::GeluTanh).launch(count);
        let tested = gpu.run::<_, T>(&launch, std::slice::from_ref(&a_bytes), count);
        let gelu = |x: &f64| {
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh())
        };
        assert_close("gelu", &tested, &a.iter().map(gelu).collect::<Vec<f64>>());

        let launch = of(ElementwiseOp::SiluMul).launch(count);
        let tested = gpu.run::<_, T>(&launch, &[a_bytes.clone(), b_bytes.clone()], count);
        let silu = |(a, b): (&f64, &f64)| a / (1.0 + (-a).exp()) * b;
        assert_close(
            "silu",
            &tested,
            &a.iter().zip(&b).map(silu).collect::<Vec<f64>>(),
        );

        // The first token uses row 1 of the table, the others row 0.
        let runs = [(1, 1), (tokens - 1, 0)].map(|(tokens, row)| TokenRun { tokens, row });
        let launches = of(ElementwiseOp::GatedResidual).launches(dim, &runs);
        let inputs = [a_bytes, b_bytes, gate_bytes];
        let tested = gpu.run::<_, T>(&launches[0], &inputs, count);
        let expected: Vec<f64> = (0..count)
            .map(|index| {
                let row = usize::from(index < dim);
                a[index] + gate[row * dim + index % dim] * b[index]
            })
            .collect();
        assert_close("gated residual", &tested, &expected);
    }
}

#[test]
fn elementwise_ops() {
    let gpu = Gpu::open();
    elementwise::<f32>(&gpu);
    elementwise::<f16>(&gpu);
    if gpu.has_tensor_cores() {
        elementwise::<bf16>(&gpu);
    }
}
