// Decode attention over paged KV, with the same bits as FlashAttention 3's prefill (Shah et al. 2024).
//
//   out[t, h] = softmax(scale * q[t, h] K^T) V, where K and V are the keys and values of t's request up to t itself.
//
// q, out [tokens, heads, HEAD] and k, v [pages, page size, key heads, HEAD] are all bf16 or all fp16; sums are fp32.
// If EIGHTHS is 1, k and v are e4m3, and an element stands for fp32(element) * scale, rounded to q's type: eighths.h.
//
// Order of one output row (token, query head). Keys are cut into tiles of TILE that start at multiples of TILE, and the
// tiles are processed from the last to the first. TILE is FlashAttention 3's for the head size. Each tile:
//   1. computes the scores q k by ascending steps of 16 elements of the head;
//   2. updates the running maximum, then computes p = 2^(score * scale - max * scale);
//   3. rescales four partial sums of p, then adds p: sum t (0 to 3) takes keys 8j + 2t and 8j + 2t + 1, j ascending
//      (if CONTRACT is 1, the rescale and the first addition are one FMA);
//   4. rescales the output, then adds p (rounded to 16 bits) times V by ascending steps of 16 keys.
// After the last tile, the output is multiplied by the reciprocal of (s0 + s2) + (s1 + s3). FlashAttention 3 has tiles
// of 128 or 192 query rows, most of them empty in a decode; this kernel has 8 or 16: the query heads of one key head.
//
// Only the running maximum, the partial sums and the output pass from tile to tile, so tiles overlap. Warps have roles:
//   - A scorer has every RING-th tile. It copies the tile's K, computes scores, waits for the maximum and the partial
//     sums of the previous tile, and writes the weights p to a slot of a ring buffer.
//   - A summer holds some columns of the output and adds the slots' tiles in order.
//   - A carrier copies V to the slots.
// Warps synchronize by mbarriers. If there are few requests, a cluster of PARTS blocks shares the work of one token and
// key head: each block scores every PARTS-th run of SCORERS tiles, sends the weights to all blocks, and sums HEAD /
// PARTS columns of V. A store to another block counts its bytes at that block's mbarrier, so no fence is needed.
//
// Compiled for HEAD (64, 128, 256), TILE, PARTS (1, 2, 4, 8), HALVES (1, 2: 8 or 16 rows), SCORERS, SUMMERS, CARRIERS,
// APART (where the summers are), EIGHTHS (0, 1) and LATE; of EIGHTHS, SHARES: the carriers that share a tile. LATE is 1
// where the slots hold V's e4m3 bytes, which the summers convert between their products; else the carriers convert them.
// Limits: sm_80 or later, clusters sm_90 or later, EIGHTHS sm_89 or later; at most 16 query heads per key head; pages of
// a power of two of tokens, at least 16; no sliding window, softcap, sinks or ALiBi.

constexpr int COLUMNS = HEAD / PARTS;
constexpr int KEY_PIECES = HEAD / 8, VALUE_PIECES = COLUMNS / 8;  // pieces of 16 bytes in a row of K and of V
constexpr int OWN = VALUE_PIECES / SUMMERS;  // pieces of V that a summer sums
// Warps w, w + 4, .. share a quarter of the multiprocessor. APART: the summers, at most two, have the last quarter alone:
// warps 3 and 7. Some warps may then have no work.
static_assert(!APART || SUMMERS <= 2);
constexpr int BUSY = SCORERS + SUMMERS + CARRIERS, WARPS = APART && BUSY < 4 * SUMMERS ? 4 * SUMMERS : BUSY;
constexpr int THREADS = 32 * WARPS;
constexpr int RING = SCORERS * PARTS;  // scorers of a cluster, and slots of a block
constexpr int STEPS = TILE / 16;  // steps of 16 keys in a tile
constexpr int ROWS = 16;
constexpr int TAKEN = 2 / HALVES;  // steps per load of weights
constexpr int LOADS = (STEPS + TAKEN - 1) / TAKEN;  // per tile; half of the last load may be zeros
// A scorer reads its own numbers while it writes those of the next scorer, which another block may hold.
static_assert(RING > 1);
#if LATE
static_assert(EIGHTHS && SHARES == 1 && STEPS % 2 == 0 && VALUE_PIECES % 2 == 0 && OWN % 2 == 0);
constexpr int TEAMS = CARRIERS, FILLS = 33, KEY_BYTES = TILE * HEAD;
#elif EIGHTHS
constexpr int TEAMS = CARRIERS / SHARES, SHARE = GROUPS / SHARES;  // teams of carriers; groups of a carrier's share
constexpr int UNDER_WAY = RING / TEAMS < 6 ? RING / TEAMS : 6;  // tiles that a team copies at once, at most
constexpr int FILLS = SHARES + 1;  // arrivals that fill a slot: of the carriers of V, and 1 of the weights
static_assert(CARRIERS % SHARES == 0 && GROUPS % SHARES == 0);
constexpr int KEY_BYTES = TILE * HEAD;  // of a scorer's tile of K
#else
constexpr int TEAMS = CARRIERS, KEY_BYTES = TILE * KEY_PIECES * 16;
constexpr int FILLS = 33;  // 32 lanes that copy V, and 1 for the weights
constexpr int EARLY = PARTS > 1 ? 3 : 1;  // loads of K ahead of their products
constexpr int PRODUCTS = HEAD / 16 * STEPS;  // pairs of products of a tile's scores
#endif
static_assert(RING % TEAMS == 0);  // each slot has one team of carriers, which waits for the slot's phases in turn

