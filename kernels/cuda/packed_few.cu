// Products of up to 16 rows with weights of 4 or 8 bits: out[m, n] = round(sum over k of x[m, k] * w[n, k] + bias[n]).
//
// packing.py states how the weights lie. Two warps share a strip of 16 rows of w, and each unpacks the weights of 8 of
// them: matrices of few rows would leave most of the device idle. WARPS: warps of a block of threads. TILES: eights of
// rows of x in a block, 1 or 2. STAGES of BLOCKS blocks of 128 elements of K each are in shared memory; the threads wait
// once a stage. K has whole stages. GROUPS: groups of scales in such a block. LONG: whether a group has more than 128
// elements. ZEROS: whether there are zero points. INPUT: the 16-bit type. E2M1: whether weights are floats, whose sums
// are multiplied by `whole`. unpack.h unpacks.
//
// Order of one output: that of packed.cu, with x and w exchanged in the instruction: w is its matrix of 8 columns.

#define ROW 272  // bytes of a row of x in shared memory: 128 elements, and 16 bytes against bank conflicts
#define X_BYTES (8 * TILES * ROW)
#define STRIPS (WARPS / 2)
#define SLOT (X_BYTES + STRIPS * (BLOCK_BYTES + SCALE_BYTES * (1 + ZEROS)))  // bytes of a block of K
#define STAGE (BLOCKS * SLOT)

KERNEL product(const u16* x, const unsigned char* w, const unsigned char* scale, const unsigned char* zero,
               const u16* bias, u16* out, int rows, int cols, int depth, int group, int stride, const float* whole) {
  const int lane = thread() % 32, warp = thread() / 32, blocks = depth / 128, g = lane / 4;
  const int half = warp % 2, own = warp / 2;  // half: of the strip's rows
  const int strips = cols / 16, mine = block_x() * STRIPS + own, strip = mine < strips ? mine : strips - 1;
  const int first = block_y() * 8 * TILES;  // row of x
  x += static_cast<i64>(first) * stride;
  out += static_cast<i64>(first) * cols;
  rows -= first;
  // What this thread copies for a block of K: a part of a row of x and of every THREADS / 16th row after it, a half of
  // its strip's weights, and in the first half a part of the strip's scales.
  const int part = thread() % 16, row = thread() / 16;
  const u16* x_from = x + static_cast<i64>(row) * stride + part * 8;
  const unsigned char* w_from = w + static_cast<i64>(strip) * blocks * BLOCK_BYTES + half * UNIT + lane * 16;
#if E2M1
  const int kind = lane < GROUPS ? 0 : ZEROS + 1, piece = lane, s_step = SCALE_BYTES;
  const unsigned char* s_from = scale + static_cast<i64>(strip) * blocks * SCALE_BYTES + lane * 16;
#else
  const int kind = lane / (2 * GROUPS), piece = lane % (2 * GROUPS);
  const unsigned char* s_from = (kind ? zero : scale) + (static_cast<i64>(piece / 2) * cols + strip * 16) * 2;
  s_from += piece % 2 * 16;
  const i64 s_step = static_cast<i64>(GROUPS) * cols * 2;
#endif
  const bool of_scales = half == 0 && kind <= ZEROS;
  const int each = LONG ? group / 128 : 1;  // blocks that share a group
  int left = blocks, same = each, to = 0;
#if BITS == 8
  unsigned char* const s_to =
      shared() + X_BYTES + STRIPS * BLOCK_BYTES + (own * (1 + ZEROS) + kind) * SCALE_BYTES + piece * 16;
  // One block of a stage. There is no branch, so that copies may run between products.
  auto load_block = [&](int b) {
    const bool more = left > 0;
    unsigned char* at = shared() + to + b * SLOT;
#pragma unroll
    for (int c = 0; c < 8 * TILES; c += THREADS / 16)
      copy_16_if(at + (row + c) * ROW + part * 16, x_from + c * stride, row + c < rows && row + c < 8 * TILES && more);
    at += X_BYTES + own * BLOCK_BYTES + half * UNIT + lane * 16;
    copy_16_if(at, w_from, more);
    copy_16_if(at + 512, w_from + 512, more);
    copy_16_if(s_to + to + b * SLOT, s_from, of_scales && more);
    x_from += 128;
    w_from += BLOCK_BYTES;
    if (!LONG || --same == 0) {
      same = each;
      s_from += s_step;
    }
  };
  auto loaded = [&] {
    to = to == (STAGES - 1) * STAGE ? 0 : to + STAGE;
    left -= BLOCKS;
    end_group();
  };
  auto load = [&] {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) load_block(b);
    loaded();
  };
