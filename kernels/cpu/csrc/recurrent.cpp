// Layers with a recurrent state: causal convolutions over a short window, and linear recurrences (gated delta rule,
// Mamba 2, Mamba 1). A request's tokens run one after the other, whatever step brings them, and the state between two
// tokens is kept exactly: inputs in their own type for the window, fp32 for the recurrence. So a prompt that is cut anywhere has
// the bits of one that is not, and so has a token that is decoded.
//
// causal_conv: y[t, c] = f(bias[c] + w[c, 0] x[t-W+1, c] + ... + w[c, W-1] x[t, c]), by FMA in this order, in fp32; f is
// silu or nothing; rounded once. Inputs before position 0 are zero.
//
// recurrence: for a head with keys k, queries q [K] and values v [V], the state S [K, V] (fp32) takes each token by
//   S = d S + k u^T,  o = S^T q,   u = b (v - d S^T k) for the delta rule, u = v for Mamba 2.
// Order: each sum over K is one chain of FMA per column, K ascending; d multiplies the finished sum S^T k, and S before
// k u is added. All in fp32, o is rounded once. Columns and heads are independent: threads take 64 columns of a head.
//
// Delta rule: q and k are divided by sqrt(sum of squares + 1e-6) (the sum as in norm.cpp), q also by sqrt(K);
// d = exp(rate softplus(a + dt_bias)), b = sigmoid(b).
// Mamba 2: k = B and q = C of the head's group; v = dt x, d = exp(rate dt), dt = softplus(dt + dt_bias) held in
// [dt_min, dt_max]; o gains D x before it is rounded. The rates are at most 0.
//
// mamba1: channel c has the state S [N]: S = exp(A[c] dt[c]) S + (dt[c] x[c]) B, y = S . C + D[c] x[c], times silu of the
// gate, rounded once; dt as above. S . C: lane n mod 16 by FMA, n ascending, then sum_lanes. A is at most 0.
#include <omp.h>
#include <algorithm>
#include <cmath>
#include "api.h"
#include "edge.h"

namespace bi {
namespace {

constexpr int64_t kMaxKey = 512, kColumns = 64;

BI_INLINE float first(V16 x) {
  float f[16];
  store(f, x);
  return f[0];
}
BI_INLINE float softplus1(float x) {
  if (x > 20.f) return x;
  const float t = first(log1p_unit(exp_neg(set1(-std::fabs(x)))));
  return (x > 0.f ? x : 0.f) + t;
}
BI_INLINE float sigmoid1(float x) { return first(sigmoid(set1(x))); }

template <class T> BI_INLINE float at(const void* p, int64_t i) { return to_f32(static_cast<const T*>(p)[i]); }

// ---- The convolution.

template <class T> void conv(const ConvArgs& a, int threads) {
  const int64_t blocks = (a.dim + kColumns - 1) / kColumns, held = a.width - 1;
  if (a.query_start[a.reqs] * a.dim < kTinyPointwise) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t r = 0; r < a.reqs; ++r) {
      const int64_t from = a.query_start[r], to = a.query_start[r + 1];
      if (from == to) continue;
      T* state = static_cast<T*>(a.states) + a.slots[r] * a.state_slot;
      for (int64_t c = block * kColumns; c < std::min(a.dim, (block + 1) * kColumns); c += 16) {
        const int64_t left = a.dim - c, n = std::min<int64_t>(16, left);
        V16 w[kMaxWidth], x[kMaxWidth];  // x: a ring of the last inputs
        for (int64_t i = 0; i < a.width; ++i) {
          float lane[16] = {};
          for (int64_t j = 0; j < n; ++j) lane[j] = at<T>(a.weight, (c + j) * a.width + i);
          w[i] = load(lane);
        }
        const V16 bias = a.bias ? load_edge(static_cast<const T*>(a.bias) + c, left) : zero();
        for (int64_t i = 0; i < held; ++i)
          x[i] = a.fresh[r] ? zero() : load_edge(state + i * a.state_token + c, left);
        for (int64_t t = from; t < to; ++t) {
          x[held] = load_edge(static_cast<const T*>(a.x) + t * a.x_token + c, left);
          V16 y = bias;
          for (int64_t i = 0; i < a.width; ++i) y = fma(w[i], x[i], y);
          if (a.silu) y = mul(y, sigmoid(y));
          store_edge(static_cast<T*>(a.out) + t * a.dim + c, y, left);
          for (int64_t i = 0; i < held; ++i) x[i] = x[i + 1];
        }
        for (int64_t i = 0; i < held; ++i) store_edge(state + i * a.state_token + c, x[i], left);
      }
    }
  }
}

