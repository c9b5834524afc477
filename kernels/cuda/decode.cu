// Attention of single queries (decode) over paged KV, in the order of FlashAttention 3's prefill.
//
// Order: tiles of 128 keys at multiples of 128, the last tile first. In a tile: scores by ascending 16 elements of the
// head; the running maximum; p = 2^(score * scale - max * scale); a row's sum is four partial sums (keys 8j + 2t and
// 8j + 2t + 1 for t = 0..3, ascending), each carried from tile to tile and scaled once a tile, added at the end as (s0
// + s2) + (s1 + s3); the output is scaled, then takes p (rounded to 16 bits) times V by ascending 16 keys. At the end
// it is divided by the sum. FlashAttention 3 (Shah et al. 2024) does the same with 192 or 128 rows of queries a tile,
// of which a decode fills few; here a block has 8 or 16 rows, the query heads of one key head.
//
// From tile to tile go only the running maximum, the partial sums and the output. So each of SCORERS warps has a tile
// of its own: it copies its K and V, scores it, and waits for the warp before it only for these few numbers. SUMMERS
// warps have the output, some columns each, and take one tile after the other. Gates (mbarriers) tell who may go on.
// Where there are few requests, PARTS blocks share one: each scores all of it and sums a part of V's columns.
// Compiled for HEAD (64, 128), PARTS (1, 2, 4), HALVES (rows: 8 or 16), SCORERS.

constexpr int TILE = 128, COLUMNS = HEAD / PARTS;
constexpr int KEY_PIECES = HEAD / 8, VALUE_PIECES = COLUMNS / 8;  // of 16 bytes, in a row of K and of V
constexpr int SUMMERS = VALUE_PIECES < 8 ? VALUE_PIECES / 2 : 4;  // a warp sums at least two pieces
constexpr int OWN = VALUE_PIECES / SUMMERS;
constexpr int WARPS = SCORERS + SUMMERS, THREADS = 32 * WARPS;
constexpr int GROUP = 16;         // tokens that lie in one page
constexpr int STEPS = TILE / 16;  // of 16 keys
constexpr int ROWS = 16;
static_assert(SCORERS > 1);  // a slot's numbers are read while the next one's are written

// A lane's weights in a step, as multiply_add takes them.
struct alignas(8 * HALVES) Weights {
  u32 part[2 * HALVES];
};

// What belongs to a scorer in shared memory.
struct Slot {
  unsigned char keys[TILE * KEY_PIECES * 16], values[TILE * VALUE_PIECES * 16];
  Weights weights[STEPS][32];
  float peaks[ROWS], shrinks[ROWS], sums[ROWS][4];  // after its tile; shrinks: what it scales earlier sums by
  i64 full, empty, peaked, summed;  // gates: weights and V are there; are used; peaks are there; sums are there
};

struct Shared {
  Slot slots[SCORERS];
  float totals[ROWS];
  i64 done;  // gate: totals are there
};

DEVICE Shared& memory() { return *reinterpret_cast<Shared*>(shared()); }

// Where piece `piece` of row `row` lies: rows of one column of pieces fall into different banks.
DEVICE int place(int row, int pieces, int piece) {
  return (row * pieces + (piece ^ (pieces < 8 ? row * pieces / 8 & pieces - 1 : row & 7))) * 16;
}

// Strides in bytes. v lies `to_v` bytes after k everywhere; a page holds 2^page_bits tokens, 16 to TILE.
struct Cache {
  const unsigned char* k;  // of this key head
  const int* pages;        // of this request
  i64 to_v;
  u32 page_stride, token_stride;
  int page_bits;
};

// One token's work.
struct Work {
  const u16* q;
  u16* out;
  int length, tiles, group, q_head, o_head, part;
  float scale;
};

// Of tile i: its first key; the phase of its slot's gates.
DEVICE int begin_of(const Work& work, int i) { return (work.tiles - 1 - i) * TILE; }
DEVICE int phase_of(int i) { return i / SCORERS & 1; }

