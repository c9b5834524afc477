// GEMM on AMX tiles: y = x w^T + bias, for the shapes of gemm.cpp in bf16.
//
// Order of one output: the K blocks of gemm.cpp (512 or 1024, both multiples of 32). Each block has one fp32
// accumulator, to which tdpbf16ps adds ascending steps of 32 elements of K. The block sums are added in ascending
// order, then the bias, then one rounding. A tile computes each of its rows alone, so neither the rows of a tile nor
// zero rows beside them matter. An accumulator may be stored and loaded again between two steps: it is fp32 throughout.
//
// Layout of a packed weight: panels of 32 outputs, each [K/32][2 tiles][16 pairs of K][16 outputs][2], padded with zeros.
#if defined(BI_AMX)
#include <omp.h>
#include <algorithm>
#include "gemm.h"
#include "micro.h"
#include "scratch.h"
#include "tiles.h"

namespace bi {
namespace {

constexpr int kUnit = 32;                 // rows that share a load of B: two tiles
constexpr int64_t kStep = 32;             // elements of K in a tile
constexpr int64_t kTile = 512;            // elements of a tile of A or B
constexpr int64_t kTileSum = 256;         // elements of a tile of sums
// Loop sizes, which are not part of the order. A group of panels stays in L2. A pass of K of 32 rows (32 KiB) stays in
// L1 while the group streams past it. A short rest of K joins the last pass.
constexpr int64_t kGroupBytes = 512 << 10, kOnlyGroup = 1 << 20;  // a thread's whole part may be this large
constexpr int64_t kPass = 16, kRest = 4;  // steps
// Rows that fill one band or two: a band, a group, and the next group, which is fetched meanwhile, stay in L2 together.
// More rows would stream the weight once for each band.
constexpr int64_t kBandBytes = 768 << 10, kBands = 2, kBandGroup = 320 << 10;
constexpr int64_t kFetches = 4;  // units of a band that fetch the next group; fewer have no time for it
// With a long K, few whole panels fit into a group, and all of x streams past each group. Then a group holds one K block
// of more panels, and a band of rows takes one K block after the other: its sums wait in L2.
constexpr int64_t kLong = 64, kBlockBand = 16;  // steps; units of a band
constexpr int64_t kAhead = 8, kFewAhead = 32;  // steps of B to prefetch where B streams from memory

struct Job {
  const bf16* packed;
  int64_t n, steps, block;  // steps of K, steps of a K block
  const bf16* bias;
  bf16* y;
  float* wide;  // not null: takes the sums as they are, instead of y

  const bf16* panel(int64_t p) const { return packed + p * steps * 2 * kTile; }
};

// What comes next of the weight: `each` cache lines of it are fetched a step.
struct Next {
  const bf16 *at, *end;
  int each;
};

// Asks for `lines` cache lines from p on.
template <_mm_hint HINT> BI_INLINE void fetch(const bf16* p, int lines) {
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p + i * 32), HINT);
}

// 32 outputs of `rows` rows whose sums are complete: c, and sum of the earlier K blocks (null: none), both tiles
// [rows / 16][2][16][16]. Rows from `done` on still have to be rounded and stored.
struct Late {
  const float *sum, *c;
  int64_t row, rows, col, done;
};

