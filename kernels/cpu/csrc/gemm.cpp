// GEMM: y = x w^T + bias, for x [M, K], w [N, K], bias [N] or none, y [M, N], all of one dtype: bf16, fp16 or fp32.
//
// Order of one output: K is cut into blocks of k_block(K) elements. Each block has one fp32 accumulator that starts at
// zero and takes K in ascending order (dot_block). The block sums are added in ascending order, then the bias is added,
// then the result is rounded once (or kept in fp32, without a bias: `wide`). bf16 with AVX512_BF16 adds pairs of K by vdpbf16ps; every other case is fp32 FMA.
// M, N, tiles and threads decide only when an output is computed.
//
// Layout of a packed weight: panels of kPanel outputs, each [K/step][kPanel][step], padded with zeros.
#include <omp.h>
#include <algorithm>
#include <type_traits>
#include "api.h"
#include "gemm.h"
#include "micro.h"
#include "scratch.h"

namespace bi {

namespace {

constexpr int kPanel = 16 * kVecs;
// Loop sizes, which are not part of the order. A panel stays in L2 (1 MiB or more) while a chunk of rows streams past
// it; chunks are cut further only to give the threads equal work.
constexpr int64_t kPanelBytes = 512 << 10, kChunkBytes = 1 << 20;
constexpr int64_t kChunkRows = 96, kFewRows = 24;
constexpr int64_t kTinyWork = 1 << 16;  // multiply-adds; below this, waking threads costs more than it saves

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T>
void pack(const T* w, int64_t ldw, int64_t n, int64_t k, T* out, int threads) {
  constexpr int step = KindOf<T>::step;
  const int64_t kp = round_up(k, k_pad(DTypeOf<T>::value));
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    T* o = out + p * kPanel * kp;
    for (int64_t s = 0; s < kp / step; ++s)
      for (int j = 0; j < kPanel; ++j)
        for (int i = 0; i < step; ++i) {
          const int64_t row = p * kPanel + j, col = s * step + i;
          T v{};
          if (row < n && col < k) v = w[row * ldw + col];
          *o++ = v;
        }
  }
}

template <class T> struct Job {
  using Kind = KindOf<T>;
  using A = typename Kind::A;
  const A* x;
  int64_t ldx, m;
  const T* packed;
  int64_t n, k, kp;
  const T* bias;
  T* y;
  float* wide;  // not null: takes the sums as they are, instead of y

  // Adds the bias to one row of a panel, rounds it and stores the columns that exist.
  template <int NR> BI_INLINE void finish(V16 (&v)[NR], int64_t row, int64_t col) const {
    if (wide) return keep(v, row, col);
    T* o = y + row * n + col;
    if (col + kPanel <= n) {
#pragma GCC unroll 8
      for (int i = 0; i < NR; ++i) {
        if (bias) v[i] = add(v[i], load(bias + col + 16 * i));
        store(o + 16 * i, v[i]);
      }
      return;
    }
    for (int i = 0; i < NR; ++i) {
      const int64_t left = std::min<int64_t>(16, n - col - 16 * i);
      if (left <= 0) break;
      T edge[16] = {};
      if (bias) {
        std::memcpy(edge, bias + col + 16 * i, left * sizeof(T));
        v[i] = add(v[i], load(edge));
      }
      store(edge, v[i]);
      std::memcpy(o + 16 * i, edge, left * sizeof(T));
    }
  }

  // Stores one row of a panel in fp32.
  template <int NR> void keep(V16 (&v)[NR], int64_t row, int64_t col) const {
    for (int i = 0; i < NR; ++i) {
      const int64_t left = std::min<int64_t>(16, n - col - 16 * i);
      if (left <= 0) break;
      float edge[16];
      store(edge, v[i]);
      std::memcpy(wide + row * n + col + 16 * i, edge, left * sizeof(float));
    }
  }

  // K [k0, k1) of rows [m0, m0 + MR) of panel p. `sums` holds the sum of the earlier K blocks.
  template <int MR, int LINES>
  void tile(int64_t m0, int64_t p, int64_t k0, int64_t k1, float* sums, const Ahead<LINES>& ahead) const {
    V16 acc[MR][kVecs];
    clear(acc);
    const T* b[kVecs];
    for (int i = 0; i < kVecs; ++i) b[i] = packed + p * kPanel * kp + k0 * kPanel + i * 16 * Kind::step;
    dot_block<Kind, MR, kVecs>(acc, x + m0 * ldx + k0, ldx, b, kPanel * Kind::step,
                               (k1 - k0 + Kind::step - 1) / Kind::step, ahead);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      if (k0 > 0) {
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) acc[r][i] = add(load(sums + r * kPanel + 16 * i), acc[r][i]);
      }
      if (k1 == k) {
        finish(acc[r], m0 + r, p * kPanel);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) store(sums + r * kPanel + 16 * i, acc[r][i]);
      }
    }
  }

  // last: whether this thread takes no further panel.
  void panel(int64_t m0, int64_t rows, int64_t p, bool last, float* sums) const {
    constexpr int lines = (kPanel * Kind::step * sizeof(T) + 63) / 64;  // of a step of K
    const int64_t parts = (rows + kMaxRows - 1) / kMaxRows;
    if (parts == 1) panel<0>(m0, rows, p, parts, last, sums);
    else if (parts <= 3) panel<lines>(m0, rows, p, parts, last, sums);
    else panel<1>(m0, rows, p, parts, last, sums);
  }

  // While row blocks multiply a stretch of the weight, they fetch the next stretch to L2, each its part of it: LINES cache
  // lines a step of K. A single row block reads the weight only once, as a stream, which the processor fetches itself.
  template <int LINES>
  void panel(int64_t m0, int64_t rows, int64_t p, int64_t parts, bool last, float* sums) const {
    const int64_t block = k_block(k);
    // Loop order only. If the panel fits in L2, each row block takes all of K, so its sums stay in L1. Otherwise all
    // row blocks take one K block after another.
    const int64_t reach = kp * kPanel * int64_t(sizeof(T)) <= kPanelBytes ? k : block;
    for (int64_t at_k = 0; at_k < k; at_k += reach) {
      const bool fetches = LINES && !(last && at_k + reach >= k);
      const int64_t length = reach < k ? reach : kp, step = kPanel * Kind::step * int64_t(sizeof(T));
      const int64_t by = fetches ? (step + parts - 1) / parts : 0;  // bytes a step
      const char* at = reinterpret_cast<const char*>(packed + (p * kp + at_k + (fetches ? length : 0)) * kPanel);
      row_blocks(int(rows), [&](int first, int mr) {
        with_rows(mr, [&](auto r) {
          for (int64_t k0 = at_k; k0 < std::min(k, at_k + reach); k0 += block)
            tile<decltype(r)::value, LINES>(m0 + first, p, k0, std::min(k, k0 + block), sums + (reach < k ? first * kPanel : 0),
                                            {at + (k0 - at_k) / Kind::step * by, size_t(by)});
        });
        at += length / Kind::step * by;
      });
    }
  }
};