constexpr int SLOT_PIECES = LATE ? VALUE_PIECES / 2 : VALUE_PIECES;  // pieces of 16 bytes in a row of a slot

// One scorer's shared memory.
struct alignas(128) Scorer {
  unsigned char keys[KEY_BYTES];
  float peaks[ROWS], sums[ROWS][4];  // running maxima and partial sums after the previous tile
  i64 peaked, summed, cleared;       // mbarriers: peaks written; sums written; slot free in every block
};

// One tile's inputs for the summers of a block.
struct alignas(128) Slot {
  unsigned char values[TILE * SLOT_PIECES * 16];
  u32 weights[LOADS][32][4];  // per lane, in the layout of multiply_add's b: of each step, halves of rows by eights of keys
  float shrinks[ROWS];        // the tile's rescale factors for earlier sums
  i64 full, empty;            // mbarriers: slot filled; slot free
};

struct Shared {
  Scorer scorers[SCORERS];
  Slot slots[RING];
#if EIGHTHS
  u32 queries[HEAD / 16][32][4];  // per step and lane, as multiply_add takes them
#endif
  float totals[ROWS];
  i64 done;  // mbarrier: totals written
};

DEVICE Shared& memory() { return *reinterpret_cast<Shared*>(shared()); }

// The work of a cluster: one token and the `group` query heads of one key head. part: this block's rank.
struct Work {
  const u16* q;
  u16* out;
  int tiles, group, q_head, o_head, part;
  float scale;
#if EIGHTHS
  float k_scale, v_scale;  // of the key head
#endif
};

// The parity of the phases of tile i's mbarriers.
DEVICE int phase_of(int i) { return i / RING & 1; }

// A zero that the compiler cannot prove to be zero.
DEVICE u32 hidden_zero(const Work& work) { return work.group >> 16; }

// Copies the keys of tile i.
DEVICE void copy_keys(const Cache& cache, int i, i64 located, unsigned char* to) {
#if EIGHTHS
  copy_tile<KEY_PIECES / 2>(cache, cache.k, i, located, 0, to);
#else
  copy_tile<KEY_PIECES>(cache, cache.k, i, located, 0, to);
#endif
}

#if LATE
// The scores of a tile whose keys are e4m3. A matrix of eight keys and 16 bytes gives a lane four bytes that lie side by
// side, 4 t to 4 t + 3 of a key's step, and the queries lie the same way: Hopper adds a step's 16 products at once. The
// loop is short for the instruction cache, which other kernels of a model fill in the meantime, and as registers cannot be
// chosen by a number, the queries lie in shared memory. halves: queries are in fp16, which holds every e4m3 number.
template <bool scaled, bool halves>
DEVICE void multiply_words(float (&s)[2 * STEPS][4], const unsigned char* keys, float scale) {
  constexpr int PIECES = HEAD / 16, TURNED = PIECES < 8 ? PIECES : 8;  // pieces of a key; those that change places
  constexpr int LOADS_OF_STEP = TILE / 32;
  const int lane = thread() % 32, own = keep(place(lane, PIECES, 0));
  u32 words[2][LOADS_OF_STEP][4];
  const auto load = [&](u32 (&to)[LOADS_OF_STEP][4], int step) {
    const unsigned char* const at = keys + (own ^ step % TURNED * 16) + step / TURNED * 128;
#pragma unroll
    for (int n = 0; n < LOADS_OF_STEP; ++n) load_matrices(to[n], at + n * 32 * PIECES * 16);
  };
  const auto convert = [&](u32 (&to)[4][2], const u32 (&from)[4]) {
#pragma unroll
    for (int eight = 0; eight < 4; ++eight) {
      if (halves) unpack_eighths(from[eight], to[eight][0], to[eight][1]);
      else round_word<scaled>(from[eight], scale, to[eight][0], to[eight][1]);
    }
  };
  load(words[0], 0);
#pragma unroll 1
  for (int begin = 0; begin < HEAD / 16; begin += 2) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int step = begin + odd;
      u32 queries[4], b[2][4][2];
#pragma unroll
      for (int part = 0; part < 4; ++part) queries[part] = memory().queries[step][lane][part];
      load(words[1 - odd], step + 1 < HEAD / 16 ? step + 1 : step);  // at the end, read in vain
      convert(b[0], words[odd][0]);
#pragma unroll
      for (int n = 0; n < LOADS_OF_STEP; ++n) {
        if (n + 1 < LOADS_OF_STEP) convert(b[(n + 1) % 2], words[odd][n + 1]);
#pragma unroll
        for (int eight = 0; eight < 4; ++eight) {
          float(&sums)[4] = s[n * 4 + eight];
          const u32(&pair)[2] = b[n % 2][eight];
          if (halves) multiply_add_halves(sums, queries, pair[0], pair[1]);
          else multiply_add(sums, queries, pair[0], pair[1]);
        }
      }
    }
  }
}

