// The torch bindings of the `bi_cpu` ops: each checks shapes, dtypes and indices, then calls a kernel of api.h.
// README.md lists the arguments. A bad argument raises RuntimeError.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>
#include "api.h"
#include "blocks.h"

namespace at { int get_num_threads(); }

namespace {

bi::DType dtype_of(const at::Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case at::kFloat: return bi::DType::f32;
    case at::kBFloat16: return bi::DType::bf16;
    case at::kHalf: return bi::DType::f16;
    default: TORCH_CHECK(false, "bi_cpu: ", what, " must be float32, bfloat16 or float16, not ", t.scalar_type());
  }
}

// Gives large results memory that is kept between calls (blocks.h).
struct Results final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* const block = bi::Blocks::all().take(bytes);
    return {block->data, block, [](void* held) { bi::Blocks::all().give(static_cast<bi::Blocks::Block*>(held)); },
            c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// An empty dense tensor for a result, on the CPU.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < bi::kHugePage) return at::empty(sizes, options);
  static Results memory;
  const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(sizes, &memory, cpu, c10::typeMetaToScalarType(options.dtype()), {}));
}

// Views x [..., cols] as [rows, cols] with dense columns, or copies x. Rows may be strided.
at::Tensor as_rows(const at::Tensor& x, int64_t cols) {
  const at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, cols});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

at::Tensor gemm_pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "bi_cpu.gemm_pack: weight must be [N, K], got ", weight.sizes());
  TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, "bi_cpu.gemm_pack: empty weight ", weight.sizes());
  const auto type = dtype_of(weight, "weight");
  const at::Tensor w = weight.stride(1) == 1 ? weight : weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  at::Tensor out = at::empty({(int64_t)bi::gemm_packed_size(type, n, k)}, w.options());
  bi::ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  bi::gemm_pack(type, w.const_data_ptr(), w.stride(0), n, k, out.mutable_data_ptr(), at::get_num_threads());
  return out;
}

at::Tensor gemm(const at::Tensor& x, const at::Tensor& packed, int64_t n, int64_t k,
                const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == k, "bi_cpu.gemm: x must be [..., K=", k, "], got ", x.sizes());
  const auto type = dtype_of(x, "x");
  TORCH_CHECK(packed.scalar_type() == x.scalar_type(), "bi_cpu.gemm: x is ", x.scalar_type(),
              " but the packed weight is ", packed.scalar_type());
  TORCH_CHECK(packed.is_contiguous() && packed.numel() == (int64_t)bi::gemm_packed_size(type, n, k),
              "bi_cpu.gemm: packed weight has ", packed.numel(), " elements, not those of [", n, ", ", k,
              "]; pack it with bi_cpu.gemm_pack");
  const void* b = nullptr;
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == n &&
                    bias->is_contiguous(),
                "bi_cpu.gemm: bias must be dense [N=", n, "] of ", x.scalar_type());
    b = bias->const_data_ptr();
  }
  const at::Tensor a = as_rows(x, k);
  auto shape = x.sizes().vec();
  shape.back() = n;
  at::Tensor y = empty_result(shape, x.options());
  bi::gemm(type, a.const_data_ptr(), a.stride(0), a.size(0), packed.const_data_ptr(), n, k, b,
           y.mutable_data_ptr(), at::get_num_threads());
  return y;
}

at::Tensor gemm_sums(const at::Tensor& x, const at::Tensor& packed, int64_t n, int64_t k) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == k && x.stride(1) == 1, "bi_cpu.gemm_sums: x must be [M, K=", k,
              "], dense in the last, got ", x.sizes());
  const auto type = dtype_of(x, "x");
  TORCH_CHECK(packed.scalar_type() == x.scalar_type() && packed.is_contiguous() &&
                  packed.numel() == (int64_t)bi::gemm_packed_size(type, n, k),
              "bi_cpu.gemm_sums: the packed weight is not that of [", n, ", ", k, "] of ", x.scalar_type());
  at::Tensor y = at::empty({x.size(0), n}, x.options().dtype(at::kFloat));
  bi::gemm_sums(type, x.const_data_ptr(), x.stride(0), x.size(0), packed.const_data_ptr(), n, k,
                y.mutable_data_ptr<float>(), at::get_num_threads());
  return y;
}

bi::KvCache cache_of(const at::Tensor& kv) {
  TORCH_CHECK(kv.dim() == 4, "bi_cpu: kv_cache must be [blocks, kv_heads, block_size, 2 * D], got ", kv.sizes());
  bi::KvCache c;
  c.type = dtype_of(kv, "kv_cache");
  c.data = kv.data_ptr();
  c.blocks = kv.size(0);
  c.kv_heads = kv.size(1);
  c.block_size = kv.size(2);
  c.dim = kv.size(3) / 2;
  c.block_stride = kv.stride(0);
  c.head_stride = kv.stride(1);
  TORCH_CHECK(kv.size(3) % 2 == 0 && c.dim % 16 == 0 && c.dim >= 16 && c.dim <= 512,
              "bi_cpu: head_dim must be a multiple of 16 up to 512, got kv_cache ", kv.sizes());
  TORCH_CHECK(c.block_size % 16 == 0 && c.block_size > 0, "bi_cpu: block_size must be a multiple of 16, got ", c.block_size);
  TORCH_CHECK(kv.stride(3) == 1 && kv.stride(2) == 2 * c.dim,
              "bi_cpu: each (block, kv_head) page of kv_cache must be dense, strides are ", kv.strides());
  return c;
}