// The page of the tile's tokens GROUP * lane and on, for the tile that begins at key `begin`.
DEVICE int find_page(const Cache& cache, int begin, int length) {
  const int lane = thread() % 32, at = begin + GROUP * lane;
  return lane < TILE / GROUP && at < length ? cache.pages[at >> cache.page_bits] : 0;
}

// Where these tokens lie in the cache, in bytes.
DEVICE i64 locate(const Cache& cache, int page) {
  const u32 inside = GROUP * (thread() % 32) & ((1 << cache.page_bits) - 1);
  return static_cast<i64>(static_cast<u32>(page)) * cache.page_stride + inside * cache.token_stride;
}

// A warp's copies of the tile's rows, `pieces` of each from `from`, GROUP rows where `located` has them; zeros from
// `length` on unless `whole`.
template <int pieces, bool whole>
DEVICE void copy_rows(const Cache& cache, const unsigned char* from, int begin, int length, i64 located,
                      unsigned char* to) {
  constexpr int AT_ONCE = 32 / pieces;
  const int piece = thread() % pieces, first = thread() % 32 / pieces;
  from += first * cache.token_stride + piece * 16;
#pragma unroll 2
  for (int group = 0; group < TILE / GROUP; ++group) {
    const unsigned char* const row = from + from_lane(located, group);
#pragma unroll
    for (int r = 0; r < GROUP; r += AT_ONCE) {
      const int at = GROUP * group + r + first;
      copy_16(to + place(at, pieces, piece), row + r * cache.token_stride, whole || begin + at < length);
    }
  }
}

template <int pieces>
DEVICE void copy_tile(const Cache& cache, const unsigned char* from, int begin, int length, i64 located,
                      unsigned char* to) {
  if (begin + TILE <= length) {
    copy_rows<pieces, true>(cache, from, begin, length, located, to);
  } else {
    copy_rows<pieces, false>(cache, from, begin, length, located, to);
  }
}

// Warp `warp` scores the tiles of its slot: every SCORERS-th.
DEVICE void score(const Work& work, const Cache& cache, int warp) {
  Slot& slot = memory().slots[warp];
  const Slot& last = memory().slots[(warp + SCORERS - 1) % SCORERS];  // of the tile before
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  if (warp >= work.tiles) return;

  i64 located = locate(cache, find_page(cache, begin_of(work, warp), work.length));
  copy_tile<KEY_PIECES>(cache, cache.k, begin_of(work, warp), work.length, located, slot.keys);
  end_group();
  int next_page = 0;
  if (warp + SCORERS < work.tiles) next_page = find_page(cache, begin_of(work, warp + SCORERS), work.length);

  // A zero that the compiler does not know: it would move known ones into place for each instruction.
  const u32 zero = work.group >> 16;
  u32 queries[HEAD / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = g + 8 * (part & 1), d = 16 * i + 8 * (part >> 1) + 2 * t;
      const bool there = (part & 1) < HALVES && row < work.group;
      queries[i][part] = there ? *reinterpret_cast<const u32*>(work.q + row * work.q_head + d) : zero;
    }
  }
  // Where a lane's row of K lies: 16 rows further is a constant further, another piece an exclusive or.
  const int k_row = place(8 * (lane / 16) + lane % 8, KEY_PIECES, lane / 8 % 2);

  for (int i = warp; i < work.tiles; i += SCORERS) {
    if (i >= SCORERS) wait(&slot.empty, phase_of(i - SCORERS));
    copy_tile<VALUE_PIECES>(cache, cache.k + cache.to_v + work.part * VALUE_PIECES * 16, begin_of(work, i), work.length,
                            located, slot.values);
    end_group();
    wait_groups<1>();  // K is there
    together();

    float s[2 * STEPS][4] = {};
#pragma unroll
    for (int d = 0; d < HEAD / 16; ++d) {
#pragma unroll
      for (int pair = 0; pair < STEPS; ++pair) {
        u32 b[4];
        load_matrices(b, slot.keys + (k_row ^ d % 4 * 32) + d / 4 * 128 + pair * 16 * KEY_PIECES * 16);
        multiply_add(s[2 * pair], queries[d], b[0], b[1]);
        multiply_add(s[2 * pair + 1], queries[d], b[2], b[3]);
      }
    }
    together();
    if (i + SCORERS < work.tiles) {
      located = locate(cache, next_page);
      copy_tile<KEY_PIECES>(cache, cache.k, begin_of(work, i + SCORERS), work.length, located, slot.keys);
      if (i + 2 * SCORERS < work.tiles) next_page = find_page(cache, begin_of(work, i + 2 * SCORERS), work.length);
    }
    end_group();

    if (i == 0) {
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (begin_of(work, 0) + 8 * j + 2 * t + e % 2 >= work.length) s[j][e] = LOWEST;
        }
      }
    }
    float most[HALVES], by[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      most[half] = s[0][2 * half];
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
        most[half] = fmaxf(most[half], fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      }
      most[half] = fmaxf(most[half], exchange(most[half], 1));
      most[half] = fmaxf(most[half], exchange(most[half], 2));
    }
    if (i > 0) wait(&last.peaked, phase_of(i - 1));
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = 8 * half + g;
      const float before = i > 0 ? last.peaks[row] : LOWEST;
      most[half] = fmaxf(most[half], before);
      by[half] = i > 0 ? power_of_2((before - most[half]) * work.scale) : 1.f;
      if (t == 0) slot.peaks[row] = most[half], slot.shrinks[row] = by[half];
    }
    arrive_as_one(&slot.peaked);

