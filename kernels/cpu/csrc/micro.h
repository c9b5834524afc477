// The inner product loop of GEMM and attention: MR rows of A times NR vectors of B.
//
// Order: each output lane is one fp32 accumulator over ascending K. MR and NR decide only how many accumulators run
// side by side. Every GEMM without AMX and both products of attention use this loop.
#pragma once
#include <type_traits>
#include "vec.h"

namespace bi {

// fp32 FMA over ascending K. Loading widens B from any storage type to fp32, which is exact.
template <class T> struct Fma {
  using A = float;
  using B = T;
  static constexpr int step = 1;  // K elements per instruction
  BI_INLINE static V16 bcast(const A* p) { return set1(*p); }
  BI_INLINE static V16 loadb(const B* p) { return load(p); }
  BI_INLINE static V16 mac(V16 c, V16 a, V16 b) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps over ascending pairs of K. B is stored as [K/2][16][2].
struct Vnni {
  using A = bf16;
  using B = bf16;
  static constexpr int step = 2;
  BI_INLINE static __m512i bcast(const A* p) { return _mm512_set1_epi32(bit_load<int>(p)); }
  BI_INLINE static __m512i loadb(const B* p) { return _mm512_loadu_si512(p); }
  BI_INLINE static V16 mac(V16 c, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
using Bf16Kind = Vnni;
#else
using Bf16Kind = Fma<bf16>;
#endif
template <class T> using KindOf = std::conditional_t<std::is_same_v<T, bf16>, Bf16Kind, Fma<T>>;

#if defined(__AVX512F__)
constexpr int kMaxRows = 6, kVecs = 4;  // 24 of 32 registers are accumulators
#elif defined(__AVX2__)
constexpr int kMaxRows = 6, kVecs = 1;  // 12 of 16 (a V16 is two registers)
#else
constexpr int kMaxRows = 4, kVecs = 1;
#endif

// What a loop over K fetches for later: LINES cache lines a step, `by` bytes further at every step.
template <int LINES> struct Ahead {
  const char* at;
  size_t by;
  BI_INLINE void fetch(size_t s) const {
#pragma GCC unroll 4
    for (int i = 0; i < LINES; ++i) __builtin_prefetch(at + s * by + 64 * i, 0, 2);
  }
};

// acc[m][n] += sum over `steps` steps of A[m][k] * B[n][k].
// Row m of A is at a + m * lda; step s of the 16 lanes of B[n] is at b[n] + s * ldb. lda, ldb: elements.
template <class Kind, int MR, int NR, int LINES = 0>
BI_INLINE void dot_block(V16 (&acc)[MR][NR], const typename Kind::A* a, size_t lda,
                         const typename Kind::B* const (&b)[NR], size_t ldb, size_t steps, const Ahead<LINES>& ahead = {}) {
  const typename Kind::B* bp[NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) bp[n] = b[n];
  const typename Kind::A* ap[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) ap[m] = a + m * lda;
  for (size_t s = 0; s < steps; ++s) {
    decltype(Kind::loadb(bp[0])) bv[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) bv[n] = Kind::loadb(bp[n] + s * ldb);
    ahead.fetch(s);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto av = Kind::bcast(ap[m] + s * Kind::step);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) acc[m][n] = Kind::mac(acc[m][n], av, bv[n]);
    }
  }
}

template <int MR, int NR> BI_INLINE void clear(V16 (&acc)[MR][NR]) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) acc[m][n] = zero();
}

template <int V> struct Int { static constexpr int value = V; };

// Calls f(Int<rows>) for 1 <= rows <= kMaxRows.
template <int R = kMaxRows, class F> BI_INLINE void with_rows(int rows, F&& f) {
  if constexpr (R == 1) f(Int<1>{});
  else if (rows == R) f(Int<R>{});
  else with_rows<R - 1>(rows, f);
}

// Cuts m rows into near-equal blocks of at most kMaxRows rows and calls f(first, count) for each.
template <class F> BI_INLINE void row_blocks(int m, F&& f) {
  const int blocks = (m + kMaxRows - 1) / kMaxRows;
  for (int i = 0, at = 0; i < blocks; ++i) {
    const int n = (m - at + blocks - i - 1) / (blocks - i);
    f(at, n);
    at += n;
  }
}

}  // namespace bi