void check_rows(const at::Tensor& t, const char* what, const bi::KvCache& c, at::ScalarType type) {
  TORCH_CHECK(t.dim() == 3 && t.size(2) == c.dim && t.stride(2) == 1,
              "bi_cpu: ", what, " must be [tokens, heads, ", c.dim, "], dense in the last, got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == type, "bi_cpu: ", what, " is ", t.scalar_type(), " but kv_cache is ", type);
}

void kv_store(const at::Tensor& key, const at::Tensor& value, at::Tensor kv_cache, const at::Tensor& slots) {
  const bi::KvCache c = cache_of(kv_cache);
  check_rows(key, "key", c, kv_cache.scalar_type());
  check_rows(value, "value", c, kv_cache.scalar_type());
  TORCH_CHECK(key.size(1) == c.kv_heads && value.size(1) == c.kv_heads,
              "bi_cpu.kv_store: key and value must have ", c.kv_heads, " heads, got ", key.sizes(), value.sizes());
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.dim() == 1 && slots.is_contiguous(),
              "bi_cpu.kv_store: slot_mapping must be dense int64 [tokens]");
  // vLLM may pad key and value beyond the tokens that have a slot.
  const int64_t tokens = slots.size(0);
  TORCH_CHECK(key.size(0) >= tokens && value.size(0) >= tokens,
              "bi_cpu.kv_store: ", tokens, " slots but key ", key.sizes(), ", value ", value.sizes());
  const int64_t* s = slots.const_data_ptr<int64_t>();
  const int64_t limit = c.blocks * c.block_size;
  for (int64_t i = 0; i < tokens; ++i)
    TORCH_CHECK(s[i] < limit, "bi_cpu.kv_store: slot ", s[i], " is past the cache of ", limit);
  bi::kv_store(c, key.const_data_ptr(), key.stride(0), key.stride(1), value.const_data_ptr(),
               value.stride(0), value.stride(1), s, tokens, at::get_num_threads());
}

const int32_t* int32_of(const at::Tensor& t, const char* what, int64_t dim) {
  TORCH_CHECK(t.scalar_type() == at::kInt && t.dim() == dim && (t.numel() == 0 || t.stride(dim - 1) == 1),
              "bi_cpu.attention: ", what, " must be int32, ", dim, "-D, dense in the last dimension");
  return t.const_data_ptr<int32_t>();
}

// Reads the requests of a step into AttentionArgs or LatentArgs, and checks every block that a request names.
template <class Args>
void read_requests(Args& a, const at::Tensor& query, const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                   const at::Tensor& block_table, int64_t held, int64_t block_size, const char* op) {
  a.query_start = int32_of(query_start_loc, "query_start_loc", 1);
  a.seq_lens = int32_of(seq_lens, "seq_lens", 1);
  a.table = int32_of(block_table, "block_table", 2);
  a.table_stride = block_table.stride(0);
  a.reqs = seq_lens.size(0);
  TORCH_CHECK(query_start_loc.size(0) >= a.reqs + 1 && block_table.size(0) >= a.reqs, op, ": ", a.reqs,
              " seq_lens but query_start_loc ", query_start_loc.sizes(), ", block_table ", block_table.sizes());
  for (int r = 0; r < a.reqs; ++r) {
    const int64_t q = a.query_start[r + 1] - a.query_start[r], s = a.seq_lens[r];
    TORCH_CHECK(q >= 0 && (q == 0 || q <= s) && a.query_start[r] >= 0 && a.query_start[r + 1] <= query.size(0), op,
                ": request ", r, " has ", q, " query tokens, seq_len ", s, ", query ", query.sizes());
    const int64_t blocks = q ? (s + block_size - 1) / block_size : 0;
    TORCH_CHECK(blocks <= block_table.size(1), op, ": request ", r, " needs ", blocks, " blocks, block_table has ",
                block_table.size(1));
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t id = a.table[r * a.table_stride + b];
      TORCH_CHECK(id >= 0 && id < held, op, ": request ", r, " names block ", id, " of ", held);
    }
  }
}

void attention(at::Tensor out, const at::Tensor& query, const at::Tensor& kv_cache,
               const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
               const at::Tensor& block_table, double scale, int64_t window_left, double softcap, bool causal) {
  bi::AttentionArgs a;
  a.kv = cache_of(kv_cache);
  check_rows(query, "query", a.kv, kv_cache.scalar_type());
  check_rows(out, "out", a.kv, kv_cache.scalar_type());
  a.heads = query.size(1);
  TORCH_CHECK(a.heads > 0 && a.heads % a.kv.kv_heads == 0, "bi_cpu.attention: ", a.heads,
              " heads are not a multiple of ", a.kv.kv_heads, " kv heads");
  TORCH_CHECK(out.size(0) >= query.size(0) && out.size(1) == a.heads, "bi_cpu.attention: out ", out.sizes(),
              " does not hold query ", query.sizes());
  a.query = query.const_data_ptr();
  a.query_token = query.stride(0);
  a.query_head = query.stride(1);
  a.out = out.mutable_data_ptr();
  a.out_token = out.stride(0);
  a.out_head = out.stride(1);
  read_requests(a, query, query_start_loc, seq_lens, block_table, a.kv.blocks, a.kv.block_size, "bi_cpu.attention");
  TORCH_CHECK(softcap >= 0, "bi_cpu.attention: softcap must be >= 0, got ", softcap);
  a.scale = float(scale);
  a.window_left = window_left < 0 ? -1 : int(std::min<int64_t>(window_left, INT32_MAX));
  a.softcap = float(softcap);
  a.causal = causal;
  bi::attention(a, at::get_num_threads());
}

bi::DType latent_types(const at::Tensor& cache, const at::Tensor& query, const at::Tensor& out) {
  TORCH_CHECK(query.scalar_type() == cache.scalar_type() && out.scalar_type() == cache.scalar_type(),
              "bi_cpu.latent_attention: query is ", query.scalar_type(), ", out ", out.scalar_type(), ", the cache ",
              cache.scalar_type());
  return dtype_of(cache, "cache");
}

