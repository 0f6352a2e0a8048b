// softmax(q·kᵀ/√D + bias)·v and its gradients without the matrix of scores (FlashAttention-2's bookkeeping, Dao 2023).
//
// Why not one that is there already: cuDNN's attention has a backward pass for some of these widths and biases only, and
// asks for its own graph library; candle-flash-attn has no backward pass, none of the widths 40 and 160 without padding,
// no bias, and fetches its sources while it is built. These are small, need nothing but nvcc, and are deterministic: dq
// and dk, dv come from two passes of which each adds up in one order, so that there are no atomic additions.
//
// q, out: [b, l, heads·D]; k, v: [b, s, heads·D]; bias: [b, groups, s] or null; lse (the logarithm of each query's
// denominator) and dot (Σ out·dout): [b, heads, l]. The CPU's twins are `ops/attention/kernel.rs`.
#pragma once

#include "tiles.cuh"

/// Tile sizes; `attention.rs` has the same.
template <class T, int D> struct Sizes {
    static constexpr bool IS_WIDE = D > 80;
    /// 16-row pieces of the queries of a warp in the forward pass: two share what is read of the keys.
    static constexpr int PIECES = sizeof(T) == 2 && D <= 64 ? 2 : 1;
    /// Keys at a time in the passes over keys.
    static constexpr int KEYS = sizeof(T) == 4 ? (IS_WIDE ? 16 : 32) : (IS_WIDE ? 32 : 64);
    /// Queries at a time in the pass over queries.
    static constexpr int QUERIES = IS_WIDE ? 16 : 32;
};

constexpr float LOG2_E = 1.4426950408889634f;

/// What every pass has to know of an attention.
struct Shape {
    int l, s, heads, groups;
    bool is_causal;
    /// 1/√D.
    float scale;
};

/// The row of the bias that a query of a set sees.
__device__ inline const float* bias_row(const float* bias, const Shape& at, int set, int query) {
    int group = (int)((long long)query * at.groups / at.l);
    return bias + ((size_t)set * at.groups + group) * at.s;
}

/// Scores times log₂e: scaled, biased, −∞ where the key is hidden or past the end. `key` is the first one of the tile.
template <int M, int N>
__device__ inline void finish_scores(float (&scores)[M][N][4], const Shape& at, const float* const (&bias)[M][2],
                                     const int (&query)[M][2], int key) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = key + 8 * n + 2 * t + i % 2;
                float score = scores[m][n][i] * (at.scale * LOG2_E);
                bool is_seen = column < at.s && !(at.is_causal && column > query[m][i / 2]);
                if (is_seen && bias[m][i / 2]) score += bias[m][i / 2][column] * LOG2_E;
                scores[m][n][i] = is_seen ? score : -INFINITY;
            }
        }
    }
}

/// What a block of a pass over keys works on: rows of queries of a head, and the keys that they see, a tile of which is
/// loaded while the one before it is worked on.
template <class T, int D, int ROWS> struct OverKeys {
    static constexpr int KEYS = Sizes<T, D>::KEYS, TILE = KEYS * stride_of<T, D>();
    int first, head, set, width, rows, n_keys, s;
    /// Where the block's queries begin, and the head's keys.
    size_t own, keys;
    const T *k, *v;
    /// Two of each.
    T *k_tiles, *v_tiles;

    __device__ OverKeys(const T* k, const T* v, T* tiles, const Shape& at)
        : first(blockIdx.x * ROWS), head(blockIdx.y), set(blockIdx.z), width(at.heads * D), rows(min(ROWS, at.l - first)),
          n_keys(at.is_causal ? min(at.s, first + ROWS) : at.s), s(at.s),
          own((size_t)set * at.l * width + (size_t)first * width + head * D), keys((size_t)set * at.s * width + head * D),
          k(k), v(v), k_tiles(tiles), v_tiles(tiles + 2 * TILE) {}

    /// Begins to load the tiles from `key` on.
    __device__ void load(int key) const {
        int there = min(KEYS, s - key);
        size_t from = keys + (size_t)key * width;
        load_tile<T, D, KEYS>(k_tiles + stage(key), k + from, width, there);
        load_tile<T, D, KEYS>(v_tiles + stage(key), v + from, width, there);
    }

    /// Which of the two the tile from `key` on is.
    __device__ int stage(int key) const { return key / KEYS % 2 * TILE; }

    /// Waits for the tile from `key` on, everybody being done with the one before, and begins to load the next.
    __device__ void advance(int key) const {
        wait_for_copies();
        __syncthreads();
        if (key + KEYS < n_keys) load(key + KEYS);
    }
};