// Stores the queries for multiply_words, and returns the scale of the softmax for their scores. halves: whether K's scale
// is 1, and fp16 holds all queries. Then keys need one instruction for two elements, and products and sums are the same
// numbers, times a power of 2. bf16 queries get a shift of their exponents, which the returned scale takes back. fp16 holds
// them if all, but zeros, are then in its normal range: below it, the instruction might align products in another way. The
// bounds of the exponents keep sums and scales in fp32's normal range. All scorers of a cluster find the same.
DEVICE float store_queries(const Work& work, bool& halves) {
  constexpr int LARGEST = 142, SPAN = 29;  // the exponent of the largest fp16 number; normal exponents below it
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  u32 words[HEAD / 16][4];
  int most = 0;  // exponent of a query
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = g + 8 * (part & 1), d = 16 * i + 4 * t + 2 * (part >> 1);
      const bool there = (part & 1) < HALVES && row < work.group;
      words[i][part] = there ? *reinterpret_cast<const u32*>(work.q + row * work.q_head + d) : 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int exponent = words[i][part] >> 16 * e + 7 & 255;
        most = exponent > most ? exponent : most;
      }
    }
  }
  float by = 1.f;
  halves = work.k_scale == 1.f;
#if BRAIN
  most = greatest(most);
  halves = halves && most >= 64 && most <= 190;
  int unfit = 0;
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const u32 query = words[i][n / 2] >> n % 2 * 16 & 0x7fff;
      if (query && static_cast<int>(query >> 7) < most - SPAN) unfit = 1;
    }
  }
  if (greatest(unfit)) halves = false;
  if (halves) {
    const int shift = LARGEST - most;
    by = float_of(127 - shift << 23);
    const float up = float_of(127 + shift << 23);
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const u32 pair = words[i][part];
        words[i][part] = halves_of(float_of(pair << 16) * up, float_of(pair & 0xffff0000) * up);
      }
    }
  }
#endif
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) memory().queries[i][lane][part] = words[i][part];
  }
  return work.scale * by;
}
#elif EIGHTHS
// The lower two bytes of words[0] and [1], then of [2] and [3]: elements 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9 of a
// key's step, of two eights of keys, as the instruction takes these elements. at: of this lane's first key and the step.
DEVICE void load_pairs(u32 (&words)[4], const unsigned char* at, int pair) {
  constexpr int ROW = KEY_PIECES / 2 * 16;  // bytes of a key
#pragma unroll
  for (int n = 0; n < 4; ++n) words[n] = load_pair(at + (pair * 16 + n / 2 * 8) * ROW + n % 2 * 8);
}

// The scores of a tile whose keys are e4m3, converted on their way to the products. A loop over the steps of the head, as
// other kernels of a model take the instruction cache in the meantime: short code arrives sooner. So the queries lie in
// shared memory, where a step can be chosen.
template <bool scaled>
DEVICE void multiply_keys(float (&s)[2 * STEPS][4], const unsigned char* keys, float scale) {
  constexpr int AHEAD = STEPS % 4 ? STEPS - 1 : 3;  // loads of 16 keys, ahead of their products
  constexpr int RAW = KEY_PIECES / 2, TURNED = RAW < 8 ? RAW : 8;  // pieces of a key; those that change places
  static_assert(STEPS % (AHEAD + 1) == 0);
  const int lane = thread() % 32, own = keep(place(lane / 4, RAW, 0) + lane % 4 * 2);
  const auto place_of = [&](int step) { return keys + (own ^ step % TURNED * 16) + step / TURNED * 128; };
  u32 b[AHEAD + 1][4];
  const unsigned char* now = place_of(0);
#pragma unroll
  for (int n = 0; n < AHEAD; ++n) load_pairs(b[n], now, n);
#pragma unroll 1
  for (int step = 0; step < HEAD / 16; ++step) {
    const unsigned char* const next = place_of(step + 1 < HEAD / 16 ? step + 1 : step);  // at the end, read in vain
    u32 queries[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) queries[part] = memory().queries[step][lane][part];
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
      load_pairs(b[(n + AHEAD) % (AHEAD + 1)], n + AHEAD < STEPS ? now : next, (n + AHEAD) % STEPS);
      const u32(&words)[4] = b[n % (AHEAD + 1)];
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const u32 low = round_eighths<scaled>(words[eight * 2], scale);
        const u32 high = round_eighths<scaled>(words[eight * 2 + 1], scale);
        multiply_add(s[n * 2 + eight], queries, low, high);
      }
    }
    now = next;
  }
}
#endif

