// Softmax attention of packed sequences by wgmma (compute capability 9.0a): products in T with f32
// accumulation, softmax in f32, scores in registers only.
//
// query [tokens][heads][D], key and value [tokens][kv heads][D] with any strides of tokens and heads,
// out [tokens][heads · D]. blockIdx.x is a tile of 128 queries of one sequence, blockIdx.y a head. Each of
// the two warpgroups computes 64 of the queries over all keys. The products for the scores of one tile of
// keys and for the sums of the previous tile are issued together, so that tensor cores compute the sums
// during the softmax.
//
// Macros: T (bf16 or f16), D (64 or 128), CAUSAL, SEQUENCES (maximum per launch).

constexpr int ROWS = 128, KEYS = 128;  // of a tile
constexpr int THREADS = 256;

// A tile in shared memory consists of consecutive blocks of 64 columns, with rows of 128 bytes; the 16-byte
// chunk c of row r is stored at chunk c ^ r % 8.
constexpr int BLOCK_BYTES = KEYS * 128;
constexpr int TILE_BYTES = KEYS * D * 2;

// Score of a masked key: lower than any other.
constexpr float UNSEEN = -3.0e38f;

// Named barriers, on which the first and the second warpgroup wait.
constexpr int FIRST = 1, SECOND = 2;

struct Info {
    u64 group;  // query heads per key/value head
    u64 out_stride;
    u64 query_token, query_head, key_token, key_head, value_token, value_head;  // strides
    u64 starts[SEQUENCES + 1];  // first token of each sequence, then the end of the last, repeated
};

// Loads a tile of rows of D values, zero-filled past the last row.
template <int TILE_ROWS> __device__ inline void load_tile(unsigned char *to, const T *from, u64 stride, int rows) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    to += chunk / 8 * TILE_ROWS * 128 + first * 128 + (chunk % 8 ^ first % 8) * 16;
    from += chunk * 8;
    const T *at = from + first * stride;
#pragma unroll
    for (int i = 0; i < TILE_ROWS; i += STEP) {
        const bool valid = first + i < rows;
        if (TILE_ROWS % STEP == 0 || first + i < TILE_ROWS) cp_async_16(to + i * 128, valid ? at : from, valid);
        at += STEP * stride;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_wgmma(
    const T *__restrict__ query,
    const T *__restrict__ key,
    const T *__restrict__ value,
    T *__restrict__ out,
    const __grid_constant__ Info info
) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    unsigned char *queries = shared_memory;
    unsigned char *keys = queries + ROWS * D * 2;
    unsigned char *values = keys + 2 * TILE_BYTES;
    const int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16;
    // The shuffle lets the compiler know that the value is uniform in a warp.
    const int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);

    int tile = blockIdx.x, sequence = 0, length;
    for (;; sequence++) {
        length = (int)(info.starts[sequence + 1] - info.starts[sequence]);
        const int tiles = (length + ROWS - 1) / ROWS;
        if (tile < tiles) {
            // Causal sequences start with the tiles that have the most keys.
            if (CAUSAL) tile = tiles - 1 - tile;
            break;
        }
        tile -= tiles;
    }
    const u64 start = info.starts[sequence];
    const int head = blockIdx.y;
    const int first_query = tile * ROWS, kv_head = head / (int)info.group;
    const u64 key_token = info.key_token, value_token = info.value_token;
    query += (start + first_query) * info.query_token + head * info.query_head;
    key += start * key_token + kv_head * info.key_head;
    value += start * value_token + kv_head * info.value_head;
    const int key_count = CAUSAL ? min(length, first_query + ROWS) : length;
    const int key_tiles = (key_count + KEYS - 1) / KEYS;

    const u64 query_matrix = wgmma_descriptor(queries + group * 64 * 128, ROWS * 128, 1024);
    const u64 key_matrix = wgmma_descriptor(keys, BLOCK_BYTES, 1024);
    const u64 value_matrix = wgmma_descriptor(values, BLOCK_BYTES, 1024);

    float scores[KEYS / 2], sums[D / 2];
    unsigned weights[KEYS / 16][4];
    // For each of the lane's two rows: the largest score so far, the sum of the weights, and the factor that
    // rescales the previous sums.
    float largest[2] = {UNSEEN, UNSEEN}, total[2] = {0.0f, 0.0f}, fade[2];
    const float scale = 1.4426950408889634f / sqrtf((float)D);
