// The device instructions that the CUDA kernels use: sm_80 and later, clusters (PARTS > 1) sm_90 and later.
// tests/unit/kernels/cuda/emulate.h defines the same functions for the CPU. INPUT is the 16-bit type: "bf16" or "f16".

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define LOWEST __int_as_float(0xff800000)  // minus infinity
#if PARTS > 1
#define KERNEL extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS, 1)
#elif defined(RESIDENT)  // blocks of a multiprocessor, which bound a thread's registers
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#endif

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE void barrier() { __syncthreads(); }

// Synchronizes a warp. Each lane then sees what the other lanes wrote.
DEVICE void together() { __syncwarp(); }

// A load that the compiler does not move to the first use of its value.
DEVICE int fetch(const int* at) {
  int value;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(at));
  return value;
}

DEVICE float fetch(const float* at) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(at));
  return value;
}

DEVICE unsigned char* shared() {
  extern __shared__ __align__(128) unsigned char dynamic_memory[];
  return dynamic_memory;
}

DEVICE float exchange(float value, int distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

DEVICE float of_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The greatest x of a warp.
DEVICE int greatest(int x) { return __reduce_max_sync(0xffffffffu, x); }

DEVICE i64 from_lane(i64 value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sum * by + p, rounded once (CONTRACT 1) or twice (CONTRACT 0): whichever FlashAttention 3 was compiled to.
DEVICE float carry(float sum, float by, float p) {
  return CONTRACT ? __fmaf_rn(sum, by, p) : __fadd_rn(__fmul_rn(sum, by), p);
}

// Rounds two floats to nearest even; `low` goes to the lower half.
DEVICE u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn." INPUT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// a * b + c of two pairs, each element rounded once.
DEVICE u32 fuse_pairs(u32 a, u32 b, u32 c) {
  u32 pair;
  asm("fma.rn." INPUT "x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// x & mask | set, in one instruction.
DEVICE u32 masked_or(u32 x, u32 mask, u32 set) {
  u32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(set));
  return y;
}

// x & mask ^ other, in one instruction.
DEVICE u32 masked_xor(u32 x, u32 mask, u32 other) {
  u32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(y) : "r"(x), "r"(mask), "r"(other));
  return y;
}

// The word turned left by 1 to 31 bits.
DEVICE u32 rotated(u32 word, u32 by) { return __funnelshift_l(word, word, by); }

// The bytes of a word and zeros that a selector's digits of 4 bits name: 0 to 3 of the word, 4 for zero.
DEVICE u32 chosen_bytes(u32 word, u32 selector) { return __byte_perm(word, 0, selector); }

#if EIGHTHS
// The lower two bytes of a word as e4m3 elements, in fp32: exact, and NaN stays NaN.
DEVICE void widen_eighths(u32 pair, float& low, float& high) {
  asm("{\n\t.reg .b16 pair, low, high;\n\t.reg .b32 halves;\n\tcvt.u16.u32 pair, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 halves, pair;\n\tmov.b32 {low, high}, halves;\n\t"
      "cvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// The four bytes of a word as e4m3 elements, in fp16: exact, and NaN stays NaN.
DEVICE void unpack_eighths(u32 word, u32& low, u32& high) {
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

// A pair of fp16 elements in fp32.
DEVICE void widen_halves(u32 pair, float& low, float& high) {
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// Rounds two floats to fp16; `low` goes to the lower half.
DEVICE u32 halves_of(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// A 16-bit element as fp32. BRAIN: whether it is bf16.
DEVICE float widen(u16 half) {
  float value;
#if BRAIN
  value = __uint_as_float(static_cast<u32>(half) << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
#endif
  return value;
}

DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }

// Each rounds once, and the compiler merges none of them.
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }

DEVICE float log_of_1_plus(float x) { return log1pf(x); }

// A product that keeps numbers below the normal range: the rest of the code is compiled to flush them.
DEVICE float times_unflushed(float a, float b) {
  float y;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The lesser number, also of numbers below the normal range.
DEVICE float lesser(float a, float b) {
  float y;
  asm("min.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// by / (1 + expf(-x)), with the instructions that nvcc makes of it without fast math.
DEVICE float over_1_plus_exp(float by, float x) {
  float y;
  asm("{\n\t.reg .f32 n, t, k, f;\n\t.reg .b32 s;\n\tneg.f32 n, %1;\n\t"
      "fma.rn.f32 t, n, 0f3BBB989D, 0f3F000000;\n\tcvt.sat.f32.f32 t, t;\n\t"
      "fma.rm.f32 t, t, 0f437C0000, 0f4B400001;\n\tadd.rn.f32 k, t, 0fCB40007F;\n\tneg.f32 k, k;\n\t"
      "fma.rn.f32 f, n, 0f3FB8AA3B, k;\n\tfma.rn.f32 f, n, 0f32A57060, f;\n\t"
      "mov.b32 s, t;\n\tshl.b32 s, s, 23;\n\tmov.b32 t, s;\n\tex2.approx.ftz.f32 f, f;\n\t"
      "fma.rn.f32 f, f, t, 0f3F800000;\n\tdiv.rn.f32 %0, %2, f;\n\t}"
      : "=f"(y)
      : "f"(x), "f"(by));
  return y;
}

DEVICE float swish(float x) { return over_1_plus_exp(x, x); }

// swish within a few units in the last place, infinities and zeros included. 2^-8 keeps the reciprocal in the normal
// range: a sum can exceed 2^126.
DEVICE float quick_swish(float x) {
  float y;
  asm("{\n\t.reg .f32 e, s;\n\tmul.rn.f32 e, %1, 0fBFB8AA3B;\n\tex2.approx.ftz.f32 e, e;\n\t"
      "fma.rn.f32 e, e, 0f3B800000, 0f3B800000;\n\trcp.approx.ftz.f32 e, e;\n\t"
      "mul.rn.f32 s, %1, 0f3B800000;\n\tmul.rn.f32 %0, s, e;\n\t}"
      : "=f"(y)
      : "f"(x));
  return y;
}

DEVICE float root_reciprocal(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Stops the compiler from computing x again at each use.
DEVICE int keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE u32 address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

#if EIGHTHS
// Two bytes of shared memory, in the lower half of a word. Stays where it is among loads of matrices and products.
DEVICE u32 load_pair(const void* at) {
  u32 pair;
  asm volatile("{\n\t.reg .b16 held;\n\tld.shared.b16 held, [%1];\n\tcvt.u32.u16 %0, held;\n\t}"
               : "=r"(pair)
               : "r"(address(at)));
  return pair;
}
#endif

// mbarriers in shared memory. A phase ends after `count` arrivals and after all bytes that `expect` announced. `wait`
// returns when the phase of the given parity has ended; the waiting thread then sees what the arriving threads wrote.
DEVICE void open(i64* mbar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(mbar)), "r"(count) : "memory");
}

DEVICE void arrive(i64* mbar) {
  asm volatile("{\n\t.reg .b64 phase;\n\tmbarrier.arrive.shared.b64 phase, [%0];\n\t}" ::"r"(address(mbar)) : "memory");
}

// Arrives if `wanted`, without a branch: products that run meanwhile would have to end before a branch.
DEVICE void arrive_if(i64* mbar, bool wanted) {
  asm volatile("{\n\t.reg .b64 phase;\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %1, 0;\n\t"
               "@wanted mbarrier.arrive.shared.b64 phase, [%0];\n\t}" ::"r"(address(mbar)), "r"(static_cast<u32>(wanted))
               : "memory");
}

// One arrival for the whole warp: 32 arrivals at one mbarrier would be serialized.
DEVICE void arrive_as_one(i64* mbar) {
  together();
  if (thread() % 32 == 0) arrive(mbar);
}

DEVICE void wait(const i64* mbar, int parity) {
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  u32 over;
  do {
    asm volatile("{\n\t.reg .pred over;\n\t" WAIT " over, [%1], %2;\n\tselp.u32 %0, 1, 0, over;\n\t}"
                 : "=r"(over)
                 : "r"(address(mbar)), "r"(parity)
                 : "memory");
  } while (!over);
}

// Whether the phase of the given parity has ended for all lanes of the warp, which then see what the arriving threads
// wrote. The answer is the same in every lane.
DEVICE bool is_over(const i64* mbar, int parity) {
  u32 over;
  asm volatile("{\n\t.reg .pred over;\n\tmbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n\t"
               "selp.u32 %0, 1, 0, over;\n\t}"
               : "=r"(over)
               : "r"(address(mbar)), "r"(parity)
               : "memory");
  return __all_sync(0xffffffffu, over);
}

#if PARTS > 1
// Arrives, and makes the phase wait for `bytes` more bytes.
DEVICE void expect(i64* mbar, int bytes) {
  asm volatile("{\n\t.reg .b64 phase;\n\tmbarrier.arrive.expect_tx.shared.b64 phase, [%0], %1;\n\t}" ::"r"(
                   address(mbar)), "r"(bytes) : "memory");
}

// The address of `at` in the shared memory of the cluster's block `to`.
DEVICE u32 remote(const void* at, int to) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(at)), "r"(to));
  return there;
}

// Stores a value at `at` in block `to` and counts its bytes at that block's `mbar`. A fence would go through memory.
DEVICE void hand(float* at, float value, i64* mbar, int to) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote(at, to)),
               "f"(value), "r"(remote(mbar, to)) : "memory");
}

DEVICE void hand(u32* at, const u32 (&v)[4], i64* mbar, int to) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   remote(at, to)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(remote(mbar, to)) : "memory");
}

