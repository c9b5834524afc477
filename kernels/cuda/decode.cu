// Attention of single queries (decode) over paged KV, in the order of FlashAttention 3's prefill.
//
// Order: tiles of 128 keys at multiples of 128, the last tile first. In a tile: scores by ascending 16 elements of the
// head; the running maximum; p = 2^(score * scale - max * scale); a row's sum is four partial sums (keys 8j + 2t and
// 8j + 2t + 1 for t = 0..3, ascending), each carried from tile to tile and scaled once a tile, added at the end as (s0
// + s2) + (s1 + s3); the output is scaled, then takes p (rounded to 16 bits) times V by ascending 16 keys. At the end
// it is divided by the sum. FlashAttention 3 (Shah et al. 2024) does the same with 192 or 128 rows of queries a tile,
// of which a decode fills few; here a block has 8 or 16 rows, the query heads of one key head.
//
// From tile to tile go only the running maximum, the partial sums and the output. So scorers, a warp each, have every
// RING-th tile: they copy its K, score it, and wait for the scorer before them only for these few numbers. Summers, a
// warp each, have the output, some columns each, and take one tile after the other, for which carriers copy V. Gates
// (mbarriers) tell who may go on. Where there are few requests, the PARTS blocks of a cluster share one: each scores
// every PARTS-th run of SCORERS tiles, sends the weights to all, and sums a part of V's columns. What goes to another
// block counts its bytes at that block's gate, which needs no fence. Compiled for HEAD (64, 128), PARTS (1, 2, 4),
// HALVES (rows: 8 or 16), SCORERS, SUMMERS, CARRIERS.

constexpr int TILE = 128, COLUMNS = HEAD / PARTS;
constexpr int KEY_PIECES = HEAD / 8, VALUE_PIECES = COLUMNS / 8;  // of 16 bytes, in a row of K and of V
constexpr int OWN = VALUE_PIECES / SUMMERS;  // pieces that a warp sums
constexpr int THREADS = 32 * (SCORERS + SUMMERS + CARRIERS);
constexpr int RING = SCORERS * PARTS;  // scorers of a cluster; slots of a block
constexpr int GROUP = 16;         // tokens that lie in one page
constexpr int GROUPS = TILE / GROUP, FOUND = 32 / GROUPS;  // in a tile; tiles whose pages a warp finds at once
constexpr int STEPS = TILE / 16;  // of 16 keys
constexpr int ROWS = 16;
constexpr int TAKEN = 2 / HALVES, LOADS = STEPS / TAKEN;  // steps whose weights a lane takes at once; how often
static_assert(SCORERS > 1);  // a scorer's numbers are read while the next ones are written
static_assert(RING % CARRIERS == 0);  // a slot has one carrier, whose waits follow each other

// What a scorer has in its block's memory.
struct alignas(128) Scorer {
  unsigned char keys[TILE * KEY_PIECES * 16];
  float peaks[ROWS], sums[ROWS][4];  // after the tile before
  i64 peaked, summed, cleared;       // gates: peaks are there; sums are there; its slots are used, in every block
};

// What a block's summers take of a tile.
struct alignas(128) Slot {
  unsigned char values[TILE * VALUE_PIECES * 16];
  u32 weights[LOADS][32][4];  // of a lane, as multiply_add takes them
  float shrinks[ROWS];        // what the tile scales earlier sums by
  i64 full, empty;            // gates: all of this is there; is used
};