template <class T, int D>
__device__ inline void attention_forward(const T* q, const T* k, const T* v, const float* bias, T* out, float* lse,
                                         Shape at) {
    constexpr int M = Sizes<T, D>::PIECES, KEYS = Sizes<T, D>::KEYS, N = KEYS / 8, ROWS = 16 * M * WARPS;
    constexpr int STRIDE = stride_of<T, D>();
    SHARED_BYTES(bytes);
    T* q_tile = reinterpret_cast<T*>(bytes);
    OverKeys<T, D, ROWS> block(k, v, q_tile + ROWS * STRIDE, at);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, first = block.first;
    load_tile<T, D, ROWS>(q_tile, q + block.own, block.width, block.rows);
    block.load(0);

    int query[M][2];
    const float* own_bias[M][2];
    float largest[M][2], total[M][2], result[M][D / 8][4] = {};
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            query[m][i] = min(first + 16 * (warp * M + m) + g + 8 * i, at.l - 1);
            own_bias[m][i] = bias ? bias_row(bias, at, block.set, query[m][i]) : nullptr;
            largest[m][i] = -INFINITY;
            total[m][i] = 0;
        }
    }
    for (int key = 0; key < block.n_keys; key += KEYS) {
        block.advance(key);
        float scores[M][N][4] = {};
        products<T, D>(scores, q_tile + warp * 16 * M * STRIDE, block.k_tiles + block.stage(key));
        finish_scores(scores, at, own_bias, query, key);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float top = largest[m][i];
#pragma unroll
                for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
                top = max_of_lanes(top, 4);
                // All keys so far hidden: exponents of −∞ and not of −∞ − −∞.
                float base = top == -INFINITY ? 0 : top;
                float shrink = exp2f(largest[m][i] - base);
                largest[m][i] = top;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int j = 2 * i; j < 2 * i + 2; j++) {
                        scores[m][n][j] = exp2f(scores[m][n][j] - base);
                        sum += scores[m][n][j];
                    }
                }
                total[m][i] = total[m][i] * shrink + sum;
#pragma unroll
                for (int d = 0; d < D / 8; d++) {
                    result[m][d][2 * i] *= shrink;
                    result[m][d][2 * i + 1] *= shrink;
                }
            }
        }
        add_weighted<T, D>(result, scores, block.v_tiles + block.stage(key));
    }
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = sum_of_lanes(total[m][i], 4);
            factor[m][i] = 1 / sum;
            int row = 16 * (warp * M + m) + g + 8 * i;
            if (row < block.rows && threadIdx.x % 4 == 0) {
                lse[((size_t)block.set * at.heads + block.head) * at.l + first + row] = largest[m][i] / LOG2_E + logf(sum);
            }
        }
    }
    int done = 16 * M * warp;
    store_rows<T, D, M>(out + block.own + (size_t)done * block.width, block.width, block.rows - done, result, factor);
}

/// dot = Σ out·dout of each query and head; a warp for each.
template <class T, int D>
__device__ inline void attention_dot(const T* out, const T* dout, float* dot, int l, int heads, int n) {
    int item = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (item >= n) return; // whole warps
    float sum = 0;
    for (int d = lane; d < D; d += 32) sum += to_float(out[(size_t)item * D + d]) * to_float(dout[(size_t)item * D + d]);
    sum = sum_of_lanes(sum);
    int head = item % heads, query = item / heads % l, set = item / heads / l;
    if (lane == 0) dot[((size_t)set * heads + head) * l + query] = sum;
}

/// dq, by blocks of queries: with P the probabilities, dS = P∘(dout·vᵀ − dot), dq = dS·k/√D.
template <class T, int D>
__device__ inline void attention_dq(const T* q, const T* k, const T* v, const float* bias, const T* dout,
                                    const float* lse, const float* dot, T* dq, Shape at) {
    constexpr int KEYS = Sizes<T, D>::KEYS, N = KEYS / 8, ROWS = 16 * WARPS, STRIDE = stride_of<T, D>();
    SHARED_BYTES(bytes);
    T* q_tile = reinterpret_cast<T*>(bytes);
    T* dout_tile = q_tile + ROWS * STRIDE;
    OverKeys<T, D, ROWS> block(k, v, dout_tile + ROWS * STRIDE, at);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    load_tile<T, D, ROWS>(q_tile, q + block.own, block.width, block.rows);
    load_tile<T, D, ROWS>(dout_tile, dout + block.own, block.width, block.rows);
    block.load(0);

    int query[1][2];
    const float* own_bias[1][2];
    float denominator[2], own_dot[2], result[1][D / 8][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = block.first + 16 * warp + g + 8 * i;
        query[0][i] = min(row, at.l - 1);
        own_bias[0][i] = bias ? bias_row(bias, at, block.set, query[0][i]) : nullptr;
        size_t kept = ((size_t)block.set * at.heads + block.head) * at.l + query[0][i];
        denominator[i] = lse[kept] * LOG2_E;
        own_dot[i] = dot[kept];
    }
    for (int key = 0; key < block.n_keys; key += KEYS) {
        block.advance(key);
        float p[1][N][4] = {}, ds[1][N][4] = {};
        products<T, D>(p, q_tile + warp * 16 * STRIDE, block.k_tiles + block.stage(key));
        finish_scores(p, at, own_bias, query, key);
        products<T, D>(ds, dout_tile + warp * 16 * STRIDE, block.v_tiles + block.stage(key));
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                ds[0][n][i] = exp2f(p[0][n][i] - denominator[i / 2]) * (ds[0][n][i] - own_dot[i / 2]);
            }
        }
        add_weighted<T, D>(result, ds, block.k_tiles + block.stage(key));
    }
    int done = 16 * warp;
    store_rows<T, D, 1>(dq + block.own + (size_t)done * block.width, block.width, block.rows - done, result, {{at.scale, at.scale}});
}

