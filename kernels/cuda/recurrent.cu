// Gated delta nets and Mamba 2, one token after the other: the convolution before, and the recurrence.
//
// A request's tokens pass through one state in the order of their positions, whatever step brings them, and the state is
// kept exactly (inputs of the convolution in bf16, the recurrence in fp32). So prompts may be cut anywhere, and decode
// has the bits of prefill. Every rounding is written as an instruction, so the bits are the same for every tile.
//
// prepare: y[t, c] = silu(bias[c] + w[c, 0] x[t-3, c] + ... + w[c, 3] x[t, c]) in fp32 in this order, rounded to bf16; and
// the numbers of a token and head that do not depend on the state. A warp has the channels of one head.
//   keyed [tokens, KEY_HEADS, 4]: 1/|k|, scale/|q|, q.k (Mamba 2: only q.k). valued [tokens, HEADS, 2]: decay, step.
// keep: the last three inputs of each request, for the next step. In a decode step (starts null), prepare keeps them.
// scan (scan_one if each request has one token): S [VALUES, KEYS] of a head. With the sums p = S k and r = S q over the
// state before the token,
//   gated delta net: w = step / |k| (v - decay / |k| p); S = decay S + w k^T; o = scale / |q| (decay r + q.k w)
//   Mamba 2: w = step v; S = decay S + w k^T; o = decay r + q.k w + D v     (B is k, C is q)
// A sum over KEYS: SHARERS lanes have KEYS / SHARERS terms each (lane l: terms 4 (l + SHARERS j) .. + 3, ascending; for p,
// in two halves, which are then added). The lanes' sums are added in a butterfly, most distant lanes first.
//
// Not each decode writes the state. A slot also has a log: w, k and decay of the tokens since its state was written.
// With them, scan_one moves the state that it reads to the present, by the same instructions, so the bits are those of
// a state that was written. It writes the state with every EVERY-th token. A step of prompts writes the state, and
// empties the log. A copy of a slot has the log, too. counts [requests]: tokens in the log; prepare and keep_inputs read
// them and move them on.
//
// x [tokens, CHANNELS] bf16 (rows may be strided), y dense. Channels: queries | keys | values, Mamba 2: values | keys |
// queries. weight [CHANNELS, 4], bias [CHANNELS] or null, bf16. conv [slots, 3 + rows of the log, CHANNELS] bf16,
// a slot dense. states [slots, HEADS, VALUES, KEYS] fp32. starts [requests + 1], or null if each request has one token. slots [requests]: 0 and below are
// skipped. fresh [requests], 1 where a request starts at position 0, or null if none does. which [tokens]: the request
// of a token, or null as starts.
//
// Compiled for MAMBA (0, 1), KEYS and VALUES (multiples of 64), KEY_HEADS, HEADS, SHARERS, EVERY, and for fp32 or bf16
// parameters (RATE_FLOAT, BIAS_FLOAT, D_FLOAT). What changes no bit: TILE (tokens in shared memory), ROWS, WARPS, AHEAD
// (1: a lane loads the next token from shared memory before it computes one), UNROLL, SPREAD (1: lanes of a sum are not
// neighbours), RAW (1: bf16 in shared memory, copied asynchronously), SCATTER (1: a lane sums p of its own rows only),
// STREAM (1: states are not kept in the caches), FETCH (tokens of the log that are loaded before one is computed).

constexpr int CHANNELS = 2 * KEY_HEADS * KEYS + HEADS * VALUES;
constexpr int Q_AT = MAMBA ? HEADS * VALUES + KEY_HEADS * KEYS : 0;
constexpr int K_AT = MAMBA ? HEADS * VALUES : KEY_HEADS * KEYS;
constexpr int V_AT = MAMBA ? 0 : 2 * KEY_HEADS * KEYS;
constexpr int GROUPS = 32 / SHARERS, PER = KEYS / SHARERS;  // rows of a warp that are summed at once; keys of a lane
constexpr int OWN = WARPS * GROUPS * ROWS, PARTS_OF_HEAD = VALUES / OWN;  // rows of a block; blocks of a head
constexpr float LOG2E = 1.4426950408889634f;
static_assert(VALUES % OWN == 0 && OWN % 8 == 0 && PER % 4 == 0 && SHARERS % ROWS == 0);

