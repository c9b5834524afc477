// Pages of e4m3, one byte an element, for kernels that compute in 16 bits. An element stands for fp32(element) * scale,
// rounded to nearest even in fp32, then in 16 bits.
//
// Where LATE is 1, bytes stay bytes in shared memory. Else rows of a tile come in two steps, to the place of their 16-bit
// rows. copy_eighths copies the bytes to the second half of the place, asynchronously. Once they are there, widen_rows
// converts them from the first row on: 16-bit rows never reach bytes that nobody has loaded, because they grow twice as
// fast from half as far. So this takes no more shared memory than 16-bit pages.

#if LATE
// copy_tile for rows of one piece, two groups at a time.
DEVICE void copy_column(const Cache& cache, const unsigned char* from, int i, i64 located, int lane, unsigned char* to) {
  static_assert(GROUPS % 2 == 0);
  const int row = thread() % 32, left = cache.length - begin_of(cache, i);
  from += row % GROUP * cache.token_stride;
#pragma unroll
  for (int group = 0; group < GROUPS; group += 2) {
    const int key = GROUP * group + row;
    copy_16(to + key * 16, from + from_lane(located, lane + group + row / GROUP), key < left);
  }
}
#endif

#if EIGHTHS
struct alignas(8) Eight {
  u32 words[2];
};
struct alignas(16) Piece {
  u32 words[4];
};

// Bytes from the start of `groups` groups of 16-bit rows of `pieces` pieces to the place where their e4m3 bytes arrive.
template <int pieces, int groups>
constexpr int BYTES_AT = groups * GROUP * pieces * 8;

// A warp copies e4m3 rows of tile i from `from`: `groups` groups of rows from group `first` on. `to`: of the whole tile.
// The offset of group g is in lane `lane` + g of `located`. Rows past the length become zeros.
template <int pieces, int groups, bool whole>
DEVICE void copy_eighth_rows(const Cache& cache, const unsigned char* from, int i, int first, i64 located, int lane,
                             unsigned char* to) {
  constexpr int PARTS_OF_ROW = pieces / 2;  // of 16 bytes
  constexpr int AT_ONCE = 32 / PARTS_OF_ROW, SPAN = AT_ONCE > GROUP ? AT_ONCE / GROUP : 1;  // rows, groups of a copy
  static_assert(pieces % 2 == 0 && groups % SPAN == 0);
  const int part = thread() % PARTS_OF_ROW, row = thread() % 32 / PARTS_OF_ROW;
  const int left = cache.length - begin_of(cache, i) - GROUP * first;
  to += first * GROUP * pieces * 16 + BYTES_AT<pieces, groups> + part * 16;
  from += row % GROUP * cache.token_stride + part * 16;
#pragma unroll (PARTS > 1 ? groups : 1)  // registers are few without a cluster
  for (int group = 0; group < groups; group += SPAN) {
    const unsigned char* const at = from + from_lane(located, lane + first + group + row / GROUP);
#pragma unroll
    for (int r = 0; r < GROUP; r += AT_ONCE) {
      const int key = GROUP * group + r + row;
      copy_16(to + key * PARTS_OF_ROW * 16, at + r * cache.token_stride, whole || key < left);
    }
  }
}

template <int pieces, int groups>
DEVICE void copy_eighths(const Cache& cache, const unsigned char* from, int i, int first, i64 located, int lane,
                         unsigned char* to) {
  if (begin_of(cache, i) + TILE <= cache.length) {
    copy_eighth_rows<pieces, groups, true>(cache, from, i, first, located, lane, to);
  } else {
    copy_eighth_rows<pieces, groups, false>(cache, from, i, first, located, lane, to);
  }
}

// Two elements of the lower two bytes of `pair`, scaled and rounded. scaled: whether the scale is another than 1.
template <bool scaled>
DEVICE u32 round_eighths(u32 pair, float scale) {
  float low, high;
  widen_eighths(pair, low, high);
  return scaled ? round_pair(times_unflushed(low, scale), times_unflushed(high, scale)) : round_pair(low, high);
}

// The four elements of a word, scaled and rounded: those of the lower bytes, then of the upper bytes.
template <bool scaled>
DEVICE void round_word(u32 word, float scale, u32& low, u32& high) {
  u32 halves[2];
  unpack_eighths(word, halves[0], halves[1]);
  u32* const to[2] = {&low, &high};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float first, second;
    widen_halves(halves[n], first, second);
    *to[n] = scaled ? round_pair(times_unflushed(first, scale), times_unflushed(second, scale)) : round_pair(first, second);
  }
}

template <int pieces, int rows, bool scaled>
DEVICE void widen_all(unsigned char* to, int first, float scale) {
  constexpr int ALL = rows * pieces / 32;  // pieces of a lane
  constexpr int BATCH = ALL % 8 == 0 ? 8 : ALL % 5 == 0 ? 5 : ALL % 4 == 0 ? 4 : 1;  // of these, loaded at once
  const int lane = thread() % 32;
  const Eight* const bytes =
      reinterpret_cast<const Eight*>(to + first * pieces * 16 + BYTES_AT<pieces, rows / GROUP>) + lane;
  Eight now[BATCH], then[BATCH];
#pragma unroll
  for (int n = 0; n < BATCH; ++n) now[n] = bytes[n * 32];
#pragma unroll 1
  for (int begin = 0; begin < ALL; begin += BATCH) {
    if (begin + BATCH < ALL) {
#pragma unroll
      for (int n = 0; n < BATCH; ++n) then[n] = bytes[(begin + BATCH + n) * 32];
    }
    together();  // all lanes have loaded the bytes that these stores replace
#pragma unroll
    for (int n = 0; n < BATCH; ++n) {
      const int row = first + (begin + n) * (32 / pieces) + lane / pieces;
      const u32(&word)[2] = now[n].words;
      *reinterpret_cast<Piece*>(to + place(row, pieces, lane % pieces)) = {
          {round_eighths<scaled>(word[0], scale), round_eighths<scaled>(word[0] >> 16, scale),
           round_eighths<scaled>(word[1], scale), round_eighths<scaled>(word[1] >> 16, scale)}};
    }
#pragma unroll
    for (int n = 0; n < BATCH; ++n) now[n] = then[n];
  }
}

// A warp converts `rows` rows from row `first` on, whose bytes are there for all lanes. `to`: of the whole tile. What a
// lane stored is there for the others after the next `together`. A scale of 1, which most caches have, costs a third less.
template <int pieces, int rows>
DEVICE void widen_rows(unsigned char* to, int first, float scale) {
  if (scale == 1.f) widen_all<pieces, rows, false>(to, first, scale);
  else widen_all<pieces, rows, true>(to, first, scale);
}
#endif
