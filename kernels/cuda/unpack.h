// Weights of 4 bits from packing.py's words.
//
// Of integers, (q - zero) * scale is rounded once. ONE, BASE, MIDDLE: twice the bits of 1, of the float whose last bit of
// the mantissa is 1, and of BASE + 8.
//
// With E2M1, weights are floats e2m1. Their bits, at the lowest exponents of bf16, are the weight times 2**-126, and a
// byte of a scale, at the highest ones, is the scale times 2**119. So a product of both is exact, and needs no more than
// one instruction.

struct alignas(16) Four {
  u32 word[4];
};

DEVICE u32 twice(u16 half) { return half | static_cast<u32>(half) << 16; }

DEVICE u32 minus(u32 pair) { return pair ^ 0x80008000u; }

#if E2M1
#define SCALE_BYTES (16 * GROUPS)  // of 16 rows and 128 elements of K

// A lane's scales of its two rows, row by row for each group of a block of K.
struct alignas(2 * GROUPS) Scales {
  u32 word[GROUPS / 2];
};

using Scale = Scales;

// The scale of a row, twice.
DEVICE u32 scale_of(const Scales& scales, int group, int row) {
  return chosen_bytes(scales.word[group / 2], 0x4040u + 0x0101u * (group % 2 * 2 + row)) * 16 + 0x70007000u;
}

// Two weights of register r, and their scale.
DEVICE u32 weights(u32 word, int r, u32 scale) {
  u32 held = word << (r == 2 ? 2 : 6) & 0x81c081c0u;
  if (r == 0) held = (word >> 8 & 0x00400040u) | (word & 0x81808180u);
  if (r == 1) held = rotated(word, 28) & 0x81c081c0u;
  return fuse_pairs(held, scale, 0x80008000u);
}
#else
#define SCALE_BYTES (32 * GROUPS)

using Scale = u16;

// Two weights of register r. less: the negative of the zero point and the base.
DEVICE u32 weights(u32 word, int r, u32 less, u32 scale) {
  const u32 held = masked_or(word >> 4 * r, 0x000f000fu, BASE);
  return fuse_pairs(fuse_pairs(held, ONE, less), scale, 0x80008000u);
}
#endif

// What tells the registers of one half of a strip's rows, which a warp knows as it runs.
struct Half {
  u32 turn, turned, unturned, other;
};

#if E2M1
DEVICE Half half_of(int half) {
  return {half ? 28u : 24u, half ? 0x81c081c0u : 0x00400040u, half ? 0 : 0x81808180u, half ? 6u : 2u};
}

// The weights of two registers: the first and the third, or the second and the fourth.
DEVICE void weights_of(u32 (&two)[2], const Half& half, u32 word, u32, u32 scale) {
  two[0] = fuse_pairs(masked_or(rotated(word, half.turn), half.turned, word & half.unturned), scale, 0x80008000u);
  two[1] = fuse_pairs(rotated(word, half.other) & 0x81c081c0u, scale, 0x80008000u);
}
#else
DEVICE Half half_of(int half) { return {4u * half}; }

DEVICE void weights_of(u32 (&two)[2], const Half& half, u32 word, u32 less, u32 scale) {
  two[0] = weights(word >> half.turn, 0, less, scale);
  two[1] = weights(word >> half.turn, 2, less, scale);
}
#endif
