#!/usr/bin/env python3
"""Tests of the stand-in CUDA devices, run by test.sh: each case runs in its own process and prints one line.

    test.py              all cases
    test.py WORD         those whose name contains it
"""
import concurrent.futures
import ctypes
import math
import operator
import os
import random
import re
import struct
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
BLOCK = 64


def planted(name):
    def whole(file):
        text = open(os.path.join(HERE, "planted", file)).read()
        return re.sub(r'#include "(\w+\.cuh)"', lambda m: re.sub(r"\n\s*", "\n", whole(m.group(1))), text)

    return whole(name + ".cu")


def floats(values):
    return struct.pack(f"{len(values)}f", *values)


# ---- kernels with and without faults -------------------------------------------------------------

WGMMA = 2 * 64 * 64 * 2  # bytes of two tiles
# File, kernel, kind of hazard that must be found, kinds that may be found, bytes of dynamic shared memory.
FAULTS = [
    ("race_between_warps", "faulty", "shared-race", {"uninitialised-shared", "warp-race"}, 0),
    ("race_between_lanes", "faulty", "warp-race", {"uninitialised-shared"}, 256),
    ("divergent_barrier", "faulty", "divergent-barrier", set(), 0),
    ("divergent_barrier", "faulty_in_warp", "divergent-barrier", set(), 0),
    ("divergent_barrier", "faulty_deadlock", "divergent-barrier", {"divergent-warp"}, 0),
    ("divergent_warp", "faulty", "divergent-warp", set(), 0),
    ("divergent_warp", "faulty_branches", "divergent-warp", set(), 0),
    ("out_of_bounds_global", "faulty", "out-of-bounds-global", set(), 0),
    ("out_of_bounds_global", "faulty_write", "out-of-bounds-global", {"block-race"}, 0),
    ("out_of_bounds_global", "faulty_null", "out-of-bounds-global", set(), 0),
    ("out_of_bounds_shared", "faulty", "out-of-bounds-shared", set(), 0),
    ("out_of_bounds_shared", "faulty_dynamic", "out-of-bounds-shared", set(), 256),
    ("uninitialised_shared", "faulty", "uninitialised-shared", set(), 0),
    ("uninitialised_global", "faulty", "uninitialised-global", set(), 0),
    ("blocks", "faulty", "block-race", set(), 0),
    ("blocks", "faulty_read", "block-race", {"uninitialised-global"}, 0),
    ("async_copy", "faulty", "async-copy", set(), 1024),
    ("async_copy", "faulty_group", "async-copy", set(), 1024),
    ("async_copy", "faulty_barrier", "shared-race", {"async-copy", "warp-race", "uninitialised-shared"}, 1024),
    ("deadlock", "faulty", "deadlock", set(), 0),
    ("misaligned", "faulty", "misaligned", set(), 0),
    ("barriers_and_atomics", "faulty", "shared-race", {"warp-race", "uninitialised-shared"}, 0),
    ("wgmma", "faulty", "async-proxy", set(), WGMMA),
    ("wgmma", "faulty_late_fence", "async-proxy", set(), WGMMA),
    ("wgmma", "faulty_early_fence", "async-proxy", set(), WGMMA),
    ("wgmma", "faulty_barrier", "shared-race", {"warp-race", "async-product"}, WGMMA),
    ("wgmma", "faulty_overwrite", "async-product", set(), WGMMA),
    ("wgmma", "faulty_prefetch", "async-product", set(), WGMMA),
    ("wgmma", "faulty_overwrite_warp", "shared-race", set(), WGMMA),
    ("wgmma", "faulty_uninitialised", "uninitialised-shared", set(), WGMMA),
    ("wgmma", "faulty_end", "async-product", set(), WGMMA),
    ("wgmma", "faulty_uncommitted", "async-product", set(), WGMMA),
    ("wgmma", "faulty_sums", "async-product", set(), WGMMA),
    ("wgmma", "faulty_sums_group", "async-product", set(), WGMMA),
    ("wgmma", "faulty_sums_write", "async-product", set(), WGMMA),
    ("wgmma", "faulty_fence", "async-product", set(), WGMMA),
    ("wgmma", "faulty_misaligned", "misaligned", set(), WGMMA + 128),
    ("wgmma", "faulty_bounds", "out-of-bounds-shared", {"async-proxy", "uninitialised-shared"}, WGMMA),
    ("wgmma", "faulty_divergent", "divergent-warp", set(), WGMMA),
    ("wgmma", "faulty_lanes", "divergent-warp", set(), WGMMA),
    ("wgmma", "faulty_branches", "divergent-warp", set(), WGMMA),
    ("wgmma_groups", "faulty", "divergent-warp", set(), WGMMA),
    ("wgmma_groups", "faulty_half", "divergent-warp", set(), WGMMA),
    ("wgmma_groups", "faulty_overwrite", "shared-race", {"async-product"}, WGMMA),
    ("wgmma_barriers", "faulty", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_sync", "shared-race", {"named-barrier", "uninitialised-shared"}, WGMMA),
    ("wgmma_barriers", "faulty_publish", "shared-race", {"async-product"}, WGMMA),
    ("wgmma_barriers", "faulty_fence", "async-proxy", set(), WGMMA),
    ("wgmma_barriers", "faulty_release", "async-product", {"shared-race"}, WGMMA),
    ("wgmma_barriers", "faulty_release_warp", "shared-race", {"async-product"}, WGMMA),
    ("wgmma_barriers", "faulty_arrive", "shared-race", {"uninitialised-shared"}, WGMMA),
    ("wgmma_barriers", "faulty_other", "shared-race", {"uninitialised-shared"}, WGMMA),
    ("wgmma_barriers", "faulty_twice", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_counts", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_many", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_few", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_part", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_number", "named-barrier", set(), WGMMA),
    ("wgmma_barriers", "faulty_lanes", "divergent-warp", set(), WGMMA),
]
CORRECT = [
    ("race_between_warps", "correct", 0),
    ("race_between_lanes", "correct", 256),
    ("divergent_barrier", "correct", 0),
    ("divergent_warp", "correct", 0),
    ("out_of_bounds_global", "correct", 0),
    ("out_of_bounds_shared", "correct", 256),
    ("uninitialised_shared", "correct", 0),
    ("uninitialised_global", "correct", 0),
    ("blocks", "correct", 0),
    ("async_copy", "correct", 2048),
    ("misaligned", "correct", 0),
    ("barriers_and_atomics", "correct", 0),
    ("wgmma", "correct", WGMMA),
    ("wgmma_groups", "correct", WGMMA),
    ("wgmma_barriers", "correct", WGMMA),
]
GRID = 4
THREADS = {"wgmma": 128, "wgmma_groups": 192, "wgmma_barriers": 256}


def run_planted(file, kernel, seeds, shared, initialised):
    """Returns the output for each seed; hazards are written to SIM_REPORT."""
    import device

    device.start()
    function = device.Module(planted(file)).function(kernel)
    block = THREADS.get(file, BLOCK)
    numbers = [float(i % 50) for i in range(GRID * block)]
    results = []
    for seed in seeds:
        os.environ["SIM_SEED"] = str(seed)
        given = device.Buffer(floats(numbers))
        out_size = 4 * (GRID * block + (2 + BLOCK if file == "blocks" else 0))
        out = device.Buffer(bytes(out_size) if initialised else out_size)
        try:
            device.launch(function, GRID, block, [given, out, 3], shared)
            results.append(out.read())
        except device.CudaError as e:
            results.append(e)
        given.free()
        out.free()
    return results


def found():
    if not os.path.exists(os.environ["SIM_REPORT"]):
        return []
    kind = re.compile(r"cuda-sim: hazard ([\w-]+) in ")
    return [(m.group(1), line.strip()) for line in open(os.environ["SIM_REPORT"]) if (m := kind.match(line))]


def fault(file, kernel, kind, others, shared):
    results = run_planted(file, kernel, range(1, 9), shared, file == "blocks" and kernel == "correct")
    assert not all(isinstance(r, bytes) for r in results), "no launch failed"
    kinds = {k for k, _ in found()}
    assert kind in kinds, f"{kind} was not found, but {kinds or 'nothing'}"
    assert kinds <= others | {kind}, f"also found {kinds - others - {kind}}"
    line = next(text for k, text in found() if k == kind)
    assert f" in {kernel} at line " in line, line
    print("as planted")


def correct(file, kernel, shared):
    results = run_planted(file, kernel, range(1, 101), shared, file == "blocks")
    assert not found(), found()[0][1]
    for r in results:
        assert isinstance(r, bytes), r
        assert r == results[0], "another result with another seed"


# ---- results -------------------------------------------------------------------------------------


def bfloat(x):
    bits = struct.unpack("I", struct.pack("f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def product(kind, seeds):
    import device

    device.start()
    module = device.Module(planted("product"))
    m, n, k = 50, 72, 96
    random.seed(7)
    # Integers, so that sums are exact in any order.
    a = [random.randint(-8, 8) for _ in range(m * k)]
    b = [random.randint(-8, 8) for _ in range(k * n)]
    if kind == "bf16":
        pack = lambda values: struct.pack(f"{len(values)}H", *[bfloat(float(x)) for x in values])
        stored = [b[i * n + j] for j in range(n) for i in range(k)]
    else:
        pack = lambda values: struct.pack(f"{len(values)}e", *values)
        stored = b
    columns = [b[j::n] for j in range(n)]
    wanted = [float(sum(x * y for x, y in zip(a[i * k : i * k + k], column))) for i in range(m) for column in columns]
    left, right = device.Buffer(pack(a)), device.Buffer(pack(stored))
    # Every copied lane of a row must be within the memory, so columns are padded to 32.
    if kind == "f16":
        right = device.Buffer(pack(stored) + bytes(64))
    for seed in seeds:
        if seed is not None:
            os.environ["SIM_SEED"] = str(seed)
        out = device.Buffer(4 * m * n)
        shape = (ctypes.c_int * 3)(m, n, k)
        device.launch(module.function("product_" + kind), (-(-n // 32), -(-m // 32)), 128, [left, right, out, shape], 4 * 32 * 40 * 2)
        got = struct.unpack(f"{m * n}f", out.read())
        wrong = [i for i in range(m * n) if got[i] != wanted[i]]
        assert not wrong, f"{len(wrong)} of {m * n} wrong, first {divmod(wrong[0], n)}: {got[wrong[0]]}, not {wanted[wrong[0]]}"
        out.free()
    assert not found(), found()[0][1]


def packed(kind, values):
    return struct.pack(f"{len(values)}H", *[bfloat(float(x)) for x in values]) if kind == "bf16" else struct.pack(f"{len(values)}e", *values)


def compare(out, wanted, columns):
    got = struct.unpack(f"{len(wanted)}f", out.read())
    wrong = [i for i, (x, y) in enumerate(zip(got, wanted)) if x != y]
    assert not wrong, f"{len(wrong)} of {len(wanted)} wrong, first {divmod(wrong[0], columns)}: {got[wrong[0]]}, not {wanted[wrong[0]]}"


def wgmma_product(kind, seeds):
    """Several stages in flight; rows, columns and depth that are not multiples of the tiles."""
    import device

    device.start()
    module = device.Module(planted("wgmma_product"))
    m, n, k = 150, 72, 328
    random.seed(7)
    a, b = ([random.randint(-8, 8) for _ in range(count)] for count in (m * k, n * k))
    rows, columns = ([x[i : i + k] for i in range(0, len(x), k)] for x in (a, b))
    wanted = [float(sum(map(operator.mul, row, column))) for row in rows for column in columns]
    left, right = device.Buffer(packed(kind, a)), device.Buffer(packed(kind, b))
    for seed in seeds:
        if seed is not None:
            os.environ["SIM_SEED"] = str(seed)
        out = device.Buffer(4 * m * n)
        shape = (ctypes.c_int * 3)(m, n, k)
        device.launch(module.function("product_" + kind), (-(-n // 64), -(-m // 128)), 256, [left, right, out, shape], 4 * (128 + 64) * 64 * 2)
        compare(out, wanted, n)
        out.free()
    assert not found(), found()[0][1]


def wgmma_shapes(kind, columns, seeds):
    """Every product function: registers or a tile as the left operand, tiles of both orders as the right one."""
    import device

    device.start()
    module = device.Module(planted("wgmma_shapes"), f"-DCOLUMNS={columns}", f"-DHALF={int(kind == 'f16')}")
    m, k = 64, 64
    random.seed(7)
    a, b, c = ([random.randint(-8, 8) for _ in range(count)] for count in (m * k, columns * k, m * columns))
    rows = [a[i : i + k] for i in range(0, len(a), k)]
    for name in ("both_shared", "overwritten", "registers", "transposed"):
        right = [b[i::columns] for i in range(columns)] if name == "transposed" else [b[i : i + k] for i in range(0, len(b), k)]
        sums = [float(sum(map(operator.mul, row, column))) for row in rows for column in right]
        wanted = sums if name == "overwritten" else [x + y for x, y in zip(sums, c)]
        for seed in seeds:
            if seed is not None:
                os.environ["SIM_SEED"] = str(seed)
            out = device.Buffer(floats(c))
            # Blocks have 64 columns.
            shared = (m + -(-columns // 64) * 64) * 128
            device.launch(module.function(name), 1, 128, [device.Buffer(packed(kind, a)), device.Buffer(packed(kind, b)), out], shared)
            compare(out, wanted, columns)
            out.free()
    assert not found(), found()[0][1]


def powers_and_votes():
    import device

    device.start()
    function = device.Module("""extern "C" __global__ void powers(const float *in, float *out) {
        float x[1] = {in[threadIdx.x]};
        keep_in_place(x);
        keep_after(x[0]);
        out[threadIdx.x] = exp2_approximate(x[0]);
        out[256 + threadIdx.x] = __any_sync(~0u, x[0] == -32.0f);
    }""").function("powers")
    numbers = [i / 2 - 64 for i in range(192)] + [i / 3 - 20.1 for i in range(32)]
    numbers += [-126.0, -126.1, -150.0, -3e38, -math.inf, 127.9, 128.0, math.inf, math.nan] + [1.0] * 23
    out = device.Buffer(4 * 512)
    device.launch(function, 1, 256, [device.Buffer(floats(numbers)), out])
    got = struct.unpack("512f", out.read())
    for x, y in zip(struct.unpack("256f", floats(numbers)), got):
        wanted = 0 if x < -126 else math.inf if x >= 128 else 2**x
        assert y == wanted or abs(y - wanted) < wanted * 2.4e-7 or (x != x and y != y), (x, y)
    assert got[256:] == (0.0,) * 64 + (1.0,) * 32 + (0.0,) * 160, got[256:]


def wgmma_sums_early():
    """Accumulators are NaN before the wait, in unchecked kernels, too."""
    early, = run_planted("wgmma", "faulty_sums", [1], WGMMA, False)
    assert all(x != x for x in struct.unpack(f"{len(early) // 4}f", early)), "numbers before the wait"
    # A product reads its tiles at the wait.
    early, late = (run_planted("wgmma", kernel, [1], WGMMA, False)[0] for kernel in ("faulty", "faulty_overwrite"))
    assert early != late, "a tile was read before the wait"


def generated():
    """Code of CubeCL: wrappers of PTX, election of a lane, shared memory by offsets, lockstep of lanes."""
    import device

    device.start()
    source = planted("generated")
    module = device.Module(source)
    out = device.Buffer(4 * 32 * 5)
    device.launch(module.function("generated_kernel"), 1, 32, [out], 4096)
    got = struct.unpack("160f", out.read())
    for lane in range(32):
        assert got[lane] == float((lane + 1) % 32), ("neighbour", lane, got[lane])
        # The sum over 16 products of 1 and 2.
        assert got[32 + 4 * lane : 36 + 4 * lane] == (32.0,) * 4, ("product", lane, got[32 + 4 * lane])
    # The same source with its types in another order, as another process may write them.
    types = ["typedef unsigned int uint32;\n", "typedef unsigned char uint8;\n"]
    device.compile_source(source.replace("".join(types), "".join(reversed(types))))
    uses = open(os.path.join(os.environ["SIM_CACHE"], "use.csv")).read()
    assert "again" in uses, "the order of types made another program"


# ---- failures on request -------------------------------------------------------------------------


def fails(make):
    import device

    try:
        make()
    except device.CudaError as e:
        return e.name
    return None


def failing_allocation():
    import device

    device.start()
    names = [fails(lambda: device.Buffer(64)) for _ in range(4)]
    assert names == [None, None, "CUDA_ERROR_OUT_OF_MEMORY", None], names


def failing_code():
    import device

    device.start()
    names = [fails(lambda: device.call("cuStreamSynchronize", None)) for _ in range(4)]
    assert names == [None, "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_ECC_UNCORRECTABLE"], names


def lost_device():
    import device

    device.start()
    sync = lambda: device.call("cuStreamSynchronize", None)
    names = [fails(lambda: device.Buffer(64)), fails(sync), fails(sync), fails(sync), fails(lambda: device.Buffer(64))]
    lost = "CUDA_ERROR_DEVICE_UNAVAILABLE"
    assert names == [None, None, lost, lost, lost], names


def failing_file():
    import device

    device.start()
    path = os.environ["SIM_FAIL_FILE"]
    assert fails(lambda: device.Buffer(64)) is None
    open(path, "w").write("cuMemAllocAsync:1+")
    assert [fails(lambda: device.Buffer(64)) for _ in range(2)] == ["CUDA_ERROR_OUT_OF_MEMORY"] * 2
    os.remove(path)
    assert fails(lambda: device.Buffer(64)) is None


def failing_launch():
    import device

    device.start()
    module = device.Module("extern \"C\" __global__ void one(float *out) { out[threadIdx.x] = 1; }")
    out = device.Buffer(256)
    launch = lambda: device.launch(module.function("one"), 1, 64, [out])
    assert [fails(launch) for _ in range(3)] == [None, "CUDA_ERROR_LAUNCH_FAILED", None]
    # Limits that hold without launch bounds.
    assert fails(lambda: device.launch(module.function("one"), 1, 2048, [out])) == "CUDA_ERROR_INVALID_VALUE"
    assert fails(lambda: device.launch(module.function("one"), (1, 70000), 64, [out])) == "CUDA_ERROR_INVALID_VALUE"
    assert fails(lambda: module.function("two")) == "CUDA_ERROR_NOT_FOUND"


def failing_compiler():
    import device

    device.compile_source('extern "C" __global__ void good(float *out) { out[0] = 1; }')
    for source, message in [
        ('extern "C" __global__ void bad_kernel(float *out) { out[0] = 1; }', "on request"),
        ('extern "C" __global__ void wrong(float *out) { out[0] = nothing; }', "nothing"),
        ('extern "C" __global__ void asks(float *out) { asm("wgmma.fence.sync.aligned;"); }', "does not support wgmma"),
        ('extern "C" __global__ void asks(float *out) { asm("bar.sync 0;"); }', "inline PTX"),
        ('extern "C" __global__ void __cluster_dims__(2, 1, 1) asks(float *out) { }', "clusters"),
        ('#include <cuda_fp8.h>\nextern "C" __global__ void asks(float *out) { }', "8, 6 and 4 bit floats"),
    ]:
        try:
            device.compile_source(source)
        except RuntimeError as e:
            assert str(e).startswith("NVRTC_ERROR_COMPILATION") and message in str(e), e
        else:
            raise AssertionError("compiled: " + source)


def unchecked_deadlock():
    for file, kernel in (("divergent_barrier", "faulty_deadlock"), ("wgmma_barriers", "faulty"), ("wgmma_barriers", "faulty_number")):
        results = run_planted(file, kernel, [1], WGMMA, False)
        assert isinstance(results[0], Exception) and results[0].name == "CUDA_ERROR_LAUNCH_FAILED", results


def attributes():
    import device

    device.start()
    source = """extern "C" __global__ void __launch_bounds__(64) one(float *out) {
        __shared__ float a[100], b[28];
        a[threadIdx.x] = b[0] = 1;
        *out = a[0];
    }"""
    function = device.Module(source).function("one")
    value = ctypes.c_int()
    for attribute, wanted in ((0, 64), (1, 512), (8, 48 << 10)):
        device.call("cuFuncGetAttribute", ctypes.byref(value), attribute, function)
        assert value.value == wanted, (attribute, value.value)
    device.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(value), function, 64, ctypes.c_size_t(40 << 10))
    assert value.value == 3, value.value
    assert fails(lambda: device.call("cuFuncSetAttribute", function, 8, 200 << 10)) == "CUDA_ERROR_INVALID_VALUE"


def logged():
    import device

    device.start()
    buffer = device.Buffer(bytes(1024))
    module = device.Module('extern "C" __global__ void fill(float *out, int n) { out[threadIdx.x] = n; }')
    for _ in range(3):
        device.launch(module.function("fill"), 1, 64, [buffer, 5])
    assert struct.unpack("f", buffer.read()[252:256]) == (5.0,)


def log_of_calls():
    with tempfile.TemporaryDirectory() as folder:
        log = folder + "/log.csv"
        subprocess.run([sys.executable, __file__, "--case", "logged"], env=os.environ | {"SIM_LOG": log}, check=True, capture_output=True)
        text = subprocess.run([sys.executable, os.path.join(HERE, "log.py"), log], check=True, capture_output=True, text=True).stdout
    assert re.search(r"3\.0 launch ", text) and re.search(r"3\.0 fill +grid 1x1x1 block 64x1x1 shared 0", text), text
    assert "htod of 1024 bytes" in text and "dtoh of 1024 bytes" in text, text


def only_some_checked():
    import device

    device.start()
    module = device.Module(planted("race_between_warps"))
    numbers = device.Buffer(floats([1.0] * (GRID * BLOCK)))
    out = device.Buffer(4 * GRID * BLOCK)
    device.launch(module.function("faulty"), GRID, BLOCK, [numbers, out, 3])
    assert not found(), found()


def two_processes():
    """Compiles the same source in several processes at the same time, with an empty cache."""
    code = f"import sys; sys.path.insert(0, {HERE!r}); import device; print(len(device.compile_source({planted('race_between_lanes')!r})))"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for p in both:
        _, errors = p.communicate()
        assert p.returncode == 0, errors.decode()


def real_compiler():
    """The kernels of these tests compile with NVRTC, and the null device loads their PTX."""
    import device

    device.start()
    options = ["--gpu-architecture=sm_80", "--include-path=" + os.path.join(os.environ["CUDA_PATH"], "include")]
    ptx = device.compile_source(planted("product"), *options).value.decode()
    assert "mma.sync" in ptx and "cp.async" in ptx and "ldmatrix" in ptx
    module = device.Module(planted("product"), *options)
    out = device.Buffer(1024)
    shape = (ctypes.c_int * 3)(1, 1, 1)
    device.launch(module.function("product_bf16"), 1, 128, [out, out, out, shape], 20480)
    # Launch bounds are read from the PTX.
    too_many = fails(lambda: device.launch(module.function("product_bf16"), 1, 256, [out, out, out, shape], 20480))
    assert too_many == "CUDA_ERROR_INVALID_VALUE", too_many
    for name in sorted(os.listdir(os.path.join(HERE, "planted"))):
        # No installed package has cuda/barrier.
        if name.endswith(".cu") and "cuda/barrier" not in planted(name[:-3]):
            arch = "sm_90a" if name.startswith("wgmma") else "sm_90" if name == "generated.cu" else "sm_80"
            device.compile_source(planted(name[:-3]), "--gpu-architecture=" + arch, options[1], "-DCOLUMNS=64", "-DHALF=1")


CASES = {}
for file, kernel, kind, others, shared in FAULTS:
    CASES[f"found: {kind} in {file}, {kernel}"] = (fault, (file, kernel, kind, others, shared), {"SIM_CHECK": "1"})
for file, kernel, shared in CORRECT:
    CASES[f"nothing found, 100 seeds: {file}"] = (correct, (file, kernel, shared), {"SIM_CHECK": "1"})
for kind in ("bf16", "f16"):
    CASES[f"numbers of mma, ldmatrix and cp.async, {kind}"] = (product, (kind, [None]), {})
    CASES[f"numbers of mma, ldmatrix and cp.async, {kind}, checked, 3 seeds"] = (product, (kind, [1, 2, 3]), {"SIM_CHECK": "1"})
    CASES[f"numbers of wgmma, {kind}"] = (wgmma_product, (kind, [None]), {})
    CASES[f"numbers of wgmma, {kind}, checked, 3 seeds"] = (wgmma_product, (kind, [1, 2, 3]), {"SIM_CHECK": "1"})
for kind, columns in (("bf16", 64), ("f16", 72), ("bf16", 8), ("f16", 256)):
    CASES[f"numbers of wgmma with {columns} columns, {kind}"] = (wgmma_shapes, (kind, columns, [None]), {})
    CASES[f"numbers of wgmma with {columns} columns, {kind}, checked, 3 seeds"] = (wgmma_shapes, (kind, columns, [1, 2, 3]), {"SIM_CHECK": "1"})
CASES |= {
    "sums of wgmma before and after the wait": (wgmma_sums_early, (), {}),
    "exp2_approximate, __any_sync": (powers_and_votes, (), {}),
    "numbers of a generated source": (generated, (), {}),
    "a deadlock ends the launch, unchecked": (unchecked_deadlock, (), {}),
    "attributes of functions": (attributes, (), {}),
    "SIM_LOG": (log_of_calls, (), {}),
    "SIM_CHECK_ONLY leaves other kernels alone": (only_some_checked, (), {"SIM_CHECK": "1", "SIM_CHECK_ONLY": "^other"}),
    "SIM_FAIL: an allocation": (failing_allocation, (), {"SIM_FAIL": "cuMemAllocAsync:3"}),
    "SIM_FAIL: from a call on, with a code": (failing_code, (), {"SIM_FAIL": "cuStreamSynchronize:2+:214"}),
    "SIM_FAIL: a launch; limits of launches": (failing_launch, (), {"SIM_FAIL": "cuLaunchKernel:2"}),
    "SIM_FAIL: a lost device": (lost_device, (), {"SIM_FAIL": "lost:2"}),
    "SIM_FAIL_FILE": (failing_file, (), {}),
    "SIM_NVRTC_FAIL, and messages of what does not compile": (failing_compiler, (), {"SIM_NVRTC_FAIL": "bad_kernel"}),
    "two processes compile the same": (two_processes, (), {"fresh": "1"}),
    "the null device behind the real NVRTC": (real_compiler, (), {"SIM_HOST": "0"}),
}


def run_case(name):
    with tempfile.TemporaryDirectory() as folder:
        extra = dict(CASES[name][2])
        ours = ("SIM_CHECK", "SIM_CHECK_ONLY", "SIM_SEED", "SIM_LOG", "SIM_FAIL", "SIM_NVRTC_FAIL")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment |= {"SIM_REPORT": folder + "/report", "SIM_FAIL_FILE": folder + "/fail"}
        if extra.pop("fresh", None):
            environment["SIM_CACHE"] = folder + "/cache"
        command = [sys.executable, __file__, "--case", name]
        result = subprocess.run(command, env=environment | extra, capture_output=True, text=True, timeout=300)
        # Hazards end a process with this code even if it ignores the errors of its launches; `fault` prints its success.
        wanted = 99 if name.startswith("found: ") else 0
        passed = result.returncode == wanted and (wanted == 0 or "as planted" in result.stdout)
        return passed, result.stdout + result.stderr


def main():
    if sys.argv[1:2] == ["--case"]:
        sys.path.insert(0, HERE)
        if sys.argv[2] == "logged":
            logged()
            return 0
        function, arguments, _ = CASES[sys.argv[2]]
        function(*arguments)
        return 0
    names = [n for n in CASES if not sys.argv[1:] or sys.argv[1] in n]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (passed, output) in zip(names, pool.map(run_case, names)):
            print(("ok      " if passed else "FAILED  ") + name, flush=True)
            if not passed:
                failed += 1
                print("        " + "\n        ".join(output.strip().splitlines()[-12:]))
    print(f"{len(names) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
