// Loads and stores of 16 lanes at the end of a row: lanes past the end load as zero and are not stored.
#pragma once
#include <algorithm>
#include "vec.h"

namespace bi {

constexpr int64_t kTinyPointwise = 1 << 14;  // elements; below this, waking threads costs more than it saves

// `left`: elements from p to the end of the row; 16 or more fill all lanes.
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

// Calls f(column, columns from there to the end) for every 16th column.
template <class F> BI_INLINE void by_sixteen(int64_t cols, F f) {
  for (int64_t c = 0; c < cols; c += 16) f(c, cols - c);
}

}  // namespace bi
