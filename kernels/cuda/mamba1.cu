// Mamba 1's recurrence: one token of a request after the other, so prompts may be cut anywhere, and decode has the bits of
// prefill.
//
// Channel c has the state S [STATES] (fp32). With step = softplus(dt[t, c] + dt_bias[c]), for n ascending,
//   S[n] = exp(rate[c, n] step) S[n] + (step x[t, c]) b[t, n];  y = sum of S[n] c[t, n]
// and out[t, c] = (y + skip[c] x[t, c]) * silu(gate[t, c]), rounded once. A channel is one thread's.
//
// x, dt, gate [tokens, CHANNELS], b, c [tokens, STATES] bf16, rows may be strided. rate [CHANNELS, STATES], skip, dt_bias
// [CHANNELS] (or null) fp32. states [slots, CHANNELS, STATES] fp32. out [tokens, CHANNELS] bf16, dense. starts [requests +
// 1], or null if each request has one token. slots [requests]: 0 and below are skipped. fresh [requests], 1 where a request
// starts at position 0, or null if none does.
//
// Compiled for CHANNELS, STATES (a multiple of 8), THREADS.

struct alignas(16) Four { float x[4]; };
struct alignas(16) Eight { u32 pairs[4]; };

constexpr float LOG2E = 1.4426950408889634f;

DEVICE float wide(u16 half) { return float_of(u32(half) << 16); }
DEVICE float exponential(float x) { return power_of_2(times(x, LOG2E)); }
DEVICE float softplus(float x) { return x <= 20.f ? log_of_1_plus(exponential(x)) : x; }
DEVICE float silu(float x) { return times(x, reciprocal(plus(1.f, exponential(-x)))); }

struct Rows {
  const u16 *x, *dt, *b, *c, *gate;
  int x_row, dt_row, b_row, c_row, gate_row;
};

// What a thread takes of a token.
struct Token {
  Eight b[STATES / 8], c[STATES / 8];
  u16 x, dt, gate;
};

DEVICE Token take(const Rows& rows, i64 t, int channel) {
  Token got;
  for (int i = 0; i < STATES / 8; ++i) {
    got.b[i] = *reinterpret_cast<const Eight*>(rows.b + t * rows.b_row + 8 * i);
    got.c[i] = *reinterpret_cast<const Eight*>(rows.c + t * rows.c_row + 8 * i);
  }
  got.x = rows.x[t * rows.x_row + channel];
  got.dt = rows.dt[t * rows.dt_row + channel];
  got.gate = rows.gate[t * rows.gate_row + channel];
  return got;
}

DEVICE float part(const Eight& held, int i) {
  const u32 pair = held.pairs[i / 2];
  return float_of(i % 2 ? pair & 0xffff0000u : pair << 16);
}

// Block (channels / THREADS, requests).
KERNEL scan(const u16* x, const u16* dt, const u16* b, const u16* c, const u16* gate, const float* rate,
            const float* skip, const float* dt_bias, float* states, u16* out, const int* starts, const int* slots,
            const signed char* fresh, i64 state_slot, int x_row, int dt_row, int b_row, int c_row, int gate_row) {
  const Rows rows{x, dt, b, c, gate, x_row, dt_row, b_row, c_row, gate_row};
  const int channel = block_x() * THREADS + thread(), request = block_y();
  const int start = starts ? starts[request] : request, end = starts ? starts[request + 1] : request + 1;
  const i64 slot = slots[request];
  if (channel >= CHANNELS || start >= end) return;
  if (slot <= 0) {
    for (int t = start; t < end; ++t) out[i64(t) * CHANNELS + channel] = 0;
    return;
  }
  float* held = states + slot * state_slot + i64(channel) * STATES;
  float s[STATES] = {}, a[STATES];
  const bool begins = fresh && fresh[request];
  for (int i = 0; i < STATES / 4; ++i) {
    const Four by = *reinterpret_cast<const Four*>(rate + i64(channel) * STATES + 4 * i);
    for (int e = 0; e < 4; ++e) a[4 * i + e] = times(by.x[e], LOG2E);
    if (begins) continue;
    const Four got = *reinterpret_cast<const Four*>(held + 4 * i);
    for (int e = 0; e < 4; ++e) s[4 * i + e] = got.x[e];
  }
  const float through = skip[channel], added = dt_bias ? dt_bias[channel] : 0.f;
  Token now = take(rows, start, channel);
  for (int t = start; t < end; ++t) {
    const Token next = take(rows, t + 1 < end ? t + 1 : t, channel);
    const float value = wide(now.x), step = softplus(plus(wide(now.dt), added)), u = times(step, value);
    float y = 0.f;
    for (int n = 0; n < STATES; ++n) {
      s[n] = fused(power_of_2(times(a[n], step)), s[n], times(u, part(now.b[n / 8], n % 8)));
      y = fused(s[n], part(now.c[n / 8], n % 8), y);
    }
    const float result = times(fused(through, value, y), silu(wide(now.gate)));
    out[i64(t) * CHANNELS + channel] = u16(round_pair(result, 0.f));
    now = next;
  }
  for (int i = 0; i < STATES / 4; ++i) {
    Four given;
    for (int e = 0; e < 4; ++e) given.x[e] = s[4 * i + e];
    *reinterpret_cast<Four*>(held + 4 * i) = given;
  }
}
