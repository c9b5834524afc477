// The instructions of kernels/cuda/primitives.h, emulated on the CPU. Each thread of a block is a thread of the CPU,
// and all threads of a block run at once. A copy to shared memory happens when a thread waits for the copy's group. The
// order of sums inside multiply_add differs from the GPU's.

#include <atomic>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#ifndef BRAIN
#define BRAIN 1  // elements of 16 bits are bf16
#endif
#define DEVICE static inline
#define LOWEST (-INFINITY)
#define KERNEL static void
static constexpr int LANES = 32;

struct Copy {
  void* to;
  const void* from;
  bool wanted;
};

struct Warp {
  std::barrier<> together{LANES};
  float values[LANES];
  i64 numbers[LANES];
  const unsigned char* rows[LANES];
  u32 a[LANES][4], b[LANES][2];
};

static thread_local int this_thread;
static thread_local std::vector<Copy> open_group;
static thread_local std::deque<std::vector<Copy>> groups;
// The blocks of a cluster run at once.
struct Block {
  std::barrier<> whole;
  std::vector<Warp> warps;
  std::atomic<int> running;
  alignas(1024) unsigned char memory[1 << 18];
  explicit Block(int threads) : whole(threads), warps(threads / LANES), running(threads) {
    memset(memory, 0xff, sizeof memory);  // NaN: a read of memory that was not written shows
  }
};

static thread_local int this_part;
static thread_local bool this_began;
static int this_cluster, this_block_y, this_block_z, all_blocks_x;
static std::vector<std::unique_ptr<Block>> blocks;
static int not_begun;  // how many threads of the cluster have not begun
static std::mutex lock;
static std::condition_variable all_begun;
static std::condition_variable changed[64];  // by the address of an mbarrier: few threads wait for the same one

DEVICE int thread() { return this_thread; }
DEVICE int block_x() { return this_cluster * PARTS + this_part; }
DEVICE int block_y() { return this_block_y; }
DEVICE int block_z() { return this_block_z; }
DEVICE int blocks_x() { return all_blocks_x; }
DEVICE void barrier() { blocks[this_part]->whole.arrive_and_wait(); }
DEVICE unsigned char* shared() { return blocks[this_part]->memory; }
DEVICE Warp& warp_of() { return blocks[this_part]->warps[this_thread / LANES]; }
DEVICE void together() { warp_of().together.arrive_and_wait(); }
DEVICE int fetch(const int* at) { return *at; }
DEVICE float fetch(const float* at) { return *at; }
DEVICE int keep(int x) { return x; }
DEVICE void begin() {
  {
    const std::lock_guard held(lock);
    if (--not_begun == 0) all_begun.notify_all();
  }
  barrier();
}
DEVICE void all_began() {
  std::unique_lock held(lock);
  all_begun.wait(held, [] { return not_begun == 0; });
  this_began = true;
}

// An mbarrier's 8 bytes: arrivals per phase, missing arrivals, the phase's parity, missing bytes.
struct Mbarrier {
  unsigned char count, missing, parity;
  int bytes;
};

DEVICE std::condition_variable& changes_of(const void* mbar) {
  return changed[reinterpret_cast<unsigned long>(mbar) / sizeof(i64) % 64];
}

// The caller holds the lock.
DEVICE void settle(Mbarrier& mbar) {
  if (mbar.missing || mbar.bytes) return;
  mbar.missing = mbar.count;
  mbar.parity ^= 1;
  changes_of(&mbar).notify_all();
}

DEVICE void count(i64* at, int arrivals, int bytes) {
  const std::lock_guard held(lock);
  Mbarrier& mbar = *reinterpret_cast<Mbarrier*>(at);
  mbar.missing -= arrivals;
  mbar.bytes += bytes;
  settle(mbar);
}

DEVICE void open(i64* at, int count) {
  const auto number = static_cast<unsigned char>(count);
  *reinterpret_cast<Mbarrier*>(at) = {number, number, 0, 0};
}
DEVICE void arrive(i64* at) { count(at, 1, 0); }
DEVICE void arrive_if(i64* at, bool wanted) {
  if (wanted) arrive(at);
}
DEVICE void expect(i64* at, int bytes) { count(at, 1, bytes); }
DEVICE void arrive_as_one(i64* at) {
  together();
  if (this_thread % LANES == 0) arrive(at);
}