// 32 outputs of a row, rounded: c plus the earlier sum (null: none), then the bias.
BI_INLINE __m512i rounded(const float* sum, const float* c, bool bias, V16 b0, V16 b1) {
  V16 v0 = load(c), v1 = load(c + kTileSum);
  if (sum) v0 = add(load(sum), v0), v1 = add(load(sum + kTileSum), v1);
  if (bias) v0 = add(v0, b0), v1 = add(v1, b1);
  return (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
}

// Adds the earlier sum (if any) and the bias to the next `count` rows, rounds and stores them.
BI_INLINE void finish(const Job& job, Late& late, int64_t count) {
  const int64_t end = std::min(late.rows, late.done + count), left = job.n - late.col;
  if (late.done == end) return;
  const __mmask32 lanes = left >= 32 ? ~0u : (1u << left) - 1;
  if (job.wide) {
    for (; late.done < end; ++late.done) {
      const int64_t r = late.done, at = r / 16 * 2 * kTileSum + r % 16 * 16;
      V16 v0 = load(late.c + at), v1 = load(late.c + at + kTileSum);
      if (late.sum) v0 = add(load(late.sum + at), v0), v1 = add(load(late.sum + at + kTileSum), v1);
      float* const o = job.wide + (late.row + r) * job.n + late.col;
      _mm512_mask_storeu_ps(o, __mmask16(lanes), v0);
      _mm512_mask_storeu_ps(o + 16, __mmask16(lanes >> 16), v1);
    }
    return;
  }
  V16 b0 = zero(), b1 = zero();
  if (job.bias) {
    bf16 edge[32];
    _mm512_storeu_si512(edge, _mm512_maskz_loadu_epi16(lanes, job.bias + late.col));
    b0 = load(edge), b1 = load(edge + 16);
  }
  for (; late.done < end; ++late.done) {
    const int64_t r = late.done, at = r / 16 * 2 * kTileSum + r % 16 * 16;
    const __m512i made = rounded(late.sum ? late.sum + at : nullptr, late.c + at, job.bias, b0, b1);
    _mm512_mask_storeu_epi16(job.y + (late.row + r) * job.n + late.col, lanes, made);
  }
}

// `finish` for whole cache lines of 32 rows, two rows at a time: what it needs stays in registers.
struct Lines {
  const float *sum, *c;
  bf16* y;
  int64_t left;  // rows
  V16 b0, b1;
};

// Nothing is left where only `finish` can do it.
BI_INLINE Lines lines(const Job& job, const Late& late) {
  Lines w{late.sum, late.c, nullptr, 0, zero(), zero()};
  if (job.wide || late.done || late.rows != kUnit || job.n - late.col < 32) return w;
  w.y = job.y + late.row * job.n + late.col;
  w.left = kUnit;
  if (job.bias) w.b0 = load(job.bias + late.col), w.b1 = load(job.bias + late.col + 16);
  return w;
}

template <bool SUM, bool BIAS> BI_INLINE void two_rows(Lines& w, int64_t n) {
  for (int i = 0; i < 2; ++i, w.y += n)
    _mm512_storeu_si512(w.y, rounded(SUM ? w.sum + i * 16 : nullptr, w.c + i * 16, BIAS, w.b0, w.b1));
  w.left -= 2;
  const int64_t next = w.left == 16 ? 32 + kTileSum : 32;  // past the right tile of the first 16 rows
  w.c += next;
  if constexpr (SUM) w.sum += next;
}

// Up to 32 rows of x: row r of a tile and step s of K are at x + r * stride + s * step, the second tile is `second` further.
struct Rows {
  const bf16* x;
  int64_t stride, step, second;  // elements
};

// sums += a b over `steps` steps, for TILES (1 or 2) tiles of 16 rows and the 32 outputs of a panel. fresh: the sums
// start at zero. a stays in L1, and b streams past it. Meanwhile, `late` is finished, two rows a step, and `next` is
// fetched. cold: b comes from memory, so it is fetched kAhead steps before.
template <int TILES>
BI_INLINE void mac(const Job& job, const Rows& a, int64_t s0, const bf16* b, int64_t steps, float* c, bool fresh, Late& late,
                   Next& next, bool cold) {
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TILES == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTileSum, 64);
    if constexpr (TILES == 2) {
      _tile_loadd(2, c + 2 * kTileSum, 64);
      _tile_loadd(3, c + 3 * kTileSum, 64);
    }
  }
  const bf16* at = a.x + s0 * a.step;
  const int64_t stride = a.stride * sizeof(bf16);
  int64_t s = 0;
  const bf16* ahead = next.at;
  const auto step = [&] {
    if (cold) fetch<_MM_HINT_T1>(b + kAhead * 2 * kTile, 32);
    if (ahead < next.end) fetch<_MM_HINT_T1>(ahead, next.each), ahead += next.each * 32;
    _tile_loadd(4, at, stride);
    _tile_stream_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TILES == 2) {
      _tile_loadd(5, at + a.second, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    ++s, at += a.step, b += 2 * kTile;
  };
  Lines w = lines(job, late);
  if (w.left) {
    const auto run = [&](auto sum, auto bias) {
      for (; s < steps && w.left; step()) two_rows<decltype(sum)::value, decltype(bias)::value>(w, job.n);
    };
    if (w.sum) job.bias ? run(Int<1>{}, Int<1>{}) : run(Int<1>{}, Int<0>{});
    else job.bias ? run(Int<0>{}, Int<1>{}) : run(Int<0>{}, Int<0>{});
    late.done = late.rows - w.left;
  }
  for (; s < steps; step()) finish(job, late, 2);
  next.at = ahead;
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileSum, 64);
  if constexpr (TILES == 2) {
    _tile_stored(2, c + 2 * kTileSum, 64);
    _tile_stored(3, c + 3 * kTileSum, 64);
  }
}

