// The interface between the torch bindings (ops.cpp) and the kernels, free of torch's headers. ops.cpp checks all
// arguments; the kernels check none. `threads`: how many OpenMP threads may run; bits do not depend on it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bi {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// ---- GEMM (gemm.cpp). Strides in elements; the last dimension is dense.
size_t gemm_packed_size(DType t, int64_t n, int64_t k);  // elements
void gemm_pack(DType t, const void* w, int64_t ldw, int64_t n, int64_t k, void* packed, int threads);
void gemm(DType t, const void* x, int64_t ldx, int64_t m, const void* packed, int64_t n, int64_t k,
          const void* bias, void* y, int threads);
// The sums of the same product before they are rounded: [m, n] in fp32, without a bias.
void gemm_sums(DType t, const void* x, int64_t ldx, int64_t m, const void* packed, int64_t n, int64_t k, float* sums,
               int threads);

// ---- Attention (attention.cpp). Strides in elements; head_dim is dense.
struct KvCache {
  void* data;           // pages [blocks, kv_heads, 2 * block_size * dim]
  int64_t block_stride, head_stride;
  int64_t blocks;
  int kv_heads, block_size, dim;
  DType type;
};

void kv_store(const KvCache& c, const void* key, int64_t key_token, int64_t key_head,
              const void* value, int64_t value_token, int64_t value_head, const int64_t* slots,
              int64_t tokens, int threads);

struct AttentionArgs {
  KvCache kv;
  const void* query;
  int64_t query_token, query_head;
  void* out;
  int64_t out_token, out_head;
  int heads;
  int reqs;
  const int32_t* query_start;  // [reqs + 1]
  const int32_t* seq_lens;     // [reqs]
  const int32_t* table;        // [reqs, table_stride]
  int64_t table_stride;
  float scale;
  int window_left;             // visible keys before the token itself; < 0: all
  float softcap;               // 0: none
  bool causal;                 // false: a query also sees the keys after it, as many as before it with a window
};

void attention(const AttentionArgs& a, int threads);

// ---- Attention over latents, and products by head (latent.cpp). Strides in elements; the last dimension is dense.
constexpr int kMaxLatent = 576;

struct LatentArgs {
  DType type;
  const void* cache;     // [blocks, block_size, dim], dense in the last two
  int64_t block_stride;
  int block_size, dim, vdim;
  const void* query;     // [tokens, heads, dim]
  int64_t query_token, query_head;
  void* out;             // [tokens, heads, vdim]
  int64_t out_token, out_head;
  int heads;
  int reqs;
  const int32_t* query_start;  // [reqs + 1]
  const int32_t* seq_lens;     // [reqs]
  const int32_t* table;        // [reqs, table_stride]
  int64_t table_stride;
  float scale;
};

void latent_attention(const LatentArgs& a, int threads);

struct HeadsGemmArgs {
  DType type;
  const void* x;       // [tokens, heads, k]
  int64_t x_token, x_head;
  const void* packed;  // [heads, gemm_packed_size]
  void* out;           // [tokens, heads, n]
  int64_t out_token, out_head;
  int64_t tokens, heads, n, k;
};

void heads_gemm(const HeadsGemmArgs& a, int threads);

// ---- RMSNorm (norm.cpp). Strides in elements; columns are dense; residual, sum and out are dense.
struct NormArgs {
  DType type;
  const void* x;         // [rows, heads, cols]
  int64_t row, head;     // strides of x
  int64_t rows, heads, cols;
  const void* residual;  // null: none
  const void* weight;    // [cols], null: none
  float eps, offset;
  void* out;
  void* sum;             // round(x + residual); unused without a residual
};

void rms_norm(const NormArgs& a, int threads);

// norm(x) * weight * f(gate), or norm(x * f(gate)) * weight, over groups of `cols` columns; f is silu or sigmoid.
struct GatedNormArgs {
  DType type;
  const void* x;       // [rows, groups * cols], dense
  const void* gate;    // [rows, groups * cols]
  int64_t gate_row;    // stride of gate
  const void* weight;  // [groups * cols], null: none
  int64_t rows, groups, cols;
  float eps;
  bool sigmoid, gate_first;
  void* out;           // dense
};

void gated_rms_norm(const GatedNormArgs& a, int threads);

// ---- Pointwise (pointwise.cpp). Strides in elements; the last dimension is dense.
enum class Activation { sigmoid, silu, gelu, gelu_tanh, rsqrt, softplus };

// f(x) for n dense elements. beta and threshold: of softplus.
void activate(Activation f, DType t, const void* x, int64_t n, float beta, float threshold, void* out, int threads);

// f(g) * u for rows [g | u] of 2 * cols; f is silu, gelu or gelu_tanh.
void gated(Activation f, DType t, const void* x, int64_t row, int64_t rows, int64_t cols, void* out, int threads);

