// Products of tiles in shared memory. 16 rows belong to a warp; what a lane holds of a 16×8 result is the same for every
// number format: rows g, g+8 and columns 2t, 2t+1 with g = lane / 4, t = lane % 4. f16 and bf16 go through the tensor
// cores with sums in f32; f32 is plain arithmetic in the same places, so that one kernel serves all three.
#pragma once

#include "device.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;

/// Values from one row of a tile to the next: D and what keeps rows that are read together in different banks.
template <class T, int D> __host__ __device__ constexpr int stride_of() {
    return sizeof(T) == 4 ? D + 4 : D / 8 % 2 == 0 ? D + 8 : D;
}

struct alignas(16) Four {
    float x, y, z, w;
};

__device__ inline Four four_at(const float* at) { return *reinterpret_cast<const Four*>(at); }

__device__ inline float dot(Four a, Four b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

/// Begins to copy `there` rows of D values, `row_stride` apart, into a tile of ROWS, whose other rows become zero.
template <class T, int D, int ROWS>
__device__ inline void load_tile(T* tile, const T* rows, int row_stride, int there) {
    constexpr int PER_COPY = 16 / sizeof(T), COPIES = D / PER_COPY;
    for (int i = threadIdx.x; i < ROWS * COPIES; i += THREADS) {
        int row = i / COPIES, column = i % COPIES * PER_COPY;
        bool is_there = row < there;
        const T* from = is_there ? rows + (size_t)row * row_stride + column : rows;
        copy_16_bytes(tile + row * stride_of<T, D>() + column, from, is_there);
    }
}

/// sums[m][n] += rows 16m.. of `left` times rows 8n.. of `right`, transposed; both of D values a row.
template <class T, int D, int M, int N>
__device__ inline void products(float (&sums)[M][N][4], const T* left, const T* right) {
    constexpr int STRIDE = stride_of<T, D>();
    int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
    if constexpr (sizeof(T) == 2) {
        const T* a_at = left + (matrix % 2 * 8 + row) * STRIDE + matrix / 2 * 8;
        const T* b_at = right + (matrix / 2 * 8 + row) * STRIDE + matrix % 2 * 8;
#pragma unroll
        for (int k = 0; k + 16 <= D; k += 16) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) load_matrices(a[m], a_at + 16 * m * STRIDE + k);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[4];
                load_matrices(b, b_at + 8 * n * STRIDE + k);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    multiply_16<T>(sums[m][n], a[m], {b[0], b[1]});
                    multiply_16<T>(sums[m][n + 1], a[m], {b[2], b[3]});
                }
            }
        }
        if constexpr (D % 16 == 8) {
            int at = (lane % 16) * STRIDE + D - 8;
            uint32_t a[M][2];
#pragma unroll
            for (int m = 0; m < M; m++) load_matrices(a[m], left + 16 * m * STRIDE + at);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[2];
                load_matrices(b, right + 8 * n * STRIDE + at);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    multiply_8<T>(sums[m][n], a[m], b[0]);
                    multiply_8<T>(sums[m][n + 1], a[m], b[1]);
                }
            }
        }
    } else {
        int g = lane / 4, t = lane % 4;
#pragma unroll 2
        for (int k = 0; k < D; k += 4) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                Four a[2];
#pragma unroll
                for (int i = 0; i < 2; i++) a[i] = four_at(left + (16 * m + g + 8 * i) * STRIDE + k);
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        Four b = four_at(right + (8 * n + 2 * t + i) * STRIDE + k);
                        sums[m][n][i] += dot(a[0], b);
                        sums[m][n][2 + i] += dot(a[1], b);
                    }
                }
            }
        }
    }
}

/// sums[m] (16 × D) += weights[m] (16 × 8N, as `products` left them) times the 8N rows of `right`.
template <class T, int D, int M, int N>
__device__ inline void add_weighted(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4], const T* right) {
    constexpr int STRIDE = stride_of<T, D>();
    int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        const T* at = right + (lane % 16) * STRIDE + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            // A result's places are those of a left factor: the probabilities never leave the registers.
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                const auto &w = weights[m][n], &next = weights[m][n + 1];
                a[m][0] = packed<T>(w[0], w[1]);
                a[m][1] = packed<T>(w[2], w[3]);
                a[m][2] = packed<T>(next[0], next[1]);
                a[m][3] = packed<T>(next[2], next[3]);
            }
#pragma unroll
            for (int d = 0; d + 1 < D / 8; d += 2) {
                uint32_t b[4];
                load_transposed(b, at + 8 * n * STRIDE + 8 * d);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    multiply_16<T>(sums[m][d], a[m], {b[0], b[1]});
                    multiply_16<T>(sums[m][d + 1], a[m], {b[2], b[3]});
                }
            }
            if constexpr (D / 8 % 2 == 1) {
                uint32_t b[2];
                load_transposed(b, right + (8 * n + lane % 16) * STRIDE + D - 8);
#pragma unroll
                for (int m = 0; m < M; m++) multiply_16<T>(sums[m][D / 8 - 1], a[m], b);
            }
        }
    } else {
        int t = lane % 4;
#pragma unroll
        for (int n = 0; n < N; n++) {
            for (int from = 0; from < 4; from++) {
                const T* row = right + (8 * n + 2 * from) * STRIDE + 2 * t;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    float w[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) w[i] = __shfl_sync(ALL_LANES, weights[m][n][i], lane / 4 * 4 + from);
#pragma unroll
                    for (int d = 0; d < D / 8; d++) {
                        float b0 = row[8 * d], b1 = row[8 * d + 1];
                        float c0 = row[STRIDE + 8 * d], c1 = row[STRIDE + 8 * d + 1];
                        sums[m][d][0] += w[0] * b0 + w[1] * c0;
                        sums[m][d][1] += w[0] * b1 + w[1] * c1;
                        sums[m][d][2] += w[2] * b0 + w[3] * c0;
                        sums[m][d][3] += w[2] * b1 + w[3] * c1;
                    }
                }
            }
        }
    }
}

/// Writes the rows below `there` of a result of 16·M rows, each value times `factor[m][row / 8]`.
template <class T, int D, int M>
__device__ inline void store_rows(T* rows, int row_stride, int there, const float (&sums)[M][D / 8][4],
                                  const float (&factor)[M][2]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = 16 * m + g + 8 * half;
            if (row >= there) continue;
            T* at = rows + (size_t)row * row_stride + 2 * t;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                float f = factor[m][half];
                *reinterpret_cast<Pair<T>*>(at + 8 * d) =
                    pair_of<T>(sums[m][d][2 * half] * f, sums[m][d][2 * half + 1] * f);
            }
        }
    }
}