#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      // Only the first tile can have nothing but minus infinity and yet count: its weights are then zero.
      const float scaled = i == 0 && most[half] == LOWEST ? 0.f : most[half] * work.scale;
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) s[j][e] = power_of_2(fmaf(s[j][e], work.scale, -scaled));
      }
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      Weights weights;
#pragma unroll
      for (int part = 0; part < 2 * HALVES; ++part) {
        const int j = 2 * step + part / HALVES, e = part % HALVES * 2;
        weights.part[part] = round_pair(s[j][e], s[j][e + 1]);
      }
      slot.weights[step][lane] = weights;
    }
    wait_groups<1>();  // V is there
    arrive_as_one(&slot.full);

    if (i > 0) wait(&last.summed, phase_of(i - 1));
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = 8 * half + g;
      float sum = i > 0 ? carry(last.sums[row][t], by[half], s[0][2 * half]) : s[0][2 * half];
      sum += s[0][2 * half + 1];
#pragma unroll
      for (int j = 1; j < 2 * STEPS; ++j) {
        sum += s[j][2 * half];
        sum += s[j][2 * half + 1];
      }
      slot.sums[row][t] = sum;
      if (i + 1 < work.tiles) continue;
      sum += exchange(sum, 2);
      sum += exchange(sum, 1);
      if (t == 0) memory().totals[row] = sum;
    }
    arrive_as_one(&slot.summed);
    if (i + 1 == work.tiles) arrive_as_one(&memory().done);
  }
}

// Warp `warp` of the summers: the output of its columns.
DEVICE void sum_values(const Work& work, int warp) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  const int v_row = place(lane % 16, VALUE_PIECES, warp * OWN + lane / 16);
  float o[OWN][4] = {};
  for (int i = 0; i < work.tiles; ++i) {
    Slot& slot = memory().slots[i % SCORERS];
    wait(&slot.full, phase_of(i));
    together();
    Weights weights[STEPS];
    u32 values[STEPS][OWN / 2][4];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      weights[step] = slot.weights[step][lane];
#pragma unroll
      for (int pair = 0; pair < OWN / 2; ++pair) {
        load_matrices_transposed(values[step][pair], slot.values + (v_row ^ pair * 32) + step * 16 * VALUE_PIECES * 16);
      }
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const float by = slot.shrinks[8 * half + g];
#pragma unroll
      for (int b = 0; b < OWN; ++b) {
        o[b][2 * half] *= by;
        o[b][2 * half + 1] *= by;
      }
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const u32* const w = weights[step].part;
      const u32 a[4] = {w[0], HALVES > 1 ? w[1] : 0u, w[HALVES], HALVES > 1 ? w[2 * HALVES - 1] : 0u};
#pragma unroll
      for (int pair = 0; pair < OWN / 2; ++pair) {
        const u32(&b)[4] = values[step][pair];
        multiply_add(o[2 * pair], a, b[0], b[1]);
        multiply_add(o[2 * pair + 1], a, b[2], b[3]);
      }
    }
    arrive_as_one(&slot.empty);
  }
  if (work.tiles > 0) wait(&memory().done, 0);
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int row = 8 * half + g;
    if (row >= work.group) continue;
    const float total = work.tiles > 0 ? memory().totals[row] : 0.f;
    const float part = total == 0.f || total != total ? 0.f : reciprocal(total);
