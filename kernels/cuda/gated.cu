// SwiGLU with a factor of its gate, as Falcon-H1 has it:
//   out[t, c] = round(round(silu(round(factor x[t, c]))) x[t, COLUMNS + c]), silu and products in fp32.
// The places of the roundings are those of two kernels, a product by a number and vLLM's silu_and_mul: the bits are
// the same, and the gates are read and written once less. No sum: an element depends on its two inputs alone.
//
// x [tokens, 2 COLUMNS] of 16-bit elements, whose rows may be strided. out [tokens, COLUMNS], dense. Both are aligned to
// 16 bytes. Compiled for COLUMNS (a multiple of 8) and for bf16 or fp16 (INPUT, BRAIN).

struct alignas(16) Eight { u32 pairs[4]; };

// Block (tokens, columns / 8 / THREADS).
KERNEL gated_silu(const u16* x, u16* out, i64 x_row, float factor) {
  const int c = 8 * (block_y() * THREADS + thread());
  if (c >= COLUMNS) return;
  const u16* from = x + i64(block_x()) * x_row + c;
  const Eight gates = *reinterpret_cast<const Eight*>(from), ups = *reinterpret_cast<const Eight*>(from + COLUMNS);
  Eight made;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 gate = gates.pairs[i];
    const u32 scaled = round_pair(times_unflushed(widen(u16(gate)), factor), times_unflushed(widen(u16(gate >> 16)), factor));
    const u32 activated = round_pair(swish(widen(u16(scaled))), swish(widen(u16(scaled >> 16))));
    made.pairs[i] = fuse_pairs(activated, ups.pairs[i], 0x80008000u);  // plus -0, which changes no product
  }
  *reinterpret_cast<Eight*>(out + i64(block_x()) * COLUMNS + c) = made;
}
