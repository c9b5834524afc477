// Products of few rows with weights of 4 or 8 bits: out[m, n] = round(sum over k of x[m, k] * w[n, k] + bias[n]).
//
// packing.py states how the weights lie. WARPS: warps of a block, each with 16 rows of w. TILES: eights of rows of x in
// a block. STAGES: blocks of 128 elements of K in shared memory. GROUPS: groups of scales in such a block. ZEROS: whether
// there are zero points. INPUT: the 16-bit type.
// E2M1: whether weights are floats, whose sums are multiplied by `whole`. unpack.h unpacks.
//
// Order of one output: one fp32 accumulator of mma.m16n8k16 takes K in ascending order in one pass. (q - zero) * scale
// is rounded once, the sum is multiplied by `whole` and the bias is added in fp32, and the result is rounded once. No
// warp shares an output with another.

#define ROW 272  // bytes of a row of x in shared memory: 128 elements, and 16 bytes against bank conflicts
#define X_BYTES (8 * TILES * ROW)
#define STAGE (X_BYTES + WARPS * (BLOCK_BYTES + SCALE_BYTES * (1 + ZEROS)))

KERNEL product(const u16* x, const unsigned char* w, const unsigned char* scale, const unsigned char* zero,
               const u16* bias, u16* out, int rows, int cols, int depth, int group, int stride, const float* whole) {
  const int lane = thread() % 32, warp = thread() / 32, blocks = depth / 128, g = lane / 4;
  const int strips = cols / 16, mine = block_x() * WARPS + warp, strip = mine < strips ? mine : strips - 1;
  const int first = block_y() * 8 * TILES;  // row of x
  x += static_cast<i64>(first) * stride;
  out += static_cast<i64>(first) * cols;
  rows -= first;
  // What this thread copies for a block of K: a part of a row of x and of every THREADS / 16th row after it, its own
  // weights, and a part of its warp's scales. The pointers move on by one block at each call.
  const int part = thread() % 16, row = thread() / 16;
  const u16* x_from = x + static_cast<i64>(row) * stride + part * 8;
  const unsigned char* w_from = w + static_cast<i64>(strip) * blocks * BLOCK_BYTES + lane * 16;
#if E2M1
  const int kind = lane < GROUPS ? 0 : ZEROS + 1, piece = lane, s_step = SCALE_BYTES, each = 1;
  const unsigned char* s_from = scale + static_cast<i64>(strip) * blocks * SCALE_BYTES + lane * 16;
#else
  const int kind = lane / (2 * GROUPS), piece = lane % (2 * GROUPS);
  const unsigned char* s_from = (kind ? zero : scale) + (static_cast<i64>(piece / 2) * cols + strip * 16) * 2;
  s_from += piece % 2 * 16;
  const i64 s_step = static_cast<i64>(GROUPS) * cols * 2;
  const int each = GROUPS > 1 ? 1 : group / 128;  // blocks that share a group
#endif
  int left = blocks, same = each, slot = 0;
  auto load = [&] {
    if (left > 0) {
      unsigned char* at = shared() + slot;
      const u16* from = x_from;
#pragma unroll
      for (int c = 0; c < 8 * TILES; c += THREADS / 16) {
        const bool there = row + c < rows;
        if (THREADS / 16 <= 8 * TILES || row < 8 * TILES)
          copy_16(at + (row + c) * ROW + part * 16, there ? from : x, there);
        from += THREADS / 16 * stride;
      }
      at += X_BYTES;
      COPY_UNIT(at + warp * BLOCK_BYTES + lane * 16, w_from);
      COPY_UNIT(at + warp * BLOCK_BYTES + UNIT + lane * 16, w_from + UNIT);
      at += WARPS * BLOCK_BYTES + (warp * (1 + ZEROS) + kind) * SCALE_BYTES + piece * 16;
      if (kind <= ZEROS) copy_16(at, s_from, true);
      x_from += 128;
      w_from += BLOCK_BYTES;
      if (--same == 0) {
        same = each;
        s_from += s_step;
      }
      slot = slot == (STAGES - 1) * STAGE ? 0 : slot + STAGE;
      --left;
    }
    end_group();
  };

  float sum[TILES][4];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[t][i] = 0;

#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) load();
  // A pair is two products of 16 elements of K.
  u32 a[2][2][4], b[2][TILES][4];
#if E2M1
  Scales scales;
#else
  u32 by[2], less[2];  // of this lane's two rows
#endif
  Unit unit;
  const unsigned char* now = shared() + (STAGES - 1) * STAGE;
  auto enter = [&] {  // the next block of K: it is there, and all warps have read the one before
    wait_groups<STAGES - 2>();
    barrier();
    load();
    now = now == shared() + (STAGES - 1) * STAGE ? shared() : now + STAGE;
  };
  auto read = [&](int pair) {
    const int step = pair * 2;
    const unsigned char* own = now + X_BYTES;
    if (pair % 2 == 0) unit = unit_at(own + warp * BLOCK_BYTES + pair / 2 * UNIT + lane * 16);
#if E2M1
    if (pair == 0)
      scales = *reinterpret_cast<const Scales*>(own + WARPS * BLOCK_BYTES + warp * SCALE_BYTES + g * 2 * GROUPS);
#else
    if (step % (8 / GROUPS) == 0) {
      const u16* scales = reinterpret_cast<const u16*>(own + WARPS * BLOCK_BYTES + warp * (1 + ZEROS) * SCALE_BYTES);
      const u16* from = scales + step * GROUPS / 8 * 16 + g;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        by[r] = twice(from[8 * r]);
        less[r] = minus(ZEROS ? twice(from[8 * r + SCALE_BYTES / 2]) : MIDDLE);
      }
    }
#endif
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      load_matrices(b[pair % 2][t], now + lane % 8 * ROW + lane / 8 * 16 + t * 8 * ROW + step * 32);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const u32 word = word_of(unit, pair % 2 * 2 + j, r);
#if E2M1
        a[pair % 2][j][r] = weights(word, r, scale_of(scales, (step + j) * GROUPS / 8, r % 2));
#else
        a[pair % 2][j][r] = weights(word, r, less[r % 2], by[r % 2]);
#endif
      }
  };
  for (int block = 0; block < blocks; ++block) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      if (pair == 0) enter();
      read(pair);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int t = 0; t < TILES; ++t)
          multiply_add(sum[t], a[pair % 2][j], b[pair % 2][t][2 * j], b[pair % 2][t][2 * j + 1]);
    }
  }
  wait_groups<0>();
