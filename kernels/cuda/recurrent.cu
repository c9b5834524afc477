// Gated delta nets and Mamba 2 in chunks of CHUNK tokens: the convolution before, and the recurrence, on tensor cores.
//
// A request's chunks begin at positions 0, CHUNK, 2 CHUNK, ..., whatever step brings its tokens. A token's output depends
// on the state at its chunk's start and on its chunk's tokens up to itself. The state is written at the ends of chunks
// only; a slot also has a log, which holds what the recurrence takes of the open chunk's tokens. A step lays them before
// the new tokens and computes the chunk again, so decode runs the instructions of prefill, and prompts may be cut anywhere.
//
// prepare: y[t, c] = silu(bias[c] + w[c, 0] x[t-3, c] + ... + w[c, 3] x[t, c]) in fp32 in this order, rounded to bf16; and
// the numbers of a token and head that do not depend on the state.
//   keyed [tokens, KEY_HEADS, 2]: 1/|k|, scale/|q| (Mamba 2: not used). valued [tokens, HEADS, 2]: decay, step.
// scan (scan_one if each request has one token): S [VALUES, KEYS] of a head at the chunk's start. For the chunk's tokens i,
// with d(j, i) = decay_{j+1} ... decay_i and D_i = d(-1, i):
//   gated delta net: x_i = step_i (v_i - D_i / |k_i| S k_i); w = T x, where T = (1 + L)^-1 and
//     L_ij = step_i / (|k_i| |k_j|) d(j, i) k_i.k_j for j < i; M_ij = scale / (|q_i| |k_j|) d(j, i) q_i.k_j for j <= i;
//     o_i = D_i scale / |q_i| S q_i + sum over j of M_ij w_j; at the chunk's end S = D S + sum of d(j, end) / |k_j| w_j k_j^T
//   Mamba 2: w_i = step_i v_i; M_ij = d(j, i) q_i.k_j; o_i = D_i S q_i + sum of M_ij w_j + skip v_i; S = D S + sum of
//     d(j, end) w_j k_j^T     (B is k, C is q)
// keep_inputs, after scan, in a step of prompts: the last three inputs of the convolution, and the log. In a decode step
// (starts null), prepare writes both.
//
// The order: a sum over KEYS goes through multiply_add, 16 positions at a time, ascending (k.k and q.k: even and odd
// groups, which are then added); S, x, w, T and M enter as two pieces of bf16 each (the rounded number, and the rounded
// rest), whose sums are added at the end. T by substitution, row after row. An element of a product depends on its own
// row and column alone. A warp has 16 rows of S. What does not depend on S (see Mix) is computed once for a block.
//
// Positions: keys lie in y, in the log and in shared memory so that a lane's four neighbouring keys of S are what a lane
// holds of two results of multiply_add (see place).
//
// x [tokens, CHANNELS] bf16 (rows may be strided), y dense. Channels: queries | keys | values, Mamba 2: values | keys |
// queries. weight [CHANNELS, 4], bias [CHANNELS] or null, bf16. conv [slots, 3 + rows of the log, CHANNELS] bf16, a slot
// dense. states [slots, HEADS, VALUES, KEYS] fp32. starts [requests + 1], or null if each request has one token. slots
// [requests]: 0 and below are skipped. fresh [requests], 1 where a request starts at position 0, or null if none does.
// which [tokens]: the request of a token, or null as starts. counts [requests]: tokens in the log before the step.
//
// Compiled for MAMBA (0, 1), KEYS and VALUES (multiples of 64), KEY_HEADS, HEADS, PIECES (of S: 2, or 1 for the rounded
// number alone), and for fp32 or bf16 parameters (RATE_FLOAT, BIAS_FLOAT, D_FLOAT). What changes no bit: TILE (tokens in
// shared memory), WARPS (of a block of scan), SEGMENT (tokens), PART and AHEAD (keys and tokens of a block of follow).
// ONLY: which kernel is compiled, by default all.

constexpr int CHUNK = 8;
constexpr int CHANNELS = 2 * KEY_HEADS * KEYS + HEADS * VALUES;
constexpr int Q_AT = MAMBA ? HEADS * VALUES + KEY_HEADS * KEYS : 0;
constexpr int K_AT = MAMBA ? HEADS * VALUES : KEY_HEADS * KEYS;
constexpr int V_AT = MAMBA ? 0 : 2 * KEY_HEADS * KEYS;
constexpr int GROUPS = KEYS / 16;  // of 16 positions
constexpr int OWN = 16 * WARPS, PARTS_OF_HEAD = VALUES / OWN;  // rows of a block; blocks of a head
constexpr int KEY_ROW = KEYS + 8, OWN_ROW = OWN + 8;  // in shared memory, so that rows lie in other banks
constexpr float LOG2E = 1.4426950408889634f;
static_assert(VALUES % OWN == 0 && GROUPS % 2 == 0 && TILE % CHUNK == 0 && TILE <= THREADS && SEGMENT % TILE == 0);

struct alignas(16) Four { float x[4]; };
struct alignas(16) Eight { u32 pairs[4]; };
struct alignas(8) Two { float x[2]; };

// What a chunk's products take that does not depend on the state. A lane has, as operands in two pieces of bf16, T and M
// of token i = lane / 4 and the tokens j = 2 (lane % 4) and the next; and of these tokens j factors: of what the state
// gives to x (gated delta nets) and to o, and of w in the state at the chunk's end. whole: the decay of the whole chunk.
struct alignas(16) Mix {
  u32 inverse[2], mixed[2];
  float of_state[2], of_output[2], of_end[2], whole, unused;
};

