// Causal attention over paged latents (MLA in its absorbed form), in bf16, fp16 or fp32: every head of a query reads
// the same latent of a token. A key is the whole latent (dim), its value the first vdim elements.
//
// Order of one row (token, head), as in attention.cpp: keys are cut into leaves of kLeaf positions, aligned at position
// 0. In a leaf: score = scale * dot over ascending dim; m = max of the scores; p = exp(score - m); l = sum of p: lane i
// adds positions i mod 16, ascending, then sum_lanes adds the lanes; o = sum of p v over ascending positions. Leaves are
// merged in ascending order in fp32, and o / l is rounded once. Prompts, chunks and generated tokens take this order.
//
// The cache holds latents as vLLM stores them, [block_size][dim]. A leaf is copied into the layouts of the inner loops:
// keys as [16 tokens][dim/step][16][step], values as [tokens/step][vdim][step]. step is 2 for bf16 with AVX512_BF16,
// else 1. Limits: dim and vdim multiples of 16 up to kMaxLatent. With AMX, bf16 takes both products by tdpbf16ps over
// steps of 32 if dim and vdim are multiples of 32.
#include <algorithm>
#include <type_traits>
#include <vector>
#include "api.h"
#include "attention_amx.h"
#include "micro.h"
#include "units.h"

namespace bi {
namespace {

constexpr int kTile = 64;               // rows of a work unit; not part of the order
#if defined(BI_AMX)
template <class T> constexpr bool kUseTiles = std::is_same_v<T, bf16>;
#else
template <class T> constexpr bool kUseTiles = false;
#endif

struct Unit {
  int req;
  int64_t row0;  // first of the request's rows (token, head)
  int rows;
  int leaf0, leaf1;  // leaves [leaf0, leaf1) hold every key that a row sees; leaf0 is 0
};

// out[c][r] = in[r][c] for 16 x 16 words of 32 bits.
void transpose16(const uint32_t* const (&in)[16], int at, uint32_t* out) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in[i] + at);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4 j + i]: columns i, i + 4, i + 8, i + 12 of rows 4 j .. 4 j + 3
    const __m512i lo = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), hi = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i lo2 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), hi2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i32x4(lo, hi, 0x88));
    _mm512_storeu_si512(out + 16 * (i + 4), _mm512_shuffle_i32x4(lo2, hi2, 0x88));
    _mm512_storeu_si512(out + 16 * (i + 8), _mm512_shuffle_i32x4(lo, hi, 0xdd));
    _mm512_storeu_si512(out + 16 * (i + 12), _mm512_shuffle_i32x4(lo2, hi2, 0xdd));
  }
#else
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) out[16 * c + r] = in[r][at + c];
#endif
}