// Arrives at `mbar` of block `to` if `wanted`, without a branch. The arrival can overtake earlier loads, which would then
// read what block `to` sends next: no load of the thread's may need that. A fence would also order them, but doubles the
// kernel's time.
DEVICE void arrive_at(i64* mbar, int to, bool wanted) {
  asm volatile("{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %1, 0;\n\t"
               "@wanted mbarrier.arrive.shared::cluster.b64 _, [%0];\n\t}" ::"r"(remote(mbar, to)),
               "r"(static_cast<u32>(wanted)) : "memory");
}

// begin: this block's mbarriers are initialized. After all_began, those of every block of the cluster are.
DEVICE void begin() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  barrier();
}
DEVICE void all_began() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
#else
DEVICE void expect(i64*, int) {}
DEVICE void hand(float*, float, i64*, int) {}
DEVICE void hand(u32*, const u32 (&)[4], i64*, int) {}
DEVICE void arrive_at(i64*, int, bool) {}
DEVICE void begin() { barrier(); }
DEVICE void all_began() {}
#endif

// Copies 16 bytes to shared memory asynchronously; writes zeros unless `wanted`.
DEVICE void copy_16(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(wanted ? 16 : 0));
}

// Copies if `wanted`, without a branch: the compiler puts a few instructions before the copies after a branch.
DEVICE void copy_16_if(void* to, const void* from, bool wanted) {
  asm volatile("{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %2, 0;\n\t"
               "@wanted cp.async.cg.shared.global [%0], [%1], 16;\n\t}" ::"r"(address(to)), "l"(from),
               "r"(static_cast<u32>(wanted)));
}