struct Memory {
  u16 keys[2][TILE][KEY_ROW], queries[2][TILE][KEY_ROW], values[2][TILE][OWN_ROW], out[TILE][OWN_ROW];
  float numbers[2][TILE / CHUNK][4][CHUNK];  // decay, step, 1/|k|, scale/|q|
  Mix mixes[TILE / CHUNK][32];
};

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

// The position of key c, which is even: of 16 keys, lane t of four has keys 4t .. 4t + 3 at 2t, 2t + 1, 2t + 8, 2t + 9.
DEVICE int place(int c) { return (c & ~15) | (c & 2) << 2 | (c & 12) >> 1; }

// The log lies behind a slot's inputs, CHUNK - 1 tokens: k bf16 [KEY_HEADS, KEYS], v bf16 [HEADS, VALUES], 1/|k| fp32
// [KEY_HEADS], decay and step fp32 [HEADS, 2]; then how many tokens it holds.
constexpr int LOG_V = KEY_HEADS * KEYS, LOG_KEYED = LOG_V + HEADS * VALUES, LOG_VALUED = LOG_KEYED + 2 * KEY_HEADS;
constexpr int LOG_ROW = (LOG_VALUED + 4 * HEADS + 7) / 8 * 8;

DEVICE u16* log_of(u16* conv, i64 at) { return conv + at + 3 * CHANNELS; }
DEVICE int* count_of(u16* log) { return reinterpret_cast<int*>(log + (CHUNK - 1) * LOG_ROW); }
DEVICE float* keyed_of(u16* row) { return reinterpret_cast<float*>(row + LOG_KEYED); }
DEVICE float* valued_of(u16* row) { return reinterpret_cast<float*>(row + LOG_VALUED); }

// Where channel c of y lies in a row of the log, below 0 for queries.
DEVICE int in_log(int c) {
  if (c >= K_AT && c < K_AT + KEY_HEADS * KEYS) return c - K_AT;
  return c >= V_AT && c < V_AT + HEADS * VALUES ? LOG_V + c - V_AT : -1;
}

// How many tokens a slot's log holds; none in memory that held something else.
DEVICE int held_of(u16* log) {
  const int held = *count_of(log);
  return u32(held) < u32(CHUNK) ? held : 0;
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

// Convolves PAIRS pairs of channels per lane, from(j) first, over the tokens first to last, at most PER; done(t, y [2
// PAIRS], row of the log or null). PLACED: whether the channels are keys and queries.
template <int PER, int PAIRS, bool PLACED, class From, class Done>
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
  u32 inputs[PER][PAIRS];  // loaded before any is used
  int requests[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int t = first + i;
    requests[i] = t < last ? (s.which ? s.which[t] : t) : s.requests;
    for (int j = 0; j < PAIRS; ++j) inputs[i][j] = t < last ? pair_at(s.x + i64(t) * s.x_row + from(j)) : 0u;
  }
  int current = -1;
  i64 slot = 0;
  u16* row = nullptr;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int t = first + i, r = requests[i];
    if (r >= s.requests) break;
    if (r != current) {
      current = r;
      slot = s.slots[r];
      if (slot > 0) {
        const int start = s.starts ? s.starts[r] : t;
        const bool fresh = s.fresh && s.fresh[r];
        for (int j = 0; j < PAIRS; ++j)
          for (int n = 0; n < 3; ++n) before[j][n] = input(s, t - 3 + n, start, slot, fresh, from(j));
        if (!s.starts) {
          u16* log = log_of(s.conv, slot * s.conv_slot);
          const int held = held_of(log);
          row = held < CHUNK - 1 ? log + held * LOG_ROW : nullptr;
        }
      }
    }
    if (slot <= 0) continue;
    float got[2 * PAIRS];
    for (int j = 0; j < PAIRS; ++j) {
      const int c = from(j);
      const u32 now = inputs[i][j];
      float sums[2];
      for (int e = 0; e < 2; ++e) {
        float sum = biases[j][e];
        for (int n = 0; n < 3; ++n) sum = fused(weights[j][e][n], e ? high(before[j][n]) : low(before[j][n]), sum);
        sum = fused(weights[j][e][3], e ? high(now) : low(now), sum);
        sums[e] = times(sum, sigmoid(sum));
      }
      const u32 rounded = round_pair(sums[0], sums[1]);
      const int to = PLACED ? place(c) : c, logged = in_log(to);
      *reinterpret_cast<u32*>(y + i64(t) * CHANNELS + to) = rounded;
      if (row && logged >= 0) *reinterpret_cast<u32*>(row + logged) = rounded;
      got[2 * j] = low(rounded);
      got[2 * j + 1] = high(rounded);
      before[j][0] = before[j][1];
      before[j][1] = before[j][2];
      before[j][2] = now;
      if (!s.starts)
        for (int n = 0; n < 3; ++n)
          *reinterpret_cast<u32*>(s.conv + slot * s.conv_slot + n * s.conv_row + c) = before[j][n];
    }
    done(t, got, row);
  }
}

template <int N>
DEVICE float dot(const float* a, const float* b) {
  float sum = 0.f;
  for (int i = 0; i < N; ++i) sum = fused(a[i], b[i], sum);
  for (int d = 16; d; d /= 2) sum = plus(sum, exchange(sum, d));
  return sum;
}

// Units of prepare, one for a warp: first of q and k, then a head's v. Gated delta nets take q and k of a key head
// together, for their lengths; Mamba 2 takes 64 channels.
constexpr int KEYED_UNITS = MAMBA ? 2 * KEY_HEADS * KEYS / 64 : KEY_HEADS;