struct alignas(16) Four { float x[4]; };
struct alignas(16) Eight { u32 pairs[4]; };
struct alignas(8) Two { u32 pairs[2]; };
struct alignas(8) Pair { float x[2]; };

#if RAW
typedef u16 Kept;
#else
typedef float Kept;
#endif

struct Memory {
  Kept keys[2][TILE][KEYS], queries[2][TILE][KEYS], values[2][TILE][OWN];
  float numbers[2][TILE][8];
  u16 out[2][TILE][OWN];
};

// The lanes that share a sum: neighbours, or (SPREAD) as far from each other as they can be.
DEVICE int slice_of(int lane) { return SPREAD ? lane / GROUPS : lane % SHARERS; }
DEVICE int group_of(int lane) { return SPREAD ? lane % GROUPS : lane / SHARERS; }
DEVICE float swap(float value, int distance) { return exchange(value, SPREAD ? distance * GROUPS : distance); }

DEVICE float low(u32 pair) { return float_of(pair << 16); }
DEVICE float high(u32 pair) { return float_of(pair & 0xffff0000u); }
DEVICE float exponential(float x) { return power_of_2(times(x, LOG2E)); }
DEVICE float sigmoid(float x) { return reciprocal(plus(1.f, exponential(-x))); }
DEVICE float softplus(float x) { return x <= 20.f ? log_of_1_plus(exponential(x)) : x; }

// Element `at` of bf16 or fp32 numbers.
template <int FLOAT>
DEVICE float number(const void* from, int at) {
  return FLOAT ? static_cast<const float*>(from)[at] : float_of(u32(static_cast<const u16*>(from)[at]) << 16);
}

DEVICE u32 pair_at(const u16* from) { return *reinterpret_cast<const u32*>(from); }

// The tokens since a state was written, at most EVERY - 1, lie behind a slot's inputs: w fp32 [HEADS, VALUES], k bf16
// [KEY_HEADS, KEYS], decay fp32 [HEADS]; then how many.
constexpr int LOG_K = 2 * HEADS * VALUES, LOG_DECAY = LOG_K + KEY_HEADS * KEYS;
constexpr int LOG_ROW = (LOG_DECAY + 2 * HEADS + 7) / 8 * 8;

DEVICE u16* log_of(u16* conv, i64 at) { return conv + at + 3 * CHANNELS; }
DEVICE int* count_of(u16* log) { return reinterpret_cast<int*>(log + (EVERY - 1) * LOG_ROW); }

// Gives `rows` the number of tokens that a slot's log holds, and puts `now(rows)` in its place.
template <class Now>
DEVICE void move_count(int* rows, u16* log, Now now) {
  int* count = count_of(log);
  const int held = u32(*count) < u32(EVERY) ? *count : 0;  // memory that held something else
  *rows = held;
  *count = now(held);
}

struct Step {
  const u16 *x, *weight, *bias;
  u16* conv;
  const int *starts, *slots;
  const signed char* fresh;
  const int* which;
  int tokens, requests, x_row, conv_row;
  i64 conv_slot;
};

// The inputs of channels c and c + 1 at token t, which may lie before the request's first token in this step.
DEVICE u32 input(const Step& s, int t, int start, i64 slot, bool fresh, int c) {
  if (t >= start) return pair_at(s.x + i64(t) * s.x_row + c);
  return fresh ? 0u : pair_at(s.conv + slot * s.conv_slot + (t - start + 3) * s.conv_row + c);
}

