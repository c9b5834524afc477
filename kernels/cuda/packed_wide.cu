// Products with weights of 4 or 8 bits on Hopper's wide matrix instructions: out[m, n] = round(sum over k of x[m, k] *
// w[n, k] + bias[n]).
//
// packing.py states how the weights lie. WARPS: warps of a block, each with 16 rows of w; four are a warpgroup. TILES:
// eights of rows of x in a block. STAGES: blocks of 128 elements of K in shared memory. GROUPS: groups of scales in such
// a block. ZEROS: whether there are zero points. INPUT: the 16-bit type. EXPERTS: whether rows belong to experts
// (rows.h), each with weights, scales, zero points and bias of its own, one expert's after the other's. LEAST: of experts,
// the fewest eights of rows that a block multiplies where its tile has few rows. E2M1: whether weights are floats.
// WHOLE: whether their sums are multiplied by `whole`; experts have one each. TAIL: rows.h. unpack.h unpacks.
//
// Order of one output: that of packed.cu. One fp32 accumulator of wgmma.m64nNk16 takes K in ascending order in one pass.
// The weights of 16 elements of K lie in a warp's registers as for mma.m16n8k16, so both read one packing.

#define ATOM (1024 * TILES)  // bytes of all rows of x and 64 elements of K: rows of 128 bytes, swizzled
#define X_BYTES (2 * ATOM)
#define STAGE ((X_BYTES + WARPS * (BLOCK_BYTES + SCALE_BYTES * (1 + ZEROS)) + 1023) / 1024 * 1024)
#define AHEAD (STAGES - 2)         // loads in flight: a block's last products may run into the next block
#define OUT_ROW (32 * WARPS + 16)  // bytes of a row of outputs in shared memory

// A lane's weights of a block of K: its words, and of each group the scales and zero points of its two rows.
struct Words {
  Unit unit[2];
#if E2M1
  Scales scales;
#else
  u32 scale[GROUPS], zero[GROUPS];
#endif
};

DEVICE Words words_at(const unsigned char* stage, int warp, int lane) {
  Words block;
  const unsigned char* words = stage + X_BYTES + warp * BLOCK_BYTES + lane * 16;
  block.unit[0] = unit_at(words);
  block.unit[1] = unit_at(words + UNIT);
  const unsigned char* scales = stage + X_BYTES + WARPS * BLOCK_BYTES + warp * (1 + ZEROS) * SCALE_BYTES;
#if E2M1
  block.scales = *reinterpret_cast<const Scales*>(scales + lane / 4 * 2 * GROUPS);
#else
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const u16* from = reinterpret_cast<const u16*>(scales) + group * 16 + lane / 4;
    block.scale[group] = from[0] | static_cast<u32>(from[8]) << 16;
    if (ZEROS) block.zero[group] = from[SCALE_BYTES / 2] | static_cast<u32>(from[8 + SCALE_BYTES / 2]) << 16;
  }
#endif
  return block;
}

DEVICE u32 twice_of(u32 pair, int row) { return twice(static_cast<u16>(pair >> 16 * row)); }

// The weights of 16 elements of K, as registers of mma.m16n8k16.
DEVICE void unpack(u32 (&a)[4], const Words& block, int step) {
  const int group = step * GROUPS / 8;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const u32 word = word_of(block.unit[step / 4], step, r);
#if E2M1
    a[r] = weights(word, r, scale_of(block.scales, group, r % 2));
#else
    const u32 less = minus(ZEROS ? twice_of(block.zero[group], r % 2) : MIDDLE);
    a[r] = weights(word, r, less, twice_of(block.scale[group], r % 2));
#endif
  }
}

// What a block multiplies: the pointers are those of its expert, and dense of its first row. column: of blocks.
struct Task {
  const u16* x;
  const unsigned char *w, *scale, *zero;
  const u16* bias;
  u16* out;
  int rows, cols, depth, group, stride, column;
#if WHOLE
  const float* whole;
#endif
#if EXPERTS
  const int (&copied)[PIECES(TILES)];  // the ids whose rows of x this thread copies
  const int* ids;
  const float* factors;
  i64 inverse;
  int limit, rest;
#endif
};

// The product for the first 8 * USED rows of a block.
template <int USED>
DEVICE void multiply(const Task& task) {
  constexpr int BATCH = USED > 8 ? 2 : 4;  // products of 16 elements of K that run while others' weights are unpacked
  const u16* x = task.x;
  const int cols = task.cols, depth = task.depth, stride = task.stride;
  const int lane = thread() % 32, warp = thread() / 32, blocks = depth / 128, g = lane / 4;
  const int strips = cols / 16, mine = task.column * WARPS + warp, strip = mine < strips ? mine : strips - 1;
  // What this thread copies for a block of K: a part of a row of x and of every THREADS / 16th row after it, its own
  // weights, and a part of its warp's scales. The pointers move on by one block at each call.
  const int part = thread() % 16, row = thread() / 16;
#if EXPERTS
  int rows_at[PIECES(USED)];
  find_rows(rows_at, task.copied, task.inverse, task.limit, stride);
  const u16* x_from = x + part * 8;
#else
  const u16* x_from = x + static_cast<i64>(row) * stride + part * 8;
#endif
  const int x_to = part / 8 * ATOM + row * 128 + (part % 8 ^ row % 8) * 16;
  const unsigned char* w_from = task.w + static_cast<i64>(strip) * blocks * BLOCK_BYTES + lane * 16;
#if E2M1
  const int kind = lane < GROUPS ? 0 : ZEROS + 1, piece = lane, s_step = SCALE_BYTES, each = 1;
  const unsigned char* s_from = task.scale + static_cast<i64>(strip) * blocks * SCALE_BYTES + lane * 16;
#else
  const int kind = lane / (2 * GROUPS), piece = lane % (2 * GROUPS);
  const unsigned char* s_from = (kind ? task.zero : task.scale) + (static_cast<i64>(piece / 2) * cols + strip * 16) * 2;
  s_from += piece % 2 * 16;
  const i64 s_step = static_cast<i64>(GROUPS) * cols * 2;
  const int each = GROUPS > 1 ? 1 : task.group / 128;  // blocks that share a group
#endif
  int left = blocks, same = each, slot = 0;
  auto load = [&] {
    if (left > 0) {
      unsigned char* at = shared_1024() + slot;
#if TAIL
      const bool inside = left > 1 || part * 8 < task.rest;
#else
      const bool inside = true;
#endif
#if !EXPERTS
      const u16* from = x_from;
#endif
#pragma unroll
      for (int c = 0; c < 8 * USED; c += THREADS / 16) {
#if EXPERTS
        const int place = rows_at[c / (THREADS / 16)];
        const bool there = place >= 0 && inside;
        const u16* from = x_from + static_cast<i64>(place) * 8;
#else
        const bool there = row + c < task.rows && inside;
#endif
        if (8 * USED % (THREADS / 16) == 0 || row + c < 8 * USED)
          copy_16(at + x_to + c * 128, there ? from : x, there);
#if !EXPERTS
        from += THREADS / 16 * stride;
#endif
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

  float sum[USED][4];
#pragma unroll
  for (int t = 0; t < USED; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[t][i] = 0;

#pragma unroll
  for (int i = 0; i < AHEAD; ++i) load();
#if EXPERTS
  Row* of_rows = reinterpret_cast<Row*>(shared_1024() + STAGES * STAGE);
  hold_rows(of_rows, task.ids, task.factors, 8 * USED, task.limit);
#endif
  u32 a[2][BATCH][4];  // the weights of two batches: one is unpacked while products read the other
  wait_groups<AHEAD - 1>();
  together();
  Words held = words_at(shared_1024(), warp, lane);
  int at_slot = 0;
  for (int block = 0; block < blocks; ++block) {
    const unsigned char* at = shared_1024() + at_slot;
    at_slot = at_slot == (STAGES - 1) * STAGE ? 0 : at_slot + STAGE;
    Words next;
#pragma unroll
    for (int batch = 0; batch < 8 / BATCH; ++batch) {
      wait_products<1>();
#pragma unroll
      for (int j = 0; j < BATCH; ++j) unpack(a[batch % 2][j], held, batch * BATCH + j);
      if (batch == 0) {  // x of this block is there, and no product reads the one before the last
        show_copies();
        barrier();
        load();
      }
      begin_product();
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        const int step = batch * BATCH + j;
        multiply_wide(sum, a[batch % 2][j], described(at + step / 4 * ATOM + step % 4 * 32));
      }
      end_product();
      if (batch == 0) {
        wait_groups<AHEAD - 1>();
        together();
        next = words_at(shared_1024() + at_slot, warp, lane);
      }
    }
    held = next;
  }
  wait_products<0>();
  wait_groups<0>();
  barrier();  // the outputs pass through the memory of x

  float added[2] = {0, 0};
  if (task.bias) {
#pragma unroll
    for (int r = 0; r < 2; ++r) added[r] = widen(task.bias[strip * 16 + g + 8 * r]);
  }
  unsigned char* outputs = shared_1024();
#pragma unroll
  for (int t = 0; t < USED; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = t * 8 + lane % 4 * 2 + i % 2, n = warp * 16 + g + i / 2 * 8;
#if WHOLE
      sum[t][i] = times_unflushed(sum[t][i], *task.whole);
#endif
      float value = task.bias ? sum[t][i] + added[i / 2] : sum[t][i];
#if EXPERTS
      if (task.factors) value = times_unflushed(value, of_rows[m].factor);
#endif
      *reinterpret_cast<u16*>(outputs + m * OUT_ROW + n * 2) = static_cast<u16>(round_pair(value, 0));
    }
  barrier();
  const int column = task.column * WARPS * 16, parts = 2 * WARPS;
  for (int i = thread(); i < 8 * USED * parts; i += THREADS) {
    const int m = i / parts, n = column + i % parts * 8;
#if EXPERTS
    const int to = of_rows[m].id;
    const bool there = to >= 0;
#else
    const int to = m;
    const bool there = m < task.rows;
#endif
    if (there && n < cols)
      *reinterpret_cast<Four*>(task.out + static_cast<i64>(to) * cols + n) =
          *reinterpret_cast<const Four*>(outputs + m * OUT_ROW + i % parts * 16);
  }
}

#if EXPERTS
// Multiplies a tile's first `used` rows with the smallest form that has them.
template <int USED>
DEVICE void multiply_used(const Task& task, int used) {
  if constexpr (USED / 2 >= LEAST) {
    if (used <= 4 * USED) return multiply_used<USED / 2>(task, used);
  }
  multiply<USED>(task);
}

KERNEL product(const u16* x, const unsigned char* w, const unsigned char* scale, const unsigned char* zero,
               const u16* bias, u16* out, int rows, int cols, int depth, int group, int stride PARAMETERS_OF_EXPERTS) {
  const int column = block_y(), tile = tile_of_block(), first = tile * 8 * TILES;
  if (tile >= tiles) return;
  const int end = fetch(padded), expert = fetch(experts + tile);
  ids += first;
  int copied[PIECES(TILES)], used = 0;
#pragma unroll
  for (int i = 0; i < PIECES(TILES); ++i) {
    const int m = thread() / 16 + i * (THREADS / 16);
    copied[i] = m < 8 * TILES ? fetch(ids + m) : limit;
  }
#pragma unroll
  for (int i = 0; i < 8 * TILES; i += 32) {
    const int m = i + thread() % 32;
    if (m < 8 * TILES && is_row(fetch(ids + m), limit)) used = m + 1;
  }
  if (first >= end) return;
  if (expert < 0) {
    write_zeros(out, ids, limit, column * 16 * WARPS, cols);
    return;
  }
  w += static_cast<i64>(expert) * (cols / 16) * (depth / 128) * BLOCK_BYTES;
  const i64 at = static_cast<i64>(expert) * scales * cols * (SCALE_BYTES / (16 * GROUPS));
  if (bias) bias += static_cast<i64>(expert) * cols;
  multiply_used<TILES>({x, w, scale + at, zero + at, bias, out, rows, cols, depth, group, stride, column,
#if WHOLE
                        whole + expert,
#endif
                        copied, ids, factors, inverse, limit, rest},
                       greatest(used));
}
#else
KERNEL product(const u16* x, const unsigned char* w, const unsigned char* scale, const unsigned char* zero,
               const u16* bias, u16* out, int rows, int cols, int depth, int group, int stride, const float* whole) {
  const i64 first = block_x() * 8 * TILES;  // row of x: neighbouring blocks share weights
  multiply<TILES>({x + first * stride, w, scale, zero, bias, out + first * cols, rows - static_cast<int>(first), cols,
                   depth, group, stride, block_y()
#if WHOLE
                   , whole
#endif
  });
}
#endif