// A warp's part of prepare: PER tokens of one unit.
template <int PER>
DEVICE void prepare_tokens(const Step& s, const u16* a, const u16* b, const void* rate, const void* dt_bias, u16* y,
                           float* keyed, float* valued, int a_row, int b_row, int* counts) {
  const int unit = block_y() * (THREADS / 32) + thread() / 32, lane = thread() % 32;
  const int first = block_x() * PER, last = first + PER < s.tokens ? first + PER : s.tokens;
  const int t = first + lane, head = unit - KEYED_UNITS;
  if ((unit == 0 || head >= 0) && head < HEADS && lane < PER && t < last) {  // a lane has a token
    const int r = s.which ? s.which[t] : t;
    const i64 slot = r < s.requests ? s.slots[r] : 0;
    u16* log = slot > 0 && (!s.starts || unit == 0) ? log_of(s.conv, slot * s.conv_slot) : nullptr;
    const int held = log && !(s.fresh && s.fresh[r]) ? held_of(log) : 0;
    if (unit == 0 && slot > 0 && (!s.starts || t == s.starts[r])) counts[r] = held;
    if (head >= 0 && slot > 0) {
      const float per_step = MAMBA ? number<RATE_FLOAT>(rate, head) : -exponential(number<RATE_FLOAT>(rate, head));
      const float step = softplus(plus(number<0>(a + i64(t) * a_row, head), number<BIAS_FLOAT>(dt_bias, head)));
      const float taken = MAMBA ? step : sigmoid(number<0>(b + i64(t) * b_row, head));
      const Two found{{exponential(times(per_step, step)), taken}};
      *reinterpret_cast<Two*>(valued + (i64(t) * HEADS + head) * 2) = found;
      if (!s.starts && held < CHUNK - 1)
        for (int i = 0; i < 2; ++i) valued_of(log + held * LOG_ROW)[2 * head + i] = found.x[i];
    }
  }
  const auto nothing = [](int, const float*, u16*) {};
  if (head >= 0) {
    if (head < HEADS)
      convolve<PER, VALUES / 64, false>(
          s, y, first, last, [&](int j) { return V_AT + head * VALUES + j * 64 + 2 * lane; }, nothing);
  } else if (MAMBA) {
    convolve<PER, 1, true>(
        s, y, first, last, [&](int) { return (K_AT < Q_AT ? K_AT : Q_AT) + unit * 64 + 2 * lane; }, nothing);
  } else {
    constexpr int HALF = KEYS / 64;
    convolve<PER, 2 * HALF, true>(
        s, y, first, last,
        [&](int j) { return (j < HALF ? Q_AT : K_AT) + unit * KEYS + (j % HALF) * 64 + 2 * lane; },
        [&](int t, const float* got, u16* row) {
          const float *q = got, *k = got + 2 * HALF;
          const float of_k = root_reciprocal(plus(dot<2 * HALF>(k, k), 1e-6f));
          const float of_q = times(root_reciprocal(plus(dot<2 * HALF>(q, q), 1e-6f)), SCALE);
          if (lane) return;
          *reinterpret_cast<Two*>(keyed + (i64(t) * KEY_HEADS + unit) * 2) = Two{{of_k, of_q}};
          if (row) keyed_of(row)[unit] = of_k;
        });
  }
}

#if !defined(ONLY) || ONLY == 0
// Block (tokens / per, units / 4). per: 8 in a step of prompts, else 1.
KERNEL prepare(const u16* x, const u16* weight, const u16* bias, u16* conv, const u16* a, const u16* b,
               const void* rate, const void* dt_bias, u16* y, float* keyed, float* valued, const int* starts,
               const int* slots, const signed char* fresh, const int* which, i64 conv_slot, int tokens, int requests,
               int per, int x_row, int conv_row, int a_row, int b_row, int* counts) {
  const Step s{x, weight, bias, conv, starts, slots, fresh, which, tokens, requests, x_row, conv_row, conv_slot};
  if (per == 8) prepare_tokens<8>(s, a, b, rate, dt_bias, y, keyed, valued, a_row, b_row, counts);
  else prepare_tokens<1>(s, a, b, rate, dt_bias, y, keyed, valued, a_row, b_row, counts);
}
#endif

#if !defined(ONLY) || ONLY == 1
// Block (requests, channels / 2 / THREADS), after scan: a thread reads all three inputs of its two channels before it
// writes.
KERNEL keep_inputs(const u16* x, u16* conv, const u16* y, const float* keyed, const float* valued, const int* starts,
                   const int* slots, const signed char* fresh, i64 conv_slot, int x_row, int conv_row,
                   const int* counts) {
  const Step s{x, nullptr, nullptr, conv, starts, slots, fresh, nullptr, 0, 0, x_row, conv_row, conv_slot};
  const int r = block_x(), c = 2 * (block_y() * THREADS + thread());
  const i64 slot = slots[r];
  const int start = starts[r], end = starts[r + 1];
  if (slot <= 0 || start >= end) return;
  u16* log = log_of(conv, slot * conv_slot);
  // Position u of the request's tokens, counted from the start of the chunk that was open, is token u + base.
  const int before = counts[r], total = before + end - start, opened = total / CHUNK * CHUNK, base = start - before;
  const int first = before > opened ? before : opened;
  if (block_y() == 0) {
    for (int u = first; u < total; ++u) {
      u16* row = log + u % CHUNK * LOG_ROW;
      const i64 t = u + base;
      if (!MAMBA)
        for (int n = thread(); n < KEY_HEADS; n += THREADS) keyed_of(row)[n] = keyed[(t * KEY_HEADS + n) * 2];
      for (int n = thread(); n < 2 * HEADS; n += THREADS) valued_of(row)[n] = valued[t * HEADS * 2 + n];
    }
    if (thread() == 0) *count_of(log) = total - opened;
  }
  if (c >= CHANNELS) return;
  u32 found[3];
  for (int i = 0; i < 3; ++i) found[i] = input(s, end - 3 + i, start, slot, fresh && fresh[r], c);
  for (int i = 0; i < 3; ++i) *reinterpret_cast<u32*>(conv + slot * conv_slot + i * conv_row + c) = found[i];
  const int logged = in_log(c);
  if (logged < 0) return;
  for (int u = first; u < total; ++u)
    *reinterpret_cast<u32*>(log + u % CHUNK * LOG_ROW + logged) = pair_at(y + i64(u + base) * CHANNELS + c);
}
#endif

