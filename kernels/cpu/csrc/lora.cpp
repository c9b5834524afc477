// LoRA: y[i] += (x[i] a[s]^T) b[s]^T for rows i of the adapter in slot s = slots[i]; rows of slot < 0 are not touched.
//
// Order of one row: t = x a^T and d = t b^T are GEMMs in the order of gemm.cpp, each rounded once to the rows' type;
// then y + d is rounded once. An adapter's rank is the number of rows of a up to the last that holds a nonzero bit, so
// the padding of its slot adds nothing. Which rows share a slot, and which other slots are in use, decides only when
// an output is computed.
#include <omp.h>
#include <algorithm>
#include <vector>
#include "api.h"
#include "gemm.h"
#include "scratch.h"

namespace bi {

namespace {

// Rows of w [rows, cols] (row stride ld) up to the last that has a nonzero bit.
template <class T> int64_t used_rows(const T* w, int64_t ld, int64_t rows, int64_t cols) {
  for (; rows > 0; --rows) {
    const T* r = w + (rows - 1) * ld;
    for (int64_t c = 0; c < cols; ++c) {
      std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t> bits;
      std::memcpy(&bits, r + c, sizeof bits);
      if (bits) return rows;
    }
  }
  return 0;
}

// y = round(y + d) for n elements.
template <class T> void accumulate(T* y, const T* d, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, add(load(y + i), load(d + i)));
  if (i < n) {
    T a[16] = {}, b[16] = {};
    std::memcpy(a, y + i, (n - i) * sizeof(T));
    std::memcpy(b, d + i, (n - i) * sizeof(T));
    store(a, add(load(a), load(b)));
    std::memcpy(y + i, a, (n - i) * sizeof(T));
  }
}

template <class T> void run(const LoraArgs& a, int threads) {
  constexpr DType type = DTypeOf<T>::value;
  std::vector<std::vector<int64_t>> rows(a.slots);
  for (int64_t i = 0; i < a.rows; ++i)
    if (a.slot[i] >= 0) rows[a.slot[i]].push_back(i);
  static thread_local Scratch xs, ts, ds, own;
  for (int64_t s = 0; s < a.slots; ++s) {
    const int64_t m = rows[s].size();
    if (!m) continue;
    const int64_t in = a.a ? a.k : a.rank;  // columns of x
    const T* x = (const T*)a.x;
    int64_t ldx = a.x_row;
    if (m < a.rows) {
      T* held = xs.get<T>(m * in);
      for (int64_t r = 0; r < m; ++r) std::memcpy(held + r * in, x + rows[s][r] * a.x_row, in * sizeof(T));
      x = held;
      ldx = in;
    }
    const int64_t room = lora_room(type, a), first = a.a ? gemm_packed_size(type, a.rank, a.k) : 0;
    T* packed = a.packed ? (T*)a.packed + s * room : own.get<T>(room);
    int64_t once = -1;
    int64_t& rank = a.ranks ? a.ranks[s] : once;
    if (rank < 0) {
      const T* shrink = (const T*)a.a + s * a.a_slot;
      rank = a.a ? used_rows(shrink, a.k, a.rank, a.k) : a.rank;
      if (rank && a.a) gemm_pack(type, shrink, a.k, rank, a.k, packed, threads);
      if (rank) gemm_pack(type, (const T*)a.b + s * a.b_slot, a.rank, a.n, rank, packed + first, threads);
    }
    if (!rank) continue;
    if (a.a) {
      T* t = ts.get<T>(m * rank);
      gemm(type, x, ldx, m, packed, rank, a.k, nullptr, t, threads);
      x = t;
      ldx = rank;
    }
    T* d = ds.get<T>(m * a.n);
    gemm(type, x, ldx, m, packed + first, a.n, rank, nullptr, d, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (m > 1)
    for (int64_t r = 0; r < m; ++r) accumulate((T*)a.y + rows[s][r] * a.y_row, d + r * a.n, a.n);
  }
}

}  // namespace

int64_t lora_room(DType t, const LoraArgs& a) {
  return gemm_packed_size(t, a.n, a.rank) + (a.a ? gemm_packed_size(t, a.rank, a.k) : 0);
}

void lora(const LoraArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return run<float>(a, threads);
    case DType::bf16: return run<bf16>(a, threads);
    case DType::f16: return run<fp16>(a, threads);
  }
}

}  // namespace bi