// Scorer `warp` of the block: scores every RING-th tile, all of which use one slot.
DEVICE void score(const Work& work, const Cache& cache, int warp) {
  Scorer& own = memory().scorers[warp];
  const int mine = work.part * SCORERS + warp, next = PARTS == 1 ? (warp + 1) % SCORERS : warp + 1;
  Scorer& after = memory().scorers[next % SCORERS];
  Slot& slot = memory().slots[mine];
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  const bool first_of_block = PARTS > 1 && warp == 0;
  if (mine >= work.tiles) return all_began();

  const int page = find_page(cache, mine, RING);
  copy_keys(cache, mine, locate(cache, mine, RING, page), own.keys);
  end_group();
  int next_page = find_page(cache, mine + RING, RING);

#if LATE
  bool halves;
  const float scale = store_queries(work, halves);
#else
  const float scale = work.scale;
#if EIGHTHS
  auto& queries = memory().queries;  // all scorers store the same, and a lane loads what the lane stored
  const u32 zero = 0;
#else
  u32 queries[HEAD / 16][4];
  const u32 zero = hidden_zero(work);  // the compiler would set a known zero again for each instruction
#endif
#pragma unroll
  for (int i = 0; i < HEAD / 16; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = g + 8 * (part & 1), d = 16 * i + 8 * (part >> 1) + 2 * t;
      const bool there = (part & 1) < HALVES && row < work.group;
      const u32 query = there ? *reinterpret_cast<const u32*>(work.q + row * work.q_head + d) : zero;
#if EIGHTHS
      queries[i][lane][part] = query;
#else
      queries[i][part] = query;
#endif
    }
  }
#endif
#if !EIGHTHS
  // Offset of this lane's row of K. The row 16 further is a constant away; other pieces differ by an exclusive or.
  const int k_row = place(8 * (lane / 16) + lane % 8, KEY_PIECES, lane / 8 % 2);
#endif

  all_began();
  for (int i = mine; i < work.tiles; i += RING) {
    if (first_of_block && lane == 0 && i > 0) {
      expect(&own.peaked, 8 * HALVES * 4);
      expect(&own.summed, 32 * HALVES * 4);
    }
    wait_groups<0>();  // K has arrived
    together();

    float s[2 * STEPS][4] = {};
#if LATE
    if (halves) multiply_words<false, true>(s, own.keys, 1.f);
    else if (work.k_scale == 1.f) multiply_words<false, false>(s, own.keys, 1.f);
    else multiply_words<true, false>(s, own.keys, work.k_scale);
#elif EIGHTHS
    if (work.k_scale == 1.f) multiply_keys<false>(s, own.keys, work.k_scale);
    else multiply_keys<true>(s, own.keys, work.k_scale);
#else
    u32 b[EARLY + 1][4];  // loads take longer than the products between them
    const auto load_keys = [&](int n) {
      const int d = n / STEPS, pair = n % STEPS;
      load_matrices(b[n % (EARLY + 1)], own.keys + (k_row ^ d % 4 * 32) + d / 4 * 128 + pair * 16 * KEY_PIECES * 16);
    };
#pragma unroll
    for (int n = 0; n < EARLY; ++n) load_keys(n);
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) {
      if (n + EARLY < PRODUCTS) load_keys(n + EARLY);
      const u32(&keys)[4] = b[n % (EARLY + 1)];
      multiply_add(s[n % STEPS * 2], queries[n / STEPS], keys[0], keys[1]);
      multiply_add(s[n % STEPS * 2 + 1], queries[n / STEPS], keys[2], keys[3]);
    }
#endif
    together();
    if (i + RING < work.tiles) {
      copy_keys(cache, i + RING, locate(cache, i + RING, RING, next_page), own.keys);
      next_page = find_page(cache, i + 2 * RING, RING);
    }
    end_group();

    if (i == 0) {
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (begin_of(cache, 0) + 8 * j + 2 * t + e % 2 >= cache.length) s[j][e] = LOWEST;
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
    if (i > 0) wait(&own.peaked, phase_of(i - 1));
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = 8 * half + g;
      const float before = i > 0 ? own.peaks[row] : LOWEST;
      most[half] = fmaxf(most[half], before);
      by[half] = i > 0 ? power_of_2((before - most[half]) * scale) : 1.f;
    }
    if (i + 1 < work.tiles) {
      together();  // all lanes have read own.peaks, which may change once the new peaks are sent
      if (next < SCORERS) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) after.peaks[8 * half + g] = most[half];  // equal in four lanes
        arrive_as_one(&after.peaked);
      } else if (t == 0) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          hand(&after.peaks[8 * half + g], most[half], &after.peaked, (work.part + 1) % PARTS);
        }
      }
    }

