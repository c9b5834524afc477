// The instructions that the kernels are written in, for sm_80 and later. tests/unit/kernels/cuda/emulate.h has the same
// names on the CPU. INPUT names the 16-bit type: "bf16" or "f16".

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define LOWEST __int_as_float(0xff800000)  // minus infinity
#if PARTS > 1
#define KERNEL extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#endif

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE void barrier() { __syncthreads(); }

// The lanes of a warp wait for each other and see what each wrote.
DEVICE void together() { __syncwarp(); }

// Loaded here, and not where it is first used.
DEVICE int fetch(const int* at) {
  int value;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(at));
  return value;
}

DEVICE unsigned char* shared() {
  extern __shared__ __align__(128) unsigned char dynamic_memory[];
  return dynamic_memory;
}

DEVICE float exchange(float value, int distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

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

// sum * by + p, rounded once or twice (CONTRACT 1 or 0): as the compiler of FlashAttention 3 made it.
DEVICE float carry(float sum, float by, float p) {
  return CONTRACT ? __fmaf_rn(sum, by, p) : __fadd_rn(__fmul_rn(sum, by), p);
}

// Two floats rounded to nearest even, `low` in the lower half.
DEVICE u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn." INPUT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE u32 bits_of(float value) { return __float_as_uint(value); }

// Computed here once, not again where it is used.
DEVICE int keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE u32 address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

// A gate in shared memory passes from phase to phase whenever `count` threads have arrived; what they wrote before is
// seen by those who waited. wait: until the phase of this parity is over.
DEVICE void open(i64* gate, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(gate)), "r"(count) : "memory");
}

DEVICE void arrive(i64* gate) {
  asm volatile("{\n\t.reg .b64 phase;\n\tmbarrier.arrive.shared.b64 phase, [%0];\n\t}" ::"r"(address(gate)) : "memory");
}

// One arrival for a warp: 32 at one gate would take turns.
DEVICE void arrive_as_one(i64* gate) {
  together();
  if (thread() % 32 == 0) arrive(gate);
}

DEVICE void wait(const i64* gate, int parity) {
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  u32 over;
  do {
    asm volatile("{\n\t.reg .pred over;\n\t" WAIT " over, [%1], %2;\n\tselp.u32 %0, 1, 0, over;\n\t}"
                 : "=r"(over)
                 : "r"(address(gate)), "r"(parity)
                 : "memory");
  } while (!over);
}

#if PARTS > 1
// Bytes that this phase also waits for; arrives.
DEVICE void expect(i64* gate, int bytes) {
  asm volatile("{\n\t.reg .b64 phase;\n\tmbarrier.arrive.expect_tx.shared.b64 phase, [%0], %1;\n\t}" ::"r"(
                   address(gate)), "r"(bytes) : "memory");
}

// The address of `at` in the memory of the cluster's block `to`.
DEVICE u32 remote(const void* at, int to) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(at)), "r"(to));
  return there;
}

// A value put where `at` is in block `to`, whose `gate` then counts its bytes. No fence: those write to memory and back.
DEVICE void hand(float* at, float value, i64* gate, int to) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote(at, to)),
               "f"(value), "r"(remote(gate, to)) : "memory");
}

DEVICE void hand(u32* at, const u32 (&v)[4], i64* gate, int to) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   remote(at, to)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(remote(gate, to)) : "memory");
}

// Zero if `zero` is, once all lanes have their `values`.
DEVICE int zero_after(u32 values, u32 zero) { return __reduce_or_sync(0xffffffffu, values & zero); }

// In block `to`. An arrival at another block overtakes loads before it, and what that block sends then would be what
// they load: `to` must depend on their values. The fence that orders them too would double the kernel's time.
DEVICE void arrive_at(i64* gate, int to) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote(gate, to)) : "memory");
}

// Gates are open; other blocks of the cluster may use them after all_began.
DEVICE void begin() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  barrier();
}
DEVICE void all_began() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
#else
DEVICE void expect(i64*, int) {}
DEVICE void hand(float*, float, i64*, int) {}
DEVICE void hand(u32*, const u32 (&)[4], i64*, int) {}
DEVICE int zero_after(u32, u32 zero) { return zero; }
DEVICE void arrive_at(i64*, int) {}
DEVICE void begin() { barrier(); }
DEVICE void all_began() {}
#endif

// 16 bytes to shared memory; zeros where not `wanted`.
DEVICE void copy_16(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(wanted ? 16 : 0));
}

// Arrives at a gate once this thread's copies are there.
DEVICE void arrive_when_copied(i64* gate) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address(gate)) : "memory");
}

DEVICE void end_group() { asm volatile("cp.async.commit_group;"); }

template <int pending>
DEVICE void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending));
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
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
