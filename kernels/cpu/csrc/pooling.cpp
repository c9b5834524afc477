// Pooling: the L2 norm and the softmax of rows, and the mean of each sequence's rows. bf16, fp16 or fp32; fp32 inside.
//
// Orders. l2_normalize: the sum of squares is RMSNorm's (norm.cpp): lane c mod 64 adds the square of column c by FMA, the
// four vectors of 16 lanes are added as (0 + 1) + (2 + 3), then sum_lanes; y = x / max(sqrt(sum), eps). softmax:
// lane c mod 16 adds exp(x - max) of column c, ascending, then sum_lanes; y = exp(x - max) / sum. mean_rows: each column
// is one chain that starts at zero and adds the sequence's rows, ascending; the sum is divided by the number of rows.
// Every result is rounded once. Other rows and sequences, and the threads, do not enter any of these sums.
#include <omp.h>
#include <algorithm>
#include <cmath>
#include "api.h"
#include "edge.h"

namespace bi {
namespace {

constexpr int64_t kColumns = 64;  // of mean_rows' work units; not part of the order

template <class T>
void normalize(const T* x, int64_t row, int64_t rows, int64_t cols, float eps, T* out, int threads) {
  if (rows * cols < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = x + r * row;
    V16 acc[4] = {zero(), zero(), zero(), zero()};
    by_sixteen(cols, [&](int64_t c, int64_t left) {
      const V16 v = load_edge(in + c, left);
      V16& sum = acc[c / 16 % 4];
      sum = fma(v, v, sum);
    });
    const float sum = sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
    const float length = std::sqrt(sum);
    const V16 by = set1(length > eps || length != length ? length : eps);
    T* y = out + r * cols;
    by_sixteen(cols, [&](int64_t c, int64_t left) { store_edge(y + c, div(load_edge(in + c, left), by), left); });
  }
}

template <class T> void soft(const T* x, int64_t row, int64_t rows, int64_t cols, T* out, int threads) {
  if (rows * cols < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = x + r * row;
    float top = to_f32(in[0]);
    bool nan = top != top;
    for (int64_t c = 1; c < cols; ++c) {
      const float v = to_f32(in[c]);
      nan = nan || v != v;
      top = v > top ? v : top;
    }
    const V16 m = set1(nan ? NAN : top);
    const auto part = [&](int64_t c, int64_t left) {
      const V16 z = sub(load_edge(in + c, left), m);
      return or_nan(z, exp_neg(z));
    };
    V16 sum = zero();
    by_sixteen(cols, [&](int64_t c, int64_t left) {
      sum = add(sum, keep_lanes(part(c, left), 0, int(std::min<int64_t>(left, 16)), zero()));
    });
    const V16 by = set1(sum_lanes(sum));
    T* y = out + r * cols;
    by_sixteen(cols, [&](int64_t c, int64_t left) { store_edge(y + c, div(part(c, left), by), left); });
  }
}

template <class T>
void mean(const T* x, int64_t row, int64_t cols, const int64_t* starts, int64_t seqs, float* out, int threads) {
  const int64_t blocks = (cols + kColumns - 1) / kColumns;
  if ((starts[seqs] - starts[0]) * cols < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (int64_t s = 0; s < seqs; ++s)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t c0 = b * kColumns, width = std::min(kColumns, cols - c0);
      V16 acc[kColumns / 16] = {zero(), zero(), zero(), zero()};
      for (int64_t r = starts[s]; r < starts[s + 1]; ++r)
        by_sixteen(width, [&](int64_t c, int64_t left) {
          acc[c / 16] = add(acc[c / 16], load_edge(x + r * row + c0 + c, left));
        });
      const V16 count = set1(float(starts[s + 1] - starts[s]));
      by_sixteen(width, [&](int64_t c, int64_t left) {
        store_edge(out + s * cols + c0 + c, div(acc[c / 16], count), left);
      });
    }
}

}  // namespace

void l2_normalize(DType t, const void* x, int64_t row, int64_t rows, int64_t cols, float eps, void* out, int threads) {
  switch (t) {
    case DType::f32: return normalize((const float*)x, row, rows, cols, eps, (float*)out, threads);
    case DType::bf16: return normalize((const bf16*)x, row, rows, cols, eps, (bf16*)out, threads);
    case DType::f16: return normalize((const fp16*)x, row, rows, cols, eps, (fp16*)out, threads);
  }
}

void softmax(DType t, const void* x, int64_t row, int64_t rows, int64_t cols, void* out, int threads) {
  switch (t) {
    case DType::f32: return soft((const float*)x, row, rows, cols, (float*)out, threads);
    case DType::bf16: return soft((const bf16*)x, row, rows, cols, (bf16*)out, threads);
    case DType::f16: return soft((const fp16*)x, row, rows, cols, (fp16*)out, threads);
  }
}

void mean_rows(DType t, const void* x, int64_t row, int64_t cols, const int64_t* starts, int64_t seqs, float* out,
               int threads) {
  switch (t) {
    case DType::f32: return mean((const float*)x, row, cols, starts, seqs, out, threads);
    case DType::bf16: return mean((const bf16*)x, row, cols, starts, seqs, out, threads);
    case DType::f16: return mean((const fp16*)x, row, cols, starts, seqs, out, threads);
  }
}

}  // namespace bi
