// Weights of 4 or 8 bits (BITS) from packing.py's words.
//
// Of integers, (q - zero) * scale is rounded once. ONE, BASE, MIDDLE: twice the bits of 1, of the float whose last bit of
// the mantissa is 1, and of BASE + 2**(BITS - 1).
//
// With E2M1, weights are floats e2m1. Their bits, at the lowest exponents of bf16, are the weight times 2**-126, and a
// byte of a scale, at the highest ones, is the scale times 2**119. So a product of both is exact, and needs no more than
// one instruction.

#define UNIT (128 * BITS)          // bytes of 16 rows of w and 64 elements of K
#define BLOCK_BYTES (256 * BITS)  // bytes of 16 rows of w and 128 elements of K

struct alignas(16) Four {
  u32 word[4];
};

// A lane's weights of a unit. Of 8 bits, those of the first eight rows, and those of the others.
struct Unit {
  Four part[BITS / 4];
};

// The word of a step of 16 elements of K that has register r.
DEVICE u32 word_of(const Unit& unit, int step, int r) { return unit.part[BITS == 8 ? r % 2 : 0].word[step % 4]; }

DEVICE Unit unit_at(const unsigned char* at) {
  Unit unit;
#pragma unroll
  for (int i = 0; i < BITS / 4; ++i) unit.part[i] = *reinterpret_cast<const Four*>(at + i * 512);
  return unit;
}

// Begins the copies of a lane's weights of a unit. A macro: beside a function, NVRTC allots more registers.
#if BITS == 8
#define COPY_UNIT(to, from) copy_16(to, from, true), copy_16((to) + 512, (from) + 512, true)
#else
#define COPY_UNIT(to, from) copy_16(to, from, true)
#endif

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

#if BITS == 8
// Two weights of register r. less: the negative of the zero point less 128, if there are zero points.
DEVICE u32 weights(u32 word, int r, u32 less, u32 scale) {
  const u32 two = word >> 8 * (r / 2);
#if BRAIN
  // bf16 has 7 bits below the first: BASE and the low bits, and then -128 or, where the eighth bit is not set, -256.
  u32 value = fuse_pairs(masked_or(two, 0x007f007fu, BASE), ONE, masked_xor(two, 0x00800080u, 0xc380c380u));
#else
  u32 value = fuse_pairs(masked_or(two, 0x00ff00ffu, BASE), ONE, minus(MIDDLE));
#endif
  if (ZEROS) value = fuse_pairs(value, ONE, less);
  return fuse_pairs(value, scale, 0x80008000u);
}
#else
// Two weights of register r. less: the negative of the zero point and the base.
DEVICE u32 weights(u32 word, int r, u32 less, u32 scale) {
  const u32 held = masked_or(word >> 4 * r, 0x000f000fu, BASE);
  return fuse_pairs(fuse_pairs(held, ONE, less), scale, 0x80008000u);
}
#endif
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
#elif BITS == 8
DEVICE Half half_of(int) { return {}; }

DEVICE void weights_of(u32 (&two)[2], const Half&, u32 word, u32 less, u32 scale) {
  two[0] = weights(word, 0, less, scale);
  two[1] = weights(word, 2, less, scale);
}
#else
DEVICE Half half_of(int half) { return {4u * half}; }

DEVICE void weights_of(u32 (&two)[2], const Half& half, u32 word, u32 less, u32 scale) {
  two[0] = weights(word >> half.turn, 0, less, scale);
  two[1] = weights(word >> half.turn, 2, less, scale);
}
#endif
