// What gemm.cpp and gemm_amx.cpp share. The K blocks are part of the order.
#pragma once
#include <cstdint>
#include "api.h"
#include "vec.h"

namespace bi {

// Length of a K block: a function of K alone, the same as in oneDNN's AVX-512 matmul.
inline int64_t k_block(int64_t k) { return k > 1024 ? 1024 : 512; }

template <class T> struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DType value = DType::f32; };
template <> struct DTypeOf<bf16> { static constexpr DType value = DType::bf16; };
template <> struct DTypeOf<fp16> { static constexpr DType value = DType::f16; };

// K is padded with zeros to a multiple of this many elements.
constexpr int64_t k_pad(DType t) { return t == DType::bf16 ? 2 : 1; }

#if defined(BI_AMX)
// gemm_amx.cpp: bf16 on tiles, with a layout of its own.
size_t gemm_amx_packed_size(int64_t n, int64_t k);
void gemm_amx_pack(const bf16* w, int64_t ldw, int64_t n, int64_t k, bf16* packed, int threads);
void gemm_amx(const bf16* x, int64_t ldx, int64_t m, const bf16* packed, int64_t n, int64_t k,
              const bf16* bias, bf16* y, float* wide, int threads);
#endif

}  // namespace bi
