// Kimi delta attention: one token of a request after the other, so prompts may be cut anywhere, and decode has the bits of
// prefill.
//
// A head has the state S [VALUES, KEYS] (fp32). For a token with q, k and v after the convolution, the decay d[c] =
// exp(-exp(rate) softplus(gate[c] + dt_bias[c])) of each key channel c, and step = sigmoid(beta):
//   S = S diag(d);  w = step / |k| (v - S k / |k|);  o = scale / |q| (S q + w k.q);  S = S + w k^T
// |k| stands for sqrt(k.k + 1e-6), |q| likewise.
//
// prepare: the numbers of a token and head that do not depend on the state. decays [tokens, HEADS, KEYS]; numbers
//   [tokens, HEADS, 4]: 1/|k|, scale/|q|, step, k.q. A warp has a token and head, and a lane four neighbouring channels:
//   their products ascending, then the lanes' sums by exchange over 16, 8, 4, 2, 1.
// scan: the recurrence. Eight lanes have a row of S: lane l the channels 4l .. 4l + 3 of each 32. S k and S q: a lane's
//   channels ascending, then the lanes' sums by exchange over 4, 2, 1.
//
// y [tokens, 3, HEADS, KEYS] bf16, dense: q | k | v. gate [tokens, HEADS * KEYS] and beta [tokens, HEADS] bf16, rows may be
// strided. rate [HEADS] (A_log) and dt_bias [HEADS * KEYS] fp32. states [slots, HEADS, VALUES, KEYS] fp32. out [tokens,
// HEADS, VALUES] bf16, dense. starts [requests + 1], or null if each request has one token. slots [requests]: 0 and below
// are skipped. fresh [requests], 1 where a request starts at position 0, or null if none does.
//
// Compiled for HEADS. What changes no bit: WARPS (of a block), ROWS (of S of a thread: 1, 2 or 4).

constexpr int KEYS = 128, VALUES = KEYS;
constexpr int LANES_OF_ROW = 8, TAKEN = KEYS / 32;  // fours of channels of a lane
constexpr int OWN = 32 / LANES_OF_ROW * ROWS * WARPS, PARTS_OF_HEAD = VALUES / OWN;  // rows of a block; blocks of a head
constexpr int CHANNELS = HEADS * KEYS;
constexpr float LOG2E = 1.4426950408889634f;
static_assert(VALUES % OWN == 0 && THREADS == 32 * WARPS);

struct alignas(16) Four { float x[4]; };
struct alignas(8) Halves { u32 pairs[2]; };  // four neighbouring channels

DEVICE float wide(u16 half) { return float_of(u32(half) << 16); }
DEVICE float part(const Halves& held, int i) {
  const u32 pair = held.pairs[i / 2];
  return float_of(i % 2 ? pair & 0xffff0000u : pair << 16);
}
DEVICE float exponential(float x) { return power_of_2(times(x, LOG2E)); }
DEVICE float sigmoid(float x) { return reciprocal(plus(1.f, exponential(-x))); }
DEVICE float softplus(float x) { return x <= 20.f ? log_of_1_plus(exponential(x)) : x; }

// Block (tokens * HEADS / WARPS).
KERNEL prepare(const u16* y, const u16* gate, const u16* beta, const float* rate, const float* dt_bias, float* decays,
               float* numbers, int tokens, int gate_row, int beta_row) {
  const int unit = block_x() * WARPS + thread() / 32, c = thread() % 32 * 4, t = unit / HEADS, head = unit % HEADS;
  if (t >= tokens) return;
  const u16* at = y + i64(t) * 3 * CHANNELS + head * KEYS + c;
  const Halves q = *reinterpret_cast<const Halves*>(at), k = *reinterpret_cast<const Halves*>(at + CHANNELS);
  float sums[3] = {};  // k.k, q.q, k.q
  Four decay;
  const u16* raw = gate + i64(t) * gate_row + head * KEYS + c;
  const Four added = *reinterpret_cast<const Four*>(dt_bias + head * KEYS + c);
  const float by = -exponential(rate[head]);
  for (int i = 0; i < 4; ++i) {
    sums[0] = fused(part(k, i), part(k, i), sums[0]);
    sums[1] = fused(part(q, i), part(q, i), sums[1]);
    sums[2] = fused(part(k, i), part(q, i), sums[2]);
    decay.x[i] = exponential(times(by, softplus(plus(wide(raw[i]), added.x[i]))));
  }
  for (int d = 16; d; d /= 2)
    for (float& sum : sums) sum = plus(sum, exchange(sum, d));
  *reinterpret_cast<Four*>(decays + i64(unit) * KEYS + c) = decay;
  if (c) return;
  const Four found{{root_reciprocal(plus(sums[0], 1e-6f)), times(root_reciprocal(plus(sums[1], 1e-6f)), SCALE),
                    sigmoid(wide(beta[i64(t) * beta_row + head])), sums[2]}};
  *reinterpret_cast<Four*>(numbers + i64(unit) * 4) = found;
}