// Convolves PAIRS pairs of channels per lane, from(j) first, over the tokens first to last; done(t, y [2 PAIRS]).
template <int PAIRS, class From, class Done>
DEVICE void convolve(const Step& s, u16* y, int first, int last, From from, Done done) {
  float weights[PAIRS][2][4], biases[PAIRS][2];
  u32 before[PAIRS][3];
  for (int j = 0; j < PAIRS; ++j) {
    const int c = from(j);
    for (int i = 0; i < 4; ++i) {
      weights[j][0][i] = number<0>(s.weight, c * 4 + i);
      weights[j][1][i] = number<0>(s.weight, c * 4 + 4 + i);
    }
    const u32 bias = s.bias ? pair_at(s.bias + c) : 0u;
    biases[j][0] = low(bias);
    biases[j][1] = high(bias);
  }
  int current = -1;
  for (int t = first; t < last; ++t) {
    const int r = s.which ? s.which[t] : t;
    if (r >= s.requests) break;
    const i64 slot = s.slots[r];
    if (slot <= 0) continue;
    if (r != current) {
      const int start = s.starts ? s.starts[r] : t;
      const bool fresh = s.fresh && s.fresh[r];
      for (int j = 0; j < PAIRS; ++j)
        for (int i = 0; i < 3; ++i) before[j][i] = input(s, t - 3 + i, start, slot, fresh, from(j));
      current = r;
    }
    float got[2 * PAIRS];
    for (int j = 0; j < PAIRS; ++j) {
      const int c = from(j);
      const u32 now = pair_at(s.x + i64(t) * s.x_row + c);
      float sums[2];
      for (int e = 0; e < 2; ++e) {
        float sum = biases[j][e];
        for (int i = 0; i < 3; ++i) sum = fused(weights[j][e][i], e ? high(before[j][i]) : low(before[j][i]), sum);
        sum = fused(weights[j][e][3], e ? high(now) : low(now), sum);
        sums[e] = times(sum, sigmoid(sum));
      }
      const u32 rounded = round_pair(sums[0], sums[1]);
      *reinterpret_cast<u32*>(y + i64(t) * CHANNELS + c) = rounded;
      got[2 * j] = low(rounded);
      got[2 * j + 1] = high(rounded);
      before[j][0] = before[j][1];
      before[j][1] = before[j][2];
      before[j][2] = now;
      if (!s.starts)
        for (int i = 0; i < 3; ++i)
          *reinterpret_cast<u32*>(s.conv + slot * s.conv_slot + i * s.conv_row + c) = before[j][i];
    }
    done(t, got);
  }
}

template <int N>
DEVICE float dot(const float* a, const float* b) {
  float sum = 0.f;
  for (int i = 0; i < N; ++i) sum = fused(a[i], b[i], sum);
  for (int d = 16; d; d /= 2) sum = plus(sum, exchange(sum, d));
  return sum;
}

// Block (tokens / per, units / 4): a warp has one unit, a key head's q and k, or a head's v.
KERNEL prepare(const u16* x, const u16* weight, const u16* bias, u16* conv, const u16* a, const u16* b,
               const void* rate, const void* dt_bias, u16* y, float* keyed, float* valued, const int* starts,
               const int* slots, const signed char* fresh, const int* which, i64 conv_slot, int tokens, int requests,
               int per, int x_row, int conv_row, int a_row, int b_row, int* counts) {
  const Step s{x, weight, bias, conv, starts, slots, fresh, which, tokens, requests, x_row, conv_row, conv_slot};
  const int unit = block_y() * (THREADS / 32) + thread() / 32, lane = thread() % 32;
  const int first = block_x() * per, last = first + per < tokens ? first + per : tokens;
  if (EVERY > 1 && !starts && unit == 0 && lane == 0)
    for (int t = first; t < last; ++t)
      if (slots[t] > 0)
        move_count(counts + t, log_of(conv, slots[t] * conv_slot), [](int n) { return n + 1 < EVERY ? n + 1 : 0; });
  if (unit < KEY_HEADS) {
    constexpr int HALF = KEYS / 64;
    convolve<2 * HALF>(
        s, y, first, last,
        [&](int j) { return (j < HALF ? Q_AT : K_AT) + unit * KEYS + (j % HALF) * 64 + 2 * lane; },
        [&](int t, const float* got) {
          const float *q = got, *k = got + 2 * HALF;
          const float both = dot<2 * HALF>(q, k);
          Four found{{1.f, 1.f, both, 0.f}};
          if (!MAMBA) {
            found.x[0] = root_reciprocal(plus(dot<2 * HALF>(k, k), 1e-6f));
            found.x[1] = times(root_reciprocal(plus(dot<2 * HALF>(q, q), 1e-6f)), SCALE);
          }
          if (lane == 0) *reinterpret_cast<Four*>(keyed + (i64(t) * KEY_HEADS + unit) * 4) = found;
        });
  } else if (unit < KEY_HEADS + HEADS) {
    const int head = unit - KEY_HEADS;
    convolve<VALUES / 64>(
        s, y, first, last, [&](int j) { return V_AT + head * VALUES + j * 64 + 2 * lane; },
        [&](int t, const float*) {
          if (lane) return;
          const float step = softplus(plus(number<0>(a + i64(t) * a_row, head), number<BIAS_FLOAT>(dt_bias, head)));
          const float per_step = MAMBA ? number<RATE_FLOAT>(rate, head) : -exponential(number<RATE_FLOAT>(rate, head));
          float* to = valued + (i64(t) * HEADS + head) * 2;
          to[0] = exponential(times(per_step, step));
          to[1] = MAMBA ? step : sigmoid(number<0>(b + i64(t) * b_row, head));
        });
  }
}