#pragma unroll
    for (int i = 0; i < D / 2; i++) sums[i] = 0.0f;

    auto load_keys = [&](int tile) {
        load_tile<KEYS>(keys + tile % 2 * TILE_BYTES, key + (u64)(tile * KEYS) * key_token, key_token,
                        key_count - tile * KEYS);
    };
    auto load_values = [&](int tile) {
        load_tile<KEYS>(values + tile % 2 * TILE_BYTES, value + (u64)(tile * KEYS) * value_token, value_token,
                        key_count - tile * KEYS);
    };
    auto start_scores = [&](int tile) {
        const u64 matrix = key_matrix + tile % 2 * TILE_BYTES / 16;
#pragma unroll
        for (int d = 0; d < D / 16; d++)
            wgmma_ss<T>(scores, query_matrix + (d / 4 * ROWS * 128 + d % 4 * 32) / 16,
                        matrix + (d / 4 * BLOCK_BYTES + d % 4 * 32) / 16, d > 0);
        wgmma_commit();
    };
    auto start_sums = [&](int tile) {
        const u64 matrix = value_matrix + tile % 2 * TILE_BYTES / 16;
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
            wgmma_rs_t<T>(sums, weights[k], matrix + k * 2048 / 16);
        wgmma_commit();
    };
    // Turns the scores into weights, in f32.
    auto softmax = [&](int tile) {
        const int first_key = tile * KEYS;
        const int first_row = first_query + group * 64;
        if (first_key + KEYS > (CAUSAL ? min(key_count, first_row + 1) : key_count)) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) {
                const int row = first_query + warp_row + i / 2 % 2 * 8 + lane / 4;
                const int end = CAUSAL ? min(key_count, row + 1) : key_count;
                if (first_key + i / 4 * 8 + lane % 4 * 2 + i % 2 >= end) scores[i] = UNSEEN;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = largest[half];
#pragma unroll
            for (int j = half * 2; j < KEYS / 2; j += 4) top = fmaxf(top, fmaxf(scores[j], scores[j + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            // Every row has a key in the first tile, so `top` is not UNSEEN. It is subtracted before scaling,
            // so that rounding errors of large scores cannot make a weight larger than 1.
            fade[half] = exp2_approximate((largest[half] - top) * scale);
            largest[half] = top;
            float sum = 0.0f;
#pragma unroll
            for (int j = half * 2; j < KEYS / 2; j += 4) {
                scores[j] = exp2_approximate((scores[j] - top) * scale);
                scores[j + 1] = exp2_approximate((scores[j + 1] - top) * scale);
                sum += scores[j] + scores[j + 1];
            }
            total[half] = total[half] * fade[half] + sum;
        }
    };
    auto pack_weights = [&]() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) weights[i / 4][i % 4] = pack<T>(scores[i * 2], scores[i * 2 + 1]);
    };

    load_tile<ROWS>(queries, query, info.query_token, length - first_query);
    load_keys(0);
    cp_async_commit();
    if (key_tiles > 1) load_keys(1);
    load_values(0);
    cp_async_commit();
    cp_async_wait<1>();
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    start_scores(0);
    wgmma_wait<0>();
    keep_in_place(scores);
    softmax(0);
    pack_weights();
    keep_after(total[0] + total[1]);
    cp_async_wait<0>();
    fence_async_proxy();
    if (group == 1) barrier_arrive(FIRST, THREADS);

    // The warpgroups issue their products in turns, so that the softmax of one runs while tensor cores work
    // for the other. Each waits until the other has loaded its part of the tiles and no longer reads those
    // that are overwritten next.
    for (int tile = 1; tile < key_tiles; tile++) {
        barrier_sync(group == 0 ? FIRST : SECOND, THREADS);
        wgmma_fence();
        start_scores(tile);
        start_sums(tile - 1);
        if (group == 0) barrier_arrive(SECOND, THREADS);
        if (tile + 1 < key_tiles) load_keys(tile + 1);
        load_values(tile);
        cp_async_commit();

        wgmma_wait<1>();
        keep_in_place(scores);
        softmax(tile);
        keep_after(total[0] + total[1]);
        cp_async_wait<0>();
        fence_async_proxy();
        wgmma_wait<0>();
        keep_in_place(sums);
        keep_in_place(weights);
        if (group == 1) barrier_arrive(FIRST, THREADS);
        if (__any_sync(0xffffffffu, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) sums[i] *= fade[i / 2 % 2];
        }
        pack_weights();
    }
    barrier_sync(group == 0 ? FIRST : SECOND, THREADS);
    wgmma_fence();
    start_sums(key_tiles - 1);
    if (group == 0) barrier_arrive(SECOND, THREADS);
    wgmma_wait<0>();
    keep_in_place(sums);

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float whole = total[half];
        whole += __shfl_xor_sync(0xffffffffu, whole, 1);
        whole += __shfl_xor_sync(0xffffffffu, whole, 2);
        const int row = first_query + warp_row + half * 8 + lane / 4;
        if (row >= length) continue;
        const float inverse = 1.0f / whole;
        T *to = out + (start + row) * info.out_stride + head * D + lane % 4 * 2;
#pragma unroll
        for (int j = half * 2; j < D / 2; j += 4)
            store_pair(to + j * 2 - half * 4, sums[j] * inverse, sums[j + 1] * inverse, true, true);
    }
}
