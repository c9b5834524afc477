// The paged KV cache and its requests, as the kernels of decode attention read them. Tiles of TILE keys start at multiples
// of TILE; tile 0 is the last one.

constexpr int GROUP = 16;  // consecutive tokens that always share a page
constexpr int GROUPS = TILE / GROUP, FOUND = 32 / GROUPS;  // groups of a tile; tiles that find_page covers
static_assert(TILE % GROUP == 0 && FOUND > 0);

// Byte offset of piece `piece` of row `row`. The exclusive or puts the rows of one column into different banks.
DEVICE int place(int row, int pieces, int piece) {
  return (row * pieces + (piece ^ (pieces < 8 ? row * pieces / 8 & pieces - 1 : row & 7))) * 16;
}

// The cache of one request. Strides in bytes; V lies `to_v` bytes after K; a page holds 2^page_bits tokens, at least 16.
struct Cache {
  const unsigned char* k;  // of one key head
  const int* pages;        // of the request
  i64 to_v;
  u32 page_stride, token_stride;
  int page_bits, length, tiles;  // length in keys
};

DEVICE int tiles_of(int length) { return length > 0 ? (length + TILE - 1) / TILE : 0; }

// Tile i's first key.
DEVICE int begin_of(const Cache& cache, int i) { return (cache.tiles - 1 - i) * TILE; }

// The first key of this lane's group: group lane % GROUPS of tile i + lane / GROUPS * step.
DEVICE int key_of(const Cache& cache, int i, int step) {
  const int lane = thread() % 32;
  return begin_of(cache, i + lane / GROUPS * step) + GROUP * (lane % GROUPS);
}

// The page of this lane's group; 0 outside of the request.
DEVICE int find_page(const Cache& cache, int i, int step) {
  const int at = key_of(cache, i, step);
  return at >= 0 && at < cache.length ? cache.pages[at >> cache.page_bits] : 0;
}

// Byte offset in the cache of this lane's group, whose page is `page`.
DEVICE i64 locate(const Cache& cache, int i, int step, int page) {
  const u32 inside = key_of(cache, i, step) & ((1 << cache.page_bits) - 1);
  return static_cast<i64>(static_cast<u32>(page)) * cache.page_stride + inside * cache.token_stride;
}

// A warp copies the rows of tile i from `from` to `to`, `pieces` pieces per row. Lane `lane` + g holds the offset of
// group g in `located`. Rows past the length become zeros; `whole` says that the tile has no such rows.
template <int pieces, bool whole>
DEVICE void copy_rows(const Cache& cache, const unsigned char* from, int i, i64 located, int lane, unsigned char* to) {
  constexpr int AT_ONCE = 32 / pieces;
  constexpr int MOST = PARTS > 1 ? 32 / pieces : 2;  // 16 copies of a lane, or fewer where registers are few
  constexpr int AHEAD = MOST >= GROUPS ? GROUPS : GROUPS % MOST ? 1 : MOST;  // groups whose offsets are at hand
  const int piece = thread() % pieces, first = thread() % 32 / pieces, left = cache.length - begin_of(cache, i);
  from += first * cache.token_stride + piece * 16;
  for (int group = 0; group < GROUPS; group += AHEAD) {
    i64 offsets[AHEAD];
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) offsets[n] = from_lane(located, lane + group + n);
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) {
      const unsigned char* const row = from + offsets[n];
#pragma unroll
      for (int r = 0; r < GROUP; r += AT_ONCE) {
        const int at = GROUP * (group + n) + r + first;
        copy_16(to + place(at, pieces, piece), row + r * cache.token_stride, whole || at < left);
      }
    }
  }
}

template <int pieces>
DEVICE void copy_tile(const Cache& cache, const unsigned char* from, int i, i64 located, int lane, unsigned char* to) {
  if (begin_of(cache, i) + TILE <= cache.length) {
    copy_rows<pieces, true>(cache, from, i, located, lane, to);
  } else {
    copy_rows<pieces, false>(cache, from, i, located, lane, to);
  }
}

// A token's request: its number, the end of its tokens in q, and its length in keys.
struct Request {
  int number, end, length;
};

DEVICE Request request_of(const int* starts, const int* lengths, int requests, int token) {
  // Usually each request has one token: check this guess first, with loads that do not wait for each other.
  const int guess = token < requests ? token : requests - 1;
  const int begin = fetch(starts + guess), end = fetch(starts + guess + 1), length = fetch(lengths + guess);
  if (begin == token && end > token) return {guess, end, length};
  int low = 0, high = requests;  // the last request that begins at or before the token
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= token ? low : high) = middle;
  }
  return {low, starts[low + 1], lengths[low]};
}
