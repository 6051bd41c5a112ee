"""Bindings of the calls of the driver and of NVRTC that the tests make, with ctypes. SIM_LIBRARIES is the folder in
which scripts/cuda-sim.sh built the libraries."""
import ctypes
import os

libraries = os.environ["SIM_LIBRARIES"]
cuda = ctypes.CDLL(os.path.join(libraries, "libcuda.so.1"))
nvrtc = ctypes.CDLL(os.path.join(libraries, "libnvrtc.so"))


class CudaError(Exception):
    def __init__(self, code, call):
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(name))
        self.code, self.name = code, (name.value or b"unknown").decode()
        super().__init__(f"{call}: {self.name}")


def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        raise CudaError(code, name)


def start():
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), 0)


def compile_source(source, *options):
    """Compiles to PTX, or to its replacement on the CPU device. Raises RuntimeError with the log on failure."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None)
    given = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    code = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(nvrtc.nvrtcGetErrorString(code).decode() + "\n" + log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx


class Module:
    def __init__(self, source, *options):
        self.handle = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self.handle), compile_source(source, *options))

    def function(self, name):
        function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), self.handle, name.encode())
        return function


class Buffer:
    """Memory of the device, filled with the given bytes or uninitialised."""

    def __init__(self, content):
        self.pointer = ctypes.c_uint64()
        self.size = content if isinstance(content, int) else len(content)
        call("cuMemAllocAsync", ctypes.byref(self.pointer), ctypes.c_size_t(self.size), None)
        if not isinstance(content, int):
            call("cuMemcpyHtoDAsync_v2", self.pointer, bytes(content), ctypes.c_size_t(self.size), None)

    def read(self):
        content = ctypes.create_string_buffer(self.size)
        call("cuMemcpyDtoHAsync_v2", content, self.pointer, ctypes.c_size_t(self.size), None)
        call("cuStreamSynchronize", None)
        return content.raw

    def free(self):
        call("cuMemFreeAsync", self.pointer, None)


def launch(function, grid, block, arguments, shared=0):
    """Arguments are buffers, integers (32 bits), or ctypes objects."""
    values = []
    for a in arguments:
        values.append(a.pointer if isinstance(a, Buffer) else ctypes.c_int32(a) if isinstance(a, int) else a)
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
    three = lambda t: (t, 1, 1) if isinstance(t, int) else (tuple(t) + (1, 1))[:3]
    if shared > 48 << 10:
        call("cuFuncSetAttribute", function, 8, shared)
    call("cuLaunchKernel", function, *three(grid), *three(block), shared, None, pointers, None)