// Block (requests, channels / 2 / THREADS): a thread reads all three inputs of its two channels before it writes.
KERNEL keep_inputs(const u16* x, u16* conv, const int* starts, const int* slots, const signed char* fresh,
                   i64 conv_slot, int x_row, int conv_row, int* counts) {
  const Step s{x, nullptr, nullptr, conv, starts, slots, fresh, nullptr, 0, 0, x_row, conv_row, conv_slot};
  const int r = block_x(), c = 2 * (block_y() * THREADS + thread());
  const i64 slot = slots[r];
  const int start = starts[r], end = starts[r + 1];
  if (c >= CHANNELS || slot <= 0 || start == end) return;
  if (EVERY > 1 && block_y() == 0 && thread() == 0) {
    u16* log = log_of(conv, slot * conv_slot);
    if (fresh && fresh[r]) *count_of(log) = 0;
    move_count(counts + r, log, [](int) { return 0; });
  }
  u32 found[3];
  for (int i = 0; i < 3; ++i) found[i] = input(s, end - 3 + i, start, slot, fresh && fresh[r], c);
  for (int i = 0; i < 3; ++i) *reinterpret_cast<u32*>(conv + slot * conv_slot + i * conv_row + c) = found[i];
}

constexpr int KEY_PIECES = TILE * KEYS / 4 / THREADS;  // pieces of 8 numbers of q and k that a thread brings
constexpr int VALUE_PIECES = (TILE * OWN / 8 + THREADS - 1) / THREADS;
static_assert(TILE * KEYS / 4 % THREADS == 0 && TILE <= THREADS);

// What a thread brings of a tile of tokens.
struct Brought {
#if !RAW
  Eight keys[KEY_PIECES], values[VALUE_PIECES];
#endif
  Four keyed;
  float decay, step;
};

DEVICE void widen(float* to, const Eight& from) {
  for (int half = 0; half < 2; ++half) {
    const u32 a = from.pairs[2 * half], b = from.pairs[2 * half + 1];
    *reinterpret_cast<Four*>(to + 4 * half) = Four{{low(a), high(a), low(b), high(b)}};
  }
}

// each(to, from, i): piece i of keys or queries; likewise values.
template <class Key, class Value>
DEVICE void pieces(Memory& m, int at, const u16* y, int first, int end, int head, int row, Key each, Value value) {
  const int group = head / (HEADS / KEY_HEADS);
  for (int i = 0; i < KEY_PIECES; ++i) {
    const int n = thread() + i * THREADS, t = n / (KEYS / 4), piece = n % (KEYS / 4);
    const int c = piece % (KEYS / 8) * 8;
    const u16* from = y + i64(first + t) * CHANNELS + (piece < KEYS / 8 ? K_AT : Q_AT) + group * KEYS + c;
    each((piece < KEYS / 8 ? m.keys : m.queries)[at][t] + c, from, i, first + t < end);
  }
  for (int i = 0; i < VALUE_PIECES; ++i) {
    const int n = thread() + i * THREADS, t = n / (OWN / 8), c = n % (OWN / 8) * 8;
    if (n < TILE * OWN / 8)
      value(m.values[at][t] + c, y + i64(first + t) * CHANNELS + V_AT + head * VALUES + row + c, i, first + t < end);
  }
}

