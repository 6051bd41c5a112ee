// Softmax attention of packed sequences on tensor cores (compute capability 8.0): products in T with f32
// accumulation, softmax in f32, scores in registers only (FlashAttention-2's loop).
//
// query [tokens][heads][D], key and value [tokens][kv heads][D] with any strides of tokens and heads,
// out [tokens][heads · D]. blockIdx.x is a tile of 64 queries of one sequence, blockIdx.y a head and,
// if D is more than 128, a part of its columns: the block then computes all scores, but only DV columns.
//
// Macros: T (bf16 or f16), D (a multiple of 8), DP (D rounded up to a multiple of 16), PARTS, DV (columns
// of a part, a multiple of 16), KEYS (keys of a tile), CAUSAL, SEQUENCES (maximum per launch).

constexpr int ROWS = 64;
constexpr int THREADS = 128;
// Row strides in shared memory are odd multiples of 16 bytes, so that 8 rows are in different banks.
constexpr int LD = DP + 8, LDV = DV + 8;
// For narrow heads the queries stay in registers, and the keys reuse their shared memory.
constexpr bool QUERIES_STAY = DP <= 128;
constexpr int DEPTH_TILES = DP / 16, KEY_TILES = KEYS / 8, COLUMN_TILES = DV / 8;

// Score of a masked key: lower than any other.
constexpr float UNSEEN = -3.0e38f;

struct Info {
    u64 group;  // query heads per key/value head
    u64 out_stride;
    u64 query_token, query_head, key_token, key_head, value_token, value_head;  // strides
    u64 starts[SEQUENCES + 1];  // first token of each sequence, then the end of the last, repeated
};