#pragma unroll
    for (int b = 0; b < OWN; ++b) {
      u16* const to = work.out + row * work.o_head + work.part * COLUMNS + (warp * OWN + b) * 8 + 2 * t;
      *reinterpret_cast<u32*>(to) = round_pair(o[b][2 * half] * part, o[b][2 * half + 1] * part);
    }
  }
}

// A token's request, that request's last token + 1, and its length.
struct Request {
  int number, end, length;
};

DEVICE Request request_of(const int* starts, const int* lengths, int requests, int token) {
  // As a rule all have one token: one look then, with loads that do not wait for each other.
  const int guess = token < requests ? token : requests - 1;
  const int begin = fetch(starts + guess), end = fetch(starts + guess + 1), length = fetch(lengths + guess);
  if (begin == token && end > token) return {guess, end, length};
  int low = 0, high = requests;  // the last request that begins at or before the token
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= token ? low : high) = middle;
  }
  return {low, starts[low + 1], lengths[low]};
}

// q, out [tokens, heads, HEAD]; k [pages, 2^page_bits, key heads, HEAD], v the same `to_v` bytes further; starts
// [requests + 1]: where a request's tokens begin in q, the last ones of its `lengths` [requests]; pages [requests,
// most_pages]. Strides of q and out in elements, of the cache in bytes. group: query heads of a key head, at most 8 *
// HALVES. scale: of the softmax, times log2(e). Grid: PARTS * key heads x tokens; tokens of no request stay as they are.
KERNEL
decode(const u16* q, const unsigned char* k, u16* out, const int* starts, const int* lengths, const int* pages,
       i64 to_v, int requests, int most_pages, int page_bits, int group, float scale, int q_token, int q_head,
       int k_page, int k_token, int k_head, int o_token, int o_head) {
  const int head = block_x() / PARTS, token = block_y(), warp = thread() / 32;
  const Request request = request_of(starts, lengths, requests, token);
  if (token >= request.end) return;
  const int length = request.length - (request.end - 1 - token), tiles = length > 0 ? (length + TILE - 1) / TILE : 0;
  const Cache cache{k + static_cast<i64>(head) * k_head, pages + static_cast<i64>(request.number) * most_pages, to_v,
                    static_cast<u32>(k_page), static_cast<u32>(k_token), page_bits};
  const Work work{q + static_cast<i64>(token) * q_token + head * group * q_head,
                  out + static_cast<i64>(token) * o_token + head * group * o_head,
                  length, tiles, group, q_head, o_head, block_x() % PARTS, scale};
  if (thread() % 32 == 0) {  // the threads of a warp would take turns
#pragma unroll 1
    for (int i = warp; i < SCORERS; i += THREADS / 32) {
      Slot& slot = memory().slots[i];
      open(&slot.full, 1);
      open(&slot.empty, SUMMERS);
      open(&slot.peaked, 1);
      open(&slot.summed, 1);
    }
  }
  if (thread() == 0) open(&memory().done, 1);
  barrier();
  if (warp < SCORERS) {
    score(work, cache, warp);
  } else {
    sum_values(work, warp - SCORERS);
  }
}
