// Causal convolutions over a few tokens: of Mamba 1 and Kimi delta attention (GATED 0), and between the two products of
// LFM2's layers (GATED 1).
//
// x [tokens, CHANNELS] bf16 (rows may be strided); with GATED [tokens, 3, CHANNELS]: before | after | inputs. The inputs u
// are x, with GATED before * inputs, rounded to bf16. The sum in fp32 in this order:
//   sum[t, c] = bias[c] + w[c, 0] u[t-BEFORE, c] + ... + w[c, BEFORE] u[t, c]
// out[t, c] = silu(sum), rounded to bf16; with GATED after * (the sum, rounded to bf16), rounded. A token's sum takes its
// request's own inputs, whatever step brought them: conv [slots, BEFORE, CHANNELS] bf16 keeps the last of them.
//
// convolve: out. In a step of one token a request (starts null) it also keeps the inputs. keep_inputs: the same after a
// step of prompts. weight [CHANNELS, BEFORE + 1] (fp32 if WEIGHT_FLOAT), bias [CHANNELS] or null, bf16. starts
// [requests + 1], slots [requests] (0 and below are skipped), fresh [requests], which [tokens]: as in recurrent.cu. out
// [tokens, CHANNELS], dense.
//
// Compiled for CHANNELS (even), BEFORE (1 to 7), GATED, WEIGHT_FLOAT, THREADS.

struct Step {
  const u16* x;
  u16* conv;
  const int *starts, *slots;
  const signed char* fresh;
  int x_row, conv_row;
  i64 conv_slot;
};

DEVICE float low(u32 pair) { return float_of(pair << 16); }
DEVICE float high(u32 pair) { return float_of(pair & 0xffff0000u); }
DEVICE u32 pair_at(const u16* from) { return *reinterpret_cast<const u32*>(from); }
DEVICE float silu(float x) { return times(x, reciprocal(plus(1.f, power_of_2(times(x, -1.4426950408889634f))))); }
// Element `at` of the weights.
DEVICE float factor(const void* weight, int at) {
  return WEIGHT_FLOAT ? static_cast<const float*>(weight)[at]
                      : float_of(u32(static_cast<const u16*>(weight)[at]) << 16);
}
DEVICE u32 product(u32 a, u32 b) { return round_pair(times(low(a), low(b)), times(high(a), high(b))); }

// u of channels c and c + 1 at token t, which may lie before the request's first token in this step.
DEVICE u32 input(const Step& s, int t, int start, i64 slot, bool fresh, int c) {
  const u16* at = s.x + i64(t) * s.x_row + c;
  if (t >= start) return GATED ? product(pair_at(at), pair_at(at + 2 * CHANNELS)) : pair_at(at);
  return fresh ? 0u : pair_at(s.conv + slot * s.conv_slot + (t - start + BEFORE) * s.conv_row + c);
}

DEVICE void keep(const Step& s, i64 slot, int c, const u32* last) {
  for (int i = 0; i < BEFORE; ++i)
    *reinterpret_cast<u32*>(s.conv + slot * s.conv_slot + i * s.conv_row + c) = last[i];
}

// Block (tokens / per, channels / 2 / THREADS).
KERNEL convolve(const u16* x, const void* weight, const u16* bias, u16* conv, u16* out, const int* starts,
                const int* slots, const signed char* fresh, const int* which, i64 conv_slot, int tokens, int requests,
                int per, int x_row, int conv_row) {
  const Step s{x, conv, starts, slots, fresh, x_row, conv_row, conv_slot};
  const int first = block_x() * per, c = 2 * (block_y() * THREADS + thread());
  if (c >= CHANNELS) return;
  float w[2][BEFORE + 1];
  for (int e = 0; e < 2; ++e)
    for (int i = 0; i <= BEFORE; ++i) w[e][i] = factor(weight, (c + e) * (BEFORE + 1) + i);
  const u32 added = bias ? pair_at(bias + c) : 0u;
  u32 held[BEFORE + 1];
  int current = -1;
  for (int t = first; t < first + per && t < tokens; ++t) {
    const int r = which ? which[t] : t;
    u32* to = reinterpret_cast<u32*>(out + i64(t) * CHANNELS + c);
    const i64 slot = r < requests ? slots[r] : 0;
    if (slot <= 0) {
      *to = 0u;
      continue;
    }
    const int start = starts ? starts[r] : t;
    const bool begins = fresh && fresh[r];
    for (int i = 0; i < BEFORE; ++i) held[i] = r == current ? held[i + 1] : input(s, t - BEFORE + i, start, slot, begins, c);
    held[BEFORE] = input(s, t, start, slot, begins, c);
    current = r;
    float sums[2] = {low(added), high(added)};
    for (int i = 0; i <= BEFORE; ++i) {
      sums[0] = fused(w[0][i], low(held[i]), sums[0]);
      sums[1] = fused(w[1][i], high(held[i]), sums[1]);
    }
    if (GATED) *to = product(pair_at(x + i64(t) * x_row + CHANNELS + c), round_pair(sums[0], sums[1]));
    else *to = round_pair(silu(sums[0]), silu(sums[1]));
    if (!starts) keep(s, slot, c, held + 1);
  }
}

// Block (requests, channels / 2 / THREADS): a thread reads all inputs of its channels before it writes.
KERNEL keep_inputs(const u16* x, u16* conv, const int* starts, const int* slots, const signed char* fresh,
                   i64 conv_slot, int x_row, int conv_row) {
  const Step s{x, conv, starts, slots, fresh, x_row, conv_row, conv_slot};
  const int r = block_x(), c = 2 * (block_y() * THREADS + thread());
  const i64 slot = slots[r];
  const int start = starts[r], end = starts[r + 1];
  if (c >= CHANNELS || slot <= 0 || start >= end) return;
  u32 found[BEFORE];
  for (int i = 0; i < BEFORE; ++i) found[i] = input(s, end - BEFORE + i, start, slot, fresh && fresh[r], c);
  keep(s, slot, c, found);
}