DEVICE void bring(Brought& b, Memory& m, int at, const u16* y, const float* keyed, const float* valued, int first,
                  int end, int head, int row) {
#if RAW
  auto copy = [&](u16* to, const u16* from, int, bool wanted) { copy_16(to, wanted ? from : y, wanted); };
  pieces(m, at, y, first, end, head, row, copy, copy);
#else
  pieces(
      m, at, y, first, end, head, row,
      [&](float*, const u16* from, int i, bool wanted) { if (wanted) b.keys[i] = *reinterpret_cast<const Eight*>(from); },
      [&](float*, const u16* from, int i, bool wanted) { if (wanted) b.values[i] = *reinterpret_cast<const Eight*>(from); });
#endif
  const int t = first + thread();
  if (thread() < TILE && t < end) {
    b.keyed = *reinterpret_cast<const Four*>(keyed + (i64(t) * KEY_HEADS + head / (HEADS / KEY_HEADS)) * 4);
    b.decay = valued[(i64(t) * HEADS + head) * 2];
    b.step = valued[(i64(t) * HEADS + head) * 2 + 1];
  }
}

// What a token's arithmetic needs of its numbers.
struct Numbers {
  float decay, scale, of_r, of_w, back;  // w = scale (v + back p); o = of_r r + of_w w
};

DEVICE Numbers fold(float decay, float step, const Four& keyed) {
  if (MAMBA) return {decay, step, decay, keyed.x[2], 0.f};
  return {decay, times(step, keyed.x[0]), times(decay, keyed.x[1]), times(keyed.x[2], keyed.x[1]),
          -times(decay, keyed.x[0])};
}

// A lane's part of a token: its keys and queries, the values of its rows.
struct Token {
  float k[PER], q[PER], v[ROWS], own;  // own: the value of the lane's own row
  Numbers n;
};

constexpr int EACH = SHARERS / ROWS;  // lanes that end with the same row

// Sums over the lanes that share them. A lane keeps half of its rows at each step, until it has one.
DEVICE float gather(float (&r)[ROWS], int slice) {
  int distance = SHARERS / 2;
#pragma unroll
  for (int left = ROWS / 2; left; left /= 2, distance /= 2) {
    const bool upper = slice & distance;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float sent = upper ? r[i] : r[left + i];
      r[i] = plus(upper ? r[left + i] : r[i], swap(sent, distance));
    }
  }
#pragma unroll
  for (; distance; distance /= 2) r[0] = plus(r[0], swap(r[0], distance));
  return r[0];
}

// Gives every lane the rows that the lanes have one of.
DEVICE void scatter(float (&w)[ROWS], int slice) {
  int distance = EACH;
#pragma unroll
  for (int held = 1; held < ROWS; held *= 2, distance *= 2) {
    const bool upper = slice & distance;
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const float got = swap(w[i], distance);
      w[held + i] = upper ? w[i] : got;
      w[i] = upper ? got : w[i];
    }
  }
}

// The lane's own row of `of`.
DEVICE float pick(const float (&of)[ROWS], int slice) {
  float held[ROWS];
  for (int i = 0; i < ROWS; ++i) held[i] = of[i];
  int distance = SHARERS / 2;
#pragma unroll
  for (int left = ROWS / 2; left; left /= 2, distance /= 2)
#pragma unroll
    for (int i = 0; i < left; ++i) held[i] = slice & distance ? held[left + i] : held[i];
  return held[0];
}

// Moves the state of ROWS rows over one token. Returns the output of the row that the lane owns, slice / EACH.
DEVICE float advance(float (&s)[ROWS][PER], const Token& x, float skip, int slice, float& own_w) {
  constexpr int HALF = PER / 2;
  float w[ROWS], r[ROWS], own;
  if (!MAMBA) {
    float p[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      float a = 0.f, b = 0.f;
      for (int e = 0; e < HALF; ++e) a = fused(s[i][e], x.k[e], a), b = fused(s[i][HALF + e], x.k[HALF + e], b);
      p[i] = plus(a, b);
    }
    if (SCATTER) {
      own = times(x.n.scale, fused(x.n.back, gather(p, slice), x.own));
      w[0] = own;
      scatter(w, slice);
    } else {
      for (int distance = SHARERS / 2; distance; distance /= 2)
        for (int i = 0; i < ROWS; ++i) p[i] = plus(p[i], swap(p[i], distance));
      for (int i = 0; i < ROWS; ++i) w[i] = times(x.n.scale, fused(x.n.back, p[i], x.v[i]));
    }
  } else {
    for (int i = 0; i < ROWS; ++i) w[i] = times(x.n.scale, x.v[i]);
  }
  for (int i = 0; i < ROWS; ++i) {
    r[i] = 0.f;
    for (int e = 0; e < PER; ++e) r[i] = fused(s[i][e], x.q[e], r[i]);
    for (int e = 0; e < PER; ++e) s[i][e] = fused(w[i], x.k[e], times(x.n.decay, s[i][e]));
  }
  if (MAMBA) own = pick(x.v, slice);
  else if (!SCATTER) own = pick(w, slice);
  const float of_state = times(x.n.of_r, gather(r, slice));
  own_w = MAMBA ? times(x.n.scale, own) : own;
  if (!MAMBA) return fused(x.n.of_w, own, of_state);
  return fused(skip, own, fused(x.n.of_w, own_w, of_state));
}

