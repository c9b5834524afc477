// Weights of 4 bits from packing.py's words. ONE, BASE, MIDDLE: twice the bits of 1, of the float whose last bit of the
// mantissa is 1, and of BASE + 8. (q - zero) * scale is rounded once.

struct alignas(16) Four {
  u32 word[4];
};

DEVICE u32 twice(u16 half) { return half | static_cast<u32>(half) << 16; }

DEVICE u32 minus(u32 pair) { return pair ^ 0x80008000u; }

// Two weights from the integers at bits `shift` and 16 + `shift`. less: the negative of the zero point and the base.
DEVICE u32 weights(u32 word, int shift, u32 less, u32 scale) {
  const u32 held = masked_or(word >> shift, 0x000f000fu, BASE);
  return fuse_pairs(fuse_pairs(held, ONE, less), scale, 0x80008000u);
}
