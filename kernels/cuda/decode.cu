// Attention of single queries (decode) over paged KV, in the order of FlashAttention 3's prefill.
//
// Order: tiles of 128 keys at multiples of 128, the last tile first. In a tile: scores by ascending 16 elements of the
// head; the running maximum; p = 2^(score * scale - max * scale); a row's sum is four partial sums (keys 8j + 2t and
// 8j + 2t + 1 for t = 0..3, ascending), each carried from tile to tile and scaled once a tile, added at the end as
// (s0 + s2) + (s1 + s3); the output is scaled, then takes p (rounded to 16 bits) times V by ascending 16 keys. At the end
// it is divided by the sum. FlashAttention 3 (Shah et al. 2024) does the same with 192 or 128 rows of queries a tile, of
// which a decode fills few; here a block has 16 rows, the query heads of one key head.
//
// One block of four warps per request and key head. A warp scores 32 of a tile's keys for all rows, and sums V over all
// of its keys for a quarter of the head's elements. There is room for STAGES tiles of K and V, at least 3: one whose V and
// one whose K are read, the others on their way. Compiled for HEAD (64, 128).

constexpr int TILE = 128, WARPS = 4, THREADS = 32 * WARPS, ROWS = 16;
constexpr int PIECES = HEAD / 8;  // of 16 bytes, in a row of K or V
constexpr int PASS_ROWS = THREADS / PIECES, PASSES = TILE / PASS_ROWS;
constexpr int TILE_BYTES = TILE * HEAD * 2;
constexpr int WEIGHT_STRIDE = TILE + 8;  // floats; the padding spreads rows over banks

// Where piece `piece` of row `row` lies: rows of one column of pieces fall into different banks.
DEVICE int place(int row, int pieces, int piece) { return (row * pieces + (piece ^ (row & 7))) * 16; }

// Strides in bytes. v lies `to_v` bytes after k everywhere; a page holds 2^page_bits tokens, at most TILE.
struct Cache {
  const unsigned char* k;  // of this key head
  const int* pages;        // of this request
  i64 to_v;
  int page_stride, token_stride, page_bits;
};

DEVICE void find_pages(const Cache& cache, int tile, int length, int (&found)[PASSES]) {
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    const int at = tile * TILE + i * PASS_ROWS + thread() / PIECES;
    found[i] = at < length ? cache.pages[at >> cache.page_bits] : 0;
  }
}

// K and V of a tile on their way to shared memory, as two groups.
DEVICE void load_tile(const Cache& cache, int tile, int length, const int (&pages)[PASSES], unsigned char* k,
                      unsigned char* v) {
  const int piece = thread() % PIECES, mask = (1 << cache.page_bits) - 1;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int row = i * PASS_ROWS + thread() / PIECES;
      const unsigned char* from = cache.k + static_cast<i64>(pages[i]) * cache.page_stride +
                                  ((row & mask) * cache.token_stride + piece * 16);
      unsigned char* const to = (part ? v : k) + place(row, PIECES, piece);
      copy_16(to, part ? from + cache.to_v : from, tile * TILE + row < length);
    }
    end_group();
  }
}

// The attention of one query of each of `group` heads, q and out of the first of them, over `length` tokens.
DEVICE void attend(const u16* q, u16* out, const Cache& cache, int length, int group, float scale, int q_head,
                   int o_head) {
  const int warp = thread() / 32, lane = thread() % 32, g = lane / 4, t = lane % 4;
  unsigned char* const keys = shared();
  unsigned char* const values = keys + STAGES * TILE_BYTES;
  unsigned char* const rounded = values + STAGES * TILE_BYTES;                    // weights p, 16 bits [ROWS, TILE]
  float* const weights = reinterpret_cast<float*>(rounded + ROWS * TILE * 2);     // p in fp32 [ROWS, WEIGHT_STRIDE]
  float* const peaks = weights + ROWS * WEIGHT_STRIDE;                            // a warp's maxima [WARPS, ROWS]

  u32 queries[HEAD / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = g + 8 * (part & 1), d = 16 * i + 8 * (part >> 1) + 2 * t;
      const u32 pair = *reinterpret_cast<const u32*>(q + (row < group ? row : 0) * q_head + d);
      queries[i][part] = row < group ? pair : 0u;
    }
  }

  const int tiles = (length + TILE - 1) / TILE;
  int next = tiles - 1, found[PASSES];
  if (next >= 0) find_pages(cache, next, length, found);
  const auto load_next = [&](int stage) {
    if (next >= 0) {
      load_tile(cache, next, length, found, keys + stage * TILE_BYTES, values + stage * TILE_BYTES);
    } else {
      end_group();
      end_group();
    }
    if (--next >= 0) find_pages(cache, next, length, found);
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load_next(s);

  // This thread's rows are g and g + 8; its partial sum is of row `mine`, keys 8j + 2t and 8j + 2t + 1. Two threads have
  // the same one: that costs nothing, and a branch would keep sums and products apart.
  const int mine = 4 * warp + g % 4;
  float o[HEAD / 32][4] = {}, peak[2] = {LOWEST, LOWEST}, my_peak = LOWEST, sum = 0.f;
  float shrink[2] = {1.f, 1.f}, my_shrink;

  // s [ROWS, 32 keys of this warp] from the keys in `stage`.
  const auto score = [&](int stage, float(&s)[4][4]) {
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int key = 32 * warp + 16 * pair + 8 * (lane / 16) + lane % 8;
        u32 b[4];
        load_matrices(b, keys + stage * TILE_BYTES + place(key, PIECES, 2 * i + lane / 8 % 2));
        multiply_add(s[2 * pair], queries[i], b[0], b[1]);
        multiply_add(s[2 * pair + 1], queries[i], b[2], b[3]);
      }
    }
  };

  // The new maxima, what they shrink earlier sums by, and the weights of a tile. Rows past the group hold anything.
  const auto weigh = [&](const float(&s)[4][4], bool first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= group) break;
      float most = s[0][2 * half];