#if E2M1
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[t][i] = times_unflushed(sum[t][i], *whole);
#endif
  float added[2] = {0, 0};
  if (bias) {
#pragma unroll
    for (int r = 0; r < 2; ++r) added[r] = widen(bias[strip * 16 + g + 8 * r]);
  }
  if (mine >= strips) return;
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = t * 8 + lane % 4 * 2 + i % 2, n = strip * 16 + g + i / 2 * 8;
      const float value = bias ? sum[t][i] + added[i / 2] : sum[t][i];
      if (m < rows) out[static_cast<i64>(m) * cols + n] = static_cast<u16>(round_pair(value, 0));
    }
}

// The weights as 16-bit floats [N, K], without `whole`: a warp for each strip of 16 rows and block of 128 elements of K.
// They pass through shared memory, so that lanes store neighbouring elements.
KERNEL dequantize(const unsigned char* w, const Scale* scale, const u16* zero, u16* out, int cols, int depth, int group) {
  const int lane = thread() % 32, blocks = depth / 128, g = lane / 4;
  const int index = block_x() * WARPS + thread() / 32, strip = index / blocks, block = index % blocks;
  if (strip >= cols / 16) return;
  unsigned char* held = shared() + thread() / 32 * 16 * ROW;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Unit unit = unit_at(w + static_cast<i64>(index) * BLOCK_BYTES + half * UNIT + lane * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int k = half * 64 + j * 16;
#if !E2M1
      const i64 from = static_cast<i64>((block * 128 + k) / group) * cols + strip * 16 + g;
#endif
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#if E2M1
        const u32 two = weights(word_of(unit, j, r), r, scale_of(scale[index * 8 + g], k / 16 * GROUPS / 8, r % 2));
#else
        const u32 less = minus(ZEROS ? twice(zero[from + r % 2 * 8]) : MIDDLE);
        const u32 two = weights(word_of(unit, j, r), r, less, twice(scale[from + r % 2 * 8]));
#endif
        *reinterpret_cast<u32*>(held + (g + r % 2 * 8) * ROW + (k + lane % 4 * 2 + r / 2 * 8) * 2) = two;
      }
    }
  }
  together();
  u16* to = out + static_cast<i64>(strip * 16 + lane / 16) * depth + block * 128 + lane % 16 * 8;
#pragma unroll
  for (int r = 0; r < 16; r += 2)
    *reinterpret_cast<Four*>(to + static_cast<i64>(r) * depth) =
        *reinterpret_cast<const Four*>(held + (r + lane / 16) * ROW + lane % 16 * 16);
}