DEVICE void lay(Memory& m, int at, const Brought& b, const u16* y, int first, int end, int head, int row) {
#if !RAW
  pieces(
      m, at, y, first, end, head, row, [&](float* to, const u16*, int i, bool) { widen(to, b.keys[i]); },
      [&](float* to, const u16*, int i, bool) { widen(to, b.values[i]); });
#endif
  if (thread() < TILE) *reinterpret_cast<Numbers*>(m.numbers[at][thread()]) = fold(b.decay, b.step, b.keyed);
}

// N elements of shared memory, aligned to their size.
template <int N>
DEVICE void read(float* to, const float* from) {
  if (N % 4 == 0) {
    for (int i = 0; i < N; i += 4) {
      const Four got = *reinterpret_cast<const Four*>(from + i);
      for (int e = 0; e < 4; ++e) to[i + e] = got.x[e];
    }
  } else if (N == 2) {
    const Pair got = *reinterpret_cast<const Pair*>(from);
    to[0] = got.x[0], to[1] = got.x[1];
  } else {
    to[0] = from[0];
  }
}

template <int N>
DEVICE void read(float* to, const u16* from) {
  if (N == 8) {
    const Eight got = *reinterpret_cast<const Eight*>(from);
    for (int e = 0; e < 4; ++e) to[2 * e] = low(got.pairs[e]), to[2 * e + 1] = high(got.pairs[e]);
  } else if (N == 4) {
    const Two got = *reinterpret_cast<const Two*>(from);
    for (int e = 0; e < 2; ++e) to[2 * e] = low(got.pairs[e]), to[2 * e + 1] = high(got.pairs[e]);
  } else if (N == 2) {
    const u32 got = pair_at(from);
    to[0] = low(got), to[1] = high(got);
  } else {
    to[0] = float_of(u32(from[0]) << 16);
  }
}

DEVICE void take(Token& x, const Memory& m, int at, int t, int slice, int row) {
  for (int j = 0; j < PER / 4; ++j) {
    read<4>(x.k + 4 * j, m.keys[at][t] + 4 * (slice + SHARERS * j));
    read<4>(x.q + 4 * j, m.queries[at][t] + 4 * (slice + SHARERS * j));
  }
  if (!MAMBA && SCATTER) read<1>(&x.own, m.values[at][t] + row + slice / EACH);
  else read<ROWS>(x.v, m.values[at][t] + row);
  const Four n = *reinterpret_cast<const Four*>(m.numbers[at][t]);
  x.n = {n.x[0], n.x[1], n.x[2], n.x[3], MAMBA ? 0.f : m.numbers[at][t][4]};
}

#if STREAM
DEVICE Four load_once(const float* from) {
  Four got;
  asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(got.x[0]), "=f"(got.x[1]), "=f"(got.x[2]), "=f"(got.x[3]) : "l"(from));
  return got;
}
DEVICE void store_once(float* to, const Four& v) {
  asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x[0]), "f"(v.x[1]), "f"(v.x[2]), "f"(v.x[3]) : "memory");
}
#else
DEVICE Four load_once(const float* from) { return *reinterpret_cast<const Four*>(from); }
DEVICE void store_once(float* to, const Four& v) { *reinterpret_cast<Four*>(to) = v; }
#endif

// A lane's part of the state of ROWS rows.
DEVICE void fill(float (&s)[ROWS][PER], const float* held, int slice) {
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PER / 4; ++j) {
      const Four got = load_once(held + i * KEYS + 4 * (slice + SHARERS * j));
      for (int e = 0; e < 4; ++e) s[i][4 * j + e] = got.x[e];
    }
}

DEVICE void put(const float (&s)[ROWS][PER], float* held, int slice) {
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PER / 4; ++j) {
      Four given;
      for (int e = 0; e < 4; ++e) given.x[e] = s[i][4 * j + e];
      store_once(held + i * KEYS + 4 * (slice + SHARERS * j), given);
    }
}

// Moves a lane's part of a state over the `rows` tokens that the slot's log holds. Loads FETCHED tokens before one is
// computed.
template <int FETCHED>
DEVICE void replay(float (&s)[ROWS][PER], const u16* log, int rows, int head, int row, int slice) {
#pragma unroll 1
  for (int first = 0; first < rows; first += FETCHED) {
    float w[FETCHED][ROWS], decay[FETCHED];
    Two k[FETCHED][PER / 4];
#pragma unroll
    for (int j = 0; j < FETCHED; ++j)
      if (first + j < rows) {
        const u16* at = log + (first + j) * LOG_ROW;
        read<ROWS>(w[j], reinterpret_cast<const float*>(at) + head * VALUES + row);
        for (int i = 0; i < PER / 4; ++i)
          k[j][i] = *reinterpret_cast<const Two*>(
              at + LOG_K + head / (HEADS / KEY_HEADS) * KEYS + 4 * (slice + SHARERS * i));
        decay[j] = reinterpret_cast<const float*>(at + LOG_DECAY)[head];
      }
#pragma unroll
    for (int j = 0; j < FETCHED; ++j)
      if (first + j < rows)
        for (int i = 0; i < ROWS; ++i)
          for (int e = 0; e < PER; ++e) {
            const u32 pair = k[j][e / 4].pairs[e % 4 / 2];
            s[i][e] = fused(w[j][i], e % 2 ? high(pair) : low(pair), times(decay[j], s[i][e]));
          }
  }
}

// Block (HEADS * PARTS_OF_HEAD, requests). out [tokens, HEADS, VALUES] bf16, dense.
KERNEL scan(const u16* y, const float* keyed, const float* valued, const void* d, float* states, u16* out,
            const int* starts, const int* slots, const signed char* fresh, i64 state_slot, u16* conv, i64 conv_slot,
            const int* counts) {
  Memory& m = *reinterpret_cast<Memory*>(shared());
  const int head = block_x() / PARTS_OF_HEAD, part = block_x() % PARTS_OF_HEAD, request = block_y();
  const int lane = thread() % 32, slice = slice_of(lane), row = (thread() / 32 * GROUPS + group_of(lane)) * ROWS;
  const int start = starts[request], end = starts[request + 1];
  const i64 slot = slots[request];
  u16* to = out + head * VALUES + part * OWN;
  if (slot <= 0 || start >= end) return;
  float* held = states + slot * state_slot + (i64(head) * VALUES + part * OWN + row) * KEYS;
  float s[ROWS][PER] = {};
  if (!fresh || !fresh[request]) {
    fill(s, held, slice);
    if (EVERY > 1) replay<1>(s, log_of(conv, slot * conv_slot), counts[request], head, part * OWN + row, slice);
  }
  const float skip = MAMBA ? number<D_FLOAT>(d, head) : 0.f;
  Brought brought = {};
  bring(brought, m, 0, y, keyed, valued, start, end, head, part * OWN);
  if (RAW) end_group();
  lay(m, 0, brought, y, start, end, head, part * OWN);
  if (RAW) wait_groups<0>();
  barrier();
  int at = 0;
  for (int first = start; first < end; first += TILE, at ^= 1) {
    const int count = end - first < TILE ? end - first : TILE, after = first + TILE;
    const bool more = after < end;
    if (more) bring(brought, m, at ^ 1, y, keyed, valued, after, end, head, part * OWN);
    if (RAW) end_group();
    Token now;
    if (AHEAD) take(now, m, at, 0, slice, row);
#pragma unroll UNROLL
    for (int t = 0; t < count; ++t) {
      Token next;
      if (AHEAD) take(next, m, at, t + 1 < TILE ? t + 1 : t, slice, row);
      else take(now, m, at, t, slice, row);
      float w;
      const float o = advance(s, now, skip, slice, w);
      if (slice % EACH == 0) m.out[at][t][row + slice / EACH] = u16(round_pair(o, 0.f));
      if (AHEAD) now = next;
    }
    if (more) lay(m, at ^ 1, brought, y, after, end, head, part * OWN);
    if (RAW) wait_groups<0>();
    barrier();
    for (int n = thread(); n < count * (OWN / 8); n += THREADS)
      *reinterpret_cast<Eight*>(to + i64(first + n / (OWN / 8)) * HEADS * VALUES + n % (OWN / 8) * 8) =
          *reinterpret_cast<const Eight*>(m.out[at][n / (OWN / 8)] + n % (OWN / 8) * 8);
  }
  put(s, held, slice);
}