#pragma unroll
      for (int j = 0; j < 4; ++j) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      most = fmaxf(most, exchange(most, 1));
      most = fmaxf(most, exchange(most, 2));
      if (t == 0) peaks[warp * ROWS + 8 * half + g] = most;
    }
    barrier();
    const auto raise = [&](float& peak, int row) {
      float most = peak;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) most = fmaxf(most, peaks[w * ROWS + row]);
      const float by = first ? 1.f : power_of_2((peak - most) * scale);
      peak = most;
      return by;
    };
    my_shrink = raise(my_peak, mine);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= group) break;
      const int row = 8 * half + g;
      shrink[half] = raise(peak[half], row);
      const float scaled = peak[half] * scale;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = power_of_2(fmaf(s[j][2 * half], scale, -scaled));
        const float high = power_of_2(fmaf(s[j][2 * half + 1], scale, -scaled));
        *reinterpret_cast<float2*>(weights + row * WEIGHT_STRIDE + 32 * warp + 8 * j + 2 * t) = float2{low, high};
        *reinterpret_cast<u32*>(rounded + place(row, TILE / 8, 4 * warp + j) + 4 * t) = round_pair(low, high);
      }
    }
  };

  if (tiles > 0) {
    wait_groups<2 * STAGES - 3>();
    barrier();
    float s[4][4] = {};
    score(0, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if ((tiles - 1) * TILE + 32 * warp + 8 * j + 2 * t + e % 2 >= length) s[j][e] = LOWEST;
      }
    }
    weigh(s, true);
  }
  int stage = 0;
  for (int tile = tiles - 1; tile >= 0; --tile) {
    wait_groups<2 * STAGES - 5>();  // this tile's V and the next one's K are here
    barrier();
    load_next(stage == 0 ? STAGES - 1 : stage - 1);
    const int following = stage == STAGES - 1 ? 0 : stage + 1;

    // The next tile's scores go between this one's sums: alone, each waits for itself. After tile 0 they are not used.
    float s[4][4] = {};
    score(following, s);
    const float2* const row = reinterpret_cast<const float2*>(weights + mine * WEIGHT_STRIDE + 2 * t);
    sum = tile == tiles - 1 ? row[0].x : carry(sum, my_shrink, row[0].x);
    sum += row[0].y;
#pragma unroll
    for (int j = 1; j < TILE / 8; ++j) {
      sum += row[4 * j].x;
      sum += row[4 * j].y;
    }
#pragma unroll
    for (int b = 0; b < HEAD / 32; ++b) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[b][e] *= shrink[e / 2];
    }
#pragma unroll
    for (int i = 0; i < TILE / 16; ++i) {
      u32 a[4];
      load_matrices(a, rounded + place(lane % 8 + 8 * (lane / 8 % 2), TILE / 8, 2 * i + lane / 16));
#pragma unroll
      for (int pair = 0; pair < HEAD / 64; ++pair) {
        const int key = 16 * i + lane % 8 + 8 * (lane / 8 % 2);
        const int piece = (warp * (HEAD / 4) + 16 * pair) / 8 + lane / 16;
        u32 b[4];
        load_matrices_transposed(b, values + stage * TILE_BYTES + place(key, PIECES, piece));
        multiply_add(o[2 * pair], a, b[0], b[1]);
        multiply_add(o[2 * pair + 1], a, b[2], b[3]);
      }
    }
    if (tile > 0) weigh(s, false);
    stage = following;
  }

  sum += exchange(sum, 2);
  sum += exchange(sum, 1);
  barrier();
  if (t == 0) peaks[mine] = sum;
  barrier();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + g;
    if (row >= group) continue;
    const float total = peaks[row], part = total == 0.f || total != total ? 0.f : reciprocal(total);
#pragma unroll
    for (int b = 0; b < HEAD / 32; ++b) {
      u16* to = out + row * o_head + warp * (HEAD / 4) + 8 * b + 2 * t;
      *reinterpret_cast<u32*>(to) = round_pair(o[b][2 * half] * part, o[b][2 * half + 1] * part);
    }
  }
}

// q, out [tokens, heads, HEAD]; k [pages, 2^page_bits, key heads, HEAD], v the same `to_v` bytes further; starts
// [requests + 1]: where a request's tokens begin in q; lengths [requests]; pages [requests, most_pages]. Strides of q and out
// in elements, of the cache in bytes. group: query heads of a key head, at most 16. scale: of the softmax, times log2(e).
// Grid: key heads x requests. A request of several tokens (a graph of single queries may be replayed on one) has them done
// one after the other.
KERNEL(THREADS)
decode(const u16* q, const unsigned char* k, u16* out, const int* starts, const int* lengths, const int* pages,
       i64 to_v, int most_pages, int page_bits, int group, float scale, int q_token, int q_head, int k_page, int k_token,
       int k_head, int o_token, int o_head) {
  const int head = block_x(), request = block_y();
  const int begin = starts[request], end = starts[request + 1], length = lengths[request];
  const Cache cache{k + static_cast<i64>(head) * k_head, pages + static_cast<i64>(request) * most_pages, to_v,
                    k_page, k_token, page_bits};
  for (int token = begin; token < end; ++token) {
    if (token > begin) barrier();
    attend(q + static_cast<i64>(token) * q_token + head * group * q_head,
           out + static_cast<i64>(token) * o_token + head * group * o_head, cache, length - (end - 1 - token), group, scale,
           q_head, o_head);
  }
}
