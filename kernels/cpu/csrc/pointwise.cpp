// Activations and the rotary embedding, in bf16, fp16 or fp32. All compute in fp32 and round once. An output depends on
// its own inputs alone: there is no sum over columns, and the last elements take the same vector code as all others.
//
// activate: x -> f(x), for a dense tensor of any shape.
// gated: x [rows, 2 * D] = [g | u] -> f(g) * u [rows, D]. f is silu or gelu; sigmoid uses exp(-|g|), vec.h's polynomial.
// rope: x [tokens, heads * dim] -> (x1 cos - x2 sin, x2 cos + x1 sin); each product and each sum is rounded to fp32. x1
// and x2 are the halves (neox) or the even and odd elements of the first `rotary` elements of a head. The remaining
// elements are copied.
#include <omp.h>
#include "api.h"
#include "edge.h"

namespace bi {
namespace {

constexpr int64_t kStretch = 4096;  // elements that one thread takes at a time

BI_INLINE V16 silu(V16 x) { return mul(x, sigmoid(x)); }
BI_INLINE V16 gelu(V16 x) {
  const V16 half = set1(0.5f);
  return mul(x, fma(half, erf(mul(x, set1(0.70710678118654752f))), half));
}
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
BI_INLINE V16 gelu_tanh(V16 x) {
  const V16 cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
  return mul(x, sigmoid(mul(cubic, set1(1.5957691216057308f))));
}
BI_INLINE V16 softplus(V16 x, V16 beta, V16 threshold) {
  const V16 z = mul(x, beta), tail = log1p_unit(exp_neg(sub(zero(), abs(z))));
  return or_nan(x, if_less(threshold, z, x, div(add(max(z, zero()), tail), beta)));
}

template <class T, class F> void gated(const T* x, int64_t row, int64_t rows, int64_t cols, T* out, int threads, F f) {
  if (rows * cols < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* gate = x + r * row;
    by_sixteen(cols, [&](int64_t c, int64_t left) {
      store_edge(out + r * cols + c, mul(f(load_edge(gate + c, left)), load_edge(gate + cols + c, left)), left);
    });
  }
}

template <class T>
void gated(Activation f, const T* x, int64_t row, int64_t rows, int64_t cols, T* out, int threads) {
  switch (f) {
    case Activation::gelu: return gated(x, row, rows, cols, out, threads, [](V16 v) { return gelu(v); });
    case Activation::gelu_tanh: return gated(x, row, rows, cols, out, threads, [](V16 v) { return gelu_tanh(v); });
    default: return gated(x, row, rows, cols, out, threads, [](V16 v) { return silu(v); });
  }
}

template <class T, class F> void each(const T* x, int64_t n, T* out, int threads, F f) {
  if (n < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < n; at += kStretch)
    by_sixteen(std::min(kStretch, n - at), [&](int64_t c, int64_t left) {
      store_edge(out + at + c, f(load_edge(x + at + c, left)), left);
    });
}

template <class T>
void activate(Activation f, const T* x, int64_t n, float beta, float threshold, T* out, int threads) {
  const V16 one = set1(1.f), b = set1(beta), limit = set1(threshold);
  switch (f) {
    case Activation::sigmoid: return each(x, n, out, threads, [](V16 v) { return sigmoid(v); });
    case Activation::silu: return each(x, n, out, threads, [](V16 v) { return silu(v); });
    case Activation::gelu: return each(x, n, out, threads, [](V16 v) { return gelu(v); });
    case Activation::gelu_tanh: return each(x, n, out, threads, [](V16 v) { return gelu_tanh(v); });
    case Activation::rsqrt: return each(x, n, out, threads, [=](V16 v) { return div(one, sqrt(v)); });
    case Activation::softplus: return each(x, n, out, threads, [=](V16 v) { return softplus(v, b, limit); });
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

void gated(Activation f, DType t, const void* x, int64_t row, int64_t rows, int64_t cols, void* out, int threads) {
  switch (t) {
    case DType::f32: return gated(f, (const float*)x, row, rows, cols, (float*)out, threads);
    case DType::bf16: return gated(f, (const bf16*)x, row, rows, cols, (bf16*)out, threads);
    case DType::f16: return gated(f, (const fp16*)x, row, rows, cols, (fp16*)out, threads);
  }
}

void activate(Activation f, DType t, const void* x, int64_t n, float beta, float threshold, void* out, int threads) {
  switch (t) {
    case DType::f32: return activate(f, (const float*)x, n, beta, threshold, (float*)out, threads);
    case DType::bf16: return activate(f, (const bf16*)x, n, beta, threshold, (bf16*)out, threads);
    case DType::f16: return activate(f, (const fp16*)x, n, beta, threshold, (fp16*)out, threads);
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
