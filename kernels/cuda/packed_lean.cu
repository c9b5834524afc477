// Products of few rows with weights of 4 or 8 bits: those of packed.cu, or of experts (EXPERTS): out[id, n] = round((sum
// over k of x[m, k] * w[e, n, k] + bias[e, n]) * factor[id]), where m is the id's row of x and e the expert of the id's
// tile (rows.h).
//
// packing.py states how the weights lie, one expert's after the other's. WARPS: warps of a block of threads, each with
// 16 rows of w. TILES: eights of ids in a block. STAGES of BLOCKS blocks of 128 elements of K each are in shared memory;
// the threads wait once a stage. K has whole stages, except with TAIL (rows.h). GROUPS: groups of scales in a block of K.
// LONG: whether a group has more than 128 elements. ZEROS: whether there are zero points. INPUT: the 16-bit type. E2M1:
// whether weights are floats. WHOLE: whether their sums are multiplied by `whole`; experts have one each. unpack.h
// unpacks.
//
// Order of one output: that of packed.cu. One fp32 accumulator of mma.m16n8k16 takes K in ascending order in one pass.
// (q - zero) * scale is rounded once, a float times its scale is exact, `whole` multiplies in fp32, the bias is added in
// fp32, the factor multiplies in fp32, and the result is rounded once. No warp shares an output with another.
//
// With few rows, the instructions that unpack take most of the time, so all others count.

#define ROW 272  // bytes of a row of x in shared memory: 128 elements, and 16 bytes against bank conflicts
#define X_BYTES (8 * TILES * ROW)
#define SLOT (X_BYTES + WARPS * (BLOCK_BYTES + SCALE_BYTES * (1 + ZEROS)))  // bytes of a block of K
#define STAGE (BLOCKS * SLOT)

KERNEL product(const u16* x, const unsigned char* w, const unsigned char* scale, const unsigned char* zero,
               const u16* bias, u16* out, int rows, int cols, int depth, int group, int stride
#if EXPERTS
                   PARAMETERS_OF_EXPERTS
#else
               , const float* whole
#endif
) {
  const int lane = thread() % 32, warp = thread() / 32, blocks = depth / 128, g = lane / 4;
  const int part = thread() % 16, row = thread() / 16;
  int copied[PIECES(TILES)], rows_at[PIECES(TILES)], id[2 * TILES];  // id: of this lane's rows of out
#if EXPERTS
  const int column = block_y(), tile = tile_of_block(), first = tile * 8 * TILES;
  if (tile >= tiles) return;
  const int end = fetch(padded), expert = fetch(experts + tile);
  ids += first;
#pragma unroll
  for (int i = 0; i < PIECES(TILES); ++i) {
    const int m = row + i * (THREADS / 16);
    copied[i] = m < 8 * TILES ? fetch(ids + m) : limit;
  }
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) id[i] = fetch(ids + i / 2 * 8 + lane % 4 * 2 + i % 2);
  if (first >= end) return;
  if (expert < 0) {
    write_zeros(out, ids, limit, column * 16 * WARPS, cols);
    return;
  }
#else
  const int column = block_x(), first = block_y() * 8 * TILES, expert = 0, scales = 0, limit = rows;
  const float* const factors = nullptr;
  const i64 inverse = 1ll << 32;
#pragma unroll
  for (int i = 0; i < PIECES(TILES); ++i) {
    const int m = row + i * (THREADS / 16);
    copied[i] = m < 8 * TILES ? first + m : limit;
  }
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) id[i] = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
#endif
  find_rows(rows_at, copied, inverse, limit, stride);
  const int strips = cols / 16, mine = column * WARPS + warp, strip = mine < strips ? mine : strips - 1;

  // What this thread copies for a block of K: a part of a row of x and of every THREADS / 16th row after it, its own
  // weights, and a part of its warp's scales. Rows without an id are not copied: their products are not stored.
  const u16* x_from[PIECES(TILES)];
#pragma unroll
  for (int i = 0; i < PIECES(TILES); ++i) x_from[i] = x + static_cast<i64>(rows_at[i]) * 8 + part * 8;
  const unsigned char* w_from = w + (static_cast<i64>(expert) * strips + strip) * blocks * BLOCK_BYTES + lane * 16;
#if E2M1
  const int kind = lane < GROUPS ? 0 : ZEROS + 1, piece = lane, s_step = SCALE_BYTES;
  const unsigned char* s_from = scale + (static_cast<i64>(expert) * strips + strip) * blocks * SCALE_BYTES + lane * 16;
#else
  const int kind = lane / (2 * GROUPS), piece = lane % (2 * GROUPS);
  const i64 scales_from = (static_cast<i64>(expert) * scales + piece / 2) * cols + strip * 16 + piece % 2 * 8;
  const unsigned char* s_from = (kind ? zero : scale) + scales_from * 2;
  const i64 s_step = static_cast<i64>(GROUPS) * cols * 2;
