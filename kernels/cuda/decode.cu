// Attention of single queries (decode) over paged KV, in the order of FlashAttention 3's prefill.
//
// Order: tiles of 128 keys at multiples of 128, the last tile first. In a tile: scores by ascending 16 elements of the
// head; the running maximum; p = 2^(score * scale - max * scale); a row's sum is four partial sums (keys 8j + 2t and
// 8j + 2t + 1 for t = 0..3, ascending), each carried from tile to tile and scaled once a tile, added at the end as (s0
// + s2) + (s1 + s3); the output is scaled, then takes p (rounded to 16 bits) times V by ascending 16 keys. At the end
// it is divided by the sum. FlashAttention 3 (Shah et al. 2024) does the same with 192 or 128 rows of queries a tile,
// of which a decode fills few; here a block has 16 rows, the query heads of one key head.
//
// Only the running maximum, the sums and the output go from tile to tile, and of them only the products with V take
// time; an element of the output needs one column of V. So SHARES blocks of four warps, a cluster, share a request and
// key head: in a round each scores one of SHARES tiles for all, and each sums V over all of them for its columns. One
// block alone (SHARES 1) is for many requests. The next round's scores are computed while V is summed. K and V have
// DEPTH slots each; V comes a round after K. Compiled for HEAD (64, 128), SHARES (1, 2, 4, 8), DEPTH (2 or more).

constexpr int TILE = 128, WARPS = 4, THREADS = 32 * WARPS, ROWS = 16;
constexpr int PIECES = HEAD / 8;           // of 16 bytes, in a row of K
constexpr int COPIES = TILE * PIECES / THREADS;  // a thread's copies of a round's K, and of its V
constexpr int BLOCKS = PIECES / SHARES;    // of 8 columns of V and of the output, a block's share
constexpr int OWN = BLOCKS < WARPS ? 1 : BLOCKS / WARPS, ACTIVE = BLOCKS / OWN;  // a warp's; warps that have any
constexpr int SLOT = TILE * HEAD * 2;      // bytes: K of one tile, or a share of V of SHARES tiles
constexpr int PAGES = TILE / 16;           // most pages of a tile
constexpr int OWN_ROWS = ROWS / SHARES;    // rows whose sums a block keeps: row % SHARES is its number
constexpr int WEIGHT_STRIDE = TILE + 8;    // floats; the padding spreads rows over banks

// Where piece `piece` of row `row` lies: rows of one column of pieces fall into different banks.
DEVICE int place(int row, int pieces, int piece) {
  return (row * pieces + (piece ^ (pieces < 8 ? row * pieces / 8 & pieces - 1 : row & 7))) * 16;
}

// Strides in bytes. v lies `to_v` bytes after k everywhere; a page holds 2^page_bits tokens, 16 to TILE.
struct Cache {
  const unsigned char* k;  // of this key head
  const int* pages;        // of this request
  i64 to_v;
  int page_stride, token_stride, page_bits;
};

// The pages of `tiles` tiles from `tile` down, PAGES of each, a lane's share of them: found[i] is that of 32 * i +
// lane.
template <int tiles>
DEVICE void find_pages(const Cache& cache, int tile, int length, int (&found)[(tiles * PAGES + 31) / 32]) {
#pragma unroll
  for (int i = 0; i < (tiles * PAGES + 31) / 32; ++i) {
    const int number = 32 * i + thread() % 32, inside = number % PAGES << cache.page_bits;
    const int at = (tile - number / PAGES) * TILE + inside;
    const bool there = number < tiles * PAGES && inside < TILE && at >= 0 && at < length;
    found[i] = there ? cache.pages[at >> cache.page_bits] : 0;
  }
}