struct Shared {
  Scorer scorers[SCORERS];
  Slot slots[RING];
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

// Of tile i: its first key; the phase of its gates.
DEVICE int begin_of(const Work& work, int i) { return (work.tiles - 1 - i) * TILE; }
DEVICE int phase_of(int i) { return i / RING & 1; }

// A zero that the compiler does not know.
DEVICE u32 hidden_zero(const Work& work) { return work.group >> 16; }

// Of tiles i, i + step and so on, a lane's group: the page where it lies.
DEVICE int find_page(const Cache& cache, const Work& work, int i, int step) {
  const int lane = thread() % 32, tile = i + lane / GROUPS * step, at = begin_of(work, tile) + GROUP * (lane % GROUPS);
  return tile < work.tiles && at < work.length ? cache.pages[at >> cache.page_bits] : 0;
}

// Where this group lies in the cache, in bytes.
DEVICE i64 locate(const Cache& cache, int page) {
  const u32 inside = GROUP * (thread() % 32) & ((1 << cache.page_bits) - 1);
  return static_cast<i64>(static_cast<u32>(page)) * cache.page_stride + inside * cache.token_stride;
}

// A warp's copies of tile i's rows, `pieces` of each from `from`, its groups where `located` of lanes from `lane` on has
// them; zeros past the length unless `whole`.
template <int pieces, bool whole>
DEVICE void copy_rows(const Cache& cache, const unsigned char* from, const Work& work, int i, i64 located, int lane,
                      unsigned char* to) {
  constexpr int AT_ONCE = 32 / pieces;
  const int piece = thread() % pieces, first = thread() % 32 / pieces, left = work.length - begin_of(work, i);
  from += first * cache.token_stride + piece * 16;
#pragma unroll 2
  for (int group = 0; group < GROUPS; ++group) {
    const unsigned char* const row = from + from_lane(located, lane + group);
#pragma unroll
    for (int r = 0; r < GROUP; r += AT_ONCE) {
      const int at = GROUP * group + r + first;
      copy_16(to + place(at, pieces, piece), row + r * cache.token_stride, whole || at < left);
    }
  }
}

template <int pieces>
DEVICE void copy_tile(const Cache& cache, const unsigned char* from, const Work& work, int i, i64 located, int lane,
                      unsigned char* to) {
  if (begin_of(work, i) + TILE <= work.length) {
    copy_rows<pieces, true>(cache, from, work, i, located, lane, to);
  } else {
    copy_rows<pieces, false>(cache, from, work, i, located, lane, to);
  }
}

// Scorer `warp` of the block scores the tiles of its slot: every RING-th.
DEVICE void score(const Work& work, const Cache& cache, int warp) {
  Scorer& own = memory().scorers[warp];
  const int mine = work.part * SCORERS + warp, next = PARTS == 1 ? (warp + 1) % SCORERS : warp + 1;
  Scorer& after = memory().scorers[next % SCORERS];
  Slot& slot = memory().slots[mine];
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  const bool first_of_block = PARTS > 1 && warp == 0;
  if (mine >= work.tiles) return all_began();

  const int page = find_page(cache, work, mine, RING);
  copy_tile<KEY_PIECES>(cache, cache.k, work, mine, locate(cache, page), 0, own.keys);
  end_group();
  int next_page = find_page(cache, work, mine + RING, RING);

  const u32 zero = hidden_zero(work);  // the compiler would move one that it knows into place for each instruction
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

  all_began();
  for (int i = mine; i < work.tiles; i += RING) {
    if (first_of_block && lane == 0 && i > 0) {
      expect(&own.peaked, 8 * HALVES * 4);
      expect(&own.summed, 32 * HALVES * 4);
    }
    wait_groups<0>();  // K is there
    together();

    float s[2 * STEPS][4] = {};
#pragma unroll
    for (int d = 0; d < HEAD / 16; ++d) {
#pragma unroll
      for (int pair = 0; pair < STEPS; ++pair) {
        u32 b[4];
        load_matrices(b, own.keys + (k_row ^ d % 4 * 32) + d / 4 * 128 + pair * 16 * KEY_PIECES * 16);
        multiply_add(s[2 * pair], queries[d], b[0], b[1]);
        multiply_add(s[2 * pair + 1], queries[d], b[2], b[3]);
      }
    }
    together();
    if (i + RING < work.tiles) {
      copy_tile<KEY_PIECES>(cache, cache.k, work, i + RING, locate(cache, next_page), 0, own.keys);
      next_page = find_page(cache, work, i + 2 * RING, RING);
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
    if (i > 0) wait(&own.peaked, phase_of(i - 1));
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = 8 * half + g;
      const float before = i > 0 ? own.peaks[row] : LOWEST;
      most[half] = fmaxf(most[half], before);
      by[half] = i > 0 ? power_of_2((before - most[half]) * work.scale) : 1.f;
    }
    if (i + 1 < work.tiles) {
      together();  // all have seen the peaks before, which may be overwritten once these are sent
      if (next < SCORERS) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) after.peaks[8 * half + g] = most[half];  // four lanes, one value
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
      // Only the first tile can have nothing but minus infinity and yet count: its weights are then zero.
      const float scaled = i == 0 && most[half] == LOWEST ? 0.f : most[half] * work.scale;
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) s[j][e] = power_of_2(fmaf(s[j][e], work.scale, -scaled));
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
        weights[part] = round_pair(s[j][e], s[j][e + 1]);
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

// Carrier `warp` of the block copies V of every CARRIERS-th tile.
DEVICE void carry_values(const Work& work, const Cache& cache, int warp) {
  const unsigned char* const from = cache.k + cache.to_v + work.part * VALUE_PIECES * 16;
  int next_page = find_page(cache, work, warp, CARRIERS);
  for (int first = warp; first < work.tiles; first += FOUND * CARRIERS) {
    const i64 located = locate(cache, next_page);
    next_page = find_page(cache, work, first + FOUND * CARRIERS, CARRIERS);  // is there when these tiles are copied
    for (int n = 0; n < FOUND && first + n * CARRIERS < work.tiles; ++n) {
      const int i = first + n * CARRIERS;
      Slot& slot = memory().slots[i % RING];
      if (i >= RING) wait(&slot.empty, phase_of(i - RING));
      if (PARTS > 1 && thread() % 32 == 0) expect(&slot.full, sizeof slot.weights + 8 * HALVES * 4);
      together();
      copy_tile<VALUE_PIECES>(cache, from, work, i, located, GROUPS * n, slot.values);
      arrive_when_copied(&slot.full);
    }
  }
  end_group();
  wait_groups<0>();  // no copy outlives the thread that began it
  all_began();
}

// What a lane of a summer takes of a tile.
struct Taken {
  u32 weights[LOADS][4], values[STEPS][OWN / 2][4];
  float by[HALVES];
  int slot;
};

// Where a summer is: a slot, its phase, and what a lane takes there.
struct Turn {
  int slot, phase, v_row;
};

template <class Between>
DEVICE void take(Taken& taken, Turn& turn, Between between) {
  const int lane = thread() % 32, v_row = turn.v_row, at = turn.slot;
  Slot& slot = memory().slots[at];
  wait(&slot.full, turn.phase);
  together();
  if (++turn.slot == RING) turn.slot = 0, turn.phase ^= 1;
#pragma unroll
  for (int half = 0; half < HALVES; ++half) taken.by[half] = slot.shrinks[8 * half + lane / 4];
#pragma unroll
  for (int load = 0; load < LOADS; ++load) {
#pragma unroll
    for (int part = 0; part < 4; ++part) taken.weights[load][part] = slot.weights[load][lane][part];
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int pair = 0; pair < OWN / 2; ++pair) {
      load_matrices_transposed(taken.values[step][pair],
                               slot.values + (v_row ^ pair * 32) + step * 16 * VALUE_PIECES * 16);
    }
    between(step);
  }
  arrive_as_one(&slot.empty);
  taken.slot = at;
}

// Tells the block that scores for it that the slot of tile i is free: after the loads of all that blocks send there. Only
// what someone waits for goes to another block: that one may be gone afterwards.
DEVICE void clear(const Taken& taken, const Work& work, int i) {
  if (PARTS == 1 || i + RING >= work.tiles) return;
  u32 values = 0;
#pragma unroll
  for (int half = 0; half < HALVES; ++half) values |= bits_of(taken.by[half]);
#pragma unroll
  for (int load = 0; load < LOADS; ++load) {
#pragma unroll
    for (int part = 0; part < 4; ++part) values |= taken.weights[load][part];
  }
  const int none = zero_after(values, hidden_zero(work));
  if (thread() % 32 == 0) {
    arrive_at(&memory().scorers[taken.slot % SCORERS].cleared, taken.slot / SCORERS + none);
  }
}

DEVICE void shrink(float (&o)[OWN][4], const Taken& taken) {
#pragma unroll
  for (int b = 0; b < OWN; ++b) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      o[b][2 * half] *= taken.by[half];
      o[b][2 * half + 1] *= taken.by[half];
    }
  }
}