// The same for requests of one token each: no lane waits for another warp.
KERNEL scan_one(const u16* y, const float* keyed, const float* valued, const void* d, float* states, u16* out,
                const int* slots, i64 state_slot, u16* conv, i64 conv_slot, const int* counts) {
  const int head = block_x() / PARTS_OF_HEAD, part = block_x() % PARTS_OF_HEAD, request = block_y();
  const int lane = thread() % 32, slice = slice_of(lane), row = (thread() / 32 * GROUPS + group_of(lane)) * ROWS;
  const i64 slot = slots[request];
  u16* to = out + (i64(request) * HEADS + head) * VALUES + part * OWN + row;
  if (slot <= 0) {
    if (slice == 0)
      for (int i = 0; i < ROWS; ++i) to[i] = 0;
    return;
  }
  float* held = states + slot * state_slot + (i64(head) * VALUES + part * OWN + row) * KEYS;
  float s[ROWS][PER];
  fill(s, held, slice);
  const int group = head / (HEADS / KEY_HEADS);
  const u16 *of_k = y + i64(request) * CHANNELS + K_AT + group * KEYS, *of_q = of_k + Q_AT - K_AT;
  Token x;
  for (int j = 0; j < PER / 4; ++j) {
    const int c = 4 * (slice + SHARERS * j);
    const Two k = *reinterpret_cast<const Two*>(of_k + c), q = *reinterpret_cast<const Two*>(of_q + c);
    for (int e = 0; e < 2; ++e) {
      x.k[4 * j + 2 * e] = low(k.pairs[e]), x.k[4 * j + 2 * e + 1] = high(k.pairs[e]);
      x.q[4 * j + 2 * e] = low(q.pairs[e]), x.q[4 * j + 2 * e + 1] = high(q.pairs[e]);
    }
  }
  const u16* of_v = y + i64(request) * CHANNELS + V_AT + head * VALUES + part * OWN + row;
  read<ROWS>(x.v, of_v);
  x.own = number<0>(of_v, slice / EACH);
  const float* numbers = valued + (i64(request) * HEADS + head) * 2;
  x.n = fold(numbers[0], numbers[1], *reinterpret_cast<const Four*>(keyed + (i64(request) * KEY_HEADS + group) * 4));
  const int rows = EVERY > 1 ? counts[request] : 0;
  u16* log = log_of(conv, slot * conv_slot);
  if (EVERY > 1) replay<FETCH>(s, log, rows, head, part * OWN + row, slice);
  float w;
  const float o = advance(s, x, MAMBA ? number<D_FLOAT>(d, head) : 0.f, slice, w);
  if (slice % EACH == 0) to[slice / EACH] = u16(round_pair(o, 0.f));
  if (rows == EVERY - 1) {
    put(s, held, slice);
    return;
  }
  u16* at = log + rows * LOG_ROW;
  if (slice % EACH == 0) reinterpret_cast<float*>(at)[head * VALUES + part * OWN + row + slice / EACH] = w;
  if (part == 0 && row == 0 && head % (HEADS / KEY_HEADS) == 0)
    for (int j = 0; j < PER / 4; ++j) {
      const int c = 4 * (slice + SHARERS * j);
      *reinterpret_cast<Two*>(at + LOG_K + group * KEYS + c) = *reinterpret_cast<const Two*>(of_k + c);
    }
  if (part == 0 && thread() == 0) reinterpret_cast<float*>(at + LOG_DECAY)[head] = x.n.decay;
}