void latent_attention(at::Tensor out, const at::Tensor& query, const at::Tensor& cache,
                      const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                      double scale) {
  bi::LatentArgs a;
  a.type = latent_types(cache, query, out);
  TORCH_CHECK(cache.dim() == 3 && cache.stride(2) == 1 && cache.stride(1) == cache.size(2),
              "bi_cpu.latent_attention: cache must be [blocks, block_size, D], dense in the last two, got ",
              cache.sizes());
  a.dim = cache.size(2);
  TORCH_CHECK(query.dim() == 3 && query.size(2) == a.dim && query.stride(2) == 1,
              "bi_cpu.latent_attention: query must be [tokens, heads, D=", a.dim, "], dense in the last, got ",
              query.sizes());
  a.heads = query.size(1);
  TORCH_CHECK(out.dim() == 3 && out.stride(2) == 1 && out.size(1) == a.heads && out.size(0) >= query.size(0),
              "bi_cpu.latent_attention: out ", out.sizes(), " does not hold query ", query.sizes());
  a.vdim = out.size(2);
  TORCH_CHECK(a.dim % 16 == 0 && a.vdim % 16 == 0 && a.vdim >= 16 && a.vdim <= a.dim && a.dim <= bi::kMaxLatent,
              "bi_cpu.latent_attention: D and V must be multiples of 16, V <= D <= ", bi::kMaxLatent, ", got ", a.dim,
              " and ", a.vdim);
  a.cache = cache.const_data_ptr();
  a.block_stride = cache.stride(0);
  a.block_size = cache.size(1);
  a.query = query.const_data_ptr();
  a.query_token = query.stride(0);
  a.query_head = query.stride(1);
  a.out = out.mutable_data_ptr();
  a.out_token = out.stride(0);
  a.out_head = out.stride(1);
  const int64_t blocks = cache.size(0);
  read_requests(a, query, query_start_loc, seq_lens, block_table, blocks, a.block_size, "bi_cpu.latent_attention");
  a.scale = float(scale);
  bi::latent_attention(a, at::get_num_threads());
}

void heads_gemm(at::Tensor out, const at::Tensor& x, const at::Tensor& packed) {
  bi::HeadsGemmArgs a;
  a.type = dtype_of(x, "x");
  TORCH_CHECK(x.dim() == 3 && out.dim() == 3 && x.stride(2) == 1 && out.stride(2) == 1 && out.size(0) == x.size(0) &&
                  out.size(1) == x.size(1) && x.size(1) > 0 && x.size(2) > 0 && out.size(2) > 0,
              "bi_cpu.heads_gemm: x [tokens, heads, K] and out [tokens, heads, N] must be dense in the last, got ",
              x.sizes(), " and ", out.sizes());
  a.tokens = x.size(0);
  a.heads = x.size(1);
  a.k = x.size(2);
  a.n = out.size(2);
  TORCH_CHECK(packed.scalar_type() == x.scalar_type() && out.scalar_type() == x.scalar_type(),
              "bi_cpu.heads_gemm: x is ", x.scalar_type(), ", out ", out.scalar_type(), ", the packed weight ",
              packed.scalar_type());
  TORCH_CHECK(packed.dim() == 2 && packed.is_contiguous() && packed.size(0) == a.heads &&
                  packed.size(1) == (int64_t)bi::gemm_packed_size(a.type, a.n, a.k),
              "bi_cpu.heads_gemm: packed weights ", packed.sizes(), " are not those of ", a.heads, " heads of [", a.n,
              ", ", a.k, "]; pack each with bi_cpu.gemm_pack");
  a.x = x.const_data_ptr();
  a.x_token = x.stride(0);
  a.x_head = x.stride(1);
  a.packed = packed.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.out_token = out.stride(0);
  a.out_head = out.stride(1);
  bi::heads_gemm(a, at::get_num_threads());
}

// Views x as [rows, heads, cols] with dense columns, or copies x. Shapes other than 3-D have one head.
at::Tensor as_heads(const at::Tensor& x) {
  const at::Tensor dense = x.stride(-1) == 1 ? x : x.contiguous();
  if (dense.dim() == 3) return dense;
  if (dense.dim() == 2) return dense.unsqueeze(1);
  return dense.reshape({-1, 1, x.size(-1)});
}

std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                        const std::optional<at::Tensor>& weight, double eps, double offset) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "bi_cpu.rms_norm: x must be [..., C], got ", x.sizes());
  const int64_t cols = x.size(-1);
  bi::NormArgs a{};
  a.type = dtype_of(x, "x");
  if (weight) {
    TORCH_CHECK(weight->scalar_type() == x.scalar_type() && weight->dim() == 1 && weight->size(0) == cols &&
                    weight->is_contiguous(),
                "bi_cpu.rms_norm: weight must be dense [C=", cols, "] of ", x.scalar_type(), ", got ",
                weight->sizes(), " of ", weight->scalar_type());
    a.weight = weight->const_data_ptr();
  }
  at::Tensor held, sum;
  if (residual) {
    TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(),
                "bi_cpu.add_rms_norm: residual must be as x, ", x.sizes(), " of ", x.scalar_type(), ", got ",
                residual->sizes(), " of ", residual->scalar_type());
    held = residual->contiguous();
    a.residual = held.const_data_ptr();
    sum = empty_result(x.sizes(), x.options());
    a.sum = sum.mutable_data_ptr();
  }
  at::Tensor out = empty_result(x.sizes(), x.options());
  const at::Tensor rows = as_heads(x);
  a.x = rows.const_data_ptr();
  a.row = rows.stride(0);
  a.head = rows.stride(1);
  a.rows = rows.size(0);
  a.heads = rows.size(1);
  a.cols = cols;
  a.eps = float(eps);
  a.offset = float(offset);
  a.out = out.mutable_data_ptr();
  bi::rms_norm(a, at::get_num_threads());
  return {out, sum};
}

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double offset) {
  return std::get<0>(norm(x, std::nullopt, weight, eps, offset));
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const std::optional<at::Tensor>& weight, double eps, double offset) {
  return norm(x, residual, weight, eps, offset);
}

