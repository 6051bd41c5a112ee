//! Compiles kernels in CUDA C++ and launches them through `CubeCL`, on its buffers and its stream.

use std::fmt::Debug;
use std::hash::Hash;

use burn_cubecl::cubecl::cuda::{CudaCompiler, CudaRuntime};
use burn_cubecl::cubecl::ir::{Scope, StorageType};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::DType;
use cubecl_cpp::shared::{Elem, Item, SharedMemory};
use cubecl_runtime::compiler::{CompilationError, Compiler, CubeTask};
use cubecl_runtime::id::KernelId;
use cubecl_runtime::kernel::{CompiledKernel, KernelDefinition, KernelMetadata, KernelOptions};
use cubecl_runtime::server::{ExecutionMode, KernelArguments, MetadataBindingInfo};

/// Source that every kernel starts with.
const DEVICE: &str = include_str!("kernels/device.cuh");

/// A kernel in CUDA C++. The value holds its compile-time parameters, and is part of the cache key of
/// the compiled kernel.
pub trait CudaKernel: Clone + Debug + Eq + Hash + Send + Sync + 'static {
    /// Name of the `__global__` function.
    const NAME: &'static str;
    /// Source files, in order; they follow `device.cuh` and the macros of [`CudaKernel::defines`].
    const TEXTS: &'static [&'static str];

    /// Names and values of the macros that the source is compiled with.
    fn defines(&self) -> Vec<(&'static str, String)>;
    /// Threads per block.
    fn threads(&self) -> u32;
    /// Bytes of dynamic shared memory per block.
    fn shared_bytes(&self) -> usize;

    /// The complete source for NVRTC.
    fn source(&self) -> String {
        let defines = self.defines().into_iter();
        let defines = defines.map(|(name, value)| format!("#define {name} {value}\n"));
        let defines: String = defines.collect();
        [&[DEVICE, &defines], Self::TEXTS].concat().join("\n")
    }
}

/// A kernel launch without its buffers. The kernel's arguments are the buffers, then `info`.
#[derive(Debug, Clone)]
pub struct Launch<K> {
    pub kernel: K,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// The fields of the kernel's `struct Info`, passed by value.
    pub info: Vec<u64>,
}

impl<K: CudaKernel> Launch<K> {
    /// Queues the launch on the stream of `buffers`, which are in the order of the kernel's arguments.
    pub(super) fn run(self, buffers: &[&CubeTensor<CudaRuntime>]) {
        let [x, y, z] = self.grid;
        let fixed = self.info.len();
        let arguments = KernelArguments::new()
            .with_buffers(buffers.iter().map(|x| x.handle.clone().binding()).collect())
            .with_info(MetadataBindingInfo::new(self.info, fixed));
        let task = Box::new(Task(self.kernel));
        buffers[0]
            .client
            .launch(task, CubeCount::Static(x, y, z), arguments);
    }
}

/// The C++ name of a dtype, if the kernels support it.
pub(super) fn element(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float"),
        DType::F16 => Some("__half"),
        DType::BF16 => Some("__nv_bfloat16"),
        _ => None,
    }
}

#[derive(Clone)]
struct Task<K>(K);

impl<K: CudaKernel> KernelMetadata for Task<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    /// Cache key of the compiled kernel. It includes a hash of the source, so that a changed source is
    /// compiled anew.
    fn id(&self) -> KernelId {
        let text = const {
            let mut hash = fnv(FNV, DEVICE.as_bytes());
            let mut index = 0;
            while index < K::TEXTS.len() {
                hash = fnv(hash, K::TEXTS[index].as_bytes());
                index += 1;
            }
            hash
        };
        KernelId::new::<Self>()
            .info((text, self.0.clone()))
            .cube_dim(CubeDim::new_1d(self.0.threads()))
    }

    fn address_type(&self) -> StorageType {
        u64::as_type_native_unchecked().storage_type()
    }
}

impl<K: CudaKernel> CubeTask<CudaCompiler> for Task<K> {
    fn compile(
        &self,
        compiler: &mut CudaCompiler,
        options: &<CudaCompiler as Compiler>::CompilationOptions,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<CompiledKernel<CudaCompiler>, CompilationError> {
        let cube_dim = CubeDim::new_1d(self.0.threads());
        // CubeCL reads only the size of the shared memory from a kernel's representation.
        let empty = KernelDefinition {
            buffers: Vec::new(),
            tensor_maps: Vec::new(),
            scalars: Vec::new(),
            cube_dim,
            body: Scope::root(false),
            options: KernelOptions {
                kernel_name: K::NAME.to_owned(),
                ..KernelOptions::default()
            },
        };
        let mut repr = compiler.compile(empty, options, mode, address_type)?;
        repr.body.shared_memories = vec![SharedMemory::Array {
            index: 0,
            item: Item::scalar(Elem::U8, true),
            length: self.0.shared_bytes(),
            align: 128,
            offset: 0,
        }];
        Ok(CompiledKernel {
            entrypoint_name: K::NAME.to_owned(),
            debug_name: Some(K::NAME),
            source: self.0.source(),
            repr: Some(repr),
            cube_dim,
            debug_info: None,
        })
    }
}

/// The 64-bit FNV-1a hash of an empty text.
const FNV: u64 = 0xcbf2_9ce4_8422_2325;

/// Extends an FNV-1a hash by a text.
const fn fnv(mut hash: u64, text: &[u8]) -> u64 {
    let mut index = 0;
    while index < text.len() {
        hash = (hash ^ text[index] as u64).wrapping_mul(0x100_0000_01b3);
        index += 1;
    }
    hash
}