template <class T> class Worker {
  using Kind = KindOf<T>;
  using A = typename Kind::A;
  static constexpr int step = Kind::step;

  const LatentArgs& a_;
  const int dim_, vdim_;
  const bool tiles_;
  alignas(64) float s_[kTile * kLeaf];
  alignas(64) A p_[kTile * kLeaf];
  alignas(64) A q_[kTile * kMaxLatent];
  alignas(64) T k_[kLeaf * kMaxLatent];
  alignas(64) T v_[kLeaf * kMaxLatent];
  alignas(64) T nothing_[kMaxLatent] = {};  // the latent of a position that no row sees
  int hi_[kTile];  // keys [0, hi) of each row
  Unit u_{-1, 0, 0, 0};

  const T* latent(int pos) const {
    const int64_t block = a_.table[u_.req * a_.table_stride + pos / a_.block_size];
    return static_cast<const T*>(a_.cache) + block * a_.block_stride + int64_t(pos % a_.block_size) * dim_;
  }

  // Copies the latents of positions [j0, j0 + keys) into k_ and v_, and zeros up to `groups` groups of 16.
  void pack(int j0, int keys, int groups) {
    for (int g = 0; g < groups; ++g) {
      const T* row[16];
      for (int i = 0; i < 16; ++i) row[i] = 16 * g + i < keys ? latent(j0 + 16 * g + i) : nothing_;
      T* const k = k_ + size_t(g) * 16 * dim_;
      if constexpr (step * sizeof(T) == 4) {
        const uint32_t* word[16];
        for (int i = 0; i < 16; ++i) word[i] = reinterpret_cast<const uint32_t*>(row[i]);
        const int words = dim_ / step;
        int at = 0;
        for (; at + 16 <= words; at += 16) transpose16(word, at, reinterpret_cast<uint32_t*>(k) + at * 16);
        for (; at < words; ++at)
          for (int i = 0; i < 16; ++i) reinterpret_cast<uint32_t*>(k)[at * 16 + i] = word[i][at];
      } else {
        for (int d = 0; d < dim_; ++d)
          for (int i = 0; i < 16; ++i) k[d * 16 + i] = row[i][d];
      }
      T* const v = v_ + size_t(g) * 16 * vdim_;
      if constexpr (step == 1) {
        for (int i = 0; i < 16; ++i) std::memcpy(v + i * vdim_, row[i], vdim_ * sizeof(T));
      } else {
        for (int i = 0; i < 16; i += 2) {
          T* __restrict o = v + i * vdim_;
          const T *x = row[i], *y = row[i + 1];
          for (int d = 0; d < vdim_; ++d) o[2 * d] = x[d], o[2 * d + 1] = y[d];
        }
      }
    }
  }

#if defined(BI_AMX)
  // A leaf by tiles, of 1 or 2 tiles of 16 rows from row r0. Rows of a tile that the unit does not have hold anything.
  template <int ROW_TILES> void score_tiles(int r0, int groups) {
    constexpr int together = 4 / ROW_TILES;
    const int steps = dim_ / 32;
    for (int g = 0; g < groups; g += together) {
      const T *k[together], *tail[together];
      for (int n = 0; n < together; ++n) {
        k[n] = k_ + size_t(std::min(g + n, groups - 1)) * 16 * dim_;
        tail[n] = k[n] + (steps - 1) * 512;
      }
      tile_scores<ROW_TILES, together>(q_ + r0 * dim_, dim_, k, tail, steps, s_ + r0 * kLeaf + 16 * g, kLeaf);
    }
  }

  template <int ROW_TILES> void value_tiles(int r0, int steps, float* o) {
    constexpr int cols = 4 / ROW_TILES;
    const T* v[kLeaf / kStepTokens];
    for (int s = 0; s < steps; ++s) v[s] = v_ + size_t(s) * kStepTokens * vdim_;
    alignas(64) float out[ROW_TILES * 16 * 64];
    const auto take = [&](auto n, int d) {
      constexpr int count = decltype(n)::value;
      tile_values<ROW_TILES, count>(p_ + r0 * kLeaf, kLeaf, v, steps, vdim_, d, out);
      // Adding 0 makes every zero positive, as in `values`.
      for (int r = 0; r < std::min(ROW_TILES * 16, u_.rows - r0); ++r)
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i)
          store(o + (r0 + r) * vdim_ + d + 16 * i, add(load(out + r * 64 + 16 * i), zero()));
    };
    int d = 0;
    for (; d + 16 * cols <= vdim_; d += 16 * cols) take(Int<cols>{}, d);
    for (; d < vdim_; d += 32) take(Int<2>{}, d);
  }

  void leaf_tiles(int j0, int keys, State* st, float* o) {
    const int steps = (keys + kStepTokens - 1) / kStepTokens, groups = 2 * steps;
    pack(j0, keys, groups);
    for (int r = 0; r < u_.rows; r += 32) {
      if (u_.rows - r > 16) score_tiles<2>(r, groups);
      else score_tiles<1>(r, groups);
    }
    for (int r = 0; r < u_.rows; ++r)
      st[r] = softmax(s_ + r * kLeaf, p_ + r * kLeaf, std::min(hi_[r] - j0, kLeaf), groups);
    for (int r = 0; r < u_.rows; r += 32) {
      if (u_.rows - r > 16) value_tiles<2>(r, steps, o);
      else value_tiles<1>(r, steps, o);
    }
  }