#endif
  unsigned char* const x_to = shared() + row * ROW + part * 16;
  unsigned char* const w_to = shared() + X_BYTES + warp * BLOCK_BYTES + lane * 16;
  unsigned char* const s_to =
      shared() + X_BYTES + WARPS * BLOCK_BYTES + (warp * (1 + ZEROS) + kind) * SCALE_BYTES + piece * 16;
  const int each = LONG ? group / 128 : 1;  // blocks that share a group
  int left = blocks, same = each, to = 0;
  auto load = [&] {
    if (left > 0) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const int at = to + b * SLOT;
#if TAIL
        if (b >= left) break;
        const bool inside = left - b > 1 || part * 8 < rest;
#endif
#pragma unroll
        for (int i = 0; i < PIECES(TILES); ++i)
#if TAIL
          copy_inside_16_if(x_to + at + i * (THREADS / 16) * ROW, x_from[i] + b * 128, rows_at[i] >= 0, inside);
#else
          copy_16_if(x_to + at + i * (THREADS / 16) * ROW, x_from[i] + b * 128, rows_at[i] >= 0);
#endif
        COPY_UNIT(w_to + at, w_from + b * BLOCK_BYTES);
        COPY_UNIT(w_to + at + UNIT, w_from + b * BLOCK_BYTES + UNIT);
        copy_16_if(s_to + at, s_from, kind <= ZEROS);
        if (!LONG || --same == 0) {
          same = each;
          s_from += s_step;
        }
      }
#pragma unroll
      for (int i = 0; i < PIECES(TILES); ++i) x_from[i] += BLOCKS * 128;
      w_from += BLOCKS * BLOCK_BYTES;
      to = to == (STAGES - 1) * STAGE ? 0 : to + STAGE;
      left -= BLOCKS;
    }
    end_group();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) load();

  float factor[2 * TILES], sum[TILES][4];
#if WHOLE && EXPERTS
  const float whole_of_expert = fetch(whole + expert);  // long before the sums need the number
#endif
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) factor[i] = factors && is_row(id[i], limit) ? fetch(factors + id[i]) : 1;
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[t][i] = 0;
  const unsigned char* const rows_of = shared() + lane % 8 * ROW + lane / 8 * 16;
  const unsigned char* const words = shared() + X_BYTES + warp * BLOCK_BYTES + lane * 16;
  const unsigned char* const scales_of =
      shared() + X_BYTES + WARPS * BLOCK_BYTES + warp * (1 + ZEROS) * SCALE_BYTES + g * (E2M1 ? 2 * GROUPS : 2);
  int now = 0;
  for (int block = 0; block < blocks; block += BLOCKS) {
    wait_groups<STAGES - 2>();
    barrier();  // the next stage is there, and all warps have read the one before
    load();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#if TAIL
      if (block + b >= blocks) break;
#endif
      const int at = now + b * SLOT;
      Unit unit;
#if E2M1
      const Scales own = *reinterpret_cast<const Scales*>(scales_of + at);
#endif
      u32 by[2], less[2];  // of this lane's two rows of w
      u32 rows_now[TILES][4];
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        if (step % 4 == 0) unit = unit_at(words + at + step / 4 * UNIT);
        if (step % (8 / GROUPS) == 0) {
#if E2M1
#pragma unroll
          for (int r = 0; r < 2; ++r) by[r] = scale_of(own, step * GROUPS / 8, r);
#else
          const u16* from = reinterpret_cast<const u16*>(scales_of + at) + step * GROUPS / 8 * 16;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            by[r] = twice(from[8 * r]);
            less[r] = minus(ZEROS ? twice(from[8 * r + SCALE_BYTES / 2]) : MIDDLE);
          }
#endif
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t)
          if (step % 2 == 0) load_matrices(rows_now[t], rows_of + at + t * 8 * ROW + step * 32);
        u32 a[4];
#pragma unroll
#if E2M1
        for (int r = 0; r < 4; ++r) a[r] = weights(word_of(unit, step, r), r, by[r % 2]);
#else
        for (int r = 0; r < 4; ++r) a[r] = weights(word_of(unit, step, r), r, less[r % 2], by[r % 2]);
#endif
#pragma unroll
        for (int t = 0; t < TILES; ++t)
          multiply_add(sum[t], a, rows_now[t][step % 2 * 2], rows_now[t][step % 2 * 2 + 1]);
      }
    }
    now = now == (STAGES - 1) * STAGE ? 0 : now + STAGE;
  }
  wait_groups<0>();
  if (mine >= strips) return;
  float added[2] = {0, 0};
  if (bias) {
    bias += static_cast<i64>(expert) * cols;
#pragma unroll
    for (int r = 0; r < 2; ++r) added[r] = widen(bias[strip * 16 + g + 8 * r]);
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = t * 2 + i % 2, n = strip * 16 + g + i / 2 * 8;
#if WHOLE && EXPERTS
      sum[t][i] = times_unflushed(sum[t][i], whole_of_expert);
#elif WHOLE
      sum[t][i] = times_unflushed(sum[t][i], *whole);
#endif
      float value = bias ? sum[t][i] + added[i / 2] : sum[t][i];
      if (factors) value = times_unflushed(value, factor[m]);
      if (is_row(id[m], limit)) out[static_cast<i64>(id[m]) * cols + n] = static_cast<u16>(round_pair(value, 0));
    }
}