// Copies x to the kernel's A type and pads K with zeros to kp.
template <class T, class A>
void prepare_rows(const T* x, int64_t ldx, int64_t m, int64_t k, int64_t kp, A* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (m > 1)
  for (int64_t r = 0; r < m; ++r) {
    const T* in = x + r * ldx;
    A* o = out + r * kp;
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(o, in, k * sizeof(T));
    } else {
      int64_t i = 0;
      for (; i + 16 <= k; i += 16) store(o + i, load(in + i));
      for (; i < k; ++i) o[i] = to_f32(in[i]);
    }
    std::memset(static_cast<void*>(o + k), 0, (kp - k) * sizeof(A));
  }
}

template <class T>
void run(const T* x, int64_t ldx, int64_t m, const T* packed, int64_t n, int64_t k, const T* bias,
         T* y, float* wide, int threads) {
  using Kind = KindOf<T>;
  using A = typename Kind::A;
  if (m == 0 || n == 0) return;
  if (m * n * k < kTinyWork) threads = 1;
#if defined(BI_AMX)
  if constexpr (std::is_same_v<T, bf16>) return gemm_amx(x, ldx, m, packed, n, k, bias, y, wide, threads);
#endif
  const int64_t kp = round_up(k, k_pad(DTypeOf<T>::value));
  static thread_local Scratch rows;
  const A* a;
  int64_t lda = ldx;
  if (std::is_same_v<T, A> && kp == k) {
    a = reinterpret_cast<const A*>(x);
  } else {
    A* buf = rows.get<A>(m * kp);
    prepare_rows(x, ldx, m, k, kp, buf, threads);
    a = buf;
    lda = kp;
  }
  const Job<T> job{a, lda, m, packed, n, k, kp, bias, y, wide};
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const int64_t chunk_max = std::max<int64_t>(kChunkRows, kChunkBytes / (kp * sizeof(A)));
  int64_t chunks = (m + chunk_max - 1) / chunk_max;
  const auto idle = [&](int64_t tasks) { return (threads - tasks % threads) % threads; };
  while (idle(chunks * panels) * 32 > chunks * panels && m / (chunks + 1) >= kFewRows) ++chunks;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch sums_buf;
    float* sums = sums_buf.get<float>(std::min(m, chunk_max) * kPanel);
    // A thread takes consecutive panels of one chunk: x stays in cache, the panels stream.
    const int64_t tasks = chunks * panels, team = omp_get_num_threads(), own = omp_get_thread_num();
    const int64_t end = tasks * (own + 1) / team;
    for (int64_t t = tasks * own / team; t < end; ++t) {
      const int64_t c = t / panels, p = t % panels;
      const int64_t m0 = m * c / chunks, m1 = m * (c + 1) / chunks;
      job.panel(m0, m1 - m0, p, t + 1 == end, sums);
    }
  }
}

}  // namespace