#else
  auto load = [&] {
    if (left > 0) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        unsigned char* at = shared() + to + b * SLOT;
        const u16* from = x_from;
#pragma unroll
        for (int c = 0; c < 8 * TILES; c += THREADS / 16) {
          const bool there = row + c < rows;
          if (THREADS / 16 <= 8 * TILES || row < 8 * TILES)
            copy_16(at + (row + c) * ROW + part * 16, there ? from : x, there);
          from += THREADS / 16 * stride;
        }
        at += X_BYTES;
        COPY_UNIT(at + own * BLOCK_BYTES + half * UNIT + lane * 16, w_from);
        at += STRIPS * BLOCK_BYTES + (own * (1 + ZEROS) + kind) * SCALE_BYTES + piece * 16;
        copy_16_if(at, s_from, of_scales);
        x_from += 128;
        w_from += BLOCK_BYTES;
        if (!LONG || --same == 0) {
          same = each;
          s_from += s_step;
        }
      }
      to = to == (STAGES - 1) * STAGE ? 0 : to + STAGE;
      left -= BLOCKS;
    }
    end_group();
  };
#endif
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) load();

  float sum[4] = {0, 0, 0, 0};  // with one tile, the last two are those of the same rows again
  const unsigned char* const rows_of = shared() + lane % (8 * TILES) * ROW + lane / 16 * 16;
  const unsigned char* const words = shared() + X_BYTES + own * BLOCK_BYTES + half * (UNIT - 512) + lane * 16;
  const unsigned char* const scales_of = shared() + X_BYTES + STRIPS * BLOCK_BYTES + own * (1 + ZEROS) * SCALE_BYTES;
  const Half of = half_of(half);
  int now = 0;
  for (int block = 0; block < blocks; block += BLOCKS) {
    wait_groups<STAGES - 2>();
    barrier();  // the next stage is there, and all warps have read the one before
#if BITS != 8
    load();
#endif
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int at = now + b * SLOT;
      Four four;
#if E2M1
      const Scales scales = *reinterpret_cast<const Scales*>(scales_of + at + g * 2 * GROUPS);
#else
      u32 by, less;
#endif
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        if (step % 4 == 0) four = *reinterpret_cast<const Four*>(words + at + step / 4 * UNIT);
        u32 rows_now[4];
        load_matrices(rows_now, rows_of + at + step * 32);
#if E2M1
        const u32 by = scale_of(scales, step * GROUPS / 8, half), less = 0;
#else
        if (step % (8 / GROUPS) == 0) {
          const u16* from = reinterpret_cast<const u16*>(scales_of + at) + step * GROUPS / 8 * 16 + half * 8 + g;
          by = twice(from[0]);
          less = minus(ZEROS ? twice(from[SCALE_BYTES / 2]) : MIDDLE);
        }
#endif
        u32 two[2];
        weights_of(two, of, four.word[step % 4], less, by);
        multiply_add(sum, rows_now, two[0], two[1]);
#if BITS == 8
        if (step == 1) load_block(b);
#endif
      }
    }
#if BITS == 8
    loaded();
#endif
    now = now == (STAGES - 1) * STAGE ? 0 : now + STAGE;
  }
  wait_groups<0>();
  if (mine >= strips || g >= rows) return;
  const int n = strip * 16 + half * 8 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
#if E2M1
    sum[i] = times_unflushed(sum[i], *whole);
#endif
    if (bias) sum[i] += widen(bias[n + i % 2]);
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t)
    if (g + 8 * t < rows)
      *reinterpret_cast<u32*>(out + static_cast<i64>(g + 8 * t) * cols + n) = round_pair(sum[2 * t], sum[2 * t + 1]);
}