// Rows of K or V of `tiles` tiles from `tile` down on their way to shared memory, PIECES / tiles pieces of each from
// `first`.
template <int tiles>
DEVICE void copy_rows(const Cache& cache, const unsigned char* part, int tile, int first, int length,
                      const int (&found)[(tiles * PAGES + 31) / 32], unsigned char* slot) {
  constexpr int pieces = PIECES / tiles;
  const int piece = thread() % pieces, page_mask = (1 << cache.page_bits) - 1;
  int of[COPIES];  // all lookups first: each takes long, and copies after it would wait
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int down = i / pieces, inside = (i * THREADS + thread()) / pieces % TILE;
    of[i] = from_lane(found[down * PAGES / 32], down * PAGES % 32 + (inside >> cache.page_bits));
  }
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int down = i / pieces, row = (i * THREADS + thread()) / pieces, inside = row % TILE;
    const int at = (tile - down) * TILE + inside;
    const int page = of[i];
    copy_16(slot + place(row, pieces, piece),
            part + static_cast<i64>(page) * cache.page_stride +
                ((inside & page_mask) * cache.token_stride + (first + piece) * 16),
            at >= 0 && at < length);
  }
}

// The attention of one query of each of `group` heads, q and out of the first of them, over `length` tokens.
DEVICE void attend(const u16* q, u16* out, const Cache& cache, int length, int group, float scale, int q_head,
                   int o_head) {
  const int warp = thread() / 32, lane = thread() % 32, g = lane / 4, t = lane % 4, me = share();
  unsigned char* const keys = shared();
  unsigned char* const values = keys + DEPTH * SLOT;
  unsigned char* const rounded = values + DEPTH * SLOT;               // weights p in 16 bits [SHARES, ROWS, TILE]
  float* const weights = reinterpret_cast<float*>(rounded + SHARES * ROWS * TILE * 2);  // [SHARES, OWN_ROWS, stride]
  float* const peaks = weights + ROWS * WEIGHT_STRIDE;                // warps' maxima [SHARES, WARPS, ROWS]
  float* const totals = peaks + SHARES * WARPS * ROWS;                // [ROWS]

  // Where lanes' rows lie: a multiple of 8 rows further is a constant further, another piece an exclusive or.
  const int row8 = lane % 8, v_base = place(lane % 16, BLOCKS, OWN == 1 ? warp % BLOCKS : warp * OWN + lane / 16);
  const int p_base = place(lane % 16, TILE / 8, lane / 16);
  const int k_base = place(32 * warp + 8 * (lane / 16) + row8, PIECES, lane / 8 % 2);

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

  // Tile j of round u is tile last - u * SHARES - j; below 0 there is none.
  const int last = (length + TILE - 1) / TILE - 1, rounds = (last + SHARES) / SHARES;
  int key_pages[1], value_pages[(SHARES * PAGES + 31) / 32], next = 0;
  if (rounds > 0) find_pages<1>(cache, last - me, length, key_pages);
  // K of round `next` and V of the one before, as one group.
  const auto load_next = [&] {
    if (next > 0 && next <= rounds) {
      copy_rows<SHARES>(cache, cache.k + cache.to_v, last - (next - 1) * SHARES, me * BLOCKS, length, value_pages,
                        values + (next - 1) % DEPTH * SLOT);
    }
    if (next < rounds) {
      const int tile = last - next * SHARES;
      copy_rows<1>(cache, cache.k, tile - me, 0, length, key_pages, keys + next % DEPTH * SLOT);
      if (SHARES == 1) {
        value_pages[0] = key_pages[0];
      } else {
        find_pages<SHARES>(cache, tile, length, value_pages);
      }
      if (next + 1 < rounds) find_pages<1>(cache, tile - SHARES - me, length, key_pages);
    }
    end_group();
    ++next;
  };
#pragma unroll
  for (int s = 0; s < DEPTH; ++s) load_next();
  if (SHARES > 1) everyone();  // a block must have begun before another may write into its memory

  // This thread's rows are g and g + 8; its partial sum is of row `mine` of this block's, keys 8j + 2t and 8j + 2t + 1.
  // Several threads have the same one: that costs nothing, and a branch would keep sums and products apart.
  const int mine = (4 * warp + g % 4) % OWN_ROWS;
  const bool sums = ACTIVE == WARPS || warp >= ACTIVE;  // one warp has all of a block's rows where some sum no V
  float o[OWN][4] = {}, peak[2] = {LOWEST, LOWEST}, my_peak = LOWEST, sum = 0.f;
  float shrink[SHARES][2], my_shrink[SHARES];

  // s [ROWS, 32 keys of this warp] from the keys in `slot`.
  const auto score = [&](int slot, float(&s)[4][4]) {
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        u32 b[4];
        load_matrices(b, keys + slot * SLOT + (k_base ^ i % 4 * 32) + i / 4 * 128 + pair * 16 * PIECES * 16);
        multiply_add(s[2 * pair], queries[i], b[0], b[1]);
        multiply_add(s[2 * pair + 1], queries[i], b[2], b[3]);
      }
    }
  };

  // The new maxima, what they shrink earlier sums by, and the weights of this block's tile, given to all blocks. Rows
  // past the group hold anything.
  const auto weigh = [&](const float(&s)[4][4], int round) {
    const int tiles = last - round * SHARES + 1;  // of this round and later
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= group) break;
      float most = s[0][2 * half];