size_t gemm_packed_size(DType t, int64_t n, int64_t k) {
#if defined(BI_AMX)
  if (t == DType::bf16) return gemm_amx_packed_size(n, k);
#endif
  return round_up(n, kPanel) * round_up(k, k_pad(t));
}

void gemm_pack(DType t, const void* w, int64_t ldw, int64_t n, int64_t k, void* out, int threads) {
  switch (t) {
    case DType::f32: return pack((const float*)w, ldw, n, k, (float*)out, threads);
#if defined(BI_AMX)
    case DType::bf16: return gemm_amx_pack((const bf16*)w, ldw, n, k, (bf16*)out, threads);
#else
    case DType::bf16: return pack((const bf16*)w, ldw, n, k, (bf16*)out, threads);
#endif
    case DType::f16: return pack((const fp16*)w, ldw, n, k, (fp16*)out, threads);
  }
}

void gemm(DType t, const void* x, int64_t ldx, int64_t m, const void* packed, int64_t n, int64_t k,
          const void* bias, void* y, int threads) {
  switch (t) {
    case DType::f32:
      return run((const float*)x, ldx, m, (const float*)packed, n, k, (const float*)bias, (float*)y, nullptr, threads);
    case DType::bf16:
      return run((const bf16*)x, ldx, m, (const bf16*)packed, n, k, (const bf16*)bias, (bf16*)y, nullptr, threads);
    case DType::f16:
      return run((const fp16*)x, ldx, m, (const fp16*)packed, n, k, (const fp16*)bias, (fp16*)y, nullptr, threads);
  }
}

void gemm_sums(DType t, const void* x, int64_t ldx, int64_t m, const void* packed, int64_t n, int64_t k, float* sums,
               int threads) {
  switch (t) {
    case DType::f32: return run<float>((const float*)x, ldx, m, (const float*)packed, n, k, nullptr, nullptr, sums, threads);
    case DType::bf16: return run<bf16>((const bf16*)x, ldx, m, (const bf16*)packed, n, k, nullptr, nullptr, sums, threads);
    case DType::f16: return run<fp16>((const fp16*)x, ldx, m, (const fp16*)packed, n, k, nullptr, nullptr, sums, threads);
  }
}

}  // namespace bi
