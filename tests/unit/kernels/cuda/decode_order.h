// The order of kernels/cuda/decode.cu in plain loops, one output row: q [HEAD], k and v [length, HEAD], out [HEAD], all
// fp32 that hold bf16 values. scale: of the softmax, times log2(e). As in emulate.h, a step's products are added one by
// one.
#pragma GCC optimize("fp-contract=off")

extern "C" void in_order(const float* q, const float* k, const float* v, float* out, int length, float scale) {
  std::vector<float> sums(4, 0.f), o(HEAD, 0.f);
  float most = LOWEST;
  for (int begin = (length - 1) / TILE * TILE; begin >= 0; begin -= TILE) {
    const bool first = begin + TILE >= length;
    float p[TILE], peak = most;
    for (int key = 0; key < TILE; ++key) {
      p[key] = 0.f;
      for (int n = 0; n < HEAD && begin + key < length; ++n) {
        // LATE: the four lanes of a key take four neighbours each, two for each half of the instruction's 16 products.
        const int d = LATE ? n / 16 * 16 + n % 8 / 2 * 4 + n % 16 / 8 * 2 + n % 2 : n;
        p[key] += q[d] * k[(begin + key) * HEAD + d];
      }
      if (begin + key >= length) p[key] = LOWEST;
      peak = fmaxf(peak, p[key]);
    }
    const float by = first ? 1.f : exp2f((most - peak) * scale), scaled = peak * scale;
    most = peak;
    for (float& weight : p) weight = exp2f(fmaf(weight, scale, -scaled));
    for (int t = 0; t < 4; ++t) {
      sums[t] = fmaf(sums[t], by, p[2 * t]);
      for (int key = 2 * t + 1; key < TILE; key += key % 2 ? 7 : 1) sums[t] += p[key];
    }
    for (float& value : o) value *= by;
    for (int key = 0; key < TILE; ++key) {
      const float weight = widen_bf16(round_bf16(p[key]));
      for (int d = 0; d < HEAD; ++d) o[d] += weight * (begin + key < length ? v[(begin + key) * HEAD + d] : 0.f);
    }
  }
  const float part = 1.f / ((sums[0] + sums[2]) + (sums[1] + sums[3]));
  for (int d = 0; d < HEAD; ++d) out[d] = widen_bf16(round_bf16(o[d] * part));
}