DEVICE void add_step(float (&o)[OWN][4], const Taken& taken, int step) {
  const u32* const w = taken.weights[step / TAKEN] + step % TAKEN * 2;
  const u32 a[4] = {w[0], HALVES > 1 ? w[1] : 0u, w[HALVES], HALVES > 1 ? w[2 * HALVES - 1] : 0u};
#pragma unroll
  for (int pair = 0; pair < OWN / 2; ++pair) {
    const u32(&b)[4] = taken.values[step][pair];
    multiply_add(o[2 * pair], a, b[0], b[1]);
    multiply_add(o[2 * pair + 1], a, b[2], b[3]);
  }
}

DEVICE void add(float (&o)[OWN][4], const Taken& taken) {
  shrink(o, taken);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) add_step(o, taken, step);
}

// Adds tile i's and takes the next one's: between the additions, each of which waits for the one before.
DEVICE void add_and_take(float (&o)[OWN][4], const Taken& taken, Taken& next, const Work& work, int i, Turn& turn) {
  if (i + 1 >= work.tiles) return add(o, taken);
  shrink(o, taken);
  add_step(o, taken, 0);
  take(next, turn, [&](int step) {
    if (step + 1 < STEPS) add_step(o, taken, step + 1);
  });
  clear(taken, work, i);  // here nobody waits for its loads
}