at::Tensor gated_rms_norm(const at::Tensor& x, const at::Tensor& gate, const std::optional<at::Tensor>& weight,
                          double eps, int64_t group, bool gate_first, bool sigmoid) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "bi_cpu.gated_rms_norm: x must be [..., C], got ", x.sizes());
  const int64_t width = x.size(-1);
  TORCH_CHECK(group > 0 && width % group == 0, "bi_cpu.gated_rms_norm: groups of ", group, " in ", x.sizes());
  TORCH_CHECK(gate.sizes() == x.sizes() && gate.scalar_type() == x.scalar_type(),
              "bi_cpu.gated_rms_norm: gate must be as x, ", x.sizes(), " of ", x.scalar_type(), ", got ", gate.sizes(),
              " of ", gate.scalar_type());
  bi::GatedNormArgs a{};
  a.type = dtype_of(x, "x");
  if (weight) {
    TORCH_CHECK(weight->scalar_type() == x.scalar_type() && weight->numel() == width && weight->is_contiguous(),
                "bi_cpu.gated_rms_norm: weight must be dense [C=", width, "] of ", x.scalar_type());
    a.weight = weight->const_data_ptr();
  }
  const at::Tensor dense = x.contiguous(), rows = as_rows(gate, width);
  at::Tensor out = empty_result(x.sizes(), x.options());
  a.x = dense.const_data_ptr();
  a.gate = rows.const_data_ptr();
  a.gate_row = rows.stride(0);
  a.rows = x.numel() / width;
  a.groups = width / group;
  a.cols = group;
  a.eps = float(eps);
  a.gate_first = gate_first;
  a.sigmoid = sigmoid;
  a.out = out.mutable_data_ptr();
  bi::gated_rms_norm(a, at::get_num_threads());
  return out;
}

// The requests of a step: query_start int32 [reqs + 1], slots int32 [reqs], fresh bool [reqs].
bi::Spans spans_of(const at::Tensor& query_start, const at::Tensor& slots, const at::Tensor& fresh, int64_t tokens,
                   int64_t states) {
  bi::Spans s;
  s.reqs = slots.size(0);
  TORCH_CHECK(query_start.scalar_type() == at::kInt && query_start.is_contiguous() && query_start.numel() == s.reqs + 1,
              "bi_cpu: query_start_loc must be dense int32 [", s.reqs + 1, "], got ", query_start.sizes());
  TORCH_CHECK(slots.scalar_type() == at::kInt && slots.dim() == 1 && slots.is_contiguous(),
              "bi_cpu: slots must be dense int32 [requests]");
  TORCH_CHECK(fresh.scalar_type() == at::kBool && fresh.is_contiguous() && fresh.numel() == s.reqs,
              "bi_cpu: fresh must be dense bool [", s.reqs, "], got ", fresh.sizes());
  s.query_start = query_start.const_data_ptr<int32_t>();
  s.slots = slots.const_data_ptr<int32_t>();
  s.fresh = fresh.const_data_ptr<bool>();
  for (int64_t r = 0; r < s.reqs; ++r) {
    const int64_t from = s.query_start[r], to = s.query_start[r + 1];
    TORCH_CHECK(0 <= from && from <= to && to <= tokens, "bi_cpu: request ", r, " has tokens ", from, " to ", to, " of ",
                tokens);
    TORCH_CHECK(from == to || (s.slots[r] >= 0 && s.slots[r] < states), "bi_cpu: request ", r, " names state ",
                s.slots[r], " of ", states);
  }
  return s;
}

at::Tensor causal_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::Tensor states, const at::Tensor& query_start, const at::Tensor& slots,
                       const at::Tensor& fresh, bool silu) {
  bi::ConvArgs a{};
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1, "bi_cpu.causal_conv: x must be [tokens, dim], dense in the last, got ",
              x.sizes());
  a.type = dtype_of(x, "x");
  a.dim = x.size(1);
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(0) == a.dim &&
                  weight.scalar_type() == x.scalar_type(),
              "bi_cpu.causal_conv: weight must be dense [", a.dim, ", width] of ", x.scalar_type(), ", got ",
              weight.sizes(), " of ", weight.scalar_type());
  a.width = weight.size(1);
  TORCH_CHECK(a.width >= 2 && a.width <= bi::kMaxWidth, "bi_cpu.causal_conv: a width of 2 to ", bi::kMaxWidth, ", not ",
              a.width);
  TORCH_CHECK(states.dim() == 3 && states.size(1) == a.width - 1 && states.size(2) == a.dim && states.stride(2) == 1 &&
                  states.scalar_type() == x.scalar_type(),
              "bi_cpu.causal_conv: states must be [slots, ", a.width - 1, ", ", a.dim, "] of ", x.scalar_type(),
              ", dense in the last, got ", states.sizes(), " of ", states.scalar_type());
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->numel() == a.dim && bias->is_contiguous(),
                "bi_cpu.causal_conv: bias must be dense [", a.dim, "] of ", x.scalar_type());
    a.bias = bias->const_data_ptr();
  }
  static_cast<bi::Spans&>(a) = spans_of(query_start, slots, fresh, x.size(0), states.size(0));
  at::Tensor out = empty_result(x.sizes(), x.options());
  a.x = x.const_data_ptr();
  a.x_token = x.stride(0);
  a.weight = weight.const_data_ptr();
  a.states = states.mutable_data_ptr();
  a.state_slot = states.stride(0);
  a.state_token = states.stride(1);
  a.out = out.mutable_data_ptr();
  a.silu = silu;
  bi::causal_conv(a, at::get_num_threads());
  return out;
}

const float* per_head(const at::Tensor& t, const char* what, int64_t heads) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == heads && t.is_contiguous(),
              "bi_cpu: ", what, " must be dense float32 [heads=", heads, "], got ", t.sizes(), " of ", t.scalar_type());
  return t.const_data_ptr<float>();
}