// Loads a tile of rows of 16-bit values, zero-filled past the last row and column.
template <int TILE_ROWS, int COLUMNS, int STRIDE>
__device__ inline void load_tile(T *to, const T *from, u64 stride, int rows, int columns) {
    constexpr int CHUNKS = COLUMNS / 8;
    for (int i = threadIdx.x; i < TILE_ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * 8;
        const bool valid = row < rows && column < columns;
        cp_async_16(to + row * STRIDE + column, from + (valid ? row * stride + column : 0), valid);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_mma(
    const T *__restrict__ query,
    const T *__restrict__ key,
    const T *__restrict__ value,
    T *__restrict__ out,
    const __grid_constant__ Info info
) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    T *queries = (T *)shared_memory;
    T *keys = queries + (QUERIES_STAY ? 0 : ROWS * LD);
    T *values = keys + (QUERIES_STAY && ROWS > KEYS ? ROWS : KEYS) * LD;
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16;

    int tile = blockIdx.x, sequence = 0, length;
    for (;; sequence++) {
        length = (int)(info.starts[sequence + 1] - info.starts[sequence]);
        const int tiles = (length + ROWS - 1) / ROWS;
        if (tile < tiles) break;
        tile -= tiles;
    }
    const u64 start = info.starts[sequence];
    const int head = blockIdx.y / PARTS, part = blockIdx.y % PARTS;
    const int first_query = tile * ROWS, kv_head = head / (int)info.group;
    const int columns = min(DV, D - part * DV);
    query += (start + first_query) * info.query_token + head * info.query_head;
    key += start * info.key_token + kv_head * info.key_head;
    value += start * info.value_token + kv_head * info.value_head + part * DV;
    const int key_count = CAUSAL ? min(length, first_query + ROWS) : length;

    load_tile<ROWS, DP, LD>(queries, query, info.query_token, length - first_query, D);
    cp_async_commit();
    const T *query_rows = queries + (warp_row + (lane & 15)) * LD + (lane >> 4) * 8;
    unsigned stay[QUERIES_STAY ? DEPTH_TILES : 1][4];
    if (QUERIES_STAY) {
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int d = 0; d < (QUERIES_STAY ? DEPTH_TILES : 0); d++) ldmatrix_x4(stay[d], query_rows + d * 16);
        __syncthreads();
    }

    float sums[COLUMN_TILES][4];
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    // For each of the lane's two rows: the largest score so far, and the sum of the weights.
    float largest[2] = {UNSEEN, UNSEEN}, total[2] = {0.0f, 0.0f};
    const float scale = 1.4426950408889634f / sqrtf((float)D);

    load_tile<KEYS, DP, LD>(keys, key, info.key_token, key_count, D);
    cp_async_commit();
    for (int first_key = 0; first_key < key_count; first_key += KEYS) {
        // All threads' copies of the keys have arrived, and the previous values are no longer read.
        cp_async_wait<0>();
        __syncthreads();
        load_tile<KEYS, DV, LDV>(values, value + first_key * info.value_token, info.value_token,
                                 key_count - first_key, columns);
        cp_async_commit();

        float scores[KEY_TILES][4];
#pragma unroll
        for (int j = 0; j < KEY_TILES; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
#pragma unroll
        for (int d = 0; d < DEPTH_TILES; d++) {
            unsigned left[4];
            if (!QUERIES_STAY) ldmatrix_x4(left, query_rows + d * 16);
#pragma unroll
            for (int j = 0; j < KEY_TILES; j += 2) {
                const int row = j * 8 + (lane & 7) + (lane >> 4) * 8;
                unsigned four[4];
                ldmatrix_x4(four, keys + row * LD + d * 16 + (lane >> 3 & 1) * 8);
                const unsigned low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
                mma<T>(scores[j], QUERIES_STAY ? stay[d] : left, low);
                mma<T>(scores[j + 1], QUERIES_STAY ? stay[d] : left, high);
            }
        }

        // All threads' copies of the values have arrived, and the keys are no longer read.
        cp_async_wait<0>();
        __syncthreads();
        if (first_key + KEYS < key_count) {
            load_tile<KEYS, DP, LD>(keys, key + (first_key + KEYS) * info.key_token, info.key_token,
                                    key_count - first_key - KEYS, D);
            cp_async_commit();
        }

        unsigned weights[KEY_TILES][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_query + warp_row + half * 8 + lane / 4;
            const int end = CAUSAL ? min(key_count, row + 1) : key_count;
            float top = largest[half];
#pragma unroll
            for (int j = 0; j < KEY_TILES; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &score = scores[j][half * 2 + e];
                    score = first_key + j * 8 + lane % 4 * 2 + e < end ? score * scale : UNSEEN;
                    top = fmaxf(top, score);
                }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            // Every row has a key in the first tile, so `top` is not UNSEEN.
            const float fade = exp2f(largest[half] - top);
            largest[half] = top;
            total[half] *= fade;
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j++) {
                sums[j][half * 2] *= fade;
                sums[j][half * 2 + 1] *= fade;
            }
#pragma unroll
            for (int j = 0; j < KEY_TILES; j++) {
                const float first = exp2f(scores[j][half * 2] - top);
                const float second = exp2f(scores[j][half * 2 + 1] - top);
                total[half] += first + second;
                weights[j][half] = pack<T>(first, second);
            }
        }
#pragma unroll
        for (int k = 0; k < KEY_TILES; k += 2) {
            const unsigned left[4] = {weights[k][0], weights[k][1], weights[k + 1][0], weights[k + 1][1]};
            const T *rows = values + (k * 8 + (lane & 15)) * LDV + (lane >> 4) * 8;
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j += 2) {
                unsigned four[4];
                ldmatrix_x4_trans(four, rows + j * 8);
                const unsigned low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
                mma<T>(sums[j], left, low);
                mma<T>(sums[j + 1], left, high);
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float whole = total[half];
        whole += __shfl_xor_sync(0xffffffffu, whole, 1);
        whole += __shfl_xor_sync(0xffffffffu, whole, 2);
        const int row = first_query + warp_row + half * 8 + lane / 4;
        if (row >= length) continue;
        const float inverse = 1.0f / whole;
        T *to = out + (start + row) * info.out_stride + head * D + part * DV;
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; j++) {
            const int column = j * 8 + lane % 4 * 2;
            if (column < columns)
                store_pair(to + column, sums[j][half * 2] * inverse, sums[j][half * 2 + 1] * inverse, true, true);
        }
    }
}
