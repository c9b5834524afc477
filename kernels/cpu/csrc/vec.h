// V16: sixteen fp32 lanes, the only vector type of the kernels, on AVX-512, AVX2 or plain C++.
//
// Every function works lane by lane (sum_lanes and max_lanes aside), so a lane's bits are the same on every ISA.
// FMA is always explicit: the library is compiled with -ffp-contract=off.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bi {

struct bf16 { uint16_t u; };
struct fp16 { uint16_t u; };

#define BI_INLINE inline __attribute__((always_inline))

template <class T> BI_INLINE T bit_load(const void* p) { T t; std::memcpy(&t, p, sizeof t); return t; }

BI_INLINE float to_f32(float x) { return x; }
BI_INLINE float to_f32(bf16 x) { uint32_t b = uint32_t(x.u) << 16; return bit_load<float>(&b); }
#if defined(__F16C__)
BI_INLINE float to_f32(fp16 x) { return _cvtsh_ss(x.u); }
#else
BI_INLINE float to_f32(fp16 x) { return float(bit_load<_Float16>(&x)); }
#endif

#if defined(__AVX512F__)
// ---------------------------------------------------------------- AVX-512
using V16 = __m512;
BI_INLINE V16 zero() { return _mm512_setzero_ps(); }
BI_INLINE V16 set1(float x) { return _mm512_set1_ps(x); }
BI_INLINE V16 load(const float* p) { return _mm512_loadu_ps(p); }
BI_INLINE V16 load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
BI_INLINE V16 load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
BI_INLINE void store(float* p, V16 x) { _mm512_storeu_ps(p, x); }
BI_INLINE void store(fp16* p, V16 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
BI_INLINE V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
BI_INLINE V16 sub(V16 a, V16 b) { return _mm512_sub_ps(a, b); }
BI_INLINE V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
BI_INLINE V16 div(V16 a, V16 b) { return _mm512_div_ps(a, b); }
BI_INLINE V16 max(V16 a, V16 b) { return _mm512_max_ps(a, b); }
BI_INLINE V16 sqrt(V16 a) { return _mm512_sqrt_ps(a); }
BI_INLINE V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
BI_INLINE V16 abs(V16 a) { return _mm512_abs_ps(a); }
BI_INLINE V16 copysign(V16 mag, V16 sign) {
  const __m512i s = _mm512_set1_epi32(int(0x80000000u));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(s, _mm512_castps_si512(mag)),
                                             _mm512_and_si512(s, _mm512_castps_si512(sign))));
}
// y * 2^n, where n is in the low mantissa bits of t.
BI_INLINE V16 ldexp_bits(V16 y, V16 t) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y),
                                              _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