// What both recurrences share. out [tokens, heads, values], x [tokens, ...], a [tokens, heads], states [slots, heads,
// keys, values].
bi::RecurrenceArgs recurrence_of(at::Tensor& out, const at::Tensor& x, const at::Tensor& a, const at::Tensor& rate,
                                 const at::Tensor& dt_bias, at::Tensor& states, int64_t key_heads) {
  bi::RecurrenceArgs r{};
  r.type = dtype_of(x, "x");
  TORCH_CHECK(states.dim() == 4 && states.scalar_type() == at::kFloat && states[0].is_contiguous(),
              "bi_cpu: states of a recurrence must be float32 [slots, heads, keys, values], each slot dense, got ",
              states.sizes(), " of ", states.scalar_type());
  r.heads = states.size(1);
  r.keys = states.size(2);
  r.values = states.size(3);
  r.key_heads = key_heads;
  TORCH_CHECK(r.keys % 16 == 0 && r.keys <= 512 && r.values % 16 == 0,
              "bi_cpu: keys (up to 512) and values must be multiples of 16, got states ", states.sizes());
  TORCH_CHECK(key_heads > 0 && r.heads % key_heads == 0, "bi_cpu: ", r.heads, " heads are not a multiple of ",
              key_heads, " heads of keys");
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 && x.size(1) == 2 * key_heads * r.keys + r.heads * r.values,
              "bi_cpu: x must be [tokens, keys, queries and values], dense in the last, got ", x.sizes());
  TORCH_CHECK(out.dim() == 3 && out.size(0) >= x.size(0) && out.size(1) == r.heads && out.size(2) == r.values &&
                  out[0].is_contiguous() && out.scalar_type() == x.scalar_type(),
              "bi_cpu: out must be [tokens, ", r.heads, ", ", r.values, "] of ", x.scalar_type(), ", got ", out.sizes(),
              " of ", out.scalar_type());
  TORCH_CHECK(a.dim() == 2 && a.size(0) >= x.size(0) && a.size(1) == r.heads && a.stride(1) == 1 &&
                  a.scalar_type() == x.scalar_type(),
              "bi_cpu: a must be [tokens, heads=", r.heads, "] of ", x.scalar_type(), ", got ", a.sizes());
  r.rate = per_head(rate, "rate", r.heads);
  r.dt_bias = per_head(dt_bias, "dt_bias", r.heads);
  r.x = x.const_data_ptr();
  r.x_token = x.stride(0);
  r.a = a.const_data_ptr();
  r.a_token = a.stride(0);
  r.states = states.mutable_data_ptr();
  r.state_slot = states.stride(0);
  r.out = out.mutable_data_ptr();
  r.out_token = out.stride(0);
  return r;
}

void gated_delta_rule(at::Tensor out, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                      const at::Tensor& rate, const at::Tensor& dt_bias, at::Tensor states,
                      const at::Tensor& query_start, const at::Tensor& slots, const at::Tensor& fresh,
                      int64_t key_heads) {
  bi::RecurrenceArgs r = recurrence_of(out, x, a, rate, dt_bias, states, key_heads);
  TORCH_CHECK(b.sizes() == a.sizes() && b.stride(1) == 1 && b.scalar_type() == a.scalar_type(),
              "bi_cpu.gated_delta_rule: b must be as a, got ", b.sizes());
  r.delta = true;
  r.query_at = 0;
  r.key_at = key_heads * r.keys;
  r.value_at = 2 * key_heads * r.keys;
  r.b = b.const_data_ptr();
  r.b_token = b.stride(0);
  static_cast<bi::Spans&>(r) = spans_of(query_start, slots, fresh, x.size(0), states.size(0));
  bi::recurrence(r, at::get_num_threads());
}

void mamba2(at::Tensor out, const at::Tensor& x, const at::Tensor& dt, const at::Tensor& rate,
            const at::Tensor& dt_bias, const std::optional<at::Tensor>& D, at::Tensor states,
            const at::Tensor& query_start, const at::Tensor& slots, const at::Tensor& fresh, int64_t groups,
            double dt_min, double dt_max) {
  bi::RecurrenceArgs r = recurrence_of(out, x, dt, rate, dt_bias, states, groups);
  r.delta = false;
  r.value_at = 0;
  r.key_at = r.heads * r.values;
  r.query_at = r.key_at + groups * r.keys;
  r.D = D ? per_head(*D, "D", r.heads) : nullptr;
  r.dt_min = float(dt_min);
  r.dt_max = float(dt_max);
  static_cast<bi::Spans&>(r) = spans_of(query_start, slots, fresh, x.size(0), states.size(0));
  bi::recurrence(r, at::get_num_threads());
}

at::Tensor gated(const char* name, bi::Activation f, const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "bi_cpu.", name, ": x must be [..., 2 * D], got ", x.sizes());
  const auto type = dtype_of(x, "x");
  const int64_t cols = x.size(-1) / 2;
  auto shape = x.sizes().vec();
  shape.back() = cols;
  at::Tensor out = empty_result(shape, x.options());
  const at::Tensor rows = as_rows(x, 2 * cols);
  bi::gated(f, type, rows.const_data_ptr(), rows.stride(0), rows.size(0), cols, out.mutable_data_ptr(),
            at::get_num_threads());
  return out;
}

at::Tensor silu_and_mul(const at::Tensor& x) { return gated("silu_and_mul", bi::Activation::silu, x); }
at::Tensor gelu_and_mul(const at::Tensor& x, bool tanh) {
  return gated("gelu_and_mul", tanh ? bi::Activation::gelu_tanh : bi::Activation::gelu, x);
}

// As PyTorch's pointwise operators, the result has the order of x's strides and no gaps.
at::Tensor activate(bi::Activation f, const at::Tensor& x, double beta = 1, double threshold = 0) {
  const auto type = dtype_of(x, "x");
  const at::Tensor dense = x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
  at::Tensor out = at::empty_like(dense);
  bi::activate(f, type, dense.const_data_ptr(), dense.numel(), float(beta), float(threshold), out.mutable_data_ptr(),
               at::get_num_threads());
  return out;
}