struct RopeArgs {
  DType type;
  const int64_t* positions;  // [tokens]
  const void* x;             // [tokens, heads * dim]
  int64_t token;             // stride of x
  const void* cache;         // [positions, rotary]: cosines, then sines
  void* out;                 // dense
  int64_t tokens, heads, dim, rotary;
  bool neox;
};

void rope(const RopeArgs& a, int threads);

// ---- Pooling (pooling.cpp). Rows are dense in the last dimension; out is dense.
// x / max(|x|, eps) for rows x [rows, cols].
void l2_normalize(DType t, const void* x, int64_t row, int64_t rows, int64_t cols, float eps, void* out, int threads);

// Softmax of each row x [rows, cols].
void softmax(DType t, const void* x, int64_t row, int64_t rows, int64_t cols, void* out, int threads);

// The mean of the rows [starts[s], starts[s + 1]) of x, for every sequence s: out [seqs, cols], fp32.
void mean_rows(DType t, const void* x, int64_t row, int64_t cols, const int64_t* starts, int64_t seqs, float* out,
               int threads);

// ---- Choice of experts (softmax_topk.cpp). logits [rows, experts]; weights and ids dense [rows, k].
void softmax_topk(DType t, const void* logits, int64_t row, int64_t rows, int64_t experts, int64_t k, bool renormalize,
                  float* weights, int32_t* ids, int threads);

// ---- Recurrent layers (recurrent.cpp). Strides in elements; the last dimension is dense.
constexpr int64_t kMaxWidth = 8;  // of a causal convolution

struct Spans {
  int64_t reqs;
  const int32_t* query_start;  // [reqs + 1]: the tokens of each request
  const int32_t* slots;        // [reqs]: the state of each request
  const bool* fresh;           // [reqs]: the request starts at position 0, so its state is zero
};

struct ConvArgs : Spans {
  DType type;
  const void* x;      // [tokens, dim]
  int64_t x_token;
  const void* weight;  // [dim, width], dense
  const void* bias;    // [dim], null: none
  void* states;        // [slots, width - 1, dim]: the last inputs, oldest first
  int64_t state_slot, state_token;
  void* out;           // [tokens, dim], dense
  int64_t dim, width;
  bool silu;
};

void causal_conv(const ConvArgs& a, int threads);

struct RecurrenceArgs : Spans {
  DType type;
  bool delta;               // the gated delta rule; else Mamba 2
  const void* x;            // [tokens, ...]: keys and queries [key_heads, keys], values [heads, values]
  int64_t x_token, key_at, query_at, value_at;
  const void* a;            // [tokens, heads]: the step size, before its bias and softplus
  int64_t a_token;
  const void* b;            // [tokens, heads]: beta before its sigmoid; of the delta rule only
  int64_t b_token;
  const float *rate, *dt_bias, *D;  // [heads]; D may be null
  float dt_min, dt_max;
  void* states;             // [slots, heads, keys, values], fp32
  int64_t state_slot;
  void* out;                // [tokens, heads, values]
  int64_t out_token;
  int64_t heads, key_heads, keys, values;
};

void recurrence(const RecurrenceArgs& a, int threads);

// ---- LoRA (lora.cpp). Strides in elements; the last dimension is dense.
struct LoraArgs {
  DType type;
  const void* x;        // [rows, k]; without a: [rows, rank]
  int64_t x_row;
  int64_t rows, k, n, rank;
  const void* a;        // [slots, rank, k], rows dense; null: x is already shrunk
  const void* b;        // [slots, n, rank], rows dense
  int64_t a_slot, b_slot, slots;
  const int64_t* slot;  // [rows]; < 0: no adapter
  void* y;              // [rows, n]
  int64_t y_row;
  void* packed;         // [slots, lora_room()]: the packed weights of each slot; null: they are packed for this call
  int64_t* ranks;       // [slots]: the rank of a slot whose weights are packed, < 0: not packed; null with `packed`
};

int64_t lora_room(DType t, const LoraArgs& a);  // elements of a slot's packed weights

void lora(const LoraArgs& a, int threads);

struct Mamba1Args : Spans {
  DType type;
  const void *x, *dt;   // [tokens, dim]; dt: the step size, before its bias and softplus
  int64_t x_token, dt_token;
  const void *b, *c;    // [tokens, size]
  int64_t b_token, c_token;
  const void* gate;     // [tokens, dim], null: none
  int64_t gate_token;
  const float *A, *D, *dt_bias;  // [dim, size], [dim], [dim]; dt_bias may be null
  void* states;         // [slots, dim, size], fp32
  int64_t state_slot;
  void* out;            // [tokens, dim], dense
  int64_t dim, size;
};

void mamba1(const Mamba1Args& a, int threads);

}  // namespace bi