// lo where x < limit, else y.
BI_INLINE V16 if_less(V16 x, V16 limit, V16 lo, V16 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), y, lo);
}
// x where x is NaN, else y.
BI_INLINE V16 or_nan(V16 x, V16 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), y, x);
}
// x in lanes [from, to), fill elsewhere.
BI_INLINE V16 keep_lanes(V16 x, int from, int to, V16 fill) {
  const uint32_t up = to >= 16 ? 0xffffu : to <= 0 ? 0u : (1u << to) - 1;
  const uint32_t lo = from <= 0 ? 0u : from >= 16 ? 0xffffu : (1u << from) - 1;
  return _mm512_mask_blend_ps(__mmask16(up & ~lo), fill, x);
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
// ---------------------------------------------------------------- AVX2
struct V16 { __m256 a, b; };
#define BI_EACH(expr_a, expr_b) return V16{expr_a, expr_b}
BI_INLINE V16 zero() { BI_EACH(_mm256_setzero_ps(), _mm256_setzero_ps()); }
BI_INLINE V16 set1(float x) { BI_EACH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
BI_INLINE V16 load(const float* p) { BI_EACH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
BI_INLINE __m256 widen(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
BI_INLINE V16 load(const bf16* p) { BI_EACH(widen(p), widen(p + 8)); }
BI_INLINE V16 load(const fp16* p) {
  BI_EACH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
}
BI_INLINE void store(float* p, V16 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
BI_INLINE void store(fp16* p, V16 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
BI_INLINE V16 add(V16 x, V16 y) { BI_EACH(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
BI_INLINE V16 sub(V16 x, V16 y) { BI_EACH(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
BI_INLINE V16 mul(V16 x, V16 y) { BI_EACH(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
BI_INLINE V16 div(V16 x, V16 y) { BI_EACH(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
BI_INLINE V16 max(V16 x, V16 y) { BI_EACH(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
BI_INLINE V16 sqrt(V16 x) { BI_EACH(_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)); }
BI_INLINE V16 fma(V16 x, V16 y, V16 z) {
  BI_EACH(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
BI_INLINE __m256 sign_mask() { return _mm256_castsi256_ps(_mm256_set1_epi32(int(0x80000000u))); }
BI_INLINE V16 abs(V16 x) {
  BI_EACH(_mm256_andnot_ps(sign_mask(), x.a), _mm256_andnot_ps(sign_mask(), x.b));
}
BI_INLINE V16 copysign(V16 m, V16 s) {
  const V16 t = abs(m);
  BI_EACH(_mm256_or_ps(t.a, _mm256_and_ps(sign_mask(), s.a)),
          _mm256_or_ps(t.b, _mm256_and_ps(sign_mask(), s.b)));
}
BI_INLINE __m256 ldexp_half(__m256 y, __m256 t) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
BI_INLINE V16 ldexp_bits(V16 y, V16 t) { BI_EACH(ldexp_half(y.a, t.a), ldexp_half(y.b, t.b)); }
BI_INLINE V16 if_less(V16 x, V16 l, V16 lo, V16 y) {
  BI_EACH(_mm256_blendv_ps(y.a, lo.a, _mm256_cmp_ps(x.a, l.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, lo.b, _mm256_cmp_ps(x.b, l.b, _CMP_LT_OQ)));
}
BI_INLINE V16 or_nan(V16 x, V16 y) {
  BI_EACH(_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)));
}
BI_INLINE V16 keep_lanes(V16 x, int from, int to, V16 fill) {
  alignas(32) float v[16], f[16];
  store(v, x);
  store(f, fill);
  for (int i = 0; i < 16; ++i) v[i] = (i >= from && i < to) ? v[i] : f[i];
  return load(v);
}
#undef BI_EACH
#else
// ---------------------------------------------------------------- portable
struct V16 { float v[16]; };
#define BI_EACH(expr) do { V16 r; for (int i = 0; i < 16; ++i) r.v[i] = (expr); return r; } while (0)
BI_INLINE V16 zero() { BI_EACH(0.f); }
BI_INLINE V16 set1(float x) { BI_EACH(x); }
template <class T> BI_INLINE V16 load(const T* p) { BI_EACH(to_f32(p[i])); }
BI_INLINE void store(float* p, V16 x) { std::memcpy(p, x.v, sizeof x.v); }
BI_INLINE void store(fp16* p, V16 x) {
  for (int i = 0; i < 16; ++i) { _Float16 h = (_Float16)x.v[i]; std::memcpy(p + i, &h, 2); }
}
BI_INLINE V16 add(V16 a, V16 b) { BI_EACH(a.v[i] + b.v[i]); }
BI_INLINE V16 sub(V16 a, V16 b) { BI_EACH(a.v[i] - b.v[i]); }
BI_INLINE V16 mul(V16 a, V16 b) { BI_EACH(a.v[i] * b.v[i]); }
BI_INLINE V16 div(V16 a, V16 b) { BI_EACH(a.v[i] / b.v[i]); }
BI_INLINE V16 max(V16 a, V16 b) { BI_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
BI_INLINE V16 sqrt(V16 a) { BI_EACH(__builtin_sqrtf(a.v[i])); }
BI_INLINE V16 fma(V16 a, V16 b, V16 c) { BI_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
BI_INLINE V16 abs(V16 a) { BI_EACH(__builtin_fabsf(a.v[i])); }
BI_INLINE V16 copysign(V16 m, V16 s) { BI_EACH(__builtin_copysignf(m.v[i], s.v[i])); }
BI_INLINE float ldexp_one(float y, float t) {
  const uint32_t b = bit_load<uint32_t>(&y) + (bit_load<uint32_t>(&t) << 23);
  return bit_load<float>(&b);
}
BI_INLINE V16 ldexp_bits(V16 y, V16 t) { BI_EACH(ldexp_one(y.v[i], t.v[i])); }
BI_INLINE V16 if_less(V16 x, V16 l, V16 lo, V16 y) { BI_EACH(x.v[i] < l.v[i] ? lo.v[i] : y.v[i]); }
BI_INLINE V16 or_nan(V16 x, V16 y) { BI_EACH(x.v[i] != x.v[i] ? x.v[i] : y.v[i]); }
BI_INLINE V16 keep_lanes(V16 x, int from, int to, V16 fill) {
  BI_EACH((i >= from && i < to) ? x.v[i] : fill.v[i]);
}
#undef BI_EACH
#endif

// Stores as bf16: rounds to nearest even; NaN stays NaN.
#if defined(__AVX512BF16__)
BI_INLINE void store(bf16* p, V16 x) {
  const __m256bh h = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &h, 32);
}
#else
BI_INLINE void store(bf16* p, V16 x) {
  float f[16];
  store(f, x);
  for (int i = 0; i < 16; ++i) {
    const uint32_t b = bit_load<uint32_t>(f + i);
    const bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    p[i].u = nan ? uint16_t((b >> 16) | 0x40) : uint16_t((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
  }
}
#endif

// Sum of the lanes, always by the same tree: lane i plus lane i + 8, then i + 4, i + 2, i + 1.
BI_INLINE float sum_lanes(V16 x) {
  float f[16];
  store(f, x);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) f[i] = f[i] + f[i + w];
  return f[0];
}
BI_INLINE float max_lanes(V16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float f[16];
  store(f, x);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) f[i] = f[i] > f[i + w] ? f[i] : f[i + w];
  return f[0];
#endif
}

// exp(x) for x <= 0: 2^n * P(r), r = x - n ln 2 in two FMA steps, P of degree 6.
// exp(0) is 1 exactly; x < -87 gives 0 exactly. Relative error below 2e-7.
BI_INLINE V16 exp_neg(V16 x) {
  const V16 magic = set1(12582912.f);  // 1.5 * 2^23: adding this rounds to an integer
  const V16 t = fma(x, set1(1.44269504088896341f), magic);
  const V16 n = sub(t, magic);
  V16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V16 y = set1(1.f / 720);
  y = fma(y, r, set1(1.f / 120));
  y = fma(y, r, set1(1.f / 24));
  y = fma(y, r, set1(1.f / 6));
  y = fma(y, r, set1(0.5f));
  y = fma(y, r, set1(1.f));
  y = fma(y, r, set1(1.f));
  return if_less(x, set1(-87.f), zero(), ldexp_bits(y, t));
}
BI_INLINE float exp_neg1(float x) {
  float f[16];
  store(f, exp_neg(set1(x)));
  return f[0];
}
// tanh from exp(-2|x|), so that tanh(-x) is -tanh(x).
BI_INLINE V16 tanh(V16 x) {
  const V16 t = exp_neg(mul(abs(x), set1(-2.f)));
  return copysign(div(sub(set1(1.f), t), add(set1(1.f), t)), x);
}

// 1 / (1 + exp(-x)) from exp(-|x|).
BI_INLINE V16 sigmoid(V16 x) {
  const V16 one = set1(1.f), t = exp_neg(sub(zero(), abs(x)));
  return or_nan(x, div(if_less(x, zero(), t, one), add(one, t)));
}
// erf(x) = x P(x^2) / Q(x^2), with |x| held below 4, where erf is 1 in fp32. Error below 1e-6.
BI_INLINE V16 erf(V16 x) {
  const V16 a = abs(x), four = set1(4.f), h = if_less(a, four, a, four), h2 = mul(h, h);
  V16 p = set1(-2.72614225801306e-10f);
  p = fma(p, h2, set1(2.77068142495902e-08f));
  p = fma(p, h2, set1(-2.10102402082508e-06f));
  p = fma(p, h2, set1(-5.69250639462346e-05f));
  p = fma(p, h2, set1(-7.34990630326855e-04f));
  p = fma(p, h2, set1(-2.95459980854025e-03f));
  p = fma(p, h2, set1(-1.60960333262415e-02f));
  V16 q = set1(-1.45660718464996e-05f);
  q = fma(q, h2, set1(-2.13374055278905e-04f));
  q = fma(q, h2, set1(-1.68282697438203e-03f));
  q = fma(q, h2, set1(-7.37332916720468e-03f));
  q = fma(q, h2, set1(-1.42647390514189e-02f));
  return copysign(div(mul(h, p), q), x);
}
// log(1 + t) for 0 <= t <= 1: 2 atanh(s), s = t / (2 + t), by its series to s^17.
BI_INLINE V16 log1p_unit(V16 t) {
  const V16 s = div(t, add(set1(2.f), t)), s2 = mul(s, s);
  V16 y = set1(1.f / 17);
  y = fma(y, s2, set1(1.f / 15));
  y = fma(y, s2, set1(1.f / 13));
  y = fma(y, s2, set1(1.f / 11));
  y = fma(y, s2, set1(1.f / 9));
  y = fma(y, s2, set1(1.f / 7));
  y = fma(y, s2, set1(1.f / 5));
  y = fma(y, s2, set1(1.f / 3));
  y = fma(y, s2, set1(1.f));
  return mul(add(s, s), y);
}

}  // namespace bi