at::Tensor sigmoid(const at::Tensor& x) { return activate(bi::Activation::sigmoid, x); }
at::Tensor silu(const at::Tensor& x) { return activate(bi::Activation::silu, x); }
at::Tensor rsqrt(const at::Tensor& x) { return activate(bi::Activation::rsqrt, x); }
at::Tensor gelu(const at::Tensor& x, bool tanh) {
  return activate(tanh ? bi::Activation::gelu_tanh : bi::Activation::gelu, x);
}
at::Tensor softplus(const at::Tensor& x, double beta, double threshold) {
  return activate(bi::Activation::softplus, x, beta, threshold);
}

at::Tensor rope(const at::Tensor& positions, const at::Tensor& x, const at::Tensor& cache, int64_t dim,
                bool neox) {
  bi::RopeArgs a;
  a.type = dtype_of(x, "x");
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.dim() == 1 && positions.is_contiguous(),
              "bi_cpu.rope: positions must be dense int64 [tokens]");
  a.tokens = positions.size(0);
  TORCH_CHECK(dim > 0 && a.tokens > 0 ? x.size(0) == a.tokens && x.numel() % (a.tokens * dim) == 0 : x.numel() == 0,
              "bi_cpu.rope: x must be [tokens=", a.tokens, ", heads * ", dim, "], got ", x.sizes());
  TORCH_CHECK(cache.dim() == 2 && cache.is_contiguous() && cache.scalar_type() == x.scalar_type() &&
                  cache.size(1) % 2 == 0 && cache.size(1) <= dim,
              "bi_cpu.rope: cache must be dense [positions, rotary <= ", dim, "] of ", x.scalar_type(), ", got ",
              cache.sizes(), " of ", cache.scalar_type());
  at::Tensor out = empty_result(x.sizes(), x.options());
  if (a.tokens == 0) return out;
  a.heads = x.numel() / (a.tokens * dim);
  const at::Tensor rows = as_rows(x, a.heads * dim);
  a.positions = positions.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < a.tokens; ++t)
    TORCH_CHECK(a.positions[t] >= 0 && a.positions[t] < cache.size(0), "bi_cpu.rope: position ", a.positions[t],
                " is outside the cache of ", cache.size(0));
  a.x = rows.const_data_ptr();
  a.token = rows.stride(0);
  a.cache = cache.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.dim = dim;
  a.rotary = cache.size(1);
  a.neox = neox;
  bi::rope(a, at::get_num_threads());
  return out;
}

std::tuple<at::Tensor, at::Tensor> softmax_topk(const at::Tensor& logits, int64_t k, bool renormalize) {
  TORCH_CHECK(logits.dim() == 2, "bi_cpu.softmax_topk: logits must be [rows, experts], got ", logits.sizes());
  TORCH_CHECK(k >= 1 && k <= logits.size(1), "bi_cpu.softmax_topk: ", k, " of ", logits.size(1), " experts");
  const auto type = dtype_of(logits, "logits");
  const at::Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous();
  at::Tensor weights = empty_result({x.size(0), k}, x.options().dtype(at::kFloat));
  at::Tensor ids = empty_result({x.size(0), k}, x.options().dtype(at::kInt));
  bi::softmax_topk(type, x.const_data_ptr(), x.stride(0), x.size(0), x.size(1), k, renormalize,
                   weights.mutable_data_ptr<float>(), ids.mutable_data_ptr<int32_t>(), at::get_num_threads());
  return {weights, ids};
}

at::Tensor l2_normalize(const at::Tensor& x, double eps) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "bi_cpu.l2_normalize: x must be [..., C], got ", x.sizes());
  const auto type = dtype_of(x, "x");
  at::Tensor out = empty_result(x.sizes(), x.options());
  const at::Tensor rows = as_rows(x, x.size(-1));
  bi::l2_normalize(type, rows.const_data_ptr(), rows.stride(0), rows.size(0), rows.size(1), float(eps),
                   out.mutable_data_ptr(), at::get_num_threads());
  return out;
}

at::Tensor softmax(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "bi_cpu.softmax: x must be [..., C], got ", x.sizes());
  const auto type = dtype_of(x, "x");
  at::Tensor out = empty_result(x.sizes(), x.options());
  const at::Tensor rows = as_rows(x, x.size(-1));
  bi::softmax(type, rows.const_data_ptr(), rows.stride(0), rows.size(0), rows.size(1), out.mutable_data_ptr(),
              at::get_num_threads());
  return out;
}

at::Tensor mean_rows(const at::Tensor& x, const at::Tensor& starts) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "bi_cpu.mean_rows: x must be [rows, C], got ", x.sizes());
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.dim() == 1 && starts.is_contiguous() && starts.size(0) >= 1,
              "bi_cpu.mean_rows: starts must be dense int64 [sequences + 1]");
  const int64_t seqs = starts.size(0) - 1;
  const int64_t* s = starts.const_data_ptr<int64_t>();
  TORCH_CHECK(s[0] >= 0 && s[seqs] <= x.size(0), "bi_cpu.mean_rows: starts leave the rows of x ", x.sizes());
  for (int64_t i = 0; i < seqs; ++i)
    TORCH_CHECK(s[i] < s[i + 1], "bi_cpu.mean_rows: sequence ", i, " has no rows");
  const auto type = dtype_of(x, "x");
  const at::Tensor rows = as_rows(x, x.size(1));
  at::Tensor out = empty_result({seqs, x.size(1)}, x.options().dtype(at::kFloat));
  bi::mean_rows(type, rows.const_data_ptr(), rows.stride(0), rows.size(1), s, seqs, out.mutable_data_ptr<float>(),
                at::get_num_threads());
  return out;
}

