// CUDA's side of `device.cuh` on the CPU: the threads of a block are fibers that change places, in an order drawn by lot,
// wherever the machine's could wait for one another: barriers, shuffles, matrix instructions. Copies that run beside the
// arithmetic are made as late as they may be, so that who does not wait for them reads the old value.
//
// Built with ThreadSanitizer, a switch of fibers orders nothing and only barriers do (of a block, of a warp): two threads
// that touch the same place without one between them are reported, in shared and in global memory, whatever the order
// was. Built with AddressSanitizer, every tensor and the shared memory are allocations of exactly their size.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__SANITIZE_THREAD__)
#define UNWATCHED __attribute__((noinline, no_sanitize_thread))
#else
#define UNWATCHED __attribute__((noinline))
#endif

// --- number formats ---

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __half2float(__half x) {
    _Float16 value;
    memcpy(&value, &x.bits, 2);
    return (float)value;
}

inline __half __float2half_rn(float x) {
    _Float16 value = (_Float16)x;
    __half half;
    memcpy(&half.bits, &value, 2);
    return half;
}

inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (std::isnan(x)) return {(uint16_t)0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using std::isfinite;

// --- who and where a thread is ---

namespace emulation {

struct Index {
    unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
unsigned char* shared_bytes();

void block_barrier();
void warp_barrier();

/// What every lane of the warp gave at this place in the program; all must stand at the same `site`.
struct Given {
    uint32_t words[32][8];
};
const Given& among_lanes(const uint32_t* own, int n_words, const char* site);

/// Word number `i` of what a lane gave.
UNWATCHED uint32_t word_of(const Given& given, int lane, int i);

void begin_copy(void* to, const void* from, bool is_there);
void finish_copies();

/// Enters a kernel by its name, for `emulation/main.cpp` to find.
struct Kernel {
    Kernel(const char* name, void (*run)(void* const* arguments), size_t n_arguments);
};

template <auto F> struct Unpacked;
template <class... A, void (*F)(A...)> struct Unpacked<F> {
    template <size_t... I> static void call(void* const* arguments, std::index_sequence<I...>) {
        F(*reinterpret_cast<std::remove_const_t<A>*>(arguments[I])...);
    }
    static void run(void* const* arguments) { call(arguments, std::index_sequence_for<A...>()); }
    static constexpr size_t COUNT = sizeof...(A);
};

} // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())
#define SHARED_BYTES(name) unsigned char* name = emulation::shared_bytes()
#define EXPORTED(kernel) \
    static emulation::Kernel entry_##kernel(#kernel, emulation::Unpacked<kernel>::run, emulation::Unpacked<kernel>::COUNT);

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

inline float shuffled(float x, int lane, const char* site) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = emulation::word_of(emulation::among_lanes(&bits, 1, site), lane, 0);
    memcpy(&x, &bits, 4);
    return x;
}
inline float __shfl_sync(unsigned, float x, int lane) { return shuffled(x, lane, "shfl"); }
inline float __shfl_xor_sync(unsigned, float x, int other) {
    return shuffled(x, (int)(emulation::thread_index().x % 32) ^ other, "shfl_xor");
}

// --- matrices of a warp, from the tables of PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8" and "ldmatrix" ---


namespace emulation {

template <class T> float value_of(uint32_t pair, int i) {
    uint16_t bits = (uint16_t)(pair >> 16 * i);
    T value;
    memcpy(&value, &bits, 2);
    if constexpr (std::is_same_v<T, __half>) return __half2float(value);
    else return __bfloat162float(value);
}

/// d += a·b with 8·STEPS in the middle. Register r of a: rows 8·(r % 2) + g, columns 8·(r / 2) + 2t, + 1.
template <class T, int STEPS> void multiply(float (&d)[4], const uint32_t (&a)[2 * STEPS], const uint32_t (&b)[STEPS]) {
    uint32_t own[3 * STEPS];
    memcpy(own, a, sizeof(a));
    memcpy(own + 2 * STEPS, b, sizeof(b));
    const Given& all = among_lanes(own, 3 * STEPS, "mma");
    int lane = thread_index().x % 32, g = lane / 4, t = lane % 4;
    for (int k = 0; k < 8 * STEPS; k += 2) {
        uint32_t rows[2], columns[2];
        for (int i = 0; i < 2; i++) {
            rows[i] = word_of(all, 4 * g + k % 8 / 2, k / 8 * 2 + i);
            columns[i] = word_of(all, 4 * (2 * t + i) + k % 8 / 2, 2 * STEPS + k / 8);
        }
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 2; j++) d[i] += value_of<T>(rows[i / 2], j) * value_of<T>(columns[i % 2], j);
        }
    }
}

template <int COUNT> void load_matrices(uint32_t (&r)[COUNT], const void* row, bool is_transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) __builtin_trap();
    uint32_t own[2];
    memcpy(own, &row, sizeof(row));
    const Given& all = among_lanes(own, 2, "ldmatrix");
    int lane = thread_index().x % 32, g = lane / 4, t = lane % 4;
    for (int m = 0; m < COUNT; m++) {
        uint16_t values[2];
        for (int i = 0; i < 2; i++) {
            int of_row = is_transposed ? 2 * t + i : g, column = is_transposed ? g : 2 * t + i;
            uint64_t address = word_of(all, 8 * m + of_row, 0) | (uint64_t)word_of(all, 8 * m + of_row, 1) << 32;
            values[i] = reinterpret_cast<const uint16_t*>(address)[column];
        }
        r[m] = values[0] | (uint32_t)values[1] << 16;
    }
}

} // namespace emulation

template <class T> uint32_t packed(float low, float high);
template <> inline uint32_t packed<__half>(float low, float high) {
    return __float2half_rn(low).bits | (uint32_t)__float2half_rn(high).bits << 16;
}
template <> inline uint32_t packed<__nv_bfloat16>(float low, float high) {
    return __float2bfloat16_rn(low).bits | (uint32_t)__float2bfloat16_rn(high).bits << 16;
}

template <class T> void multiply_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::multiply<T, 2>(d, a, b);
}
template <class T> void multiply_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    emulation::multiply<T, 1>(d, a, {b});
}

template <int COUNT> void load_matrices(uint32_t (&r)[COUNT], const void* row) {
    emulation::load_matrices(r, row, false);
}
template <int COUNT> void load_transposed(uint32_t (&r)[COUNT], const void* row) {
    emulation::load_matrices(r, row, true);
}

inline void copy_16_bytes(void* shared, const void* global, bool is_there) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) __builtin_trap();
    emulation::begin_copy(shared, global, is_there);
}
inline void wait_for_copies() { emulation::finish_copies(); }
