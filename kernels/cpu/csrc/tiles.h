// The configuration of AMX tiles: what GEMM and attention share.
#pragma once
#if defined(BI_AMX)
#include <immintrin.h>
#include <cstdint>

namespace bi {

// Tiles 0 to 3 hold sums, 4 and 5 rows of A (32 elements of K each), 6 and 7 of B. All have 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) colsb[i] = 64, rows[i] = 16;
  }
  // Sums and A have `m` rows.
  static TileConfig few(int m) {
    TileConfig c;
    for (int i = 0; i < 6; ++i) c.rows[i] = uint8_t(m);
    return c;
  }
};

}  // namespace bi
#endif