#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      // In the first tile, a row whose scores are all minus infinity gets weights of zero, not NaN.
      const float scaled = i == 0 && most[half] == LOWEST ? 0.f : most[half] * scale;
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) s[j][e] = power_of_2(fmaf(s[j][e], scale, -scaled));
      }
    }
    if (i >= RING) wait(PARTS == 1 ? &slot.empty : &own.cleared, phase_of(i - RING));
    if (PARTS == 1) {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        if (t == 0) slot.shrinks[8 * half + g] = by[half];
      }
    } else {
#pragma unroll
      for (int to = 0; to < PARTS; ++to) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          if (t == 0) hand(&slot.shrinks[8 * half + g], by[half], &slot.full, to);
        }
      }
    }
#pragma unroll
    for (int load = 0; load < LOADS; ++load) {
      u32 weights[4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int step = TAKEN * load + part / (2 * HALVES), of = part % (2 * HALVES);
        const int j = 2 * step + of / HALVES, e = of % HALVES * 2;
        weights[part] = step < STEPS ? round_pair(s[j][e], s[j][e + 1]) : 0;
      }
      if (PARTS == 1) {
#pragma unroll
        for (int part = 0; part < 4; ++part) slot.weights[load][lane][part] = weights[part];
      } else {
#pragma unroll
        for (int to = 0; to < PARTS; ++to) hand(slot.weights[load][lane], weights, &slot.full, to);
      }
    }
    if (PARTS == 1) arrive_as_one(&slot.full);

    if (i > 0) wait(&own.summed, phase_of(i - 1));
    float sums[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = 8 * half + g;
      float& sum = sums[half];
      sum = i > 0 ? carry(own.sums[row][t], by[half], s[0][2 * half]) : s[0][2 * half];
      sum += s[0][2 * half + 1];
#pragma unroll
      for (int j = 1; j < 2 * STEPS; ++j) {
        sum += s[j][2 * half];
        sum += s[j][2 * half + 1];
      }
    }
    if (i + 1 < work.tiles) {
      if (next < SCORERS) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) after.sums[8 * half + g][t] = sums[half];
        arrive_as_one(&after.summed);
      } else {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          hand(&after.sums[8 * half + g][t], sums[half], &after.summed, (work.part + 1) % PARTS);
        }
      }
      continue;
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = 8 * half + g;
      float sum = sums[half];
      sum += exchange(sum, 2);
      sum += exchange(sum, 1);
      if (t) continue;
      if (PARTS == 1) {
        memory().totals[row] = sum;
      } else {
#pragma unroll
        for (int to = 0; to < PARTS; ++to) hand(&memory().totals[row], sum, &memory().done, to);
      }
    }
    if (PARTS == 1) arrive_as_one(&memory().done);
  }
}