void add_to(float* sum, const float* c, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) store(sum + i, add(load(sum + i), load(c + i)));
}

// Packs one unit of up to 32 rows as `mac` takes it: one tile for up to 16 rows, else two. Missing rows and columns
// become zeros.
void pack_unit(const bf16* x, int64_t ldx, int64_t rows, int64_t k, int64_t steps, bf16* out) {
  const int64_t tiles = rows > 16 ? 2 : 1;
  constexpr int64_t together = 4;  // steps: a cache line each
  for (int64_t s0 = 0; s0 < steps; s0 += together) {
    const int64_t s1 = std::min(steps, s0 + together);
    for (int64_t r = 0; r < tiles * 16; ++r) {
      bf16* o = out + r * kStep;
      const bf16* in = x + r * ldx;
      for (int64_t s = s0; s < s1; ++s) {
        bf16* line = o + s * tiles * kTile;
        const int64_t have = r < rows ? std::min(kStep, k - s * kStep) : 0;
        if (have == kStep) {
          std::memcpy(line, in + s * kStep, kStep * sizeof(bf16));
        } else {
          std::memset(static_cast<void*>(line), 0, kStep * sizeof(bf16));
          if (have > 0) std::memcpy(line, in + s * kStep, have * sizeof(bf16));
        }
      }
    }
  }
}

// Steps [s0, s1) of one unit and one panel. The sums of the first K block go to `sum`, those of a later one to `c`.
template <int TILES>
BI_INLINE void pass(const Job& job, const Rows& a, const bf16* b, int64_t s0, int64_t s1, float* sum, float* c,
                    int64_t row, int64_t rows, int64_t col, Late& late, Next& next, bool cold) {
  for (int64_t s = s0; s < s1;) {
    const int64_t first = s / job.block * job.block;
    const int64_t end = std::min(s1, first + job.block);
    float* to = first ? c : sum;
    mac<TILES>(job, a, s, b + s * 2 * kTile, end - s, to, s == first, late, next, cold);
    if (end == job.steps) {
      finish(job, late, kUnit);
      late = {first ? sum : nullptr, to, row, rows, col, 0};
    } else if (first && end == first + job.block) {
      add_to(sum, c, TILES * 2 * kTileSum);
    }
    s = end;
  }
}

// Steps [k0, k1) of one unit of up to 32 rows, which starts at `row`, and panels [p0, p1). Panel p's sums lie `apart`
// floats after those of the panel before it, in `sums` and, for a later K block, in `cs`.
template <int TILES>
void unit_group(const Job& job, const Rows& a, int64_t row, int64_t rows, int64_t p0, int64_t p1, int64_t k0, int64_t k1,
                float* sums, float* cs, int64_t apart, Late& late, Next& next, bool cold) {
  for (int64_t s0 = k0, s1; s0 < k1; s0 = s1) {
    s1 = k1 - s0 <= kPass + kRest ? k1 : s0 + kPass;
    const bool whole = s0 == 0 && s1 == job.steps;
    for (int64_t p = p0; p < p1; ++p) {
      // A whole panel's sums leave at once. `late` holds those of the panel before this one.
      const int64_t at = (whole ? late.c && late.c < sums + apart : p - p0) * apart;
      pass<TILES>(job, a, job.panel(p), s0, s1, sums + at, cs + at, row, rows, p * 32, late, next, cold);
    }
  }
  if (p1 - p0 == 1) finish(job, late, kUnit);
}

