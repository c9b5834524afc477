// Prints the peak of AMX tiles: operations (multiply or add) a second of one and of two threads, with operands in tiles
// and with operands loaded from L1.
//
//   g++ -O2 -fopenmp -mamx-tile -mamx-bf16 benchmarks/cpu/tiles.cpp -o tiles && ./tiles
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
  Config() {
    for (int i = 0; i < 8; ++i) colsb[i] = 64, rows[i] = 16;
  }
};

alignas(64) static char held[2][1 << 15];

static double run(int threads, bool loads) {
  constexpr int rounds = 20000;
  double best = 1e9;
  for (int repeat = 0; repeat < 30; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
    {
      static const Config config;
      _tile_loadconfig(&config);
      const char* from = held[omp_get_thread_num()];
      for (int i = 0; i < rounds; ++i) {
        const char* p = from + i % 8 * 4096;
        if (loads) {
          _tile_loadd(4, p, 64);
          _tile_loadd(5, p + 1024, 64);
          _tile_loadd(6, p + 2048, 64);
          _tile_loadd(7, p + 3072, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_release();
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return threads * double(rounds) * 4 * 16 * 16 * 32 * 2 / best / 1e12;
}

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return std::puts("Linux does not allow tiles here"), 1;
  for (int threads : {1, 2})
    std::printf("peak, %d threads: %.2f TFLOP/s, with loads from L1 %.2f\n", threads, run(threads, false), run(threads, true));
}