// ---- The recurrences.

// 1 / sqrt(sum of squares + 1e-6) of x [n] (n a multiple of 16), the sum in norm.cpp's order.
BI_INLINE float inverse_length(const float* x, int64_t n) {
  V16 acc[4] = {zero(), zero(), zero(), zero()};
  for (int64_t c = 0; c < n; c += 16) {
    const V16 v = load(x + c);
    acc[(c / 16) % 4] = fma(v, v, acc[(c / 16) % 4]);
  }
  return 1.f / std::sqrt(sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3]))) + 1e-6f);
}

// One token on N x 16 columns of a state [keys, ld]: see above.
template <int N, bool Delta>
BI_INLINE void step(float* s, int64_t ld, int64_t keys, const float* k, const float* q, const V16* v, float decay,
                    float beta, V16* o) {
  const V16 d = set1(decay);
  V16 u[N];
  if (Delta) {
    V16 sum[N];
    for (int j = 0; j < N; ++j) sum[j] = zero();
    for (int64_t i = 0; i < keys; ++i) {
      const V16 ki = set1(k[i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[j] = fma(ki, load(s + i * ld + 16 * j), sum[j]);
    }
    for (int j = 0; j < N; ++j) u[j] = mul(set1(beta), sub(v[j], mul(d, sum[j])));
  } else {
    for (int j = 0; j < N; ++j) u[j] = v[j];
  }
  for (int j = 0; j < N; ++j) o[j] = zero();
  for (int64_t i = 0; i < keys; ++i) {
    const V16 ki = set1(k[i]), qi = set1(q[i]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const V16 x = fma(ki, u[j], mul(load(s + i * ld + 16 * j), d));
      store(s + i * ld + 16 * j, x);
      o[j] = fma(qi, x, o[j]);
    }
  }
}

template <class T, bool Delta, int N>
void columns(const RecurrenceArgs& a, int64_t r, int64_t head, int64_t column) {
  const int64_t keys = a.keys, values = a.values, group = head / (a.heads / a.key_heads);
  float* s = static_cast<float*>(a.states) + a.slots[r] * a.state_slot + head * keys * values + column;
  if (a.fresh[r])
    for (int64_t i = 0; i < keys; ++i) std::memset(s + i * values, 0, N * 16 * sizeof(float));
  const float rate = a.rate[head], scale = 1.f / std::sqrt(float(keys));
  float k[kMaxKey], q[kMaxKey];
  V16 v[N], x[N], o[N];
  for (int64_t t = a.query_start[r]; t < a.query_start[r + 1]; ++t) {
    const T* row = static_cast<const T*>(a.x) + t * a.x_token;
    for (int64_t i = 0; i < keys; i += 16) {
      store(k + i, load(row + a.key_at + group * keys + i));
      store(q + i, load(row + a.query_at + group * keys + i));
    }
    for (int j = 0; j < N; ++j) v[j] = x[j] = load(row + a.value_at + head * values + column + 16 * j);
    const float step_size = at<T>(a.a, t * a.a_token + head) + a.dt_bias[head];
    float decay, beta = 0;
    if (Delta) {
      const V16 kn = set1(inverse_length(k, keys)), qn = set1(inverse_length(q, keys) * scale);
      for (int64_t i = 0; i < keys; i += 16) store(k + i, mul(load(k + i), kn)), store(q + i, mul(load(q + i), qn));
      decay = exp_neg1(rate * softplus1(step_size));
      beta = sigmoid1(at<T>(a.b, t * a.b_token + head));
    } else {
      const float dt = std::min(std::max(softplus1(step_size), a.dt_min), a.dt_max);
      decay = exp_neg1(rate * dt);
      for (int j = 0; j < N; ++j) v[j] = mul(set1(dt), x[j]);
    }
    step<N, Delta>(s, values, keys, k, q, v, decay, beta, o);
    T* out = static_cast<T*>(a.out) + t * a.out_token + head * values + column;
    for (int j = 0; j < N; ++j)
      store(out + 16 * j, Delta || !a.D ? o[j] : fma(set1(a.D[head]), x[j], o[j]));
  }
}

template <class T, bool Delta> void recurrence(const RecurrenceArgs& a, int threads) {
  const int64_t blocks = (a.values + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(3)
  for (int64_t r = 0; r < a.reqs; ++r)
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t block = 0; block < blocks; ++block) {
        if (a.query_start[r] == a.query_start[r + 1]) continue;
        const int64_t column = block * kColumns;
        switch (std::min(kColumns, a.values - column) / 16) {
          case 4: columns<T, Delta, 4>(a, r, head, column); break;
          case 3: columns<T, Delta, 3>(a, r, head, column); break;
          case 2: columns<T, Delta, 2>(a, r, head, column); break;
          default: columns<T, Delta, 1>(a, r, head, column);
        }
      }
}

// ---- Mamba 1.

template <class T> void mamba1(const Mamba1Args& a, int threads) {
  const int64_t blocks = (a.dim + 15) / 16;
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t r = 0; r < a.reqs; ++r)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t c = block * 16, left = a.dim - c, n = std::min<int64_t>(16, left);
      float* s = static_cast<float*>(a.states) + a.slots[r] * a.state_slot + c * a.size;
      if (a.fresh[r] && a.query_start[r] != a.query_start[r + 1]) std::memset(s, 0, n * a.size * sizeof(float));
      const V16 bias = a.dt_bias ? load_edge(a.dt_bias + c, left) : zero(), D = load_edge(a.D + c, left);
      for (int64_t t = a.query_start[r]; t < a.query_start[r + 1]; ++t) {
        const V16 x = load_edge(static_cast<const T*>(a.x) + t * a.x_token + c, left);
        const V16 raw = add(load_edge(static_cast<const T*>(a.dt) + t * a.dt_token + c, left), bias);
        const T* b = static_cast<const T*>(a.b) + t * a.b_token;
        const T* cc = static_cast<const T*>(a.c) + t * a.c_token;
        float step[16], scaled[16], y[16] = {};
        store(step, raw);
        for (int j = 0; j < 16; ++j) step[j] = softplus1(step[j]);
        store(scaled, mul(load(step), x));
        for (int64_t j = 0; j < n; ++j) {
          V16 sum = zero();
          for (int64_t i = 0; i < a.size; i += 16) {
            const V16 decay = exp_neg(mul(set1(step[j]), load(a.A + (c + j) * a.size + i)));
            const V16 held = fma(set1(scaled[j]), load(b + i), mul(load(s + j * a.size + i), decay));
            store(s + j * a.size + i, held);
            sum = fma(held, load(cc + i), sum);
          }
          y[j] = sum_lanes(sum);
        }
        V16 out = fma(D, x, load(y));
        if (a.gate) {
          const V16 gate = load_edge(static_cast<const T*>(a.gate) + t * a.gate_token + c, left);
          out = mul(out, mul(gate, sigmoid(gate)));
        }
        store_edge(static_cast<T*>(a.out) + t * a.dim + c, out, left);
      }
    }
}

template <class T> void recurrence(const RecurrenceArgs& a, int threads) {
  a.delta ? recurrence<T, true>(a, threads) : recurrence<T, false>(a, threads);
}

}  // namespace

void causal_conv(const ConvArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return conv<float>(a, threads);
    case DType::bf16: return conv<bf16>(a, threads);
    case DType::f16: return conv<fp16>(a, threads);
  }
}

void mamba1(const Mamba1Args& a, int threads) {
  switch (a.type) {
    case DType::f32: return mamba1<float>(a, threads);
    case DType::bf16: return mamba1<bf16>(a, threads);
    case DType::f16: return mamba1<fp16>(a, threads);
  }
}

void recurrence(const RecurrenceArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return recurrence<float>(a, threads);
    case DType::bf16: return recurrence<bf16>(a, threads);
    case DType::f16: return recurrence<fp16>(a, threads);
  }
}

}  // namespace bi