DEVICE void wait(const i64* at, int parity) {
  std::unique_lock held(lock);
  const Mbarrier& mbar = *reinterpret_cast<const Mbarrier*>(at);
  changes_of(at).wait(held, [&] { return mbar.parity != parity; });
}

DEVICE bool is_over(const i64* at, int parity) {
  Warp& w = warp_of();
  {
    const std::lock_guard held(lock);
    w.numbers[this_thread % LANES] = reinterpret_cast<const Mbarrier*>(at)->parity != parity;
  }
  w.together.arrive_and_wait();
  bool all = true;
  for (const i64 over : w.numbers) all = all && over;
  w.together.arrive_and_wait();
  return all;
}

// The address of `at` in block `to`. Aborts unless that block has begun and has not ended.
template <class T>
DEVICE T* remote(T* at, int to) {
  if (!this_began || !blocks[to]->running) std::abort();
  return reinterpret_cast<T*>(blocks[to]->memory + (reinterpret_cast<unsigned char*>(at) - shared()));
}

DEVICE void arrive_at(i64* at, int to, bool wanted) {
  if (wanted) count(remote(at, to), 1, 0);
}
DEVICE void hand(float* at, float value, i64* mbar, int to) {
  *remote(at, to) = value;
  count(remote(mbar, to), 0, -4);
}
DEVICE void hand(u32* at, const u32 (&v)[4], i64* mbar, int to) {
  memcpy(remote(at, to), v, 16);
  count(remote(mbar, to), 0, -16);
}

DEVICE float exchange(float value, int distance) {
  Warp& w = warp_of();
  w.values[this_thread % LANES] = value;
  w.together.arrive_and_wait();
  const float got = w.values[(this_thread % LANES) ^ distance];
  w.together.arrive_and_wait();
  return got;
}

DEVICE float of_lane(float value, int lane) {
  Warp& w = warp_of();
  w.values[this_thread % LANES] = value;
  w.together.arrive_and_wait();
  const float got = w.values[lane];
  w.together.arrive_and_wait();
  return got;
}

DEVICE i64 from_lane(i64 value, int lane) {
  Warp& w = warp_of();
  w.numbers[this_thread % LANES] = value;
  w.together.arrive_and_wait();
  const i64 got = w.numbers[lane];
  w.together.arrive_and_wait();
  return got;
}

DEVICE int greatest(int x) {
  Warp& w = warp_of();
  w.numbers[this_thread % LANES] = x;
  w.together.arrive_and_wait();
  i64 most = x;
  for (const i64 number : w.numbers) most = number > most ? number : most;
  w.together.arrive_and_wait();
  return static_cast<int>(most);
}