// A request's tokens from the start of the chunk that was open: `before` of the log, then token u + base of the step.
struct Source {
  const u16* y;
  const float *keyed, *valued;
  u16* log;
  int base, before, total, head, row;
};

// Brings TOKENS tokens from `first` on into shared memory, zeros after the last one. LOG: whether some may lie in the log.
template <int TOKENS, bool LOG>
DEVICE void bring(Memory& m, int at, const Source& from, int first) {
  // A thread has the same channels of several tokens.
  constexpr int KEYED = KEYS / 4, KEYED_STEP = THREADS / KEYED;
  constexpr int VALUED = OWN / 8, VALUED_STEP = THREADS / VALUED;
  static_assert(THREADS % KEYED == 0 && THREADS % VALUED == 0);
  const int piece = thread() % KEYED, group = from.head / (HEADS / KEY_HEADS), c = piece % (KEYS / 8) * 8;
  const bool key = piece < KEYS / 8;
  const u16* keyed = from.y + i64(first + from.base) * CHANNELS + (key ? K_AT : Q_AT) + group * KEYS + c;
  u16(*to)[KEY_ROW] = (key ? m.keys : m.queries)[at];
#pragma unroll
  for (int i = 0; i < (TOKENS + KEYED_STEP - 1) / KEYED_STEP; ++i) {
    const int token = thread() / KEYED + i * KEYED_STEP, u = first + token;
    if (TOKENS % KEYED_STEP && token >= TOKENS) break;
    const bool old = LOG && u < from.before;
    const u16* held = old ? from.log + u * LOG_ROW + group * KEYS + c : keyed + i64(token) * CHANNELS;
    copy_16(to[token] + c, held, u < from.total && (key || !old));
  }
  const int row = thread() % VALUED * 8, channel = from.head * VALUES + from.row + row;
  const u16* valued = from.y + i64(first + from.base) * CHANNELS + V_AT + channel;
#pragma unroll
  for (int i = 0; i < (TOKENS + VALUED_STEP - 1) / VALUED_STEP; ++i) {
    const int token = thread() / VALUED + i * VALUED_STEP, u = first + token;
    if (TOKENS % VALUED_STEP && token >= TOKENS) break;
    const bool old = LOG && u < from.before;
    const u16* held = old ? from.log + u * LOG_ROW + LOG_V + channel : valued + i64(token) * CHANNELS;
    copy_16(m.values[at][token] + row, held, u < from.total);
  }
  end_group();
}

// The numbers of one token: decay, step, 1/|k|, scale/|q|. LOG: whether it may lie in the log.
template <bool LOG>
DEVICE Four numbers_of(const Source& from, int u) {
  Four got{{1.f, 0.f, 0.f, 0.f}};
  if (u >= from.total) return got;
  const int group = from.head / (HEADS / KEY_HEADS);
  if (LOG && u < from.before) {
    u16* row = from.log + u * LOG_ROW;
    got.x[0] = valued_of(row)[2 * from.head];
    got.x[1] = valued_of(row)[2 * from.head + 1];
    if (!MAMBA) got.x[2] = keyed_of(row)[group];
    return got;
  }
  const i64 t = u + from.base;
  const Two two = *reinterpret_cast<const Two*>(from.valued + (t * HEADS + from.head) * 2);
  got.x[0] = two.x[0];
  got.x[1] = two.x[1];
  if (MAMBA) return got;
  const Two of_keys = *reinterpret_cast<const Two*>(from.keyed + (t * KEY_HEADS + group) * 2);
  got.x[2] = of_keys.x[0];
  got.x[3] = of_keys.x[1];
  return got;
}

DEVICE void lay(Memory& m, int at, int token, const Four& numbers) {
  for (int i = 0; i < 4; ++i) m.numbers[at][token / CHUNK][i][token % CHUNK] = numbers.x[i];
}

// Two floats as two pairs of bf16: rounded, and the rest.
struct Pieces { u32 first, second; };

DEVICE Pieces split(float a, float b) {
  const u32 first = round_pair(a, b);
  return {first, round_pair(plus(a, -low(first)), plus(b, -high(first)))};
}

// The operand of multiply_add that has 16 rows of 8 tokens, in two pieces.
DEVICE void operand(u32 (&a)[4], const float (&x)[4]) {
  const Pieces upper = split(x[0], x[1]), lower = split(x[2], x[3]);
  a[0] = upper.first, a[1] = lower.first, a[2] = upper.second, a[3] = lower.second;
}

// d [16 rows, 8 tokens i] += a [16 rows, 8 tokens j] of `operand`, times b_ij in two pieces.
DEVICE void add_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  multiply_add(d, a, b[0], b[0]);
  multiply_add(d, a, b[1], b[1]);
}