// Cuts the product among the threads: `across` parts of the panels times `down` parts of the rows. Of equal cuts it takes
// that with most parts of the panels: each reads its part of the weight once.
struct Parts { int64_t across, down; };
Parts cut(int64_t panels, int64_t units, int64_t threads) {
  Parts best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t across = threads; across >= 1; --across) {
    const int64_t down = threads / across;
    const int64_t work = ((panels + across - 1) / across) * ((units + down - 1) / down);
    if (work < least) least = work, best = {across, down};
  }
  return best;
}

// One panel of up to 16 rows, with tiles of just these rows. x: [rows][steps * 32] of stride ldx. The weight streams from
// memory: it is fetched to L2 kFewAhead steps before its use, also past the panel's end.
void few_rows(const Job& job, const bf16* x, int64_t ldx, int64_t rows, int64_t p, float* sums) {
  const bf16* b = job.panel(p);
  const int64_t lda = ldx * sizeof(bf16);
  float* const later = sums + 2 * kTileSum;
  for (int64_t s0 = 0; s0 < job.steps; s0 += job.block) {
    const int64_t s1 = std::min(job.steps, s0 + job.block);
    float* const c = s0 ? later : sums;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t s = s0; s < s1; ++s, b += 2 * kTile) {
      fetch<_MM_HINT_T1>(b + kFewAhead * 2 * kTile, 32);
      _tile_loadd(4, x + s * kStep, lda);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + kTileSum, 64);
    if (s1 == job.steps) {
      Late late{s0 ? sums : nullptr, c, 0, rows, p * 32, 0};
      finish(job, late, rows);
    } else if (s0) {
      for (int i = 0; i < 2; ++i) add_to(sums + i * kTileSum, later + i * kTileSum, rows * 16);
    }
  }
}

}  // namespace

size_t gemm_amx_packed_size(int64_t n, int64_t k) { return (n + 31) / 32 * 32 * ((k + 31) / 32 * 32); }

void gemm_amx_pack(const bf16* w, int64_t ldw, int64_t n, int64_t k, bf16* out, int threads) {
  const int64_t panels = (n + 31) / 32, steps = (k + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t j = 0; j < 32; ++j) {
      bf16* o = out + p * steps * 2 * kTile + j / 16 * kTile + j % 16 * 2;
      const int64_t row = p * 32 + j;
      for (int64_t c = 0; c < steps * 32; c += 2)
        for (int64_t i = 0; i < 2; ++i)
          o[c / 32 * 2 * kTile + c % 32 * 16 + i] = row < n && c + i < k ? w[row * ldw + c + i] : bf16{};
    }
}