DEVICE float power_of_2(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1.f / x; }
DEVICE float log_of_1_plus(float x) { return log1pf(x); }
DEVICE float times_unflushed(float a, float b) { return a * b; }
DEVICE float lesser(float a, float b) { return fminf(a, b); }
DEVICE float over_1_plus_exp(float by, float x) { return by / (1.f + expf(-x)); }
DEVICE float swish(float x) { return over_1_plus_exp(x, x); }
DEVICE float quick_swish(float x) { return x * 0x1p-8f * (1.f / fmaf(exp2f(x * -1.44269504f), 0x1p-8f, 0x1p-8f)); }
DEVICE float root_reciprocal(float x) { return 1.f / sqrtf(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float times(float a, float b) { return a * b; }
DEVICE float plus(float a, float b) { return a + b; }
DEVICE float carry(float sum, float by, float p) { return fmaf(sum, by, p); }

DEVICE u32 bits_of(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DEVICE float float_of(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

DEVICE u32 round_bf16(float value) {
  const u32 bits = bits_of(value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

DEVICE float widen_bf16(u32 half) {
  const u32 bits = (half & 0xffff) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// An e4m3 element: 1 sign, 4 bits of exponent, 3 of mantissa; the largest of all stands for NaN.
DEVICE float widen_eighth(u32 byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  float value = exponent ? ldexpf(8.f + mantissa, exponent - 10) : ldexpf(static_cast<float>(mantissa), -9);
  if ((byte & 127) == 127) value = NAN;
  return byte & 128 ? -value : value;
}
DEVICE void widen_eighths(u32 pair, float& low, float& high) {
  low = widen_eighth(pair & 255);
  high = widen_eighth(pair >> 8 & 255);
}

// fp16 of the normal range, zero and NaN: what e4m3 elements and the queries beside them need.
DEVICE u32 half_of(float value) {
  const u32 bits = bits_of(value), sign = bits >> 16 & 0x8000;
  if (value != value) return 0x7fff;
  if (value == 0.f) return sign;
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent < 1 || exponent > 30 || bits & 0x1fff) std::abort();  // not exact
  return sign | exponent << 10 | (bits >> 13 & 0x3ff);
}

DEVICE float widen_half(u32 half) {
  const int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  float value = exponent == 31 ? NAN : exponent ? ldexpf(1024.f + mantissa, exponent - 25) : 0.f;
  return half & 0x8000 ? -value : value;
}

DEVICE u32 halves_of(float low, float high) { return half_of(low) | half_of(high) << 16; }

DEVICE void widen_halves(u32 pair, float& low, float& high) {
  low = widen_half(pair & 0xffff);
  high = widen_half(pair >> 16);
}

DEVICE void unpack_eighths(u32 word, u32& low, u32& high) {
  low = halves_of(widen_eighth(word & 255), widen_eighth(word >> 8 & 255));
  high = halves_of(widen_eighth(word >> 16 & 255), widen_eighth(word >> 24));
}

DEVICE u32 load_pair(const void* at) {
  u16 pair;
  memcpy(&pair, at, 2);
  return pair;
}

DEVICE u32 round_pair(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

DEVICE u32 masked_or(u32 x, u32 mask, u32 set) { return (x & mask) | set; }

DEVICE u32 masked_xor(u32 x, u32 mask, u32 other) { return (x & mask) ^ other; }

DEVICE u32 rotated(u32 word, u32 by) { return word << by | word >> (32 - by); }

DEVICE u32 chosen_bytes(u32 word, u32 selector) {
  u32 y = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 from = selector >> 4 * i & 15;
    if (from < 4) y |= (word >> 8 * from & 255) << 8 * i;
  }
  return y;
}

DEVICE float widen(u16 half) { return widen_bf16(half); }

// Exact if the product has at most 24 bits.
DEVICE u32 fuse_pairs(u32 a, u32 b, u32 c) {
  float value[2];
  for (int i = 0; i < 2; ++i) value[i] = fmaf(widen_bf16(a >> 16 * i), widen_bf16(b >> 16 * i), widen_bf16(c >> 16 * i));
  return round_pair(value[0], value[1]);
}

DEVICE void copy_16(void* to, const void* from, bool wanted) {
  memset(to, 0xff, 16);  // NaN until a thread waits for the group: a read of the old values shows
  open_group.push_back({to, from, wanted});
}

DEVICE void copy_16_if(void* to, const void* from, bool wanted) {
  if (wanted) copy_16(to, from, true);
}

DEVICE void copy_inside_16_if(void* to, const void* from, bool wanted, bool inside) {
  if (wanted) copy_16(to, from, inside);
}

DEVICE void end_group();
template <int pending>
DEVICE void wait_groups();

DEVICE void arrive_when_copied(i64* mbar) {
  end_group();
  wait_groups<0>();
  arrive(mbar);
}

DEVICE void end_group() {
  groups.push_back(open_group);
  open_group.clear();
}

template <int pending>
DEVICE void wait_groups() {
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.wanted) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
    groups.pop_front();
  }
}

DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  Warp& w = warp_of();
  const int lane = this_thread % LANES;
  w.rows[lane] = static_cast<const unsigned char*>(row);
  w.together.arrive_and_wait();
  for (int m = 0; m < 4; ++m) memcpy(&r[m], w.rows[8 * m + lane / 4] + 4 * (lane % 4), 4);
  w.together.arrive_and_wait();
}

DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  Warp& w = warp_of();
  const int lane = this_thread % LANES;
  w.rows[lane] = static_cast<const unsigned char*>(row);
  w.together.arrive_and_wait();
  for (int m = 0; m < 4; ++m) {
    u16 pair[2];
    for (int e = 0; e < 2; ++e) memcpy(&pair[e], w.rows[8 * m + 2 * (lane % 4) + e] + 2 * (lane / 4), 2);
    r[m] = pair[0] | u32(pair[1]) << 16;
  }
  w.together.arrive_and_wait();
}

template <class Widen>
DEVICE void multiply_add_of(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Widen widened) {
  Warp& w = warp_of();
  const int lane = this_thread % LANES, g = lane / 4, t = lane % 4;
  memcpy(w.a[lane], a, 16);
  w.b[lane][0] = b0;
  w.b[lane][1] = b1;
  w.together.arrive_and_wait();
  for (int e = 0; e < 4; ++e) {
    const int half = e / 2, column = 2 * t + e % 2;
    float sum = d[e];
    for (int k = 0; k < 16; ++k) {
      const int part = half + 2 * (k / 8), of = 4 * g + k % 8 / 2, shift = 16 * (k % 2);
      sum += widened(w.a[of][part] >> shift & 0xffff) * widened(w.b[4 * column + k % 8 / 2][k / 8] >> shift & 0xffff);
    }
    d[e] = sum;
  }
  w.together.arrive_and_wait();
}

DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_add_of(d, a, b0, b1, widen_bf16); }

DEVICE void multiply_add_halves(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_add_of(d, a, b0, b1, widen_half);
}

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  for (float& value : d) value = 0.f;
  multiply_add(d, a, b0, b1);
}

