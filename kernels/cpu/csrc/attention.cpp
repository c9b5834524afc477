// Attention over paged KV, with grouped query heads, sliding window and softcap, in bf16, fp16 or fp32. Causal, or over
// the whole sequence in both directions (encoders).
//
// Order of one row (token, head): keys are cut into leaves of kLeaf positions, aligned at position 0. In a leaf:
//   score = scale * dot over ascending head_dim, then softcap; m = max of the scores; p = exp(score - m);
//   l = sum of p: lane i adds positions i mod 16, ascending, then sum_lanes adds the lanes;
//   o = sum of p v over ascending positions.
// Leaves are merged in ascending order in fp32 (merge), and o / l is rounded once. The order depends on positions
// alone. A masked key adds an exact zero, so the rows that share a tile do not matter. Zero times an infinite value is
// NaN, so a row that is not finite is computed again, alone.
//
// bf16 takes both products by tdpbf16ps over steps of 32 (BI_AMX), or by vdpbf16ps over pairs (AVX512_BF16). All else is
// fp32 FMA.
//
// Layout of a page (block, KV head): K as [tokens/16][D/step][16][step], then V as [tokens/step][D][step]. step is 2
// for bf16 with AVX512_BF16, else 1. Limits: head_dim a multiple of 16 up to 512, block size a multiple of 16.
#include <omp.h>
#include <algorithm>
#include <type_traits>
#include <vector>
#include "api.h"
#include "attention_amx.h"
#include "micro.h"
#include "units.h"

namespace bi {
namespace {

#if defined(BI_AMX)
template <class T> constexpr bool kUseTiles = std::is_same_v<T, bf16>;
#else
template <class T> constexpr bool kUseTiles = false;
#endif
// Rows of a work unit; not part of the order.
template <class T> constexpr int kRowsOf = kUseTiles<T> ? 32 : 5 * kMaxRows;
constexpr int kGroups = kLeaf / 16;
constexpr int kMaxDim = 512;

// ------------------------------------------------------------------ pages
template <class T> struct Pages {
  static constexpr int step = KindOf<T>::step;
  const KvCache& c;
  T* page(int64_t block, int head) const {
    return static_cast<T*>(c.data) + block * c.block_stride + head * c.head_stride;
  }
  // First element of K's group of 16 tokens, and of V's step (a pair of tokens, or one token).
  T* k_group(T* page, int group) const { return page + size_t(group) * c.dim * 16; }
  T* v_step(T* page, int s) const {
    return page + size_t(c.block_size) * c.dim + size_t(s) * c.dim * step;
  }
};

// Stores COUNT tokens of one head at slot `off` of a page. COUNT: 16 (a whole group) or 1.
template <int COUNT, class T>
void store_run(const Pages<T>& pages, T* page, int off, const T* key, int64_t kt, const T* value, int64_t vt) {
  constexpr int step = Pages<T>::step;
  const int dim = pages.c.dim;
  T* __restrict k = pages.k_group(page, off / 16) + (off % 16) * step;
  for (int d = 0; d < dim; d += step)
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) std::memcpy(k + d * 16 + i * step, key + i * kt + d, step * sizeof(T));
  for (int i = 0; i < COUNT; i += step) {
    T* __restrict v = pages.v_step(page, (off + i) / step) + off % step;
    const T* v0 = value + i * vt;
    if constexpr (step == 1) {
      std::memcpy(v, v0, dim * sizeof(T));
    } else if constexpr (COUNT == 1) {
      for (int d = 0; d < dim; ++d) v[d * step] = v0[d];
    } else {
      const T* v1 = v0 + vt;
      for (int d = 0; d < dim; ++d) v[2 * d] = v0[d], v[2 * d + 1] = v1[d];
    }
  }
}

template <class T>
void store_tokens(const KvCache& c, const T* key, int64_t kt, int64_t kh, const T* value, int64_t vt,
                  int64_t vh, const int64_t* slots, int64_t tokens, int threads) {
  const Pages<T> pages{c};
  // The first token of each run: -t - 1 for a whole group of 16 slots, t for a single token.
  std::vector<int64_t> runs;
  for (int64_t t = 0; t < tokens;) {
    int n = 1;
    if (slots[t] >= 0 && slots[t] % 16 == 0 && t + 16 <= tokens)
      while (n < 16 && slots[t + n] == slots[t] + n) ++n;
    if (slots[t] >= 0) runs.push_back(n == 16 ? -t - 1 : t);
    t += n == 16 ? 16 : 1;
  }
  const int64_t count = int64_t(runs.size());
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static) if (tokens > 16)
  for (int64_t i = 0; i < count; ++i)
    for (int h = 0; h < c.kv_heads; ++h) {
      const bool whole = runs[i] < 0;
      const int64_t t = whole ? -runs[i] - 1 : runs[i];
      T* page = pages.page(slots[t] / c.block_size, h);
      const int off = int(slots[t] % c.block_size);
      const T* k = key + t * kt + h * kh;
      const T* v = value + t * vt + h * vh;
      if (whole) store_run<16>(pages, page, off, k, kt, v, vt);
      else store_run<1>(pages, page, off, k, kt, v, vt);
    }
}

