// Leaves of attention: keys are cut at multiples of kLeaf positions, and a row's leaves are merged in ascending order.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include "vec.h"

namespace bi {
namespace {

#ifndef BI_LEAF  // a test builds another order
#define BI_LEAF 256
#endif
constexpr int kLeaf = BI_LEAF;  // part of the order
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// One row's maximum and sum, of a leaf or of all leaves so far. any: whether the row has seen a key.
struct State {
  float m = kMinusInf, l = 0;
  bool any = false;
};

// Merges a leaf's (m, l, o) into the running (m, l, o). The first leaf is copied.
BI_INLINE void merge(State& run, float* run_o, const State& leaf, const float* o, int dim) {
  if (!leaf.any) return;
  if (!run.any) {
    run = leaf;
    std::memcpy(run_o, o, dim * sizeof(float));
    return;
  }
  const float m = std::max(run.m, leaf.m);
  const float fa = exp_neg1(run.m - m), fb = exp_neg1(leaf.m - m);
  run.m = m;
  run.l = __builtin_fmaf(run.l, fa, leaf.l * fb);
  const V16 a = set1(fa), b = set1(fb);
  for (int d = 0; d < dim; d += 16) store(run_o + d, fma(load(run_o + d), a, mul(load(o + d), b)));
}

// Writes o / l, rounded, to out [dim]. Returns whether all of o is finite.
template <class T> BI_INLINE bool close_values(const float* o, const State& st, int dim, T* out) {
  const V16 l = set1(st.l);
  V16 seen = zero();  // stays zero while all values are finite
  for (int d = 0; d < dim; d += 16) {
    const V16 x = load(o + d);
    seen = fma(x, zero(), seen);
    store(out + d, div(x, l));
  }
  return sum_lanes(seen) == 0;
}

}  // namespace
}  // namespace bi
