// Which rows a block of the products with packed weights has. Dense: neighbouring rows of x and out. EXPERTS: ids
// sorted by expert, in tiles of 8 * TILES whose ids are of one expert. An id is a row of out; (id * inverse) >> 32 is
// the row of x. In a tile, ids from `limit` on fill the end. experts: of each tile; -1: its rows of out get zeros.
// padded: how many ids count. factors: of each id, multiplies its sum, or null. tiles: all, also those beyond `padded`.
// scales: depth / group. A division would take long beside a product of few rows. With TAIL, rows of x end inside of
// w's last block of 128 elements of K: `rest` elements of x belong to the block, and zeros follow. WHOLE: whether sums are
// multiplied by `whole`, a number of its own for each expert.
//
// Blocks go through a few tiles (the grid's x) for one column of out after the other (y), and then through the next
// tiles (z). So x and w of blocks that run together are few and stay in the cache: few experts have these tiles.

#define THREADS (32 * WARPS)
#define PIECES(eights) ((8 * (eights) + THREADS / 16 - 1) / (THREADS / 16))  // rows of x that a thread copies

DEVICE bool is_row(int id, int limit) { return static_cast<u32>(id) < static_cast<u32>(limit); }

// The places in x of ids' rows, in parts of 16 bytes; -1: none.
template <int count, int most>
DEVICE void find_rows(int (&at)[count], const int (&ids)[most], i64 inverse, int limit, int stride) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int in_x = static_cast<int>(ids[i] * inverse >> 32);
    at[i] = is_row(ids[i], limit) ? in_x * (stride / 8) : -1;
  }
}

#if EXPERTS
#if WHOLE
#define PARAMETER_WHOLE , const float* whole
#else
#define PARAMETER_WHOLE
#endif
#define PARAMETERS_OF_EXPERTS                                                                                \
  , const int *ids, const int *experts, const int *padded, const float *factors, i64 inverse, int limit,     \
      int tiles, int scales, int rest PARAMETER_WHOLE

struct Row {
  int id;  // -1: none
  float factor;
};

DEVICE int tile_of_block() { return block_z() * blocks_x() + block_x(); }

// Zeros for a tile's rows and this block's columns of out.
DEVICE void write_zeros(u16* out, const int* ids, int limit, int column, int cols) {
  const int parts = 2 * WARPS;
#pragma unroll 1
  for (int i = thread(); i < 8 * TILES * parts; i += THREADS) {
    const int id = ids[i / parts], n = column + i % parts * 8;
    if (is_row(id, limit) && n < cols) *reinterpret_cast<Four*>(out + static_cast<i64>(id) * cols + n) = Four{};
  }
}

DEVICE void hold_rows(Row* held, const int* ids, const float* factors, int most, int limit) {
#pragma unroll 1
  for (int m = thread(); m < most; m += THREADS) {
    const int id = ids[m];
    held[m] = is_row(id, limit) ? Row{id, factors ? factors[id] : 1} : Row{-1, 1};
  }
}
#else
#define PARAMETERS_OF_EXPERTS
#endif