#if EIGHTHS && !LATE
// Carrier `warp` of the block: its team has every TEAMS-th tile, and the carrier SHARE groups of each tile's keys. Copies
// V's bytes to the tile's slot once that is free, and converts a tile while the next tile's bytes arrive. The first
// carrier of a team tells the tile's scorer, as below.
DEVICE void carry_values(const Work& work, const Cache& cache, int warp) {
  const int team = warp / SHARES, member = warp % SHARES;
  const int tiles = work.tiles > team ? (work.tiles - team + TEAMS - 1) / TEAMS : 0;  // of the team
  const unsigned char* const from = cache.k + cache.to_v + work.part * COLUMNS;
  const bool speaks = PARTS > 1 && member == 0;
  bool began = false;
  int next_page = find_page(cache, team, TEAMS);
  i64 located = 0;
  for (int copied = 0, carried = 0; carried < tiles;) {
    const int next = team + copied * TEAMS;
    Slot& slot = memory().slots[next % RING];
    // With a tile under way, no wait for a slot: the summers may wait for that tile.
    if (copied < tiles && (copied == carried || (copied - carried < UNDER_WAY &&
                                                 (next < RING || is_over(&slot.empty, phase_of(next - RING)))))) {
      if (next >= RING) wait(&slot.empty, phase_of(next - RING));
      if (copied % FOUND == 0) {
        located = locate(cache, next, TEAMS, next_page);
        next_page = find_page(cache, next + FOUND * TEAMS, TEAMS);
      }
      const bool first = thread() % 32 == 0;
      if (speaks && first) expect(&slot.full, sizeof slot.weights + 8 * HALVES * 4);
      if (speaks && next >= RING) {
        if (!began) all_began();
        began = true;
        arrive_at(&memory().scorers[next % RING % SCORERS].cleared, next % RING / SCORERS, first);
      }
      together();
      copy_eighths<VALUE_PIECES, SHARE>(cache, from, next, member * SHARE, located, copied % FOUND * GROUPS, slot.values);
      end_group();
      ++copied;
      continue;
    }
    switch (copied - carried) {
      case 1: wait_groups<0>(); break;
      case 2: wait_groups<1>(); break;
      case 3: wait_groups<2>(); break;
      case 4: wait_groups<3>(); break;
      case 5: wait_groups<4>(); break;
      default: wait_groups<5>();
    }
    together();
    Slot& arrived = memory().slots[(team + carried * TEAMS) % RING];
    widen_rows<VALUE_PIECES, SHARE * GROUP>(arrived.values, member * SHARE * GROUP, work.v_scale);
    arrive_as_one(&arrived.full);
    ++carried;
  }
  if (!began) all_began();
}
#else
// Carrier `warp` of the block: copies V of every CARRIERS-th tile to the tile's slot once that is free, and tells the tile's
// scorer. Summers tell nobody in other blocks: such a message could overtake their loads.
DEVICE void carry_values(const Work& work, const Cache& cache, int warp) {
  bool began = false;
  const unsigned char* const from = cache.k + cache.to_v + work.part * SLOT_PIECES * 16;
  int next_page = find_page(cache, warp, CARRIERS);
  for (int first = warp; first < work.tiles; first += FOUND * CARRIERS) {
    const i64 located = locate(cache, first, CARRIERS, next_page);
    next_page = find_page(cache, first + FOUND * CARRIERS, CARRIERS);  // loads while these tiles are copied
    for (int n = 0; n < FOUND && first + n * CARRIERS < work.tiles; ++n) {
      const int i = first + n * CARRIERS;
      Slot& slot = memory().slots[i % RING];
      if (i >= RING) wait(&slot.empty, phase_of(i - RING));
      const bool first = thread() % 32 == 0;
      if (PARTS > 1 && first) expect(&slot.full, sizeof slot.weights + 8 * HALVES * 4);
      if (PARTS > 1 && i >= RING) {  // the tile's scorer, in any block, may send weights
        if (!began) all_began();
        began = true;
        arrive_at(&memory().scorers[i % RING % SCORERS].cleared, i % RING / SCORERS, first);
      }
      together();
#if LATE
      if constexpr (SLOT_PIECES == 1) copy_column(cache, from, i, located, GROUPS * n, slot.values);
      else
#endif
      copy_tile<SLOT_PIECES>(cache, from, i, located, GROUPS * n, slot.values);
      arrive_when_copied(&slot.full);
    }
  }
  end_group();
  wait_groups<0>();  // a thread must not end before its copies
  if (!began) all_began();
}
#endif

constexpr int KEPT = LATE ? 2 : 1;  // steps whose values lie in one load of a summer's
typedef u32 Step[OWN / 2][4];       // a step's values, as multiply_add takes them

// A tile's inputs in the registers of a summer's lane. LATE: the values' bytes, of two keys and two columns a word.
struct Taken {
  u32 weights[LOADS][4], values[STEPS / KEPT][OWN / 2][4];
  float by[HALVES][2];
  int slot;
#if LATE
  Step first;  // the first step's values
#endif
};

// A summer's next slot, the parity of its phase, whether the slot is known to be full, and the offset of this lane's
// values in a slot.
struct Turn {
  int slot, phase, v_row;
  bool full;
};

// Waits for the next slot and loads what is in the slot.
DEVICE void take(Taken& taken, Turn& turn) {
  const int lane = thread() % 32, at = turn.slot;
  const Slot& slot = memory().slots[at];
  if (!turn.full) wait(&slot.full, turn.phase);
  together();
  if (++turn.slot == RING) turn.slot = 0, turn.phase ^= 1;
  taken.slot = at;
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
#pragma unroll
    for (int e = 0; e < 2; ++e) taken.by[half][e] = slot.shrinks[8 * half + lane % 4 * 2 + e];
  }
#pragma unroll
  for (int load = 0; load < LOADS; ++load) {
#pragma unroll
    for (int part = 0; part < 4; ++part) taken.weights[load][part] = slot.weights[load][lane][part];
  }
#pragma unroll
  for (int step = 0; step < STEPS / KEPT; ++step) {
#pragma unroll
    for (int pair = 0; pair < OWN / 2; ++pair) {
      const unsigned char* const values = slot.values + step * 16 * VALUE_PIECES * 16;
      load_matrices_transposed(taken.values[step][pair], values + (turn.v_row ^ pair * (LATE ? 16 : 32)));
    }
  }
}