// A chunk's Mix.
DEVICE Mix mix_of(const u16* keys, const u16* queries, const float* numbers) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  float dots[4];  // k_g.k and q_g.k of the tokens 2 t and 2 t + 1
  const u16* row = (lane < 16 ? keys : queries) + lane % 8 * KEY_ROW + lane / 8 % 2 * 8;
  float sums[2][4] = {};
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) {
    u32 m[4];
    load_matrices(m, row + 16 * j);
    const u32 both[4] = {m[0], m[2], m[1], m[3]};
    multiply_add(sums[j % 2], both, m[0], m[1]);
  }
  for (int i = 0; i < 4; ++i) dots[i] = plus(sums[0][i], sums[1][i]);
  float decay[CHUNK], until[2], after[2] = {1.f, 1.f}, within[2] = {1.f, 1.f}, whole = 1.f;
  for (int i = 0; i < 2; ++i) {
    const Four got = *reinterpret_cast<const Four*>(numbers + 4 * i);
    for (int e = 0; e < 4; ++e) decay[4 * i + e] = got.x[e];
  }
#pragma unroll
  for (int l = 0; l < CHUNK; ++l) {
    whole = times(whole, decay[l]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = 2 * t + e;
      if (l <= i) until[e] = whole;
      if (l > i) after[e] = times(after[e], decay[l]);
      if (l > i && l <= g) within[e] = times(within[e], decay[l]);
    }
  }
  Two of_k{{1.f, 1.f}}, of_q{{1.f, 1.f}};
  float of_k_g = 1.f, of_q_g = 1.f;
  if (!MAMBA) {
    of_k = *reinterpret_cast<const Two*>(numbers + 2 * CHUNK + 2 * t);
    of_q = *reinterpret_cast<const Two*>(numbers + 3 * CHUNK + 2 * t);
    of_k_g = times(numbers[CHUNK + g], numbers[2 * CHUNK + g]);
    of_q_g = numbers[3 * CHUNK + g];
  }
  Mix mix;
  float inverse[2], mixed[2], less[2];
  for (int e = 0; e < 2; ++e) {
    const int j = 2 * t + e;
    const float common = MAMBA ? within[e] : times(of_k.x[e], within[e]);
    mixed[e] = j <= g ? times(times(of_q_g, common), dots[2 + e]) : 0.f;
    less[e] = j < g ? times(times(of_k_g, common), dots[e]) : 0.f;
    inverse[e] = j == g ? 1.f : 0.f;
    mix.of_state[e] = MAMBA ? 0.f : times(until[e], of_k.x[e]);
    mix.of_output[e] = times(until[e], of_q.x[e]);
    mix.of_end[e] = MAMBA ? after[e] : times(of_k.x[e], after[e]);
  }
  if (!MAMBA) {
#pragma unroll
    for (int j = 0; j < CHUNK - 1; ++j) {
      const float by = -of_lane(less[j % 2], 4 * g + j / 2);
      const float upper = of_lane(inverse[0], 4 * j + t), lower = of_lane(inverse[1], 4 * j + t);
      inverse[0] = fused(by, upper, inverse[0]);
      inverse[1] = fused(by, lower, inverse[1]);
    }
  }
  const Pieces t_pieces = split(inverse[0], inverse[1]), m_pieces = split(mixed[0], mixed[1]);
  mix.inverse[0] = t_pieces.first, mix.inverse[1] = t_pieces.second;
  mix.mixed[0] = m_pieces.first, mix.mixed[1] = m_pieces.second;
  mix.whole = whole;
  mix.unused = 0.f;
  return mix;
}

// Moves 16 N keys of 16 rows of a state, as `advance` has them, to a chunk's end. keys: of the chunk's tokens. w: what each
// token adds, of rows g and g + 8 for the tokens 2 t and 2 t + 1. whole: the decay of the whole chunk.
template <int N>
DEVICE void fold(float (&s)[N][2][4], const u16* keys, int key_row, const float (&w)[4], float whole) {
  const int lane = thread() % 32;
  u32 a[4];
  operand(a, w);
  const u16* column = keys + lane % 8 * key_row + lane / 8 * 8;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    u32 m[4];
    load_matrices_transposed(m, column + 16 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float more[4];
      multiply(more, a, m[i], m[i]);
      float(&held)[4] = s[j + i / 2][i % 2];
      for (int e = 0; e < 4; ++e) held[e] = fused(held[e], whole, more[e]);
    }
  }
}

