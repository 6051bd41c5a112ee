// Computes out[m][n] = sum over k of a[m][k] · b[n][k], plus a bias, in f32 arithmetic for all types.
//
// Linear layers: a is [token][in], b the weight, and the bias is per column.
// Convolutions (CONV): a is the weight as [out][channel · kernel · kernel], b the image of blockIdx.y
// as [channel][pixel]; the bias is per row, out is [out][pixel].
//
// Macros: A, B, BIAS, OUT (element types), HAS_BIAS, CONV, ROUND_A (rounds a to bf16 first), TILE (64 or
// 128). A block of 256 threads computes a tile of TILE × TILE, each thread TILE / 16 × TILE / 16 values.

constexpr int BK = 16;
constexpr int THREADS = 256;
constexpr int OWN = TILE / 16;
constexpr int LOADS = TILE * BK / THREADS;
// Rows of shared memory are padded by 4 values to avoid bank conflicts.
constexpr int STRIDE = TILE + 4;

extern "C" __global__ void __launch_bounds__(THREADS)
product_fma(
    const A *__restrict__ a,
    const B *__restrict__ b,
#if HAS_BIAS
    const BIAS *__restrict__ bias,
#endif
    OUT *__restrict__ out,
    const __grid_constant__ Info info
) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float *a_tile = (float *)shared_memory, *b_tile = a_tile + BK * STRIDE;
    const int thread = threadIdx.x, own_row = thread / 16, own_column = thread % 16;
    const int rows = (int)info.rows, columns = (int)info.columns, depth = (int)info.depth;
    const Tile tile = tile_of_block(rows, columns, TILE, TILE);
    const int first_row = tile.first_row, first_column = tile.first_column;
#if CONV
    b += blockIdx.y * info.b_image;
    out += blockIdx.y * info.out_image;
    const int height = (int)info.height, width = (int)info.width, kernel = (int)info.kernel;
    // A thread loads one pixel of the tile, at several depths.
    const int pixel = first_column + thread % TILE;
    const int pixel_y = pixel / width - kernel / 2, pixel_x = pixel % width - kernel / 2;
#endif

    float sums[OWN][OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < OWN; j++) sums[i][j] = 0.0f;

    for (int start = 0; start < depth; start += BK) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = thread + i * THREADS, row = index / BK, k = index % BK;
            float value = 0.0f;
            if (first_row + row < rows && start + k < depth)
                value = to_float(a[(first_row + row) * info.a_stride + start + k]);
#if ROUND_A
            value = __bfloat162float(__float2bfloat16_rn(value));
#endif
            a_tile[k * STRIDE + row] = value;
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = thread + i * THREADS;
            float value = 0.0f;
#if CONV
            const int column = index % TILE, k = index / TILE;
            const int channel = (start + k) / (kernel * kernel), tap = (start + k) % (kernel * kernel);
            const int y = pixel_y + tap / kernel, x = pixel_x + tap % kernel;
            if (pixel < columns && start + k < depth && y >= 0 && y < height && x >= 0 && x < width)
                value = to_float(b[((u64)channel * height + y) * width + x]);
#else
            const int column = index / BK, k = index % BK;
            if (first_column + column < columns && start + k < depth)
                value = to_float(b[(first_column + column) * info.b_stride + start + k]);
#endif
            b_tile[k * STRIDE + column] = value;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < BK; k++) {
            float left[OWN], right[OWN];
#pragma unroll
            for (int i = 0; i < OWN; i++) left[i] = a_tile[k * STRIDE + i * 16 + own_row];
#pragma unroll
            for (int j = 0; j < OWN; j++) right[j] = b_tile[k * STRIDE + j * 16 + own_column];
#pragma unroll
            for (int i = 0; i < OWN; i++)
#pragma unroll
                for (int j = 0; j < OWN; j++) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int row = first_row + i * 16 + own_row;
        if (row >= rows) continue;
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const int column = first_column + j * 16 + own_column;
            if (column >= columns) continue;
            float value = sums[i][j];
#if HAS_BIAS && CONV
            value += to_float(bias[row]);
#elif HAS_BIAS
            value += to_float(bias[column]);
#endif
            out[row * info.out_stride + column] = Rounded<OUT>::of(value);
        }
    }
}