#endif

  template <int MR>
  void scores(int r0, const T* const (&k)[kVecs], float* out) {
    V16 acc[MR][kVecs];
    clear(acc);
    dot_block<Kind, MR, kVecs>(acc, q_ + r0 * dim_, dim_, k, 16 * step, dim_ / step);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) store(out + r * kLeaf + 16 * n, acc[r][n]);
  }

  template <int MR, int NR>
  void values(int r0, int d, int steps, float* o) {
    V16 acc[MR][NR];
    clear(acc);
    const T* v[NR];
    for (int n = 0; n < NR; ++n) v[n] = v_ + (d + 16 * n) * step;
    dot_block<Kind, MR, NR>(acc, p_ + r0 * kLeaf, kLeaf, v, size_t(vdim_) * step, steps);
    // Adding 0 makes every zero positive: its sign would depend on the zeros that masked keys added.
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) store(o + (r0 + r) * vdim_ + d + 16 * n, add(acc[r][n], zero()));
  }

  // Turns a row's scores s into p. The row sees keys [0, hi) of the leaf; p is filled in groups [0, groups).
  State softmax(float* s, A* p, int hi, int groups) {
    State st;
    int last = 0;
    if (hi > 0) {
      last = (hi + 15) / 16;
      const V16 scale = set1(a_.scale), inf = set1(kMinusInf);
      V16 top = inf;
      for (int g = 0; g < last; ++g) {
        V16 x = mul(load(s + 16 * g), scale);
        if (16 * g + 16 > hi) x = keep_lanes(x, 0, hi - 16 * g, inf);
        store(s + 16 * g, x);
        top = max(top, x);
      }
      st.any = true;
      st.m = max_lanes(top);
      const V16 m = set1(st.m);
      V16 sum = zero();
      for (int g = 0; g < last; ++g) {
        const V16 e = exp_neg(sub(load(s + 16 * g), m));
        sum = add(sum, e);
        store(p + 16 * g, e);
      }
      st.l = sum_lanes(sum);
    }
    if (last < groups) std::memset(static_cast<void*>(p + 16 * last), 0, (groups - last) * 16 * sizeof(A));
    return st;
  }

 public:
  explicit Worker(const LatentArgs& a)
      : a_(a), dim_(a.dim), vdim_(a.vdim), tiles_(kUseTiles<T> && a.dim % 32 == 0 && a.vdim % 32 == 0) {
#if defined(BI_AMX)
    static const TileConfig config;
    if (tiles_) _tile_loadconfig(&config);
#endif
  }

  // After the last unit of this worker.
  void done() {
#if defined(BI_AMX)
    if (tiles_) _tile_release();
#endif
  }

  void open(const Unit& u) {
    u_ = u;
    const int first = a_.query_start[u.req], len = a_.query_start[u.req + 1] - first;
    for (int r = 0; r < u.rows; ++r) {
      const int64_t t = (u.row0 + r) / a_.heads, head = (u.row0 + r) % a_.heads;
      const T* q = static_cast<const T*>(a_.query) + (first + t) * a_.query_token + head * a_.query_head;
      A* out = q_ + r * dim_;
      if constexpr (std::is_same_v<T, A>) std::memcpy(out, q, dim_ * sizeof(T));
      else for (int d = 0; d < dim_; d += 16) store(out + d, load(q + d));
      hi_[r] = a_.seq_lens[u.req] - len + int(t) + 1;
    }
  }

  // Computes one leaf of the open unit: st[rows], o[rows][vdim].
  void leaf(int index, State* st, float* o) {
    const int j0 = index * kLeaf;
    // Positions ascend from row to row: the last row sees the most keys.
    const int keys = std::min(hi_[u_.rows - 1] - j0, kLeaf), groups = (keys + 15) / 16;
#if defined(BI_AMX)
    if constexpr (kUseTiles<T>)
      if (tiles_) return leaf_tiles(j0, keys, st, o);
#endif
    pack(j0, keys, groups);
    for (int g = 0; g < groups; g += kVecs) {
      const T* k[kVecs];
      for (int n = 0; n < kVecs; ++n) k[n] = k_ + size_t(std::min(g + n, groups - 1)) * 16 * dim_;
      row_blocks(u_.rows, [&](int at, int mr) {
        with_rows(mr, [&](auto r) { scores<decltype(r)::value>(at, k, s_ + at * kLeaf + 16 * g); });
      });
    }
    for (int r = 0; r < u_.rows; ++r)
      st[r] = softmax(s_ + r * kLeaf, p_ + r * kLeaf, std::min(hi_[r] - j0, kLeaf), groups);
    const int steps = (keys + step - 1) / step;
    row_blocks(u_.rows, [&](int at, int mr) {
      with_rows(mr, [&](auto rr) {
        constexpr int R = decltype(rr)::value;
        int d = 0;
        for (; d + 16 * kVecs <= vdim_; d += 16 * kVecs) values<R, kVecs>(at, d, steps, o);
        for (; d < vdim_; d += 16) values<R, 1>(at, d, steps, o);
      });
    });
  }

  // Writes o / l of row r of the open unit, rounded, to the output. Returns whether the row is finite.
  bool close_row(int r, const State& st, const float* o) {
    const int64_t t = a_.query_start[u_.req] + (u_.row0 + r) / a_.heads, head = (u_.row0 + r) % a_.heads;
    T* out = static_cast<T*>(a_.out) + t * a_.out_token + head * a_.out_head;
    return close_values(o, st, vdim_, out);
  }

  // Row r of unit u as a unit of its own, which reads no key that the row does not see.
  Unit only(const Unit& u, int r) const {
    const int len = a_.query_start[u.req + 1] - a_.query_start[u.req];
    const int pos = a_.seq_lens[u.req] - len + int((u.row0 + r) / a_.heads);
    return {u.req, u.row0 + r, 1, 0, pos / kLeaf + 1};
  }
};