// Computes a chunk with the state s at its start, and moves s to its end if the chunk is `full`. A lane has, of 16 rows
// of the state, s[j][h]: rows g and g + 8 (g = lane / 4) at positions 16 j + 8 h + 2 t and the next (t = lane % 4).
// steps: of the chunk's tokens. done(o): the outputs of rows g and g + 8 for the tokens 2 t and 2 t + 1.
template <class Done>
DEVICE void advance(float (&s)[GROUPS][2][4], const u16* keys, const u16* queries, const u16* values,
                    const float* steps, const Mix& mix, float skip, bool full, Done done) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  float p[2][4] = {}, r[2][4] = {};
  const u16* row = (lane < 16 ? keys : queries) + lane % 8 * KEY_ROW + lane / 8 % 2 * 8;
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) {
    u32 m[4], a[2][4];
    load_matrices(m, row + 16 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pieces held = split(s[j][i / 2][2 * (i % 2)], s[j][i / 2][2 * (i % 2) + 1]);
      a[0][i] = held.first;
      a[1][i] = held.second;
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      if (!MAMBA) multiply_add(p[piece], a[piece], m[0], m[1]);
      multiply_add(r[piece], a[piece], m[2], m[3]);
    }
  }
  const Two step = *reinterpret_cast<const Two*>(steps + 2 * t);
  float v[4], w[4], o[4];
  for (int i = 0; i < 4; ++i) {
    const int e = i % 2, at = g + 8 * (i / 2);
    v[i] = float_of(u32(values[(2 * t + e) * OWN_ROW + at]) << 16);
    const float of_state = MAMBA ? 0.f : times(mix.of_state[e], plus(p[0][i], p[1][i]));
    w[i] = times(step.x[e], plus(v[i], -of_state));
    o[i] = times(mix.of_output[e], plus(r[0][i], r[1][i]));
  }
  u32 a[4];
  operand(a, w);
  if (!MAMBA) {
    for (int i = 0; i < 4; ++i) w[i] = 0.f;
    add_product(w, a, mix.inverse);
    operand(a, w);
  }
  add_product(o, a, mix.mixed);
  if (MAMBA)
    for (int i = 0; i < 4; ++i) o[i] = fused(skip, v[i], o[i]);
  done(o);
  if (!full) return;
  for (int i = 0; i < 4; ++i) w[i] = times(w[i], mix.of_end[i % 2]);
  fold(s, keys, KEY_ROW, w, mix.whole);
}

// The warp's 16 rows of a state, or 16 N keys of them. A lane's four keys of a row lie at four positions (see place).
template <int N>
DEVICE void fill(float (&s)[N][2][4], const float* held) {
  const int lane = thread() % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Four got = *reinterpret_cast<const Four*>(held + (lane / 4 + 8 * half) * KEYS + 16 * j + lane % 4 * 4);
      for (int e = 0; e < 4; ++e) s[j][e / 2][2 * half + e % 2] = got.x[e];
    }
}

template <int N>
DEVICE void put(const float (&s)[N][2][4], float* held) {
  const int lane = thread() % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Four given;
      for (int e = 0; e < 4; ++e) given.x[e] = s[j][e / 2][2 * half + e % 2];
      *reinterpret_cast<Four*>(held + (lane / 4 + 8 * half) * KEYS + 16 * j + lane % 4 * 4) = given;
    }
}

// Calls each(at, c, u) for the chunks of the tokens `first` to `last` of a request: chunk c of part `at` of shared memory
// begins with token u. after(u) follows the chunks of a part, which begins with token u.
template <class Each, class After>
DEVICE void chunks_of(Memory& m, const Source& from, int first, int last, Each each, After after) {
  bring<TILE, true>(m, 0, from, first);
  if (thread() < TILE) lay(m, 0, thread(), numbers_of<true>(from, first + thread()));
  wait_groups<0>();
  barrier();
  int at = 0;
  for (int u = first; u < last; u += TILE, at ^= 1) {
    const bool more = u + TILE < last;
    Four numbers;
    if (more) {  // the open chunk lay in the first part
      bring<TILE, false>(m, at ^ 1, from, u + TILE);
      if (thread() < TILE) numbers = numbers_of<false>(from, u + TILE + thread());
    }
    for (int c = thread() / 32; c < TILE / CHUNK; c += WARPS)
      m.mixes[c][thread() % 32] = mix_of(m.keys[at][c * CHUNK], m.queries[at][c * CHUNK], m.numbers[at][c][0]);
    barrier();
    for (int c = 0; c < TILE / CHUNK && u + c * CHUNK < last; ++c) each(at, c, u + c * CHUNK);
    if (more) {
      if (thread() < TILE) lay(m, at ^ 1, thread(), numbers);
      wait_groups<0>();
    }
    barrier();
    after(u);
  }
}

// What a block has: 16 rows of a head's state for each warp, of one request, or of one of its segments.
struct Place {
  int head, part, row, request, segment;
};

DEVICE Place place_of(const int* segments) {
  const int by = block_y(), row = thread() / 32 * 16;
  return {block_x() / PARTS_OF_HEAD, block_x() % PARTS_OF_HEAD, row, segments ? segments[2 * by] : by,
          segments ? segments[2 * by + 1] : 0};
}

DEVICE float* state_at(float* states, i64 slot, i64 state_slot, const Place& at) {
  return states + slot * state_slot + (i64(at.head) * VALUES + at.part * OWN + at.row) * KEYS;
}

