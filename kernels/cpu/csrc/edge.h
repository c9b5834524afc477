// Sixteen lanes at the end of a row: lanes past it are zero on loading and are not stored.
#pragma once
#include <algorithm>
#include "vec.h"

namespace bi {

constexpr int64_t kTinyPointwise = 1 << 14;  // elements below which waking threads costs more

// `left` elements are at p: all sixteen lanes where that is enough.
template <class T> BI_INLINE V16 load_edge(const T* p, int64_t left) {
  if (left >= 16) return load(p);
  T held[16] = {};
  std::memcpy(held, p, left * sizeof(T));
  return load(held);
}
template <class T> BI_INLINE void store_edge(T* p, V16 x, int64_t left) {
  if (left >= 16) return store(p, x);
  T held[16];
  store(held, x);
  std::memcpy(p, held, left * sizeof(T));
}

// f(column, columns left from there) for every sixteenth column.
template <class F> BI_INLINE void by_sixteen(int64_t cols, F f) {
  for (int64_t c = 0; c < cols; c += 16) f(c, cols - c);
}

}  // namespace bi
