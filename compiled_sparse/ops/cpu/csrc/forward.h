// Forward: online softmax over the listed key blocks; scores lie keys by queries.
#pragma once

#include <omp.h>

#include <cmath>

#include "gemm.h"
#include "layout.h"
#include "pack.h"
#include "pipeline.h"
#include "rounding.h"
#include "transpose.h"

namespace block_sparse {

// What one thread keeps for the queries at work.
template <class T>
struct ForwardScratch {
    T* rows;    // [query][dim] scaled queries, then sums of e^(score - top) times values
    T* q;       // [dim][query]
    T* scores;  // [key][query]
    T* top;     // [query] largest score so far
    T* sum;     // [query] sum of e^(score - top)
    T* decay;   // [query] e^(previous top - top)

    ForwardScratch(Carver<T>& carver, const Problem& p) {
        constexpr int64_t stride = kQueryStride<T>;
        rows = carver.take(kMaxQueries * dim_stride<T>(p.dim));
        q = carver.take(round_up(p.dim, kLanes<T>) * stride);
        scores = carver.take((kMaxKeys + kTileRows) * stride);
        top = carver.take(stride);
        sum = carver.take(stride);
        decay = carver.take(stride);
    }
};

// The softmax step of C vectors of queries; scores become probabilities, as Round rounds them.
template <class T, class Round, int C>
inline void softmax_columns(T* scores, int keys, T* top, T* sum, T* decay) {
    constexpr int W = kLanes<T>;
    constexpr int64_t stride = kQueryStride<T>;
    Vec<T> high[C], total[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) high[c] = load(top + c * W);
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const Vec<T> s = load(scores + key * stride + c * W);
            high[c] = s > high[c] ? s : high[c];
        }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        const Vec<T> fade = exp<T>(load(top + c * W) - high[c]);
        total[c] = load(sum + c * W) * fade;
        store(decay + c * W, fade);
        store(top + c * W, high[c]);
    }
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            T* s = scores + key * stride + c * W;
            const Vec<T> p = exp<T>(load(s) - high[c]);
            total[c] += p;
            store(s, Round::round(p));
        }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sum + c * W, total[c]);
}

template <class T, class Round>
inline void softmax_step(const ForwardScratch<T>& w, int keys, int queries) {
    constexpr int W = kLanes<T>;
    int i = 0;
    for (; i + 4 * W <= round_up(queries, W); i += 4 * W)
        softmax_columns<T, Round, 4>(w.scores + i, keys, w.top + i, w.sum + i, w.decay + i);
    for (; i < queries; i += W)
        softmax_columns<T, Round, 1>(w.scores + i, keys, w.top + i, w.sum + i, w.decay + i);
}

template <class T>
inline void load_queries(const Head& q, const QueryPart& part, int dim, T scale,
                         const ForwardScratch<T>& w) {
    const int64_t ldd = dim_stride<T>(dim);
    gather_queries(q, part, dim, scale, w.rows);
    transpose(w.rows, ldd, w.q, kQueryStride<T>, part.count, dim);
}

// Attention of the queries in w.q; goes on from w.rows, w.sum and w.top where `start` is kScale.
// Returns how to go on further: kZero if there was no key yet.
template <class T, class Round>
inline Start attend(const PackedHead<T>& head, const List& list, int dim, int queries, Start start,
                    const ForwardScratch<T>& w) {
    constexpr int64_t stride = kQueryStride<T>;
    const int64_t ldd = dim_stride<T>(dim);
    for_each_chunk(list, *head.rows, [&](const Chunk& chunk, const Chunk& next) {
        const int64_t at = chunk.row * ldd, then = next.row * ldd, ahead = next.count * ldd;
        gemm<T, Layout::kRows>({head.k + at, ldd, w.q, stride, w.scores, stride, nullptr},
                               chunk.count, queries, dim, Start::kZero, {head.k + then, ahead});
        softmax_step<T, Round>(w, chunk.count, queries);
        gemm<T, Layout::kColumns>({w.scores, stride, head.v + at, ldd, w.rows, ldd, w.decay},
                                  queries, dim, chunk.count, start, {head.v + then, ahead});
        start = Start::kScale;
    });
    return start;
}

template <class T, class Round>
inline void forward_item(const Problem& p, const PackedHead<T>& head, int64_t batch,
                         int64_t q_head, const QueryPart& part, const ForwardScratch<T>& w) {
    const int dim = static_cast<int>(p.dim);
    const int64_t ldd = dim_stride<T>(dim);
    const Head q = head_of(p.q, p.dtype, batch, q_head);
    const Head out = head_of(p.out, p.dtype, batch, q_head);
    T* lse = static_cast<T*>(p.lse) + (batch * p.q_heads + q_head) * p.q_len;

    load_queries(q, part, dim, T(p.scale), w);
    std::fill(w.top, w.top + kQueryStride<T>, -std::numeric_limits<T>::infinity());
    std::fill(w.sum, w.sum + kQueryStride<T>, T(0));
    const List list = list_of(p, batch, q_head, part.block);
    if (attend<T, Round>(head, list, dim, part.count, Start::kZero, w) == Start::kZero) {
        std::fill(w.rows, w.rows + part.count * ldd, T(0));
        std::fill(w.sum, w.sum + part.count, T(1));
    }
    for (int i = 0; i < part.count; ++i) {
        const int32_t token = part.tokens[i];
        lse[token] = w.top[i] + std::log(w.sum[i]);
        write_row(out, token, w.rows + i * ldd, dim, T(1) / w.sum[i]);
    }
}

// Heads packed at a time: more than one, where they are small, keeps threads from waiting.
template <class T>
inline int64_t packed_slots(const Problem& p) {
    constexpr int64_t most_bytes = 10 << 20;
    const int64_t bytes = 2 * packed_elements<T>(p) * static_cast<int64_t>(sizeof(T));
    return std::max<int64_t>(1, std::min(p.batch * p.kv_heads, most_bytes / bytes));
}

// Packs every kv head and calls run(packed head, batch, q head, piece, scratch) for each of the
// `pieces` of the queries of its q heads.
template <class T, class Scratch, class Run>
void for_each_piece(const Problem& p, int64_t pieces, Run run) {
    const int64_t group = p.q_heads / p.kv_heads, slots = packed_slots<T>(p);
    const PackedHeads<T> packed(p, slots);
    const ThreadScratch<T, Scratch> scratch(p);
    Pipeline pipeline(p.batch * p.kv_heads, packed.tasks(), group * pieces, slots);
#pragma omp parallel num_threads(p.threads)
    {
        const Scratch w = scratch.at(omp_get_thread_num());
        const auto pack = [&](int64_t head, int64_t task) {
            packed.pack(head, head % slots, task);
        };
        const auto use = [&](int64_t head, int64_t item) {
            run(packed.at(head, head % slots), head / p.kv_heads,
                head % p.kv_heads * group + item / pieces, item % pieces, w);
        };
        pipeline.run(pack, use);
    }
}

template <class T, class Round>
void forward(const Problem& p) {
    const std::vector<QueryPart> parts = query_parts(p);
    const auto attend = [&](const PackedHead<T>& head, int64_t batch, int64_t q_head,
                            int64_t piece, const ForwardScratch<T>& w) {
        forward_item<T, Round>(p, head, batch, q_head, parts[piece], w);
    };
    for_each_piece<T, ForwardScratch<T>>(p, static_cast<int64_t>(parts.size()), attend);
}

}  // namespace block_sparse