#if !defined(ONLY) || ONLY == 2
// Block (HEADS * PARTS_OF_HEAD, requests). out [tokens, HEADS, VALUES] bf16, dense. With segments (see follow), the block
// has a segment, whose state at the start is in `starting`, and writes no state.
KERNEL scan(const u16* y, const float* keyed, const float* valued, const void* d, float* states, u16* out,
            const int* starts, const int* slots, const signed char* fresh, i64 state_slot, u16* conv, i64 conv_slot,
            const int* counts, const int* segments, const float* starting) {
  Memory& m = *reinterpret_cast<Memory*>(shared());
  const Place block = place_of(segments);
  const int lane = thread() % 32, start = starts[block.request], end = starts[block.request + 1];
  const i64 slot = slots[block.request];
  if (slot <= 0 || start >= end) return;
  const int before = counts[block.request], total = before + end - start, first = block.segment * SEGMENT;
  const int last = segments && first + SEGMENT < total ? first + SEGMENT : total;
  if (first >= last) return;
  const bool begins = fresh && fresh[block.request];
  float* held = state_at(states, slot, state_slot, block);
  float s[GROUPS][2][4] = {};
  if (segments) fill(s, state_at(const_cast<float*>(starting), block_y(), i64(HEADS) * VALUES * KEYS, block));
  else if (!begins) fill(s, held);
  const float skip = MAMBA ? number<D_FLOAT>(d, block.head) : 0.f;
  const Source from{y, keyed, valued, log_of(conv, slot * conv_slot), start - before, before, total, block.head,
                    block.part * OWN};
  chunks_of(
      m, from, first, last,
      [&](int at, int c, int u) {
        const int token = c * CHUNK;
        advance(s, m.keys[at][token], m.queries[at][token], m.values[at][token] + block.row, m.numbers[at][c][1],
                      m.mixes[c][lane], skip, u + CHUNK <= total, [&](const float (&o)[4]) {
                        for (int i = 0; i < 4; ++i)
                          m.out[token + lane % 4 * 2 + i % 2][block.row + lane / 4 + 8 * (i / 2)] =
                              u16(round_pair(o[i], 0.f));
                      });
      },
      [&](int u) {
        constexpr int PIECES_OF_TOKEN = OWN / 8, STEP = THREADS / PIECES_OF_TOKEN;
        const int c = thread() % PIECES_OF_TOKEN * 8;
        u16* to = out + (i64(u + from.base) * HEADS + block.head) * VALUES + block.part * OWN + c;
#pragma unroll
        for (int i = 0; i < (TILE + STEP - 1) / STEP; ++i) {
          const int token = thread() / PIECES_OF_TOKEN + i * STEP;
          if (token < TILE && u + token >= before && u + token < last)
            *reinterpret_cast<Eight*>(to + i64(token) * HEADS * VALUES) =
                *reinterpret_cast<const Eight*>(m.out[token] + c);
        }
      });
  if (!segments && (begins || total >= CHUNK)) put(s, held);
}
#endif

#if !defined(ONLY) || ONLY == 4
// A block of follow has OWN rows and PART keys of a head's state, and brings AHEAD tokens at once: none waits long for
// memory.
struct Followed {
  u16 keys[2][AHEAD][PART + 8], values[2][AHEAD][OWN_ROW];
  float steps[2][AHEAD], ends[2][AHEAD], wholes[2][AHEAD / CHUNK];  // step; decay until the chunk's end; of the chunk
};
static_assert(KEYS % PART == 0 && PART % 32 == 0 && AHEAD % 32 == 0 && AHEAD <= THREADS && SEGMENT % AHEAD == 0);

// Brings the tokens from `first` on, zeros after the last one, with the keys from `key` on. LOG: see bring.
template <bool LOG>
DEVICE void bring_part(Followed& m, int at, const Source& from, int key, int first) {
  constexpr int KEYED = PART / 8, KEYED_STEP = THREADS / KEYED, VALUED = OWN / 8, VALUED_STEP = THREADS / VALUED;
  static_assert(THREADS % KEYED == 0 && THREADS % VALUED == 0 && AHEAD % KEYED_STEP == 0 && AHEAD % VALUED_STEP == 0);
  const u16* y = from.y + i64(first + from.base) * CHANNELS;
  const int to_key = thread() % KEYED * 8, keyed = from.head / (HEADS / KEY_HEADS) * KEYS + key + to_key;
#pragma unroll
  for (int i = 0; i < AHEAD / KEYED_STEP; ++i) {
    const int token = thread() / KEYED + i * KEYED_STEP, u = first + token;
    const u16* held = LOG && u < from.before ? from.log + u * LOG_ROW + keyed : y + i64(token) * CHANNELS + K_AT + keyed;
    copy_16(m.keys[at][token] + to_key, held, u < from.total);
  }
  const int to_row = thread() % VALUED * 8, row = from.head * VALUES + from.row + to_row;
#pragma unroll
  for (int i = 0; i < AHEAD / VALUED_STEP; ++i) {
    const int token = thread() / VALUED + i * VALUED_STEP, u = first + token;
    const u16* held = LOG && u < from.before ? from.log + u * LOG_ROW + LOG_V + row : y + i64(token) * CHANNELS + V_AT + row;
    copy_16(m.values[at][token] + to_row, held, u < from.total);
  }
  end_group();
}

// Lays the numbers of a thread's token; a warp has whole chunks. The products run as in mix_of.
DEVICE void lay_part(Followed& m, int at, const Four& numbers) {
  const int lane = thread() % 32;
  float whole = 1.f, after = 1.f;
#pragma unroll
  for (int l = 0; l < CHUNK; ++l) {
    const float decay = of_lane(numbers.x[0], lane / CHUNK * CHUNK + l);
    whole = times(whole, decay);
    if (l > lane % CHUNK) after = times(after, decay);
  }
  m.steps[at][thread()] = numbers.x[1];
  m.ends[at][thread()] = after;
  if (lane % CHUNK == 0) m.wholes[at][thread() / CHUNK] = whole;
}

// Moves the state over a chunk, which begins with token c of what was brought, as `advance` does.
DEVICE void follow_chunk(float (&s)[PART / 16][2][4], Followed& m, int at, int c, const u32* values) {
  const int t = thread() % 4;
  const Two step = *reinterpret_cast<const Two*>(m.steps[at] + c + 2 * t);
  const Two end = *reinterpret_cast<const Two*>(m.ends[at] + c + 2 * t);
  float w[4];
  for (int i = 0; i < 4; ++i) {
    const float v = i % 2 ? high(values[i / 2]) : low(values[i / 2]);
    w[i] = times(times(step.x[i % 2], v), end.x[i % 2]);
  }
  fold(s, m.keys[at][c], PART + 8, w, m.wholes[at][c / CHUNK]);
}

