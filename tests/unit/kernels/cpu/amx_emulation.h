// AMX tiles in plain C++. The compiler includes this file before the sources, so that machines without AMX can test
// gemm_amx.cpp and attention_amx.h. On a machine with AMX the bits are those of its tiles.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {
struct Tile { uint32_t row[16][16]; };
inline thread_local Tile tile[8];
inline thread_local int rows[8];  // 0: no configuration is loaded

// As the processor, stops at a tile that no configuration has.
inline int rows_of(int t) {
  if (rows[t] == 0) std::abort();
  return rows[t];
}
inline void configure(const void* config) {
  for (int t = 0; t < 8; ++t) {
    uint16_t colsb;
    std::memcpy(&colsb, (const char*)config + 16 + 2 * t, 2);
    rows[t] = ((const uint8_t*)config)[48 + t];
    if (colsb != 64 || rows[t] > 16) std::abort();  // only whole rows are emulated
  }
  std::memset(tile, 0, sizeof tile);
}
inline void release() { std::memset(rows, 0, sizeof rows); }

// Rows past the configuration become zero.
inline void load(int t, const void* base, long stride) {
  std::memset(&tile[t], 0, sizeof(Tile));
  for (int r = 0; r < rows_of(t); ++r) std::memcpy(tile[t].row[r], (const char*)base + r * stride, 64);
}
inline void store(int t, void* base, long stride) {
  for (int r = 0; r < rows_of(t); ++r) std::memcpy((char*)base + r * stride, tile[t].row[r], 64);
}
// bf16 as fp32; the tiles take subnormal numbers as zero.
inline float wide(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float flush(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return wide(bits);
}

// As in the manual: even and odd products form two chains, and both are then added to the sum. Subnormal results
// become zero.
inline void dpbf16(int c, int a, int b) {
  if (rows_of(a) != rows_of(c) || rows_of(b) != 16) std::abort();
  for (int m = 0; m < rows[c]; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum = wide(tile[c].row[m][n]);
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = tile[a].row[m][k], y = tile[b].row[k][n];
        even = flush(__builtin_fmaf(wide(x << 16), wide(y << 16), even));
        odd = flush(__builtin_fmaf(wide(x & 0xffff0000u), wide(y & 0xffff0000u), odd));
      }
      sum = flush(sum + flush(even + odd));
      std::memcpy(&tile[c].row[m][n], &sum, 4);
    }
}
}  // namespace amx_emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_zero(t) std::memset(&amx_emulation::tile[t], 0, sizeof(amx_emulation::Tile))
#define _tile_loadd(t, p, s) amx_emulation::load(t, p, s)
#define _tile_stream_loadd(t, p, s) amx_emulation::load(t, p, s)
#define _tile_stored(t, p, s) amx_emulation::store(t, p, s)
#define _tile_dpbf16ps(c, a, b) amx_emulation::dpbf16(c, a, b)
#define _tile_loadconfig(p) amx_emulation::configure(p)
#define _tile_release() amx_emulation::release()
