// Computes out[m][n] = sum over k of a[m][k] · b[n][k], plus a bias, on tensor cores (compute capability
// 8.0).
//
// Linear layers: a is [token][in], b the weight, and the bias is per column.
// Convolutions (CONV): a is the weight as [out][tap][channel], b the image of blockIdx.y as
// [pixel][channel], shifted by the tap; the bias is per row, out is [out][pixel].
//
// Macros: T (element type of a, b and bias), OUT (element type of out), HAS_BIAS, CONV, BM, BN, WARPS_M,
// WARPS_N, STAGES. A block of WARPS_M × WARPS_N warps computes a tile of BM × BN.

constexpr int BK = 32;
constexpr int CHUNK = 8;  // values in 16 bytes
constexpr int CHUNKS = BK / CHUNK;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_ROWS = BM / WARPS_M, WARP_COLUMNS = BN / WARPS_N;
constexpr int ROW_TILES = WARP_ROWS / 16, COLUMN_TILES = WARP_COLUMNS / 8;
constexpr int A_LOADS = BM * CHUNKS / THREADS, B_LOADS = BN * CHUNKS / THREADS;
constexpr int STAGE = (BM + BN) * BK;

// Index of a chunk of 8 values in a tile. The swizzle puts 8 rows at the same depth into different banks.
__device__ inline int place(int row, int chunk) {
    return row * BK + (chunk ^ ((row >> 1) & 3)) * CHUNK;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
product_mma(
    const T *__restrict__ a,
    const T *__restrict__ b,
#if HAS_BIAS
    const T *__restrict__ bias,
#endif
    OUT *__restrict__ out,
    const __grid_constant__ Info info
) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    T *shared = (T *)shared_memory;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int rows = (int)info.rows, columns = (int)info.columns, depth = (int)info.depth;

    const Tile tile = tile_of_block(rows, columns, BM, BN);
    const int first_row = tile.first_row, first_column = tile.first_column;

#if CONV
    b += blockIdx.y * info.b_image;
    out += blockIdx.y * info.out_image;
    const int height = (int)info.height, width = (int)info.width;
    const int kernel = (int)info.kernel, channels = (int)info.channels;
    int pixel_y[B_LOADS], pixel_x[B_LOADS];
#pragma unroll
    for (int i = 0; i < B_LOADS; i++) {
        const int pixel = first_column + (thread + i * THREADS) / CHUNKS;
        pixel_y[i] = pixel / width - kernel / 2;
        pixel_x[i] = pixel % width - kernel / 2;
        // Pixels past the last one are placed below the image for every tap, so that they load zeros.
        if (pixel >= columns) pixel_y[i] = height;
    }
#endif

    auto load = [&](int stage, int step) {
        T *to = shared + stage * STAGE;
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            const int row = (thread + i * THREADS) / CHUNKS, chunk = (thread + i * THREADS) % CHUNKS;
            const int k = step * BK + chunk * CHUNK;
            const bool valid = first_row + row < rows && k < depth;
            cp_async_16(to + place(row, chunk), a + (valid ? (first_row + row) * info.a_stride + k : 0), valid);
        }
        to += BM * BK;
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
            const int row = (thread + i * THREADS) / CHUNKS, chunk = (thread + i * THREADS) % CHUNKS;
            const int k = step * BK + chunk * CHUNK;
#if CONV
            const int tap = k / channels, channel = k % channels;
            const int y = pixel_y[i] + tap / kernel, x = pixel_x[i] + tap % kernel;
            const bool valid = k < depth && y >= 0 && y < height && x >= 0 && x < width;
            const u64 from = ((u64)y * width + x) * channels + channel;
#else
            const bool valid = first_column + row < columns && k < depth;
            const u64 from = (first_column + row) * info.b_stride + k;
#endif
            cp_async_16(to + place(row, chunk), b + (valid ? from : 0), valid);
        }
    };

    float sums[ROW_TILES][COLUMN_TILES][4];
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;

    const int warp_row = warp / WARPS_N * WARP_ROWS, warp_column = warp % WARPS_N * WARP_COLUMNS;
    const int steps = (depth + BK - 1) / BK;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) load(stage, stage);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        // All threads' copies of this step's tile have arrived, and the previous tile is no longer read.
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        const int next = step + STAGES - 1;
        if (next < steps) load(next % STAGES, next);
        cp_async_commit();

        const T *a_tile = shared + step % STAGES * STAGE, *b_tile = a_tile + BM * BK;
#pragma unroll
        for (int k = 0; k < BK / 16; k++) {
            unsigned left[ROW_TILES][4], right[COLUMN_TILES][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
                ldmatrix_x4(left[i], a_tile + place(warp_row + i * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j += 2) {
                const int row = warp_column + j * 8 + (lane & 7) + (lane >> 4) * 8;
                unsigned four[4];
                ldmatrix_x4(four, b_tile + place(row, k * 2 + (lane >> 3 & 1)));
                right[j][0] = four[0];
                right[j][1] = four[1];
                right[j + 1][0] = four[2];
                right[j + 1][1] = four[3];
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; j++) mma<T>(sums[i][j], left[i], right[j]);
        }
    }

    const bool paired = info.out_stride % 2 == 0;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j++) {
                const int column = first_column + warp_column + j * 8 + lane % 4 * 2;
                if (column >= columns) continue;
                const bool both = column + 1 < columns;
                float first = sums[i][j][half * 2], second = sums[i][j][half * 2 + 1];
#if HAS_BIAS && CONV
                first += to_float(bias[row]);
                second += to_float(bias[row]);
#elif HAS_BIAS
                first += to_float(bias[column]);
                if (both) second += to_float(bias[column + 1]);
#endif
                store_pair(out + row * info.out_stride + column, first, second, both, paired);
            }
        }
}