// ------------------------------------------------------------------ work
// The query at position pos sees keys [first_key, end_key).
BI_INLINE int first_key(const AttentionArgs& a, int pos) {
  return a.window_left < 0 ? 0 : pos - std::min(pos, a.window_left);
}
BI_INLINE int end_key(const AttentionArgs& a, int req, int pos) {
  if (a.causal) return pos + 1;
  const int after = a.seq_lens[req] - pos - 1;
  return pos + 1 + (a.window_left < 0 ? after : std::min(after, a.window_left));
}

struct Unit {
  int req, kv_head;
  int64_t row0;        // first of the request's rows (token, head in group)
  int rows;
  int leaf0, leaf1;    // leaves [leaf0, leaf1) hold every key that a row sees
};

template <class T> class Worker {
  using Kind = KindOf<T>;
  using A = typename Kind::A;
  static constexpr int step = Kind::step;
  static constexpr int kTile = kRowsOf<T>;

  const AttentionArgs& a_;
  const Pages<T> pages_;
  const int dim_, group_;
  alignas(64) float s_[kTile * kLeaf];
  alignas(64) A p_[kTile * kLeaf];
  alignas(64) A q_[kTile * kMaxDim];
  alignas(64) T edge_[2][kMaxDim * step];
  alignas(64) T edges_[kUseTiles<T> ? kLeaf * kMaxDim : 1];  // steps of V that are copied
  alignas(64) T tail_[kUseTiles<T> ? 4 : 1][16 * 32];  // the last step of head_dim of 4 groups of keys, if it is short
  int lo_[kTile], hi_[kTile];  // keys [lo, hi) of each row
  Unit u_{-1, 0, 0, 0, 0, 0};
  int configured_ = 0;  // rows of the tiles of sums and of A
  const int ldq_;  // of q_, elements: with tiles, whole steps

  struct Segment { const T* v; int at, steps; };  // keys of one page, or a pair at an edge

  T* page_of(int pos) const {
    const int block = a_.table[u_.req * a_.table_stride + pos / a_.kv.block_size];
    return pages_.page(block, u_.kv_head);
  }

  template <int MR>
  void scores(int r0, const T* const (&k)[kVecs], float* out) {
    V16 acc[MR][kVecs];
    clear(acc);
    dot_block<Kind, MR, kVecs>(acc, q_ + r0 * ldq_, ldq_, k, 16 * step, dim_ / step);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) store(out + r * kLeaf + 16 * n, acc[r][n]);
  }

  template <int MR, int NR>
  void values(int r0, int d, const Segment* seg, int segs, float* o) {
    V16 acc[MR][NR];
    clear(acc);
    for (int i = 0; i < segs; ++i) {
      const T* v[NR];
      for (int n = 0; n < NR; ++n) v[n] = seg[i].v + (d + 16 * n) * step;
      dot_block<Kind, MR, NR>(acc, p_ + r0 * kLeaf + seg[i].at, kLeaf, v, size_t(dim_) * step, seg[i].steps);
    }
    // Adding 0 makes every zero positive: its sign would depend on the zeros that masked keys added.
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) store(o + (r0 + r) * dim_ + d + 16 * n, add(acc[r][n], zero()));
  }

  // Turns a row's scores s into p. The row sees keys [lo, hi) of the leaf; p is filled in groups [g0, g1).
  State softmax(float* s, A* p, int lo, int hi, int g0, int g1) {
    State st;
    int first = g0, last = g0;
    if (lo < hi) {
      first = lo / 16, last = (hi + 15) / 16;
      const V16 scale = set1(a_.scale), inf = set1(kMinusInf);
      V16 top = inf;
      for (int g = first; g < last; ++g) {
        V16 x = mul(load(s + 16 * g), scale);
        if (a_.softcap > 0) x = mul(tanh(div(x, set1(a_.softcap))), set1(a_.softcap));
        if (16 * g < lo || 16 * g + 16 > hi) x = keep_lanes(x, lo - 16 * g, hi - 16 * g, inf);
        store(s + 16 * g, x);
        top = max(top, x);
      }
      st.any = true;
      st.m = max_lanes(top);
      const V16 m = set1(st.m);
      V16 sum = zero();
      for (int g = first; g < last; ++g) {
        const V16 e = exp_neg(sub(load(s + 16 * g), m));
        sum = add(sum, e);
        store(p + 16 * g, e);
      }
      st.l = sum_lanes(sum);
    }
    if (first > g0) std::memset(static_cast<void*>(p + 16 * g0), 0, (first - g0) * 16 * sizeof(A));
    if (last < g1) std::memset(static_cast<void*>(p + 16 * last), 0, (g1 - last) * 16 * sizeof(A));
    return st;
  }