// Summer `warp` of the block: the output of its columns.
DEVICE void sum_values(const Work& work, int warp) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  float o[OWN][4] = {};
  Taken now;
  Turn turn{0, 0, keep(place(lane % 16, VALUE_PIECES, warp * OWN + lane / 16))};
  all_began();
  if (PARTS == 1) {
    for (int i = 0; i < work.tiles; ++i) {
      take(now, turn, [](int) {});
      add(o, now);
    }
  } else {
    Taken then;  // the next tile's are taken before this one's are added: here every tile waits for the one before
    if (work.tiles > 0) take(now, turn, [](int) {});
    for (int i = 0; i < work.tiles; i += 2) {
      add_and_take(o, now, then, work, i, turn);
      if (i + 1 < work.tiles) add_and_take(o, then, now, work, i + 1, turn);
    }
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
  if (thread() % 32 == 0) {  // a warp's threads would take turns
#pragma unroll 1
    for (int i = warp; i < RING; i += THREADS / 32) {
      if (i < SCORERS) {
        Scorer& scorer = memory().scorers[i];
        open(&scorer.peaked, 1);
        open(&scorer.summed, 1);
        open(&scorer.cleared, SUMMERS * PARTS);
      }
      Slot& slot = memory().slots[i];
      open(&slot.full, 33);  // V by a warp, and the weights
      open(&slot.empty, SUMMERS);
    }
  }
  if (thread() == 0) {
    open(&memory().done, 1);
    if (PARTS > 1) expect(&memory().done, 8 * HALVES * 4);
  }
  begin();
  if (warp < SCORERS) {
    score(work, cache, warp);
  } else if (warp < SCORERS + SUMMERS) {
    sum_values(work, warp - SCORERS);
  } else {
    carry_values(work, cache, warp - SCORERS - SUMMERS);
  }
}