/// dk and dv, by blocks of keys: dv = Pᵀ·dout, dk = dSᵀ·q/√D. Everything is transposed: a warp's rows are keys.
template <class T, int D>
__device__ inline void attention_dkv(const T* q, const T* k, const T* v, const float* bias, const T* dout,
                                     const float* lse, const float* dot, T* dk, T* dv, Shape at) {
    constexpr int QUERIES = Sizes<T, D>::QUERIES, N = QUERIES / 8, ROWS = 16 * WARPS, STRIDE = stride_of<T, D>();
    SHARED_BYTES(bytes);
    T* k_tile = reinterpret_cast<T*>(bytes);
    T* v_tile = k_tile + ROWS * STRIDE;
    T* q_tiles = v_tile + ROWS * STRIDE;
    T* dout_tiles = q_tiles + 2 * QUERIES * STRIDE;
    float* kept_tiles = reinterpret_cast<float*>(dout_tiles + 2 * QUERIES * STRIDE); // two of (lse, dot) a query

    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int first = blockIdx.x * ROWS, head = blockIdx.y, set = blockIdx.z;
    int width = at.heads * D;
    size_t own = (size_t)set * at.s * width + (size_t)first * width + head * D;
    size_t queries = (size_t)set * at.l * width + head * D;
    size_t kept = ((size_t)set * at.heads + head) * at.l;
    int rows = min(ROWS, at.s - first);
    int start = at.is_causal ? first / QUERIES * QUERIES : 0;

    auto load = [&](int query) {
        int stage = query / QUERIES % 2, there = min(QUERIES, at.l - query);
        size_t from = queries + (size_t)query * width;
        load_tile<T, D, QUERIES>(q_tiles + stage * QUERIES * STRIDE, q + from, width, there);
        load_tile<T, D, QUERIES>(dout_tiles + stage * QUERIES * STRIDE, dout + from, width, there);
        float* numbers = kept_tiles + stage * 2 * QUERIES;
        for (int i = threadIdx.x; i < QUERIES; i += THREADS) {
            // Queries past the end have probability 0.
            numbers[i] = i < there ? lse[kept + query + i] * LOG2_E : INFINITY;
            numbers[QUERIES + i] = i < there ? dot[kept + query + i] : 0;
        }
    };
    load_tile<T, D, ROWS>(k_tile, k + own, width, rows);
    load_tile<T, D, ROWS>(v_tile, v + own, width, rows);
    load(start);

    int key[2] = {first + 16 * warp + g, first + 16 * warp + g + 8};
    float d_key[1][D / 8][4] = {}, d_value[1][D / 8][4] = {};
    for (int query = start; query < at.l; query += QUERIES) {
        wait_for_copies();
        __syncthreads();
        if (query + QUERIES < at.l) load(query + QUERIES);
        int stage = query / QUERIES % 2;
        const T *q_tile = q_tiles + stage * QUERIES * STRIDE, *dout_tile = dout_tiles + stage * QUERIES * STRIDE;
        const float* numbers = kept_tiles + stage * 2 * QUERIES;
        float p[1][N][4] = {}, ds[1][N][4] = {};
        products<T, D>(p, k_tile + warp * 16 * STRIDE, q_tile);
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = 8 * n + 2 * t + j;
                const float* row = bias ? bias_row(bias, at, set, min(query + column, at.l - 1)) : nullptr;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float score = p[0][n][2 * i + j] * (at.scale * LOG2_E);
                    bool is_seen = key[i] < at.s && !(at.is_causal && key[i] > query + column);
                    if (is_seen && row) score += row[key[i]] * LOG2_E;
                    p[0][n][2 * i + j] = is_seen ? exp2f(score - numbers[column]) : 0;
                }
            }
        }
        add_weighted<T, D>(d_value, p, dout_tile);
        products<T, D>(ds, v_tile + warp * 16 * STRIDE, dout_tile);
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - numbers[QUERIES + 8 * n + 2 * t + i % 2]);
        }
        add_weighted<T, D>(d_key, ds, q_tile);
    }
    int done = 16 * warp;
    size_t at_row = own + (size_t)done * width;
    store_rows<T, D, 1>(dk + at_row, width, rows - done, d_key, {{at.scale, at.scale}});
    store_rows<T, D, 1>(dv + at_row, width, rows - done, d_value, {{1, 1}});
}