#if defined(BI_AMX)
  // A leaf by tiles, of all rows (1 or 2 tiles of 16). Rows of a tile that the unit does not have hold anything.
  template <int ROW_TILES> void leaf_tiles(int j0, int k0, int k1, State* st, float* o) {
    const int bs = a_.kv.block_size, steps = ldq_ / 32;
    const int s0 = k0 / kStepTokens, s1 = (k1 + kStepTokens - 1) / kStepTokens;
    const int g0 = k0 / 16, g1 = (k1 + 15) / 16;
    constexpr int together = 4 / ROW_TILES;
    for (int g = g0 / together * together; g < g1; g += together) {
      const T *k[together], *tail[together];
      for (int n = 0; n < together; ++n) {
        const int pos = j0 + 16 * std::min(std::max(g + n, g0), g1 - 1);
        k[n] = pages_.k_group(page_of(pos), pos % bs / 16);
        tail[n] = k[n] + (steps - 1) * 512;
        if (ldq_ > dim_) {
          std::memcpy(tail_[n], tail[n], 256 * sizeof(T));
          tail[n] = tail_[n];
        }
      }
      tile_scores<ROW_TILES, together>(q_, ldq_, k, tail, steps, s_ + 16 * g, kLeaf);
    }
    for (int r = 0; r < u_.rows; ++r)
      st[r] = softmax(s_ + r * kLeaf, p_ + r * kLeaf, std::max(lo_[r] - j0, 0), std::min(hi_[r] - j0, kLeaf), 2 * s0, 2 * s1);
    const T* v[kLeaf / kStepTokens];
    for (int s = s0; s < s1; ++s) v[s - s0] = step_values(j0, s, k0, k1);
    alignas(64) float out[ROW_TILES * 16 * 64];
    const T* p = p_ + s0 * kStepTokens;
    const auto take = [&](auto cols, int d) {
      constexpr int n = decltype(cols)::value;
      tile_values<ROW_TILES, n>(p, kLeaf, v, s1 - s0, dim_, d, out);
      // Adding 0 makes every zero positive: its sign would depend on the zeros that masked keys added.
      for (int r = 0; r < u_.rows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) store(o + r * dim_ + d + 16 * i, add(load(out + r * 64 + 16 * i), zero()));
    };
    int d = 0;
    if constexpr (ROW_TILES == 1)
      for (; d + 64 <= dim_; d += 64) take(Int<4>{}, d);
    for (; d + 32 <= dim_; d += 32) take(Int<2>{}, d);
    if (d < dim_) take(Int<1>{}, d);
  }

  // V of step s of the leaf at j0, [16][dim][2]. A step that [k0, k1) or a page cuts is copied, with zeros for the keys
  // outside [k0, k1), whose memory may hold anything. At most both ends of a leaf, or every step of small pages.
  const T* step_values(int j0, int s, int k0, int k1) {
    const int bs = a_.kv.block_size, first = s * kStepTokens, off = (j0 + first) % bs;
    if (first >= k0 && first + kStepTokens <= k1 && off + kStepTokens <= bs)
      return pages_.v_step(page_of(j0 + first), off / 2);
    T* const copy = edges_ + size_t(s) * kStepTokens * dim_;
    for (int i = 0; i < kStepTokens; i += 2) {
      T* to = copy + size_t(i) * dim_;
      const int k = first + i;
      const bool even = k >= k0 && k < k1, odd = k + 1 >= k0 && k + 1 < k1;
      if (!even && !odd) {
        std::memset(static_cast<void*>(to), 0, 2 * dim_ * sizeof(T));
        continue;
      }
      const T* from = pages_.v_step(page_of(j0 + k), (j0 + k) % bs / 2);
      if (even && odd) {
        std::memcpy(to, from, 2 * dim_ * sizeof(T));
      } else {
        for (int d = 0; d < dim_; ++d) to[2 * d] = even ? from[2 * d] : T{}, to[2 * d + 1] = odd ? from[2 * d + 1] : T{};
      }
    }
    return copy;
  }