// What a thread takes of a token.
struct Token {
  Halves q[TAKEN], k[TAKEN];
  Four decay[TAKEN], numbers;
  u16 v[ROWS];
};

// Block (HEADS * PARTS_OF_HEAD, requests).
KERNEL scan(const u16* y, const float* decays, const float* numbers, float* states, u16* out, const int* starts,
            const int* slots, const signed char* fresh, i64 state_slot) {
  const int head = block_x() / PARTS_OF_HEAD, request = block_y(), lane = thread() % LANES_OF_ROW, c = 4 * lane;
  const int row = block_x() % PARTS_OF_HEAD * OWN + thread() / LANES_OF_ROW * ROWS;
  const int start = starts ? starts[request] : request, end = starts ? starts[request + 1] : request + 1;
  const i64 slot = slots[request];
  if (start >= end) return;
  if (slot <= 0) {
    for (int t = start; t < end; ++t)
      if (lane < ROWS) out[(i64(t) * HEADS + head) * VALUES + row + lane] = 0;
    return;
  }
  float* held = states + slot * state_slot + (i64(head) * VALUES + row) * KEYS + c;
  float s[ROWS][TAKEN][4];
  const bool begins = fresh && fresh[request];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < TAKEN; ++j) {
      const Four got = begins ? Four{} : *reinterpret_cast<const Four*>(held + r * KEYS + 32 * j);
      for (int i = 0; i < 4; ++i) s[r][j][i] = got.x[i];
    }
  const auto take = [&](int t) {
    Token got;
    const u16* at = y + i64(t) * 3 * CHANNELS + head * KEYS;
    const i64 unit = i64(t) * HEADS + head;
    for (int j = 0; j < TAKEN; ++j) {
      got.q[j] = *reinterpret_cast<const Halves*>(at + c + 32 * j);
      got.k[j] = *reinterpret_cast<const Halves*>(at + CHANNELS + c + 32 * j);
      got.decay[j] = *reinterpret_cast<const Four*>(decays + unit * KEYS + c + 32 * j);
    }
    got.numbers = *reinterpret_cast<const Four*>(numbers + unit * 4);
    for (int r = 0; r < ROWS; ++r) got.v[r] = at[2 * CHANNELS + row + r];
    return got;
  };
  Token now = take(start);
  for (int t = start; t < end; ++t) {
    const Token next = take(t + 1 < end ? t + 1 : t);
    float of_k[ROWS] = {}, of_q[ROWS] = {};
    for (int j = 0; j < TAKEN; ++j)
      for (int i = 0; i < 4; ++i) {
        const float k = part(now.k[j], i), q = part(now.q[j], i), decay = now.decay[j].x[i];
        for (int r = 0; r < ROWS; ++r) {
          s[r][j][i] = times(s[r][j][i], decay);
          of_k[r] = fused(s[r][j][i], k, of_k[r]);
          of_q[r] = fused(s[r][j][i], q, of_q[r]);
        }
      }
    for (int d = LANES_OF_ROW / 2; d; d /= 2)
      for (int r = 0; r < ROWS; ++r) {
        of_k[r] = plus(of_k[r], exchange(of_k[r], d));
        of_q[r] = plus(of_q[r], exchange(of_q[r], d));
      }
    const float a = now.numbers.x[0], b = now.numbers.x[1], factor = times(a, now.numbers.x[2]);
    for (int r = 0; r < ROWS; ++r) {
      const float w = times(factor, fused(-a, of_k[r], wide(now.v[r])));
      if (lane == r) {
        const float o = times(b, fused(w, now.numbers.x[3], of_q[r]));
        out[(i64(t) * HEADS + head) * VALUES + row + r] = u16(round_pair(o, 0.f));
      }
      for (int j = 0; j < TAKEN; ++j)
        for (int i = 0; i < 4; ++i) s[r][j][i] = fused(w, part(now.k[j], i), s[r][j][i]);
    }
    now = next;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < TAKEN; ++j) {
      Four given;
      for (int i = 0; i < 4; ++i) given.x[i] = s[r][j][i];
      *reinterpret_cast<Four*>(held + r * KEYS + 32 * j) = given;
    }
}