void gemm_amx(const bf16* x, int64_t ldx, int64_t m, const bf16* packed, int64_t n, int64_t k, const bf16* bias, bf16* y,
              float* wide, int threads) {
  const int64_t steps = (k + 31) / 32, kp = steps * kStep;
  const Job job{packed, n, steps, k_block(k) / kStep, bias, y, wide};
  const int64_t panels = (n + 31) / 32;
  static thread_local Scratch shared_mem;
  if (m <= 16) {
    if (kp != k) {
      bf16* copy = shared_mem.get<bf16>(m * kp);
      for (int64_t r = 0; r < m; ++r) {
        std::memcpy(copy + r * kp, x + r * ldx, k * sizeof(bf16));
        std::memset(static_cast<void*>(copy + r * kp + k), 0, (kp - k) * sizeof(bf16));
      }
      x = copy;
      ldx = kp;
    }
    const TileConfig config = TileConfig::few(int(m));
#pragma omp parallel num_threads(threads)
    {
      _tile_loadconfig(&config);
      alignas(64) float sums[4 * kTileSum];
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < panels; ++p) few_rows(job, x, ldx, m, p, sums);
      _tile_release();
    }
    return;
  }
  const int64_t units = (m + kUnit - 1) / kUnit;
  const Parts parts = cut(panels, units, threads);
  // x is read in place if a pass of 32 rows fits into L1 as it lies; the last rows and other x are packed.
  const int64_t line = ldx * sizeof(bf16);
  const bool direct = kp == k && line % 64 == 0 && line % 2048 != 0 && reinterpret_cast<uintptr_t>(x) % 64 == 0;
  const int64_t whole = direct ? m / kUnit : 0;  // units read in place
  bf16* const held = shared_mem.get<bf16>(std::max<int64_t>(1, units - whole) * kUnit * kp);
  const bool by_block = steps >= kLong && units > 3;
  const int64_t reach = by_block ? job.block : steps;  // steps of K in a group
  const int64_t bytes = reach * 2 * kTile * int64_t(sizeof(bf16)), part = (panels + parts.across - 1) / parts.across;
  const int64_t down = (units + parts.down - 1) / parts.down, fit = kBandBytes / (kUnit * kp * int64_t(sizeof(bf16)));
  const bool banded = !by_block && down >= kFetches && down <= kBands * fit;
  const int64_t band = by_block ? kBlockBand : banded ? fit : down;
  const int64_t group = (banded ? kBandGroup : kGroupBytes) / bytes;
  const int64_t most = std::max<int64_t>(2, part * bytes <= kOnlyGroup ? part : group);  // panels of a group
  static const TileConfig config;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t u = whole; u < units; ++u)
      pack_unit(x + u * kUnit * ldx, ldx, std::min<int64_t>(kUnit, m - u * kUnit), k, steps, held + (u - whole) * kUnit * kp);
    _tile_loadconfig(&config);
    static thread_local Scratch sums_mem;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < parts.across * parts.down; ++t) {
      const int64_t i = t % parts.across, j = t / parts.across;
      const int64_t q0 = panels * i / parts.across, q1 = panels * (i + 1) / parts.across;
      const int64_t u0 = units * j / parts.down, u1 = units * (j + 1) / parts.down;
      const int64_t groups = (q1 - q0 + most - 1) / most, bands = by_block || groups > 1 ? (u1 - u0 + band - 1) / band : 1;
      float* const sums = sums_mem.get<float>(most * 4 * kTileSum * (by_block ? kBlockBand + 1 : 2));
      const auto panels_of = [&](int64_t g) { return q0 + (q1 - q0) * g / groups; };
      Late late{};
      Next next{};
      for (int64_t d = 0; d < bands * groups; ++d) {
        const int64_t g = d % groups, v0 = u0 + (u1 - u0) * (d / groups) / bands, v1 = u0 + (u1 - u0) * (d / groups + 1) / bands;
        const int64_t p0 = panels_of(g), p1 = panels_of(g + 1), after = (g + 1) % groups;
        const bool fetched = next.at;  // the group was fetched during the one before
        next = {};
        if (banded && groups > 1 && d + 1 < bands * groups && v1 - v0 >= kFetches)
          next = {job.panel(panels_of(after)), job.panel(panels_of(after + 1)), int((31 + v1 - v0) / (v1 - v0))};
        for (int64_t k0 = 0; k0 < steps; k0 += reach)
          for (int64_t u = v0; u < v1; ++u) {
            const int64_t row = u * kUnit, rows = std::min<int64_t>(kUnit, m - row), k1 = std::min(steps, k0 + reach);
            const bf16* packed_rows = held + (u - whole) * kUnit * kp;
            // By block, each unit of the band keeps its sums. Otherwise a panel's sums and its later block lie side by side.
            float* const sum = by_block ? sums + (1 + u - v0) * most * 4 * kTileSum : sums;
            float* const c = by_block ? sums : sums + 4 * kTileSum;
            const int64_t apart = (by_block ? 4 : 8) * kTileSum;
            const auto go = [&](auto tiles, const Rows& a) {
              unit_group<decltype(tiles)::value>(job, a, row, rows, p0, p1, k0, k1, sum, c, apart, late, next, u == v0 && !fetched);
            };
            if (rows <= 16) go(Int<1>{}, {packed_rows, kStep, kTile, 0});
            else if (u >= whole) go(Int<2>{}, {packed_rows, kStep, 2 * kTile, kTile});
            else go(Int<2>{}, {x + row * ldx, ldx, kStep, 16 * ldx});
          }
      }
      finish(job, late, kUnit);
    }
    _tile_release();
  }
}

}  // namespace bi
#endif
