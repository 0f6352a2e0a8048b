// What the kernels take from the machine: number formats, one warp's matrix products, copies that run beside the
// arithmetic. nvcc sees CUDA's own; any other C++ compiler sees `emulation/emulation.h`, the same on the CPU, so that
// the kernels are tested as they stand, without a GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define EXPORTED(kernel)
#else
#include "emulation/emulation.h"
#endif

using half_t = __half;
using bfloat_t = __nv_bfloat16;

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half_t x) { return __half2float(x); }
__device__ inline float to_float(bfloat_t x) { return __bfloat162float(x); }

template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float(float x) { return x; }
template <> __device__ inline half_t from_float(float x) { return __float2half_rn(x); }
template <> __device__ inline bfloat_t from_float(float x) { return __float2bfloat16_rn(x); }

/// Two neighbours in memory.
template <class T> struct alignas(2 * sizeof(T)) Pair {
    T low, high;
};

/// N neighbours in memory, moved in one.
template <class T, int N> struct alignas(N * sizeof(T)) Few {
    T values[N];
};

template <class T> __device__ inline Pair<T> pair_of(float low, float high) {
    return {from_float<T>(low), from_float<T>(high)};
}

/// The sum over the lanes that differ in the bits of `lanes - 1`; the same bits in each of them.
__device__ inline float sum_of_lanes(float x, int lanes = 32) {
    for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

__device__ inline float max_of_lanes(float x, int lanes) {
    for (int other = lanes / 2; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, other));
    return x;
}

#ifdef __CUDACC__

template <class T> __device__ inline uint32_t packed(float low, float high) {
    Pair<T> pair = pair_of<T>(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// d (16×8) += a (16×16) · b (16×8), spread over the lanes as PTX's `mma.m16n8k16` has it: lane 4·g + t holds rows g, g+8
// and columns 2t, 2t+1 of d.
template <class T> __device__ void multiply_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define MMA_16(type, name)                                                                                              \
    template <> __device__ inline void multiply_16<type>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "  \
                     "{%8, %9}, {%0, %1, %2, %3};"                                                                       \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                \
    }
MMA_16(half_t, "f16")
MMA_16(bfloat_t, "bf16")

// The same with 8 in the middle.
template <class T> __device__ void multiply_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

#define MMA_8(type, name)                                                                                             \
    template <> __device__ inline void multiply_8<type>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {          \
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "   \
                     "{%0, %1, %2, %3};"                                                                               \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(b));                                                                  \
    }
MMA_8(half_t, "f16")
MMA_8(bfloat_t, "bf16")

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 8×8 matrices of 16-bit values; lane 8·m + r names row r of matrix m. Lane 4·g + t gets the values 2t, 2t+1 of row g of
// each, or, transposed, of column g.
#define LOAD_MATRICES(function, count, name, outputs, address)                                                    \
    __device__ inline void function(uint32_t (&r)[count], const void* row) {                                      \
        asm volatile("ldmatrix.sync.aligned.m8n8." name ".shared.b16 " outputs ", [" address "];"                  \
                     : LOADED_##count                                                                             \
                     : "r"(shared_address(row))                                                                   \
                     : "memory");                                                                                 \
    }
#define LOADED_2 "=r"(r[0]), "=r"(r[1])
#define LOADED_4 "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
LOAD_MATRICES(load_matrices, 2, "x2", "{%0, %1}", "%2")
LOAD_MATRICES(load_matrices, 4, "x4", "{%0, %1, %2, %3}", "%4")
LOAD_MATRICES(load_transposed, 2, "x2.trans", "{%0, %1}", "%2")
LOAD_MATRICES(load_transposed, 4, "x4.trans", "{%0, %1, %2, %3}", "%4")

/// 16 bytes into shared memory, zeros where `is_there` is false; there after `wait_for_copies`, for others after a
/// barrier behind that.
__device__ inline void copy_16_bytes(void* shared, const void* global, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(is_there ? 16 : 0)
                 : "memory");
}

/// All copies that this thread began.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif
