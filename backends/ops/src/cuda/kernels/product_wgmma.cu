// Computes out[m][n] = sum over k of a[m][k] · b[n][k], plus a bias, by wgmma (compute capability 9.0a).
// Arguments and layouts are those of product_mma.cu.
//
// Macros: T, OUT, HAS_BIAS, CONV, BN (192 or 256). A block of two warpgroups computes a tile of 128 × BN, each
// warpgroup 64 of the rows.

constexpr int BM = 128, BK = 64, STAGES = 4, THREADS = 256;
constexpr int CHUNK = 8;                  // values in 16 bytes
constexpr int STEP = THREADS * CHUNK / BK;  // rows that all threads load at once
constexpr int A_LOADS = BM / STEP, B_LOADS = BN / STEP;
constexpr int STAGE = (BM + BN) * BK;
constexpr int PITCH = BN + 4;  // row stride of the tile of sums, in values

extern "C" __global__ void __launch_bounds__(THREADS, 1)
product_wgmma(
    const T *__restrict__ a,
    const T *__restrict__ b,
#if HAS_BIAS
    const T *__restrict__ bias,
#endif
    OUT *__restrict__ out,
    const __grid_constant__ Info info
) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    T *shared = (T *)shared_memory;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int rows = (int)info.rows, columns = (int)info.columns, depth = (int)info.depth;

    const Tile tile = tile_of_block(rows, columns, BM, BN);
    const int first_row = tile.first_row, first_column = tile.first_column;

    // A thread loads the same chunk of several rows, STEP apart.
    const int chunk = thread % (BK / CHUNK), load_row = thread / (BK / CHUNK);
    const int place = load_row * BK + (chunk ^ (load_row & 7)) * CHUNK;
    const T *a_from = a + (u64)(first_row + load_row) * info.a_stride + chunk * CHUNK;
#if CONV
    b += blockIdx.y * info.b_image;
    out += blockIdx.y * info.out_image;
    const int height = (int)info.height, width = (int)info.width;
    const int kernel = (int)info.kernel, channels = (int)info.channels;
    int channel = chunk * CHUNK, tap_y = -kernel / 2, tap_x = -kernel / 2;
    int pixel_y[B_LOADS], pixel_x[B_LOADS];
#pragma unroll
    for (int i = 0; i < B_LOADS; i++) {
        const int pixel = first_column + load_row + i * STEP;
        pixel_x[i] = pixel % width;
        // Pixels past the last one are placed below the image for every tap, so that they load zeros.
        pixel_y[i] = pixel < columns ? pixel / width : 2 * height + kernel;
    }
#else
    const T *b_from = b + (u64)(first_column + load_row) * info.b_stride + chunk * CHUNK;
#endif

    auto load = [&](int stage, int step) {
        T *to = shared + stage * STAGE + place;
        const bool inside = step * BK + chunk * CHUNK < depth;
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            const bool valid = inside && first_row + load_row + i * STEP < rows;
            cp_async_16(to + i * STEP * BK, valid ? a_from + (u64)i * STEP * info.a_stride + step * BK : a, valid);
        }
        to += BM * BK;
#if CONV
        while (channel >= channels) {
            channel -= channels;
            if (++tap_x > kernel / 2) {
                tap_x = -kernel / 2;
                tap_y++;
            }
        }
#endif
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
#if CONV
            const int y = pixel_y[i] + tap_y, x = pixel_x[i] + tap_x;
            const bool valid = inside && (unsigned)y < (unsigned)height && (unsigned)x < (unsigned)width;
            const T *from = b + ((u64)y * width + x) * channels + channel;
#else
            const bool valid = inside && first_column + load_row + i * STEP < columns;
            const T *from = b_from + (u64)i * STEP * info.b_stride + step * BK;
#endif
            cp_async_16(to + i * STEP * BK, valid ? from : b, valid);
        }
#if CONV
        channel += BK;
#endif
    };

    float sums[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;

    const int warp_group = warp / 4;
    const int steps = (depth + BK - 1) / BK;
    // Loads run this many steps ahead of the products.
    constexpr int AHEAD = STAGES - 2;
#pragma unroll
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) load(step, step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        // All threads' copies of this step's tile have arrived, and all products up to the step before the
        // previous one have completed.
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();
        const T *a_tile = shared + step % STAGES * STAGE + warp_group * 64 * BK;
        const T *b_tile = shared + step % STAGES * STAGE + BM * BK;
        // `stride` is 8 rows of a tile; `leading` is unused, because a tile has only 64 columns.
        const u64 left = wgmma_descriptor(a_tile, 16, 8 * BK * 2), right = wgmma_descriptor(b_tile, 16, 8 * BK * 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BK / 16; k++) wgmma_ss<T>(sums, left + k * 2, right + k * 2);
        wgmma_commit();
        if (step + AHEAD < steps) load((step + AHEAD) % STAGES, step + AHEAD);
        cp_async_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    cp_async_wait<0>();
    __syncthreads();

    // Results go through shared memory, so that rows are written at least 16 bytes at a time.
    float *results = (float *)shared_memory;
    const int own_row = warp_group * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        float *to = results + own_row * PITCH + j * 8 + lane % 4 * 2;
        *(float2 *)to = make_float2(sums[j * 4], sums[j * 4 + 1]);
        *(float2 *)(to + 8 * PITCH) = make_float2(sums[j * 4 + 2], sums[j * 4 + 3]);
    }
    __syncthreads();
    const bool aligned = info.out_stride % 8 == 0;
    for (int i = thread; i < BM * (BN / 8); i += THREADS) {
        const int row = first_row + i / (BN / 8), column = first_column + i % (BN / 8) * 8;
        if (row >= rows || column >= columns) continue;
        const float *from = results + i / (BN / 8) * PITCH + i % (BN / 8) * 8;
        const int count = min(8, columns - column);
        float values[8];
        *(float4 *)values = *(const float4 *)from;
        *(float4 *)(values + 4) = *(const float4 *)(from + 4);
#if HAS_BIAS
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (j < count) values[j] += to_float(bias[CONV ? row : column + j]);
#endif
        OUT *to = out + row * info.out_stride + column;
        if (count == 8 && aligned) {
            store_8(to, values);
        } else {
            for (int j = 0; j < count; j++) to[j] = Rounded<OUT>::of(values[j]);
        }
    }
}
