// Kernels with faults, for the tests to see that the emulation finds them. Never part of a build for a GPU.
#include "../device.cuh"

/// Reads a neighbour's value with no barrier behind its writing.
extern "C" __global__ void fault_race(const float* x, float* y) {
    SHARED_BYTES(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    int i = threadIdx.x;
    shared[i] = x[i];
    y[i] = shared[(i + 32) % blockDim.x];
}
EXPORTED(fault_race)

/// Two blocks write the same value.
extern "C" __global__ void fault_blocks(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
EXPORTED(fault_blocks)

/// Reads one value past the end.
extern "C" __global__ void fault_bounds(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
EXPORTED(fault_bounds)

/// A barrier that half of the threads never reach.
extern "C" __global__ void fault_barrier(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x < 32) __syncthreads();
}
EXPORTED(fault_barrier)

/// Reads what was copied without waiting for it, or, `is_waiting`, without a barrier.
template <bool IS_WAITING> __device__ inline void copy_unseen(const float* x, float* y) {
    SHARED_BYTES(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    int i = threadIdx.x;
    if (i % 4 == 0) copy_16_bytes(shared + i, x + i, true);
    if (IS_WAITING) wait_for_copies();
    else __syncthreads();
    y[i] = shared[i];
    if (!IS_WAITING) wait_for_copies();
}

extern "C" __global__ void fault_unwaited(const float* x, float* y) { copy_unseen<false>(x, y); }
EXPORTED(fault_unwaited)

extern "C" __global__ void fault_unseen(const float* x, float* y) { copy_unseen<true>(x, y); }
EXPORTED(fault_unseen)
