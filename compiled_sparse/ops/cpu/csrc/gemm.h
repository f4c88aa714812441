// C = A B, C += A B and C = diag(s) C + A B on small matrices held in cache.
#pragma once

#include "vector.h"

namespace block_sparse {

enum class Start { kZero, kAdd, kScale };

// How A is laid out: A(m, k) = a[m * lda + k] or a[k * lda + m].
enum class Layout { kRows, kColumns };

template <class T>
struct Operands {
    const T* a;
    ptrdiff_t lda;
    const T* b;  // B(k, n) = b[k * ldb + n], rows aligned to a vector.
    ptrdiff_t ldb;
    T* c;  // C(m, n) = c[m * ldc + n], rows aligned to a vector.
    ptrdiff_t ldc;
    const T* scale;  // One factor for each row, read for Start::kScale.
};

// Memory that the next product needs, to be prefetched during this one.
template <class T>
struct Ahead {
    const T* data = nullptr;
    int64_t elements = 0;

    void prefetch(int64_t share) {
        constexpr int64_t line = kLineBytes / static_cast<int64_t>(sizeof(T));
        const int64_t now = share < elements ? share : elements;
        for (int64_t i = 0; i < now; i += line) __builtin_prefetch(data + i, 0, 2);
        data += now;
        elements -= now;
    }
};

// One tile of R x N vectors; A is read for all R rows, C is written for `rows` of them.
template <class T, int R, int N, Layout L>
inline void tile(const Operands<T>& o, int depth, int rows, Start start) {
    constexpr int W = kLanes<T>;
    Vec<T> acc[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) {
            if (start == Start::kZero) {
                acc[r][j] = Vec<T>{};
            } else {
                const int row = r < rows ? r : 0;
                acc[r][j] = load(o.c + row * o.ldc + j * W);
                if (start == Start::kScale) acc[r][j] *= broadcast<T>(o.scale[row]);
            }
        }
    const T* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = L == Layout::kRows ? o.a + r * o.lda : o.a + r;
    const T* b = o.b;
    for (ptrdiff_t k = 0; k < depth; ++k, b += o.ldb) {
        Vec<T> bv[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) bv[j] = load(b + j * W);
        const ptrdiff_t offset = L == Layout::kRows ? k : k * o.lda;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec<T> av = broadcast<T>(a[r][offset]);
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) acc[r][j] += av * bv[j];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        if (r >= rows) break;
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store(o.c + r * o.ldc + j * W, acc[r][j]);
    }
}

template <class T, int N, Layout L>
inline void tile_column(Operands<T> o, int m, int depth, Start start, Ahead<T> ahead) {
    const ptrdiff_t step = L == Layout::kRows ? o.lda : 1;
    // Spread over the tiles: in one go it would stall on the misses.
    const int64_t share = ahead.elements * kTileRows / m + kLineBytes;
    while (m > kTileRows / 2) {
        ahead.prefetch(share);
        tile<T, kTileRows, N, L>(o, depth, m, start);
        o.a += kTileRows * step;
        o.c += kTileRows * o.ldc;
        if (start == Start::kScale) o.scale += kTileRows;
        m -= kTileRows;
    }
    if (m > 0) tile<T, kTileRows / 2, N, L>(o, depth, m, start);
}

// C[m, n] from A[m, depth] and B[depth, n]; n is rounded up to whole vectors, and up to
// kTileRows - 1 rows of A past m are read (never used).
template <class T, Layout L>
void gemm(Operands<T> o, int m, int n, int depth, Start start, Ahead<T> ahead = {}) {
    constexpr int W = kLanes<T>;
    for (; n > W; n -= 2 * W) {
        tile_column<T, 2, L>(o, m, depth, start, ahead);
        ahead = {};
        o.b += 2 * W;
        o.c += 2 * W;
    }
    if (n > 0) tile_column<T, 1, L>(o, m, depth, start, ahead);
}

}  // namespace block_sparse
