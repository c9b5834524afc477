// gated_silu: SwiGLU, with a factor of its gate (SCALED) as Falcon-H1 has it, or without:
//   out[t, c] = round(round(silu(round(factor x[t, c]))) (x[t, COLUMNS + c] + zero)), silu and products in fp32.
// The places of the roundings are those of a product by a number and of vLLM's silu_and_mul: the bits are the same, and
// with a factor, the gates are read and written once less. `zero`, a pair of equal elements, is 0 where vLLM adds 0, and
// else -0, which changes nothing.
//
// clamped_pairs: gpt-oss's SwiGLU of pairs of a gate and an up, with the bits of vLLM's swigluoai_and_mul. In fp32:
//   out[t, c] = round((u + 1) g / (1 + exp(-alpha g))), g = min(x[t, 2 c], limit),
//   u = max(min(x[t, 2 c + 1], limit), -limit).
//
// No sum: an element depends on its two inputs alone. x [rows, 2 COLUMNS] of 16-bit elements, whose rows may be strided.
// out [rows, COLUMNS], dense. Both are aligned to 16 bytes. Compiled for COLUMNS (a multiple of 8) and for bf16 or fp16
// (INPUT, BRAIN). A thread has 8 elements of out.

struct alignas(16) Eight { u32 pairs[4]; };

// In bf16, the quick one is right for every gate. A certificate shows that on each device.
DEVICE float silu(float x) { return BRAIN ? quick_swish(x) : swish(x); }

KERNEL gated_silu(const u16* x, u16* out, i64 x_row, u32 rows, float factor, u32 zero) {
  const u32 at = block_x() * THREADS + thread(), row = at / (COLUMNS / 8), c = at % (COLUMNS / 8);
  if (row >= rows) return;
  const Eight* from = reinterpret_cast<const Eight*>(x + row * x_row) + c;
  const Eight gates = from[0], ups = from[COLUMNS / 8];
  Eight made;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 gate = gates.pairs[i];
#if SCALED
    gate = round_pair(times_unflushed(widen(u16(gate)), factor), times_unflushed(widen(u16(gate >> 16)), factor));
#endif
    const u32 activated = round_pair(silu(widen(u16(gate))), silu(widen(u16(gate >> 16))));
    const u32 up = fuse_pairs(ups.pairs[i], BRAIN ? 0x3f803f80u : 0x3c003c00u, zero);  // times 1
    made.pairs[i] = fuse_pairs(activated, up, 0x80008000u);  // plus -0, which changes no product
  }
  reinterpret_cast<Eight*>(out)[at] = made;
}

DEVICE float clamped(u32 pair, float alpha, float limit) {
  const float g = lesser(widen(u16(pair)), limit), u = -lesser(-lesser(widen(u16(pair >> 16)), limit), limit);
  return over_1_plus_exp(times_unflushed(plus(u, 1.f), g), times_unflushed(g, alpha));
}

KERNEL clamped_pairs(const u16* x, u16* out, i64 x_row, u32 rows, float alpha, float limit) {
  const u32 at = block_x() * THREADS + thread(), row = at / (COLUMNS / 8), c = at % (COLUMNS / 8);
  if (row >= rows) return;
  const Eight* from = reinterpret_cast<const Eight*>(x + row * x_row) + 2 * c;
  const Eight given[2] = {from[0], from[1]};
  Eight made;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32* pairs = given[i / 2].pairs + i % 2 * 2;
    made.pairs[i] = round_pair(clamped(pairs[0], alpha, limit), clamped(pairs[1], alpha, limit));
  }
  reinterpret_cast<Eight*>(out)[at] = made;
}
