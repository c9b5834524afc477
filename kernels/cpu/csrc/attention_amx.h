// The two products of attention on AMX tiles, for one leaf of keys in bf16. attention.cpp states the order.
//
// tdpbf16ps adds steps of 32 elements: of head_dim in the scores, of positions in the values. Steps of positions are
// aligned at the leaf. A shorter last step of head_dim is filled up with zeros. A tile computes each of its rows and
// columns alone, so a row's bits depend neither on the rows nor on the columns beside it.
#pragma once
#if defined(BI_AMX)
#include "micro.h"
#include "tiles.h"

namespace bi {

constexpr int kStepTokens = 32;  // positions of a step of the values

// out[r][16 * g + i] = q[r] . k[g][i] for ROW_TILES * 16 rows and GROUPS groups of 16 keys, ROW_TILES * GROUPS <= 4.
// q: rows of stride ldq. k[g]: [steps][16 pairs of head_dim][16 keys][2]; tail[g]: its last step, which may lie apart.
// ldq, ldo: elements.
template <int ROW_TILES, int GROUPS>
BI_INLINE void tile_scores(const bf16* q, int64_t ldq, const bf16* const* k, const bf16* const* tail, int steps, float* out,
                           int64_t ldo) {
  static_assert(ROW_TILES * GROUPS <= 4, "four tiles hold sums");
  const int64_t lda = ldq * sizeof(bf16), ldc = ldo * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; ++s) {
    const auto at = [&](int g) { return s + 1 < steps ? k[g] + s * 512 : tail[g]; };
    _tile_loadd(4, q + s * 32, lda);
    if constexpr (ROW_TILES == 2) _tile_loadd(5, q + s * 32 + 16 * ldq, lda);
    _tile_loadd(6, at(0), 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (ROW_TILES == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, at(1), 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (ROW_TILES == 2) _tile_dpbf16ps(3, 5, 7);
    if constexpr (GROUPS == 4) {
      _tile_loadd(6, at(2), 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, at(3), 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, out, ldc);
  _tile_stored(1, out + 16, ldc);
  if constexpr (ROW_TILES == 2) {
    _tile_stored(2, out + 16 * ldo, ldc);
    _tile_stored(3, out + 16 * ldo + 16, ldc);
  }
  if constexpr (GROUPS == 4) {
    _tile_stored(2, out + 32, ldc);
    _tile_stored(3, out + 48, ldc);
  }
}

// out[r][d + i] = sum over positions of p[r] v[.][d + i] for ROW_TILES * 16 rows and 16 * COLS elements i.
// p: rows of stride ldp, 32 positions a step. v[s]: [16 pairs of positions][dim][2] of step s. out: stride of 64 lanes.
template <int ROW_TILES, int COLS>
BI_INLINE void tile_values(const bf16* p, int64_t ldp, const bf16* const* v, int steps, int dim, int d, float* out) {
  static_assert(ROW_TILES * COLS <= 4, "four tiles hold sums");
  const int64_t lda = ldp * sizeof(bf16), ldb = int64_t(dim) * 2 * sizeof(bf16);
  constexpr int64_t ldc = 64 * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; ++s) {
    const bf16* b = v[s] + d * 2;
    _tile_loadd(4, p + s * kStepTokens, lda);
    if constexpr (ROW_TILES == 2) _tile_loadd(5, p + s * kStepTokens + 16 * ldp, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (ROW_TILES == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (COLS >= 2) {
      _tile_loadd(7, b + 32, ldb);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (ROW_TILES == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (COLS == 4) {
      _tile_loadd(6, b + 64, ldb);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, b + 96, ldb);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, out, ldc);
  if constexpr (COLS >= 2) _tile_stored(1, out + 16, ldc);
  if constexpr (ROW_TILES == 2) _tile_stored(2, out + 16 * 64, ldc);
  if constexpr (ROW_TILES == 2 && COLS == 2) _tile_stored(3, out + 16 * 64 + 16, ldc);
  if constexpr (COLS == 4) {
    _tile_stored(2, out + 32, ldc);
    _tile_stored(3, out + 48, ldc);
  }
}

}  // namespace bi
#endif
