// Transposition of matrices whose sizes and strides are whole vectors.
#pragma once

#include <utility>

#include "vector.h"

namespace block_sparse {

#if defined(__clang__)
template <class T, int First, size_t... Lane>
inline Vec<T> interleave_lanes(Vec<T> a, Vec<T> b, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(a, b, (First + Lane / 2 + Lane % 2 * sizeof...(Lane))...);
}
#endif

// a[First], b[First], a[First + 1], b[First + 1], ...
template <class T, int First>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
    constexpr int W = kLanes<T>;
#if defined(__clang__)
    return interleave_lanes<T, First>(a, b, std::make_index_sequence<W>());
#else
    typename Simd<T>::Int lanes;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) lanes[i] = First + i / 2 + i % 2 * W;
    return __builtin_shuffle(a, b, lanes);
#endif
}

// to[j, i] = from[i, j] for one square of vectors.
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    constexpr int W = kLanes<T>;
    Vec<T> rows[W], mixed[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_stride);
    // Each perfect shuffle moves one bit of the row number into the column number.
#pragma GCC unroll 4
    for (int bit = 1; bit < W; bit *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            mixed[2 * i] = interleave<T, 0>(rows[i], rows[i + W / 2]);
            mixed[2 * i + 1] = interleave<T, W / 2>(rows[i], rows[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = mixed[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(to + i * to_stride, rows[i]);
}

// to[j, i] = from[i, j] for i < rows and j < columns, both rounded up to whole vectors.
template <class T>
inline void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int rows,
                      int columns) {
    constexpr int W = kLanes<T>;
    for (int i = 0; i < rows; i += W)
        for (int j = 0; j < columns; j += W)
            transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i,
                             to_stride);
}

}  // namespace block_sparse
