// Sizes and tile order, shared by the product kernels.

struct Info {
    u64 rows, columns, depth;
    u64 a_stride, b_stride, out_stride;
    // Convolutions only: image size, kernel size, channels in memory, and strides between images.
    u64 height, width, kernel, channels, b_image, out_image;
};

struct Tile {
    int first_row, first_column;
};

// The tile that this block computes. Blocks that run at the same time share few rows of tiles, so that they
// find each other's inputs in the L2 cache.
__device__ inline Tile tile_of_block(int rows, int columns, int tile_rows, int tile_columns) {
    constexpr int GROUP = 8;
    const int row_tiles = (rows + tile_rows - 1) / tile_rows, column_tiles = (columns + tile_columns - 1) / tile_columns;
    const int per_group = GROUP * column_tiles;
    const int group = blockIdx.x / per_group, within = blockIdx.x % per_group;
    const int group_rows = min(GROUP, row_tiles - group * GROUP);
    return {(group * GROUP + within % group_rows) * tile_rows, within / group_rows * tile_columns};
}