// Before scan, where few long prompts would leave the device idle: the state of Mamba 2 does not depend on outputs. Block
// (HEADS * PARTS_OF_HEAD * KEYS / PART, requests) follows a part of a request's state, keeps it at each start of a
// segment, of SEGMENT tokens from the start of the chunk that was open, and writes it at the end. segments [n, 2]: a
// request, and the number of one of its segments; those of a request are neighbours, the first at firsts[request].
// starting [n, HEADS, VALUES, KEYS].
KERNEL follow(const u16* y, const float* valued, float* states, const int* starts, const int* slots,
              const signed char* fresh, i64 state_slot, u16* conv, i64 conv_slot, const int* counts, const int* firsts,
              float* starting) {
  Followed& m = *reinterpret_cast<Followed*>(shared());
  constexpr int SHARES = KEYS / PART;
  const int request = block_y(), key = block_x() % SHARES * PART, of_head = block_x() / SHARES;
  const Place block{of_head / PARTS_OF_HEAD, of_head % PARTS_OF_HEAD, thread() / 32 * 16, request, 0};
  const int start = starts[request], end = starts[request + 1], lane = thread() % 32;
  const i64 slot = slots[request], size = i64(HEADS) * VALUES * KEYS;
  if (slot <= 0 || start >= end) return;
  const int before = counts[request], total = before + end - start;
  const bool begins = fresh && fresh[request];
  float* held = state_at(states, slot, state_slot, block) + key;
  float* to = state_at(starting, firsts[request], size, block) + key;
  float s[PART / 16][2][4] = {};
  if (!begins) fill(s, held);
  const Source from{y, nullptr, valued, log_of(conv, slot * conv_slot), start - before, before, total, block.head,
                    block.part * OWN};
  bring_part<true>(m, 0, from, key, 0);
  if (thread() < AHEAD) lay_part(m, 0, numbers_of<true>(from, thread()));
  wait_groups<0>();
  barrier();
  int at = 0;
  for (int u = 0; u < total; u += AHEAD, at ^= 1) {
    const bool more = u + AHEAD < total;
    Four numbers;
    if (more) {  // the open chunk lay in the first part
      bring_part<false>(m, at ^ 1, from, key, u + AHEAD);
      if (thread() < AHEAD) numbers = numbers_of<false>(from, u + AHEAD + thread());
    }
    if (u % SEGMENT == 0) put(s, to + u / SEGMENT * size);
    const int full = total - u < AHEAD ? (total - u) / CHUNK * CHUNK : AHEAD;  // tokens of full chunks
    // Values of two chunks at once: rows g and g + 8 of the tokens 2 t and 2 t + 1 of each.
    const u16* values = m.values[at][lane / 16 * CHUNK + lane % 8] + block.row + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int c = 0; c < full; c += 2 * CHUNK) {
      u32 held_values[4];
      load_matrices_transposed(held_values, values + c * OWN_ROW);
      follow_chunk(s, m, at, c, held_values);
      if (c + CHUNK < full) follow_chunk(s, m, at, c + CHUNK, held_values + 2);
    }
    if (more) {
      if (thread() < AHEAD) lay_part(m, at ^ 1, numbers);
      wait_groups<0>();
    }
    barrier();
  }
  if (begins || total >= CHUNK) put(s, held);
}
#endif

#if !defined(ONLY) || ONLY == 3
// The same for requests of one token each.
KERNEL scan_one(const u16* y, const float* keyed, const float* valued, const void* d, float* states, u16* out,
                const int* slots, i64 state_slot, u16* conv, i64 conv_slot, const int* counts) {
  Memory& m = *reinterpret_cast<Memory*>(shared());
  const int head = block_x() / PARTS_OF_HEAD, part = block_x() % PARTS_OF_HEAD, request = block_y();
  const int lane = thread() % 32, row = thread() / 32 * 16;
  const i64 slot = slots[request];
  u16* to = out + (i64(request) * HEADS + head) * VALUES + part * OWN;
  if (slot <= 0) {
    if (thread() < OWN) to[thread()] = 0;
    return;
  }
  float* held = states + slot * state_slot + (i64(head) * VALUES + part * OWN + row) * KEYS;
  float s[GROUPS][2][4];
  fill(s, held);
  const int before = counts[request];
  u16* log = log_of(conv, slot * conv_slot);
  const Source from{y, keyed, valued, log, request - before, before, before + 1, head, part * OWN};
  bring<CHUNK, true>(m, 0, from, 0);
  if (thread() < CHUNK) lay(m, 0, thread(), numbers_of<true>(from, thread()));
  const float skip = MAMBA ? number<D_FLOAT>(d, head) : 0.f;
  wait_groups<0>();
  barrier();
  const bool full = before == CHUNK - 1;
  const Mix mix = mix_of(m.keys[0][0], m.queries[0][0], m.numbers[0][0][0]);
  advance(s, m.keys[0][0], m.queries[0][0], m.values[0][0] + row, m.numbers[0][0][1], mix, skip, full,
          [&](const float (&o)[4]) {
            if (lane % 4 != before / 2) return;
            to[row + lane / 4] = u16(round_pair(before % 2 ? o[1] : o[0], 0.f));
            to[row + lane / 4 + 8] = u16(round_pair(before % 2 ? o[3] : o[2], 0.f));
          });
  if (full) put(s, held);
  if (block_x() == 0 && thread() == 0) *count_of(log) = full ? 0 : before + 1;
}
#endif
