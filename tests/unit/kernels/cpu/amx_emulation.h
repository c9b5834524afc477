// AMX tiles in plain C++. The compiler includes this file before the sources, so that machines without AMX can test
// gemm_amx.cpp.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace amx_emulation {
struct Tile { uint32_t row[16][16]; };
inline thread_local Tile tile[8];

inline void load(int t, const void* base, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile[t].row[r], (const char*)base + r * stride, 64);
}
inline void store(int t, void* base, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy((char*)base + r * stride, tile[t].row[r], 64);
}
inline float wide(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }

// As in the manual: even and odd products form two chains, and both are then added to the sum.
inline void dpbf16(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum = wide(tile[c].row[m][n]);
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = tile[a].row[m][k], y = tile[b].row[k][n];
        even = __builtin_fmaf(wide(x << 16), wide(y << 16), even);
        odd = __builtin_fmaf(wide(x & 0xffff0000u), wide(y & 0xffff0000u), odd);
      }
      sum = sum + (even + odd);
      std::memcpy(&tile[c].row[m][n], &sum, 4);
    }
}
}  // namespace amx_emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(t) std::memset(&amx_emulation::tile[t], 0, sizeof(amx_emulation::Tile))
#define _tile_loadd(t, p, s) amx_emulation::load(t, p, s)
#define _tile_stored(t, p, s) amx_emulation::store(t, p, s)
#define _tile_dpbf16ps(c, a, b) amx_emulation::dpbf16(c, a, b)
#define _tile_loadconfig(p) (void)(p)
#define _tile_release() (void)0