// Wide instructions: the four warps of a warpgroup do not share outputs, so each is emulated alone. A product happens
// when a thread waits for it, with the weights that its registers and the rows that its memory hold then.
DEVICE unsigned char* shared_1024() { return shared(); }
DEVICE void show_copies() {}
DEVICE i64 described(const void* at) { return reinterpret_cast<i64>(at); }
DEVICE void begin_product() {}

static thread_local std::vector<std::function<void()>> open_products;
static thread_local std::deque<std::vector<std::function<void()>>> products;

template <int tiles>
DEVICE void multiply_wide(float (&d)[tiles][4], const u32 (&a)[4], i64 b) {
  open_products.push_back([&d, &a, b] {
    const int g = this_thread % LANES / 4, t = this_thread % 4;
    const i64 base = reinterpret_cast<i64>(shared());
    for (int tile = 0; tile < tiles; ++tile) {
      u32 pair[2];
      for (int half = 0; half < 2; ++half) {
        const i64 at = b - base + (tile * 8 + g) * 128 + half * 16 + t * 4;
        memcpy(&pair[half], shared() + (at ^ (at >> 7 & 7) << 4), 4);  // the swizzle of 128 bytes
      }
      multiply_add(d[tile], a, pair[0], pair[1]);
    }
  });
}

DEVICE void end_product() {
  products.push_back(open_products);
  open_products.clear();
}

template <int pending>
DEVICE void wait_products() {
  while (products.size() > pending) {
    for (const auto& product : products.front()) product();
    products.pop_front();
  }
}

// Runs one cluster after the other.
static void run_grid(int x, int y, int z, int threads, const std::function<void()>& kernel) {
  all_blocks_x = x;
  for (this_block_z = 0; this_block_z < z; ++this_block_z) {
    for (this_block_y = 0; this_block_y < y; ++this_block_y) {
      for (this_cluster = 0; this_cluster < x / PARTS; ++this_cluster) {
        blocks.clear();
        for (int i = 0; i < PARTS; ++i) blocks.push_back(std::make_unique<Block>(threads));
        not_begun = threads * PARTS;
        std::vector<std::thread> team;
        for (int i = 0; i < threads * PARTS; ++i) {
          team.emplace_back([&, i] {
            this_thread = i % threads;
            this_part = i / threads;
            kernel();
            --blocks[this_part]->running;
          });
        }
        for (std::thread& member : team) member.join();
      }
    }
  }
}

static void run_grid(int x, int y, int threads, const std::function<void()>& kernel) {
  run_grid(x, y, 1, threads, kernel);
}
