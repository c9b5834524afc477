// The instructions of kernels/cuda/primitives.h on the CPU: a block's threads are threads, run together. Copies to
// shared memory happen when their group is waited for, and the order of sums inside multiply_add is not the GPU's.

#include <barrier>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE static inline
#define LOWEST (-INFINITY)
#define KERNEL static void
static constexpr int LANES = 32;

struct float2 {
  float x, y;
};

struct Copy {
  void* to;
  const void* from;
  bool wanted;
};

struct Warp {
  std::barrier<> together{LANES};
  float values[LANES];
  int numbers[LANES];
  const unsigned char* rows[LANES];
  u32 a[LANES][4], b[LANES][2];
};

static thread_local int this_thread;
static thread_local std::vector<Copy> open_group;
static thread_local std::deque<std::vector<Copy>> groups;
// Blocks of one cluster run together.
struct Block {
  std::barrier<> together;
  std::vector<Warp> warps;
  alignas(128) unsigned char memory[1 << 18];
  explicit Block(int threads) : together(threads), warps(threads / LANES) {
    memset(memory, 0xff, sizeof memory);  // not a number: what was not written shows
  }
};

static thread_local int this_share;
static int this_cluster_x, this_block_y;
static std::vector<std::unique_ptr<Block>> cluster;
static std::barrier<>* all;

DEVICE int thread() { return this_thread; }
DEVICE int share() { return this_share; }
DEVICE int block_x() { return this_cluster_x * static_cast<int>(cluster.size()) + this_share; }
DEVICE int block_y() { return this_block_y; }
DEVICE void barrier() { cluster[this_share]->together.arrive_and_wait(); }
DEVICE void everyone() { all->arrive_and_wait(); }
DEVICE unsigned char* shared() { return cluster[this_share]->memory; }
DEVICE Warp& warp_of() { return cluster[this_share]->warps[this_thread / LANES]; }

template <class T>
DEVICE void put(T* at, int to, T value) {
  const auto offset = reinterpret_cast<unsigned char*>(at) - shared();
  memcpy(cluster[to]->memory + offset, &value, sizeof value);
}

DEVICE float exchange(float value, int distance) {
  Warp& w = warp_of();
  w.values[this_thread % LANES] = value;
  w.together.arrive_and_wait();
  const float got = w.values[(this_thread % LANES) ^ distance];
  w.together.arrive_and_wait();
  return got;
}

DEVICE int from_lane(int value, int lane) {
  Warp& w = warp_of();
  w.numbers[this_thread % LANES] = value;
  w.together.arrive_and_wait();
  const int got = w.numbers[lane];
  w.together.arrive_and_wait();
  return got;
}

DEVICE float power_of_2(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1.f / x; }
DEVICE float carry(float sum, float by, float p) { return fmaf(sum, by, p); }

DEVICE u32 round_bf16(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

DEVICE float widen_bf16(u32 half) {
  const u32 bits = (half & 0xffff) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

DEVICE u32 round_pair(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

DEVICE void copy_16(void* to, const void* from, bool wanted) { open_group.push_back({to, from, wanted}); }

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

DEVICE void load_two_transposed(u32 (&r)[2], const void* row) {
  u32 all_four[4];
  load_matrices_transposed(all_four, row);
  r[0] = all_four[0];
  r[1] = all_four[1];
}

DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
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
      sum += widen_bf16(w.a[of][part] >> shift) * widen_bf16(w.b[4 * column + k % 8 / 2][k / 8] >> shift);
    }
    d[e] = sum;
  }
  w.together.arrive_and_wait();
}

// Runs one cluster of `shares` blocks after the other.
static void run_grid(int x, int y, int threads, int shares, const std::function<void()>& kernel) {
  for (this_block_y = 0; this_block_y < y; ++this_block_y) {
    for (this_cluster_x = 0; this_cluster_x < x / shares; ++this_cluster_x) {
      std::barrier<> whole(threads * shares);
      all = &whole;
      cluster.clear();
      for (int i = 0; i < shares; ++i) cluster.push_back(std::make_unique<Block>(threads));
      std::vector<std::thread> team;
      for (int i = 0; i < threads * shares; ++i) {
        team.emplace_back([&, i] {
          this_thread = i % threads;
          this_share = i / threads;
          kernel();
        });
      }
      for (std::thread& member : team) member.join();
    }
  }
}