// As copy_16_if, and writes zeros unless `inside`: then nothing is read.
DEVICE void copy_inside_16_if(void* to, const void* from, bool wanted, bool inside) {
  asm volatile("{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %2, 0;\n\t"
               "@wanted cp.async.cg.shared.global [%0], [%1], 16, %3;\n\t}" ::"r"(address(to)), "l"(from),
               "r"(static_cast<u32>(wanted)), "r"(inside ? 16 : 0));
}

// Arrives once this thread's copies have finished.
DEVICE void arrive_when_copied(i64* mbar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address(mbar)) : "memory");
}

DEVICE void end_group() { asm volatile("cp.async.commit_group;"); }

template <int pending>
DEVICE void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending));
}

// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address(row)));
}

DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address(row)));
}

// d [16, 8] += a [16, 16] b [16, 8], products of 16-bit elements, sums in fp32.
DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." INPUT "." INPUT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if EIGHTHS
// The same of fp16 elements, whatever INPUT is.
DEVICE void multiply_add_halves(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// The same without sums before it: d = a b.
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." INPUT "." INPUT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

#if WIDE
// Of Hopper (sm_90a): matrix instructions of a warpgroup, four neighbouring warps. Each warp has 16 rows of a, in
// registers. b lies in shared memory, see `described`.

// Shared memory at a multiple of 1024, as the swizzle of 128 bytes wants it.
DEVICE unsigned char* shared_1024() {
  extern __shared__ __align__(1024) unsigned char aligned_memory[];
  return aligned_memory;
}

// What this thread wrote to shared memory becomes visible to the matrix instructions after the next barrier.
DEVICE void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The matrix descriptor of b (PTX ISA, "Matrix descriptor format"): rows of 64 16-bit elements, 128 bytes, 16 of them
// at a time from `at` on; the swizzle of 128 bytes; 1024 bytes from one eight of rows to the next.
DEVICE i64 described(const void* at) { return (address(at) & 0x3ffff) >> 4 | 1ll << 16 | 64ll << 32 | 1ll << 62; }

// Before the first product, and after the registers of a product have changed.
DEVICE void begin_product() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_product() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
#endif
