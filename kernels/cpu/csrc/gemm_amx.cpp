// GEMM on AMX tiles: y = x w^T + bias, for the shapes of gemm.cpp in bf16.
//
// Order of one output: the K blocks of gemm.cpp (512 or 1024, both multiples of 32). Each block has one fp32
// accumulator, to which tdpbf16ps adds ascending steps of 32 elements of K. The block sums are added in ascending
// order, then the bias, then one rounding. If fewer than 32 rows are left, a copy with zero rows fills the tile, so
// every row runs through the same tile shape for every M.
#if defined(BI_AMX)
#include <omp.h>
#include <algorithm>
#include "gemm.h"
#include "micro.h"
#include "scratch.h"

namespace bi {
namespace {

constexpr int kPanel = 16 * kVecs;
constexpr int kRows = 32, kCols = 32;  // 2 x 2 tiles of 16 x 16

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) colsb[i] = 64, rows[i] = 16;
  }
};

// c[32][32] = a b over `steps` steps of 32 elements of K. a: 32 rows of stride lda; b: 32 columns of a packed panel.
void block(const bf16* a, int64_t lda, const bf16* b, int64_t steps, float* c) {
  const int64_t as = lda * sizeof(bf16), bs = kPanel * 2 * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * 32, as);
    _tile_loadd(5, a + 16 * lda + s * 32, as);
    _tile_loadd(6, b + s * 16 * kPanel * 2, bs);
    _tile_loadd(7, b + s * 16 * kPanel * 2 + 32, bs);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int cs = kCols * sizeof(float);
  _tile_stored(0, c, cs);
  _tile_stored(1, c + 16, cs);
  _tile_stored(2, c + 16 * kCols, cs);
  _tile_stored(3, c + 16 * kCols + 16, cs);
}

}  // namespace

void gemm_amx(const bf16* x, int64_t ldx, int64_t m, const bf16* packed, int64_t n, int64_t k,
              const bf16* bias, bf16* y, int threads) {
  const int64_t kp = (k + 31) / 32 * 32;
  const int64_t col_tiles = (n + kCols - 1) / kCols, row_tiles = (m + kRows - 1) / kRows;
  const int64_t kb = k_block(k);
  static const TileConfig config;
#pragma omp parallel num_threads(threads)
  {
    _tile_loadconfig(&config);
    static thread_local Scratch pad_mem;
    bf16* const pad = pad_mem.get<bf16>(kRows * kp);
    int64_t padded = -1;
    alignas(64) float c[kRows * kCols], sum[kRows * kCols];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < row_tiles * col_tiles; ++t) {
      const int64_t col = t / row_tiles * kCols, row = t % row_tiles * kRows;
      const int64_t rows = std::min<int64_t>(kRows, m - row);
      const bf16* a = x + row * ldx;
      int64_t lda = ldx;
      if (rows < kRows) {
        if (padded != row) {
          std::memset(static_cast<void*>(pad), 0, kRows * kp * sizeof(bf16));
          for (int64_t r = 0; r < rows; ++r) std::memcpy(pad + r * kp, a + r * ldx, kp * sizeof(bf16));
          padded = row;
        }
        a = pad;
        lda = kp;
      }
      const bf16* b = packed + col / kPanel * kPanel * kp + col % kPanel * 2;
      for (int64_t k0 = 0; k0 < kp; k0 += kb) {
        const int64_t steps = (std::min(kp, k0 + kb) - k0) / 32;
        block(a + k0, lda, b + k0 * kPanel, steps, k0 ? c : sum);
        if (k0)
          for (int i = 0; i < kRows * kCols; i += 16) store(sum + i, add(load(sum + i), load(c + i)));
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < kCols && col + j < n; j += 16) {
          const int64_t left = std::min<int64_t>(16, n - col - j);
          V16 v = load(sum + r * kCols + j);
          bf16 edge[16] = {};
          if (bias) {
            std::memcpy(edge, bias + col + j, left * sizeof(bf16));
            v = add(v, load(edge));
          }
          store(edge, v);
          std::memcpy(y + (row + r) * n + col + j, edge, left * sizeof(bf16));
        }
    }
    _tile_release();
  }
}

}  // namespace bi
#endif