// A stack [slots, rows, cols] of adapters' weights, each dense.
void check_stack(const at::Tensor& w, const char* what, const at::Tensor& y, int64_t cols) {
  TORCH_CHECK(w.dim() == 3 && w.size(2) == cols && w.stride(2) == 1 && (w.size(1) == 1 || w.stride(1) == cols),
              "bi_cpu.lora: ", what, " must be [slots, rows, ", cols, "], each slot dense, got ", w.sizes());
  TORCH_CHECK(w.scalar_type() == y.scalar_type(), "bi_cpu.lora: ", what, " is ", w.scalar_type(), " but y is ",
              y.scalar_type());
}

void lora(at::Tensor y, const at::Tensor& x, const std::optional<at::Tensor>& a, const at::Tensor& b,
          const at::Tensor& slots, const std::optional<at::Tensor>& packed, const std::optional<at::Tensor>& ranks) {
  TORCH_CHECK(y.dim() == 2 && x.dim() == 2 && x.size(0) == y.size(0) && (y.size(1) <= 1 || y.stride(1) == 1),
              "bi_cpu.lora: y [rows, N] and x [rows, K] must be 2-D, with dense columns of y, got ", y.sizes(), ", ",
              x.sizes());
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "bi_cpu.lora: x is ", x.scalar_type(), " but y is ",
              y.scalar_type());
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.dim() == 1 && slots.is_contiguous() &&
                  slots.size(0) == y.size(0),
              "bi_cpu.lora: slots must be dense int64 [rows=", y.size(0), "], got ", slots.sizes());
  bi::LoraArgs g{};
  g.type = dtype_of(y, "y");
  g.rows = y.size(0);
  g.n = y.size(1);
  g.rank = b.size(-1);
  check_stack(b, "b", y, g.rank);
  TORCH_CHECK(b.size(1) == g.n && g.n > 0 && g.rank > 0, "bi_cpu.lora: b ", b.sizes(), " does not make y ", y.sizes());
  g.slots = b.size(0);
  g.k = x.size(1);
  if (a) {
    check_stack(*a, "a", y, g.k);
    TORCH_CHECK(a->size(0) == g.slots && a->size(1) == g.rank && g.k > 0, "bi_cpu.lora: a ", a->sizes(),
                " does not fit b ", b.sizes());
    g.a = a->const_data_ptr();
    g.a_slot = a->stride(0);
  } else {
    TORCH_CHECK(g.k == g.rank, "bi_cpu.lora: x ", x.sizes(), " does not fit b ", b.sizes());
  }
  g.b = b.const_data_ptr();
  g.b_slot = b.stride(0);
  g.slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < g.rows; ++i)
    TORCH_CHECK(g.slot[i] < g.slots, "bi_cpu.lora: row ", i, " names slot ", g.slot[i], " of ", g.slots);
  TORCH_CHECK(packed.has_value() == ranks.has_value(), "bi_cpu.lora: packed and ranks go together");
  if (packed) {
    TORCH_CHECK(packed->scalar_type() == y.scalar_type() && packed->is_contiguous() &&
                    packed->numel() == g.slots * bi::lora_room(g.type, g),
                "bi_cpu.lora: packed has ", packed->numel(), " elements, not those of ", g.slots, " slots");
    TORCH_CHECK(ranks->scalar_type() == at::kLong && ranks->is_contiguous() && ranks->numel() == g.slots,
                "bi_cpu.lora: ranks must be dense int64 [slots]");
    g.packed = packed->mutable_data_ptr();
    g.ranks = ranks->mutable_data_ptr<int64_t>();
    for (int64_t s = 0; s < g.slots; ++s)
      TORCH_CHECK(g.ranks[s] <= g.rank, "bi_cpu.lora: slot ", s, " has rank ", g.ranks[s], " of ", g.rank);
  }
  const at::Tensor rows = as_rows(x, g.k);
  g.x = rows.const_data_ptr();
  g.x_row = rows.stride(0);
  g.y = y.mutable_data_ptr();
  g.y_row = y.stride(0);
  bi::lora(g, at::get_num_threads());
}

// Elements of packed weights for each slot of these stacks.
int64_t lora_room(const std::optional<at::Tensor>& a, const at::Tensor& b) {
  bi::LoraArgs g{};
  g.n = b.size(-2);
  g.rank = b.size(-1);
  if (a) {
    g.k = a->size(-1);
    g.a = a->const_data_ptr();
  }
  return bi::lora_room(dtype_of(b, "b"), g);
}

// A view [tokens, width] of the type of x, dense in the last dimension.
const void* rows_of(const at::Tensor& t, const char* what, const at::Tensor& x, int64_t width) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == width && t.stride(1) == 1 &&
                  t.scalar_type() == x.scalar_type(),
              "bi_cpu.mamba1: ", what, " must be [", x.size(0), ", ", width, "] of ", x.scalar_type(),
              ", dense in the last, got ", t.sizes(), " of ", t.scalar_type());
  return t.const_data_ptr();
}