#pragma unroll
      for (int j = 0; j < 4; ++j) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      most = fmaxf(most, exchange(most, 1));
      most = fmaxf(most, exchange(most, 2));
#pragma unroll
      for (int to = 0; to < SHARES; ++to) {
        if (t == 0) put(peaks + (me * WARPS + warp) * ROWS + 8 * half + g, to, most);
      }
    }
    everyone();
    float scaled[2] = {};
    const auto raise = [&](float& peak, int row, int j) {
      float most = peak;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) most = fmaxf(most, peaks[(j * WARPS + w) * ROWS + row]);
      const float by = round == 0 && j == 0 ? 1.f : power_of_2((peak - most) * scale);
      peak = most;
      return by;
    };
#pragma unroll
    for (int j = 0; j < SHARES; ++j) {
      if (j >= tiles) break;
      my_shrink[j] = raise(my_peak, mine * SHARES + me, j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (8 * half >= group) break;
        shrink[j][half] = raise(peak[half], 8 * half + g, j);
        if (j == me) scaled[half] = peak[half] * scale;
      }
    }
    if (me >= tiles) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + g;
      if (8 * half >= group) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = power_of_2(fmaf(s[j][2 * half], scale, -scaled[half]));
        const float high = power_of_2(fmaf(s[j][2 * half + 1], scale, -scaled[half]));
        const u32 pair = round_pair(low, high);
        if (row >= group) continue;
        float* const at = weights + (me * OWN_ROWS + row / SHARES) * WEIGHT_STRIDE + 32 * warp + 8 * j + 2 * t;
        put(reinterpret_cast<float2*>(at), row % SHARES, float2{low, high});
        unsigned char* const to = rounded + me * ROWS * TILE * 2 + place(row, TILE / 8, 4 * warp + j) + 4 * t;
