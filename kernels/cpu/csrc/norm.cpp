// RMSNorm: out = round(x * inv * (weight + offset)), inv = 1 / sqrt(mean(x^2) + eps), for rows x [rows, heads, cols].
//
// With a residual, round(x + residual) replaces x and is stored in `sum`. bf16, fp16 or fp32; fp32 inside.
//
// Order: lane c mod 64 adds the square of column c by FMA, columns ascending. The four vectors of 16 lanes are added as
// (0 + 1) + (2 + 3), then sum_lanes adds the 16 lanes. One thread computes a row; columns past the end add zero.
//
// Gated: x * f(gate) replaces x in fp32 if the gate comes first; else the normed row times the weight is multiplied by
// f(gate) before it is rounded.
#include <omp.h>
#include <cmath>
#include <vector>
#include "api.h"
#include "edge.h"

namespace bi {
namespace {

template <class T>
float inverse(const T* x, int64_t cols, float eps) {
  V16 acc[4] = {zero(), zero(), zero(), zero()};
  int64_t c = 0;
  const auto square = [](V16 v, V16 sum) { return fma(v, v, sum); };
  for (; c + 64 <= cols; c += 64)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] = square(load(x + c + 16 * i), acc[i]);
  for (int i = 0; c < cols; c += 16, ++i) acc[i] = square(load_edge(x + c, cols - c), acc[i]);
  const float sum = sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
  return 1.f / std::sqrt(sum / float(cols) + eps);
}

template <class T> void run(const NormArgs& a, int threads) {
  const auto* weight = static_cast<const T*>(a.weight);
  if (a.rows * a.heads * a.cols < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < a.rows * a.heads; ++i) {
    const T* x = static_cast<const T*>(a.x) + i / a.heads * a.row + i % a.heads * a.head;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + i * a.cols;
      T* sum = static_cast<T*>(a.sum) + i * a.cols;
      by_sixteen(a.cols, [&](int64_t c, int64_t left) {
        store_edge(sum + c, add(load_edge(x + c, left), load_edge(residual + c, left)), left);
      });
      x = sum;
    }
    const V16 inv = set1(inverse(x, a.cols, a.eps)), offset = set1(a.offset);
    T* out = static_cast<T*>(a.out) + i * a.cols;
    by_sixteen(a.cols, [&](int64_t c, int64_t left) {
      V16 y = mul(load_edge(x + c, left), inv);
      if (weight) y = mul(y, add(load_edge(weight + c, left), offset));
      store_edge(out + c, y, left);
    });
  }
}

template <class T> void run_gated(const GatedNormArgs& a, int threads) {
  const auto* weight = static_cast<const T*>(a.weight);
  if (a.rows * a.groups * a.cols < kTinyPointwise) threads = 1;
  const auto f = [&](V16 g) { const V16 s = sigmoid(g); return a.sigmoid ? s : mul(g, s); };
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> held(a.cols + 16);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.rows * a.groups; ++i) {
      const int64_t group = i % a.groups * a.cols;
      const T* x = static_cast<const T*>(a.x) + i * a.cols;
      const T* gate = static_cast<const T*>(a.gate) + i / a.groups * a.gate_row + group;
      by_sixteen(a.cols, [&](int64_t c, int64_t left) {
        const V16 v = load_edge(x + c, left);
        store_edge(held.data() + c, a.gate_first ? mul(v, f(load_edge(gate + c, left))) : v, left);
      });
      const V16 inv = set1(inverse(held.data(), a.cols, a.eps));
      T* out = static_cast<T*>(a.out) + i * a.cols;
      by_sixteen(a.cols, [&](int64_t c, int64_t left) {
        V16 y = mul(load_edge(held.data() + c, left), inv);
        if (weight) y = mul(y, load_edge(weight + group + c, left));
        if (!a.gate_first) y = mul(y, f(load_edge(gate + c, left)));
        store_edge(out + c, y, left);
      });
    }
  }
}

}  // namespace

void gated_rms_norm(const GatedNormArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return run_gated<float>(a, threads);
    case DType::bf16: return run_gated<bf16>(a, threads);
    case DType::f16: return run_gated<fp16>(a, threads);
  }
}

void rms_norm(const NormArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return run<float>(a, threads);
    case DType::bf16: return run<bf16>(a, threads);
    case DType::f16: return run<fp16>(a, threads);
  }
}

}  // namespace bi