at::Tensor mamba1(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& b, const at::Tensor& c,
                  const std::optional<at::Tensor>& gate, const at::Tensor& A, const at::Tensor& D,
                  const std::optional<at::Tensor>& dt_bias, at::Tensor states, const at::Tensor& query_start,
                  const at::Tensor& slots, const at::Tensor& fresh) {
  bi::Mamba1Args a{};
  a.type = dtype_of(x, "x");
  TORCH_CHECK(states.dim() == 3 && states.scalar_type() == at::kFloat && states[0].is_contiguous() &&
                  states.size(2) % 16 == 0,
              "bi_cpu.mamba1: states must be float32 [slots, dim, a multiple of 16], each slot dense, got ",
              states.sizes(), " of ", states.scalar_type());
  a.dim = states.size(1);
  a.size = states.size(2);
  a.x = rows_of(x, "x", x, a.dim);
  a.dt = rows_of(dt, "dt", x, a.dim);
  a.b = rows_of(b, "B", x, a.size);
  a.c = rows_of(c, "C", x, a.size);
  if (gate) {
    a.gate = rows_of(*gate, "gate", x, a.dim);
    a.gate_token = gate->stride(0);
  }
  TORCH_CHECK(A.scalar_type() == at::kFloat && A.is_contiguous() && A.numel() == a.dim * a.size,
              "bi_cpu.mamba1: A must be dense float32 [", a.dim, ", ", a.size, "], got ", A.sizes());
  a.A = A.const_data_ptr<float>();
  a.D = per_head(D, "D", a.dim);
  a.dt_bias = dt_bias ? per_head(*dt_bias, "dt_bias", a.dim) : nullptr;
  static_cast<bi::Spans&>(a) = spans_of(query_start, slots, fresh, x.size(0), states.size(0));
  at::Tensor out = at::empty({x.size(0), a.dim}, x.options());
  a.x_token = x.stride(0);
  a.dt_token = dt.stride(0);
  a.b_token = b.stride(0);
  a.c_token = c.stride(0);
  a.states = states.mutable_data_ptr();
  a.state_slot = states.stride(0);
  a.out = out.mutable_data_ptr();
  bi::mamba1(a, at::get_num_threads());
  return out;
}

}  // namespace

TORCH_LIBRARY(bi_cpu, m) {
  m.def("gemm_pack(Tensor weight) -> Tensor");
  m.def("gemm(Tensor x, Tensor packed, int n, int k, Tensor? bias) -> Tensor");
  m.def("gemm_sums(Tensor x, Tensor packed, int n, int k) -> Tensor");
  m.def("gated_rms_norm(Tensor x, Tensor gate, Tensor? weight, float eps, int group, bool gate_first, bool sigmoid) "
        "-> Tensor");
  m.def("causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) states, Tensor query_start_loc, Tensor slots, "
        "Tensor fresh, bool silu) -> Tensor");
  m.def("gated_delta_rule(Tensor(a!) out, Tensor x, Tensor a, Tensor b, Tensor rate, Tensor dt_bias, "
        "Tensor(b!) states, Tensor query_start_loc, Tensor slots, Tensor fresh, int key_heads) -> ()");
  m.def("mamba2(Tensor(a!) out, Tensor x, Tensor dt, Tensor rate, Tensor dt_bias, Tensor? D, Tensor(b!) states, "
        "Tensor query_start_loc, Tensor slots, Tensor fresh, int groups, float dt_min, float dt_max) -> ()");
  m.def("kv_store(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()");
  m.def("attention(Tensor(a!) out, Tensor query, Tensor kv_cache, Tensor query_start_loc, "
        "Tensor seq_lens, Tensor block_table, float scale, int window_left, float softcap, bool causal=True) -> ()");
  m.def("latent_attention(Tensor(a!) out, Tensor query, Tensor cache, Tensor query_start_loc, Tensor seq_lens, "
        "Tensor block_table, float scale) -> ()");
  m.def("heads_gemm(Tensor(a!) out, Tensor x, Tensor packed) -> ()");
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("gelu_and_mul(Tensor x, bool tanh) -> Tensor");
  m.def("sigmoid(Tensor x) -> Tensor");
  m.def("silu(Tensor x) -> Tensor");
  m.def("gelu(Tensor x, bool tanh) -> Tensor");
  m.def("rsqrt(Tensor x) -> Tensor");
  m.def("softplus(Tensor x, float beta, float threshold) -> Tensor");
  m.def("softmax_topk(Tensor logits, int k, bool renormalize) -> (Tensor, Tensor)");
  m.def("l2_normalize(Tensor x, float eps) -> Tensor");
  m.def("softmax(Tensor x) -> Tensor");
  m.def("mean_rows(Tensor x, Tensor starts) -> Tensor");
  m.def("lora(Tensor(a!) y, Tensor x, Tensor? a, Tensor b, Tensor slots, Tensor(b!)? packed=None, "
        "Tensor(c!)? ranks=None) -> ()");
  m.def("lora_room(Tensor? a, Tensor b) -> int");
  m.def("mamba1(Tensor x, Tensor dt, Tensor b, Tensor c, Tensor? gate, Tensor A, Tensor D, Tensor? dt_bias, "
        "Tensor(a!) states, Tensor query_start_loc, Tensor slots, Tensor fresh) -> Tensor");
  m.def("rope(Tensor positions, Tensor x, Tensor cache, int head_size, bool neox) -> Tensor");
}

TORCH_LIBRARY_IMPL(bi_cpu, CPU, m) {
  m.impl("gemm_pack", &gemm_pack);
  m.impl("gemm", &gemm);
  m.impl("gemm_sums", &gemm_sums);
  m.impl("gated_rms_norm", &gated_rms_norm);
  m.impl("causal_conv", &causal_conv);
  m.impl("gated_delta_rule", &gated_delta_rule);
  m.impl("mamba2", &mamba2);
  m.impl("kv_store", &kv_store);
  m.impl("attention", &attention);
  m.impl("latent_attention", &latent_attention);
  m.impl("heads_gemm", &heads_gemm);
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("silu_and_mul", &silu_and_mul);
  m.impl("gelu_and_mul", &gelu_and_mul);
  m.impl("sigmoid", &sigmoid);
  m.impl("silu", &silu);
  m.impl("gelu", &gelu);
  m.impl("rsqrt", &rsqrt);
  m.impl("softplus", &softplus);
  m.impl("l2_normalize", &l2_normalize);
  m.impl("softmax", &softmax);
  m.impl("mean_rows", &mean_rows);
  m.impl("mamba1", &mamba1);
  m.impl("rope", &rope);
  m.impl("lora", &lora);
  m.impl("lora_room", &lora_room);
  m.impl("softmax_topk", &softmax_topk);
}