#pragma unroll
        for (int block = 0; block < SHARES; ++block) put(reinterpret_cast<u32*>(to), block, pair);
      }
    }
  };

  if (rounds > 0) {
    wait_groups<DEPTH - 1>();
    barrier();
    float s[4][4] = {};
    score(0, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if ((last - me) * TILE + 32 * warp + 8 * j + 2 * t + e % 2 >= length) s[j][e] = LOWEST;
      }
    }
    weigh(s, 0);
  }
  for (int round = 0; round < rounds; ++round) {
    wait_groups<DEPTH - 2>();  // this round's V and the next one's K are here
    everyone();
    load_next();

    // The next round's scores go between this one's sums: alone, each waits for itself. After the last they are not
    // used.
    float s[4][4] = {};
    if (SHARES == 1 || round + 1 < rounds) score((round + 1) % DEPTH, s);
#pragma unroll
    for (int j = 0; j < SHARES; ++j) {
      if (j > 0 && j > last - round * SHARES) break;
      if (sums) {
        const float* const whole = weights + (j * OWN_ROWS + mine) * WEIGHT_STRIDE;
        const float2* const row = reinterpret_cast<const float2*>(whole + 2 * t);
        sum = round == 0 && j == 0 ? row[0].x : carry(sum, my_shrink[j], row[0].x);
        sum += row[0].y;
#pragma unroll
        for (int i = 1; i < TILE / 8; ++i) {
          sum += row[4 * i].x;
          sum += row[4 * i].y;
        }
      }
      if (ACTIVE < WARPS && warp >= ACTIVE) continue;
#pragma unroll
      for (int b = 0; b < OWN; ++b) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[b][e] *= shrink[j][e / 2];
      }
#pragma unroll
      for (int i = 0; i < TILE / 16; ++i) {
        u32 a[4];
        load_matrices(a, rounded + j * ROWS * TILE * 2 + (p_base ^ i % 4 * 32) + i / 4 * 128);
        const unsigned char* const slot = values + round % DEPTH * SLOT;
        const int far = (j * TILE + 16 * i) * BLOCKS * 16;
        if constexpr (OWN == 1) {
          u32 b[2];
          load_two_transposed(b, slot + v_base + far);
          multiply_add(o[0], a, b[0], b[1]);
        } else {
#pragma unroll
          for (int pair = 0; pair < OWN / 2; ++pair) {
            u32 b[4];
            load_matrices_transposed(b, slot + (v_base ^ pair * 32) + far);
            multiply_add(o[2 * pair], a, b[0], b[1]);
            multiply_add(o[2 * pair + 1], a, b[2], b[3]);
          }
        }
      }
    }
    if (round + 1 < rounds) weigh(s, round + 1);
  }

  sum += exchange(sum, 2);
  sum += exchange(sum, 1);
#pragma unroll
  for (int to = 0; to < SHARES; ++to) {
    if (t == 0 && sums) put(totals + mine * SHARES + me, to, sum);
  }
  everyone();
  if (warp >= ACTIVE) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + g;
    if (row >= group) continue;
    const float total = totals[row], part = total == 0.f || total != total ? 0.f : reciprocal(total);
#pragma unroll
    for (int b = 0; b < OWN; ++b) {
      u16* to = out + row * o_head + (me * BLOCKS + warp * OWN + b) * 8 + 2 * t;
      *reinterpret_cast<u32*>(to) = round_pair(o[b][2 * half] * part, o[b][2 * half + 1] * part);
    }
  }
}

// q, out [tokens, heads, HEAD]; k [pages, 2^page_bits, key heads, HEAD], v the same `to_v` bytes further; starts
// [requests + 1]: where a request's tokens begin in q; lengths [requests]; pages [requests, most_pages]. Strides of q
// and out in elements, of the cache in bytes. group: query heads of a key head, at most 16. scale: of the softmax,
// times log2(e). Grid: SHARES * key heads x requests. A request of several tokens (a graph of single queries may be
// replayed on one) has them done one after the other.
KERNEL
decode(const u16* q, const unsigned char* k, u16* out, const int* starts, const int* lengths, const int* pages,
       i64 to_v, int most_pages, int page_bits, int group, float scale, int q_token, int q_head, int k_page,
       int k_token, int k_head, int o_token, int o_head) {
  const int head = block_x() / SHARES, request = block_y();
  const int begin = starts[request], end = starts[request + 1], length = lengths[request];
  const Cache cache{k + static_cast<i64>(head) * k_head, pages + static_cast<i64>(request) * most_pages, to_v,
                    k_page, k_token, page_bits};
  for (int token = begin; token < end; ++token) {
    attend(q + static_cast<i64>(token) * q_token + head * group * q_head,
           out + static_cast<i64>(token) * o_token + head * group * o_head, cache, length - (end - 1 - token), group,
           scale, q_head, o_head);
  }
}