// Frees the slot of a tile. In a cluster, the arrival could overtake the loads of what a scorer sent, and the next message
// would come too early: the arrival's address depends on the loaded values.
DEVICE void free(const Taken& taken, const Work& work) {
  u32 sent = 0;
#pragma unroll
  for (int half = 0; half < HALVES; ++half) sent |= bits_of(taken.by[half][0]) | bits_of(taken.by[half][1]);
#pragma unroll
  for (int load = 0; load < LOADS; ++load) {
#pragma unroll
    for (int part = 0; part < 4; ++part) sent |= taken.weights[load][part];  // all, if the compiler splits a load
  }
  const u32 zero = PARTS > 1 ? sent & hidden_zero(work) : 0;
  together();
  arrive_if(&memory().slots[taken.slot].empty + zero, thread() % 32 == 0);
}

// Columns of the output in a summer's registers: of each 16 columns and eight rows, a lane has columns g and g + 8 of
// rows 2 t and 2 t + 1. V is the wide side of the products, because there are few rows.
typedef float Sums[OWN / 2][HALVES][4];

DEVICE void shrink(Sums& o, const Taken& taken) {
#pragma unroll
  for (int pair = 0; pair < OWN / 2; ++pair) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[pair][half][e] *= taken.by[half][e % 2];
    }
  }
}

#if LATE
// A step's values in 16 bits. A loaded word has columns 2 g and 2 g + 1 of keys 2 t, then of 2 t + 1: bytes change places.
template <bool scaled>
DEVICE void widen_step(Step& to, const Taken& taken, int step, float scale) {
#pragma unroll
  for (int pair = 0; pair < OWN / 2; ++pair) {
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const u32 word = chosen_bytes(taken.values[step / 2][pair][step % 2 * 2 + eight], 0x3120);
      round_word<scaled>(word, scale, to[pair][2 * eight], to[pair][2 * eight + 1]);
    }
  }
}
#endif

// Adds a step of 16 keys. after: zero, of values that must be there first.
template <class Values>
DEVICE void add_step(Sums& o, const Taken& taken, const Values& values, int step, u32 after) {
  const u32* const w = taken.weights[step / TAKEN] + step % TAKEN * 2;
#pragma unroll
  for (int pair = 0; pair < OWN / 2; ++pair) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      multiply_add(o[pair][half], values[pair], w[half] | after, w[HALVES + half]);
    }
  }
}

// Adds a tile and frees its slot. `next`, if any, gets the next tile between the additions: these depend on each other and
// leave time. Later additions depend on its loads, as the compiler would load last, and then wait before the next branch.
template <bool ahead, bool scaled>
DEVICE void add(Sums& o, const Taken& taken, Taken& next, const Work& work, Turn& turn) {
  u32 loads = 0;
  if (ahead) {
    take(next, turn);
#pragma unroll
    for (int pair = 0; pair < OWN / 2; ++pair) loads |= next.values[STEPS / KEPT - 1][pair][3];
    loads |= next.weights[LOADS - 1][3];
  }
#if LATE
  Step values[2];
#endif
  shrink(o, taken);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    u32 after = 0;
    if (ahead && step == STEPS - 3) after = loads & hidden_zero(work);
    if (ahead && step == STEPS - 1) after = turn.full & hidden_zero(work);
#if LATE
    if (step + 1 < STEPS) widen_step<scaled>(values[(step + 1) % 2], taken, step + 1, work.v_scale);
    else if (ahead) widen_step<scaled>(next.first, next, 0, work.v_scale);
    add_step(o, taken, step ? values[step % 2] : taken.first, step, after);
#else
    add_step(o, taken, taken.values[step], step, after);
#endif
    if (PARTS > 1 && step == 1) free(taken, work);
    if (ahead && step == STEPS - 4) turn.full = is_over(&memory().slots[turn.slot].full, turn.phase);
  }
}

// Adds tile i - 1 and takes tile i, at the same time if the latter waits in its slot.
template <bool scaled>
DEVICE void add_and_take(Sums& o, const Taken& taken, Taken& next, const Work& work, int i, Turn& turn) {
  if (turn.full) return add<true, scaled>(o, taken, next, work, turn);
  add<false, scaled>(o, taken, next, work, turn);
  if (i == work.tiles) return;
  take(next, turn);
#if LATE
  widen_step<scaled>(next.first, next, 0, work.v_scale);
#endif
  turn.full = is_over(&memory().slots[turn.slot].full, turn.phase);
}

// Adds all tiles to a summer's columns of the output.
template <bool scaled>
DEVICE void add_all(Sums& o, Taken& now, const Work& work, Turn& turn) {
  if (PARTS == 1) {
    for (int i = 0; i < work.tiles; ++i) {
      take(now, turn);
#if LATE
      widen_step<scaled>(now.first, now, 0, work.v_scale);
#endif
      free(now, work);
      add<false, scaled>(o, now, now, work, turn);
    }
  } else {
    Taken then;  // the next tile, loaded while this tile is added: in a cluster every tile waits for the previous tile
    if (work.tiles > 0) {
      take(now, turn);
#if LATE
      widen_step<scaled>(now.first, now, 0, work.v_scale);
#endif
    }
    for (int i = 0; i < work.tiles;) {
      add_and_take<scaled>(o, now, then, work, ++i, turn);
      if (i < work.tiles) add_and_take<scaled>(o, then, now, work, ++i, turn);
    }
  }
}