#endif

  // The segments of V for keys [k0, k1) of the leaf, each of which some row sees. A pair that an edge cuts is copied
  // with a zero for the key outside, whose memory may hold anything.
  int segments(int j0, int k0, int k1, Segment* seg) {
    int n = 0;
    const int bs = a_.kv.block_size;
    for (int k = k0; k < k1;) {
      const int pos = j0 + k, off = pos % bs;
      T* page = page_of(pos);
      const int end = std::min(k1, k + bs - off);
      if (step == 2 && (off % 2 || end - k == 1)) {
        T* e = edge_[off % 2 ? 0 : 1];
        const T* v = pages_.v_step(page, off / step);
        for (int d = 0; d < dim_; ++d) {
          e[d * step + off % step] = v[d * step + off % step];
          e[d * step + (off + 1) % step] = T{};
        }
        seg[n++] = {e, k - off % step, 1};
        ++k;
      } else {
        const int steps = (end - k) / step;
        seg[n++] = {pages_.v_step(page, off / step), k, steps};
        k += steps * step;
      }
    }
    return n;
  }

 public:
  explicit Worker(const AttentionArgs& a)
      : a_(a),
        pages_{a.kv},
        dim_(a.kv.dim),
        group_(a.heads / a.kv.kv_heads),
        ldq_(kUseTiles<T> ? (a.kv.dim + 31) / 32 * 32 : a.kv.dim) {
    if (ldq_ > dim_) {
      std::memset(static_cast<void*>(q_), 0, sizeof q_);
      std::memset(static_cast<void*>(tail_), 0, sizeof tail_);
    }
  }

  void open(const Unit& u) {
#if defined(BI_AMX)
    if constexpr (kUseTiles<T>) {
      const int rows = std::min(u.rows, 16);
      if (rows != configured_) {
        const TileConfig config = TileConfig::few(rows);
        _tile_loadconfig(&config);
        configured_ = rows;
      }
    }
#endif
    u_ = u;
    const int first = a_.query_start[u.req], len = a_.query_start[u.req + 1] - first;
    for (int r = 0; r < u.rows; ++r) {
      const int64_t t = (u.row0 + r) / group_;
      const int head = u.kv_head * group_ + int((u.row0 + r) % group_);
      const T* q = static_cast<const T*>(a_.query) + (first + t) * a_.query_token + head * a_.query_head;
      A* out = q_ + r * ldq_;
      if constexpr (std::is_same_v<T, A>) std::memcpy(out, q, dim_ * sizeof(T));
      else for (int d = 0; d < dim_; d += 16) store(out + d, load(q + d));
      const int pos = a_.seq_lens[u.req] - len + int(t);
      hi_[r] = end_key(a_, u.req, pos);
      lo_[r] = first_key(a_, pos);
    }
  }

  // Computes one leaf of the open unit: st[rows], o[rows][dim].
  void leaf(int index, State* st, float* o) {
    const int j0 = index * kLeaf;
    // Positions ascend from row to row: the first row has the lowest lo and the last row the highest hi.
    const int k0 = std::max(lo_[0] - j0, 0), k1 = std::min(hi_[u_.rows - 1] - j0, kLeaf);
#if defined(BI_AMX)
    if constexpr (kUseTiles<T>) {
      if (u_.rows > 16) leaf_tiles<2>(j0, k0, k1, st, o);
      else leaf_tiles<1>(j0, k0, k1, st, o);
      return;
    }
#endif
    const int g0 = k0 / 16, g1 = (k1 + 15) / 16;
    const int bs = a_.kv.block_size;
    for (int g = g0 / kVecs * kVecs; g < g1; g += kVecs) {
      const T* k[kVecs];
      for (int n = 0; n < kVecs; ++n) {
        const int pos = j0 + 16 * std::min(std::max(g + n, g0), g1 - 1);
        k[n] = pages_.k_group(page_of(pos), pos % bs / 16);
      }
      row_blocks(u_.rows, [&](int at, int mr) {
        with_rows(mr, [&](auto r) { scores<decltype(r)::value>(at, k, s_ + at * kLeaf + 16 * g); });
      });
    }
    for (int r = 0; r < u_.rows; ++r)
      st[r] = softmax(s_ + r * kLeaf, p_ + r * kLeaf, std::max(lo_[r] - j0, 0), std::min(hi_[r] - j0, kLeaf), g0, g1);
    Segment seg[kGroups + 2];
    const int segs = segments(j0, k0, k1, seg);
    row_blocks(u_.rows, [&](int at, int mr) {
      with_rows(mr, [&](auto rr) {
        constexpr int R = decltype(rr)::value;
        int d = 0;
        for (; d + 16 * kVecs <= dim_; d += 16 * kVecs) values<R, kVecs>(at, d, seg, segs, o);
        if constexpr (kVecs == 4)
          for (; d + 32 <= dim_; d += 32) values<R, 2>(at, d, seg, segs, o);
        for (; d < dim_; d += 16) values<R, 1>(at, d, seg, segs, o);
      });
    });
  }

  // After the last unit of this worker.
  void done() {
#if defined(BI_AMX)
    if constexpr (kUseTiles<T>) _tile_release();
#endif
  }

  // Writes o / l of row r of the open unit, rounded, to the output. Returns whether the row is finite.
  bool close_row(int r, const State& st, const float* o) {
    const int64_t t = a_.query_start[u_.req] + (u_.row0 + r) / group_;
    const int head = u_.kv_head * group_ + int((u_.row0 + r) % group_);
    T* out = static_cast<T*>(a_.out) + t * a_.out_token + head * a_.out_head;
    return close_values(o, st, dim_, out);
  }

  // Row r of unit u as a unit of its own, which reads no key that the row does not see.
  Unit only(const Unit& u, int r) const {
    const int len = a_.query_start[u.req + 1] - a_.query_start[u.req];
    const int pos = a_.seq_lens[u.req] - len + int((u.row0 + r) / group_);
    return {u.req, u.kv_head, u.row0 + r, 1, first_key(a_, pos) / kLeaf, (end_key(a_, u.req, pos) - 1) / kLeaf + 1};
  }
};

