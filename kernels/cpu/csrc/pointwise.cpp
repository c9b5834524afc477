// SwiGLU's activation and the rotary embedding, in bf16, fp16 or fp32. Both compute in fp32 and round once. An output
// depends on its own inputs alone: there is no sum over columns.
//
// silu_and_mul: x [rows, 2 * D] = [g | u] -> g * sigmoid(g) * u [rows, D]. sigmoid uses exp(-|g|), vec.h's polynomial.
// rope: x [tokens, heads * dim] -> (x1 cos - x2 sin, x2 cos + x1 sin); each product and each sum is rounded to fp32. x1
// and x2 are the halves (neox) or the even and odd elements of the first `rotary` elements of a head. The remaining
// elements are copied.
#include <omp.h>
#include "api.h"
#include "edge.h"

namespace bi {
namespace {

BI_INLINE V16 silu(V16 x) {
  const V16 one = set1(1.f), t = exp_neg(sub(zero(), abs(x)));
  return mul(x, div(if_less(x, zero(), t, one), add(one, t)));
}

template <class T>
void gated(const T* x, int64_t row, int64_t rows, int64_t cols, T* out, int threads) {
  if (rows * cols < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* gate = x + r * row;
    by_sixteen(cols, [&](int64_t c, int64_t left) {
      store_edge(out + r * cols + c, mul(silu(load_edge(gate + c, left)), load_edge(gate + cols + c, left)), left);
    });
  }
}

template <class T> void rotate_halves(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  by_sixteen(half, [&](int64_t i, int64_t left) {
    const V16 a = load_edge(x + i, left), b = load_edge(x + half + i, left);
    const V16 c = load_edge(cos + i, left), s = load_edge(sin + i, left);
    store_edge(out + i, sub(mul(a, c), mul(b, s)), left);
    store_edge(out + half + i, add(mul(b, c), mul(a, s)), left);
  });
}

template <class T> void rotate_pairs(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  by_sixteen(half, [&](int64_t i, int64_t left) {
    const int64_t n = std::min<int64_t>(16, left);
    T even[16] = {}, odd[16] = {}, first[16], second[16];
    for (int64_t j = 0; j < n; ++j) even[j] = x[2 * (i + j)], odd[j] = x[2 * (i + j) + 1];
    const V16 a = load(even), b = load(odd), c = load_edge(cos + i, left), s = load_edge(sin + i, left);
    store(first, sub(mul(a, c), mul(b, s)));
    store(second, add(mul(b, c), mul(a, s)));
    for (int64_t j = 0; j < n; ++j) out[2 * (i + j)] = first[j], out[2 * (i + j) + 1] = second[j];
  });
}

template <class T> void rotate(const RopeArgs& a, int threads) {
  const int64_t half = a.rotary / 2, work = a.tokens * a.heads * a.dim;
  if (work < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* cos = static_cast<const T*>(a.cache) + a.positions[t] * a.rotary;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* x = static_cast<const T*>(a.x) + t * a.token + h * a.dim;
      T* out = static_cast<T*>(a.out) + (t * a.heads + h) * a.dim;
      (a.neox ? rotate_halves<T> : rotate_pairs<T>)(x, cos, cos + half, half, out);
      std::memcpy(out + a.rotary, x + a.rotary, (a.dim - a.rotary) * sizeof(T));
    }
  }
}

}  // namespace

void silu_and_mul(DType t, const void* x, int64_t row, int64_t rows, int64_t cols, void* out, int threads) {
  switch (t) {
    case DType::f32: return gated((const float*)x, row, rows, cols, (float*)out, threads);
    case DType::bf16: return gated((const bf16*)x, row, rows, cols, (bf16*)out, threads);
    case DType::f16: return gated((const fp16*)x, row, rows, cols, (fp16*)out, threads);
  }
}

void rope(const RopeArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return rotate<float>(a, threads);
    case DType::bf16: return rotate<bf16>(a, threads);
    case DType::f16: return rotate<fp16>(a, threads);
  }
}

}  // namespace bi