// Summer `warp` of the block: adds all tiles to its columns of the output, divides by the sum, and stores them.
DEVICE void sum_values(const Work& work, int warp) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  Sums o = {};
  Taken now;
#if LATE
  Turn turn{0, 0, keep(place(lane, SLOT_PIECES, warp * OWN / 2)), false};
  all_began();
  if (work.v_scale == 1.f) add_all<false>(o, now, work, turn);
  else add_all<true>(o, now, work, turn);
#else
  Turn turn{0, 0, keep(place(8 * (lane / 16) + lane % 8, VALUE_PIECES, warp * OWN + lane / 8 % 2)), false};
  all_began();
  add_all<false>(o, now, work, turn);
#endif
  if (work.tiles > 0) wait(&memory().done, 0);
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * half + 2 * t + e;
      if (row >= work.group) continue;
      const float total = work.tiles > 0 ? memory().totals[row] : 0.f;
      const float part = total == 0.f || total != total ? 0.f : reciprocal(total);
      u16* const to = work.out + row * work.o_head + work.part * COLUMNS + warp * OWN * 8 + g * KEPT;
#pragma unroll
      for (int pair = 0; pair < OWN / 2; ++pair) {
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const float value = o[pair][half][2 * eight + e] * part;
          to[pair * 16 + eight * (LATE ? 1 : 8)] = static_cast<u16>(round_pair(value, value));
        }
      }
    }
  }
}

// q, out [tokens, heads, HEAD]; k [pages, 2^page_bits, key heads, HEAD]; v has k's layout, `to_v` bytes further.
// starts [requests + 1]: where each request's tokens begin in q. lengths [requests]: keys of each request; its tokens
// in q are the last of these. pages [requests, most_pages]. Strides of q and out in elements, of the cache in bytes.
// group: query heads per key head, at most 8 * HALVES. scale: of the softmax, times log2(e).
// EIGHTHS: k_scales, v_scales: of key head 0; of a further head, scale_head elements on (0: one scale for all).
// Grid: PARTS * key heads by tokens. The kernel does not write the output of tokens that belong to no request.
KERNEL
decode(const u16* q, const unsigned char* k, u16* out, const int* starts, const int* lengths, const int* pages,
       i64 to_v, int requests, int most_pages, int page_bits, int group, float scale, int q_token, int q_head,
       int k_page, int k_token, int k_head, int o_token, int o_head
#if EIGHTHS
       , const float* k_scales, const float* v_scales, int scale_head
#endif
       ) {
  const int head = block_x() / PARTS, token = block_y(), warp = thread() / 32;
  const Request request = request_of(starts, lengths, requests, token);
  if (token >= request.end) return;
  const int length = request.length - (request.end - 1 - token), tiles = tiles_of(length);
  const Cache cache{k + static_cast<i64>(head) * k_head, pages + static_cast<i64>(request.number) * most_pages, to_v,
                    static_cast<u32>(k_page), static_cast<u32>(k_token), page_bits, length, tiles};
  const Work work{q + static_cast<i64>(token) * q_token + head * group * q_head,
                  out + static_cast<i64>(token) * o_token + head * group * o_head,
                  tiles, group, q_head, o_head, block_x() % PARTS, scale
#if EIGHTHS
                  , fetch(k_scales + head * scale_head), fetch(v_scales + head * scale_head)
#endif
  };
  if (thread() % 32 == 0) {  // the lanes of a warp would run one after the other
#pragma unroll 1
    for (int i = warp; i < RING; i += WARPS) {
      if (i < SCORERS) {
        Scorer& scorer = memory().scorers[i];
        open(&scorer.peaked, 1);
        open(&scorer.summed, 1);
        open(&scorer.cleared, PARTS);
      }
      Slot& slot = memory().slots[i];
      open(&slot.full, FILLS);
      open(&slot.empty, SUMMERS);
    }
  }
  if (thread() == 0) {
    open(&memory().done, 1);
    if (PARTS > 1) expect(&memory().done, 8 * HALVES * 4);
  }
  begin();
  const bool sums = APART ? warp % 4 == 3 && warp / 4 < SUMMERS : warp >= SCORERS && warp < SCORERS + SUMMERS;
  const int before = APART ? (warp + 1) / 4 : SUMMERS;  // summers before this warp
  const int other = warp < SCORERS && !APART ? warp : warp - (before < SUMMERS ? before : SUMMERS);
  if (sums) {
    sum_values(work, APART ? warp / 4 : warp - SCORERS);
  } else if (other < SCORERS) {
    score(work, cache, other);
  } else if (other < SCORERS + CARRIERS) {
    carry_values(work, cache, other - SCORERS);
  } else {
    all_began();
  }
}