std::vector<Unit> make_units(const AttentionArgs& a, int tile) {
  std::vector<Unit> units;
  const int group = a.heads / a.kv.kv_heads;
  for (int r = 0; r < a.reqs; ++r) {
    const int len = a.query_start[r + 1] - a.query_start[r], ctx = a.seq_lens[r] - len;
    const int64_t rows = int64_t(len) * group;
    for (int h = 0; h < a.kv.kv_heads; ++h)
      // The last tile first: it has the most keys, and the short tiles that follow even out the threads' work.
      for (int64_t i = (rows + tile - 1) / tile - 1; i >= 0; --i) {
        const int64_t row0 = i * tile;
        const int n = int(std::min<int64_t>(tile, rows - row0));
        const int first = ctx + int(row0 / group), last = ctx + int((row0 + n - 1) / group);
        units.push_back({r, h, row0, n, first_key(a, first) / kLeaf, (end_key(a, r, last) - 1) / kLeaf + 1});
      }
  }
  return units;
}

template <class T> void run(const AttentionArgs& a, int threads) {
  run_units<Worker<T>, kRowsOf<T>>(make_units(a, kRowsOf<T>), a, a.kv.dim, threads);
}

}  // namespace

void kv_store(const KvCache& c, const void* key, int64_t kt, int64_t kh, const void* value, int64_t vt,
              int64_t vh, const int64_t* slots, int64_t tokens, int threads) {
  switch (c.type) {
    case DType::f32:
      return store_tokens(c, (const float*)key, kt, kh, (const float*)value, vt, vh, slots, tokens, threads);
    case DType::bf16:
      return store_tokens(c, (const bf16*)key, kt, kh, (const bf16*)value, vt, vh, slots, tokens, threads);
    case DType::f16:
      return store_tokens(c, (const fp16*)key, kt, kh, (const fp16*)value, vt, vh, slots, tokens, threads);
  }
}

void attention(const AttentionArgs& a, int threads) {
  switch (a.kv.type) {
    case DType::f32: return run<float>(a, threads);
    case DType::bf16: return run<bf16>(a, threads);
    case DType::f16: return run<fp16>(a, threads);
  }
}

}  // namespace bi
