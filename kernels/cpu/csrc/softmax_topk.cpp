// Choice of experts: logits [rows, experts] -> ids and softmax weights [rows, k] of the k experts with the highest
// logits of each row, highest first; among equal logits the lower id comes first. Logits are bf16, fp16 or fp32.
// Weights are fp32, ids int32.
//
// Order: weight = exp(logit - max) / sum, with the exponential of vec.h. With `renormalize`, the sum adds the chosen
// experts by rank. Without it, lane e mod 16 adds expert e of all experts, ascending, then sum_lanes adds the lanes.
#include <omp.h>
#include "api.h"
#include "edge.h"

namespace bi {
namespace {

// Inserts logits into a list of the k highest: a logit goes before lower logits, never before equal ones.
template <class T> void choose(const T* logits, int64_t experts, int64_t k, float* best, int32_t* ids) {
  for (int64_t e = 0; e < experts; ++e) {
    const float x = to_f32(logits[e]);
    if (e >= k && !(x > best[k - 1])) continue;
    int64_t at = std::min(e, k - 1);
    for (; at > 0 && x > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = x;
    ids[at] = int32_t(e);
  }
}

template <class T> float sum_of_all(const T* logits, int64_t experts, float max) {
  V16 sum = zero();
  by_sixteen(experts, [&](int64_t e, int64_t left) {
    const V16 p = exp_neg(sub(load_edge(logits + e, left), set1(max)));
    sum = add(sum, keep_lanes(p, 0, int(std::min<int64_t>(left, 16)), zero()));
  });
  return sum_lanes(sum);
}

template <class T>
void run(const T* logits, int64_t row, int64_t rows, int64_t experts, int64_t k, bool renormalize, float* weights,
         int32_t* ids, int threads) {
  if (rows * experts < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = logits + r * row;
    float* w = weights + r * k;
    choose(x, experts, k, w, ids + r * k);
    const float max = w[0];
    float sum = renormalize ? 0.f : sum_of_all(x, experts, max);
    for (int64_t i = 0; i < k; ++i) {
      w[i] = exp_neg1(w[i] - max);
      if (renormalize) sum = sum + w[i];
    }
    for (int64_t i = 0; i < k; ++i) w[i] = w[i] / sum;
  }
}

}  // namespace

void softmax_topk(DType t, const void* logits, int64_t row, int64_t rows, int64_t experts, int64_t k, bool renormalize,
                  float* weights, int32_t* ids, int threads) {
  switch (t) {
    case DType::f32: return run((const float*)logits, row, rows, experts, k, renormalize, weights, ids, threads);
    case DType::bf16: return run((const bf16*)logits, row, rows, experts, k, renormalize, weights, ids, threads);
    case DType::f16: return run((const fp16*)logits, row, rows, experts, k, renormalize, weights, ids, threads);
  }
}

}  // namespace bi