std::vector<Unit> make_units(const LatentArgs& a) {
  std::vector<Unit> units;
  for (int r = 0; r < a.reqs; ++r) {
    const int len = a.query_start[r + 1] - a.query_start[r], ctx = a.seq_lens[r] - len;
    const int64_t rows = int64_t(len) * a.heads;
    // The last tile first: it has the most keys, and the short tiles that follow even out the threads' work.
    for (int64_t i = (rows + kTile - 1) / kTile - 1; i >= 0; --i) {
      const int64_t row0 = i * kTile;
      const int n = int(std::min<int64_t>(kTile, rows - row0));
      const int last = ctx + int((row0 + n - 1) / a.heads);
      units.push_back({r, row0, n, 0, last / kLeaf + 1});
    }
  }
  return units;
}

template <class T> void run(const LatentArgs& a, int threads) {
  run_units<Worker<T>, kTile>(make_units(a), a, a.vdim, threads);
}

}  // namespace

void latent_attention(const LatentArgs& a, int threads) {
  switch (a.type) {
    case DType::f32: return run<float>(a, threads);
    case DType::bf16: return run<bf16>(a, threads);
    case DType::f16: return run<fp16>(a, threads);
  }
}

// Each head is one product of the bundled GEMM on one thread; its order does not depend on the number of tokens.
void heads_gemm(const HeadsGemmArgs& a, int threads) {
  const size_t bytes = a.type == DType::f32 ? 4 : 2;
  const int64_t weight = int64_t(gemm_packed_size(a.type, a.n, a.k));
  if (a.tokens == 0) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (a.tokens * a.heads * a.n * a.k > (1 << 16))
  for (int64_t h = 0; h < a.heads; ++h) {
    static thread_local Scratch mem;
    char* const y = reinterpret_cast<char*>(mem.get<uint8_t>(a.tokens * a.n * bytes));
    gemm(a.type, static_cast<const char*>(a.x) + h * a.x_head * bytes, a.x_token, a.tokens,
         static_cast<const char*>(a.packed) + h * weight * bytes, a.n, a.k, nullptr, y, 1);
    char* const out = static_cast<char*>(a.out) + h * a.out_head * bytes;
    for (int64_t t = 0; t < a.tokens; ++t) std::memcpy(out + t * a.out_token * bytes, y + t * a.n * bytes, a.n * bytes);
  }
}

}  // namespace bi
