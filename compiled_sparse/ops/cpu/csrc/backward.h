// Backward: one pass over the queries recomputes the probabilities of each listed block.
//
// Each unit, a share of the queries of one kv head, sums the gradients of its keys privately;
// the units of a head are then added in order, so that results depend only on their number.
#pragma once

#include <omp.h>

#include <numeric>

#include "gemm.h"
#include "layout.h"
#include "pack.h"
#include "transpose.h"

namespace block_sparse {

// What one thread keeps for the queries at work.
template <class T>
struct BackwardScratch {
    T* q_rows;     // [query][dim], scaled
    T* grad_rows;  // [query][dim] gradient of the output
    T* q;          // [dim][query]
    T* grad;       // [dim][query]
    T* p;          // [key][query] scores, then probabilities
    T* ds;         // [key][query] gradient of the probabilities, then of the scores
    T* grad_q;     // [dim][query]
    T* lse;        // [query]
    T* delta;      // [query]

    BackwardScratch(Carver<T>& carver, int64_t dim) {
        constexpr int64_t stride = kQueryStride<T>;
        q_rows = carver.take(kMaxQueries * dim_stride<T>(dim));
        grad_rows = carver.take(kMaxQueries * dim_stride<T>(dim));
        q = carver.take(round_up(dim, kLanes<T>) * stride);
        grad = carver.take(round_up(dim, kLanes<T>) * stride);
        p = carver.take((kMaxKeys + kTileRows) * stride);
        ds = carver.take((kMaxKeys + kTileRows) * stride);
        grad_q = carver.take(round_up(dim, kLanes<T>) * stride);
        lse = carver.take(stride);
        delta = carver.take(stride);
    }
};

// Gradients of the keys of one unit, in the order of KeyRows.
template <class T>
struct KeyGradients {
    T* k;  // [row][dim]
    T* v;
    uint8_t* touched;  // [block] whether the rows of a block hold a sum yet
};

// The queries of one q head that a unit works on.
template <class T>
struct QueryHead {
    Head q, out, grad_out, grad_q;
    const T* lse;
    const T* grad_lse;
    int64_t batch, head;
};

template <class T>
inline QueryHead<T> query_head(const Problem& p, int64_t batch, int64_t head) {
    const int64_t first = (batch * p.q_heads + head) * p.q_len;
    const T* grad_lse = static_cast<const T*>(p.grad_lse);
    return {head_of(p.q, p.dtype, batch, head),
            head_of(p.out, p.dtype, batch, head),
            head_of(p.grad_out, p.dtype, batch, head),
            head_of(p.grad_q, p.dtype, batch, head),
            static_cast<const T*>(p.lse) + first,
            grad_lse ? grad_lse + first : nullptr,
            batch,
            head};
}

template <class T>
inline T dot(const T* a, const T* b, int dim) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int d = 0; d < dim; ++d) sum += a[d] * b[d];
    return sum;
}

// Fills the query side of the scratch; queries with an lse of -inf become all zero.
template <class T>
inline void load_queries(const QueryHead<T>& head, const QueryPart& part, int dim, T factor,
                         const BackwardScratch<T>& w) {
    constexpr int64_t stride = kQueryStride<T>;
    const int64_t ldd = dim_stride<T>(dim);
    const int padded = static_cast<int>(round_up(part.count, kLanes<T>));
    std::fill(w.lse, w.lse + padded, T(0));
    std::fill(w.delta, w.delta + padded, T(0));
    // w.q_rows holds the output until delta is known.
    gather_queries(head.out, part, dim, T(1), w.q_rows);
    gather_queries(head.grad_out, part, dim, T(1), w.grad_rows);
    for (int i = 0; i < part.count; ++i) {
        const int32_t token = part.tokens[i];
        w.lse[i] = head.lse[token];
        w.delta[i] = dot(w.q_rows + i * ldd, w.grad_rows + i * ldd, dim);
        if (head.grad_lse) w.delta[i] -= head.grad_lse[token];
    }
    gather_queries(head.q, part, dim, factor, w.q_rows);
    for (int i = 0; i < part.count; ++i) {
        if (w.lse[i] != -std::numeric_limits<T>::infinity()) continue;
        std::fill(w.q_rows + i * ldd, w.q_rows + i * ldd + dim, T(0));
        std::fill(w.grad_rows + i * ldd, w.grad_rows + i * ldd + dim, T(0));
        w.lse[i] = w.delta[i] = T(0);
    }
    transpose(w.q_rows, ldd, w.q, stride, part.count, dim);
    transpose(w.grad_rows, ldd, w.grad, stride, part.count, dim);
}

// w.p = P = e^(p - lse), w.ds = P * (ds - delta).
template <class T>
inline void score_gradients(int keys, int queries, const BackwardScratch<T>& w) {
    constexpr int W = kLanes<T>;
    constexpr int64_t stride = kQueryStride<T>;
    for (int key = 0; key < keys; ++key)
        for (int i = 0; i < queries; i += W) {
            T* p = w.p + key * stride + i;
            T* ds = w.ds + key * stride + i;
            const Vec<T> probability = exp<T>(load(p) - load(w.lse + i));
            store(ds, probability * (load(ds) - load(w.delta + i)));
            store(p, probability);
        }
}

// The five products of one chunk.
template <class T>
inline void backward_chunk(const PackedHead<T>& head, const KeyGradients<T>& sums,
                           const Chunk& chunk, const Chunk& next, int queries, int dim,
                           Start start_q, const BackwardScratch<T>& w) {
    constexpr int64_t stride = kQueryStride<T>;
    const int64_t ldd = dim_stride<T>(dim);
    const int64_t at = chunk.row * ldd, then = next.row * ldd, ahead = next.count * ldd;
    const int keys = chunk.count;
    const Start start = sums.touched[chunk.block] ? Start::kAdd : Start::kZero;
    gemm<T, Layout::kRows>({head.k + at, ldd, w.q, stride, w.p, stride, nullptr}, keys, queries,
                           dim, Start::kZero, {head.k + then, ahead});
    gemm<T, Layout::kRows>({head.v + at, ldd, w.grad, stride, w.ds, stride, nullptr}, keys,
                           queries, dim, Start::kZero, {head.v + then, ahead});
    score_gradients(keys, queries, w);
    gemm<T, Layout::kRows>({w.p, stride, w.grad_rows, ldd, sums.v + at, ldd, nullptr}, keys, dim,
                           queries, start, {sums.v + then, ahead});
    gemm<T, Layout::kRows>({w.ds, stride, w.q_rows, ldd, sums.k + at, ldd, nullptr}, keys, dim,
                           queries, start, {sums.k + then, ahead});
    gemm<T, Layout::kColumns>({head.k + at, ldd, w.ds, stride, w.grad_q, stride, nullptr}, dim,
                              queries, keys, start_q);
    const bool block_ends = next.count == 0 || next.block != chunk.block;
    if (block_ends) sums.touched[chunk.block] = 1;
}

template <class T>
inline void backward_item(const Problem& p, const PackedHead<T>& packed,
                          const KeyGradients<T>& sums, const QueryHead<T>& head,
                          const QueryPart& part, const BackwardScratch<T>& w) {
    const int dim = static_cast<int>(p.dim);
    const int64_t ldd = dim_stride<T>(dim);
    load_queries(head, part, dim, T(p.scale), w);
    Start start_q = Start::kZero;
    const List list = list_of(p, head.batch, head.head, part.block);
    for_each_chunk(list, *packed.rows, [&](const Chunk& chunk, const Chunk& next) {
        backward_chunk(packed, sums, chunk, next, part.count, dim, start_q, w);
        start_q = Start::kAdd;
    });
    if (start_q == Start::kZero) {
        std::fill(w.q_rows, w.q_rows + part.count * ldd, T(0));
    } else {
        transpose(w.grad_q, kQueryStride<T>, w.q_rows, ldd, dim, part.count);
    }
    for (int i = 0; i < part.count; ++i)
        write_row(head.grad_q, part.tokens[i], w.q_rows + i * ldd, dim, T(p.scale));
}

// The split of the work: `wave` heads at a time, each by `shares` units, one for each thread.
struct Split {
    int64_t wave;
    int64_t shares;

    explicit Split(const Problem& p)
        : wave(std::gcd(p.batch * p.kv_heads, static_cast<int64_t>(p.threads))),
          shares(p.threads / wave) {}
};

// Measure of the work on `part`: its (query, key) pairs, and one per query for the rest.
inline int64_t work_of(const List& list, const QueryPart& part, const KeyRows& rows) {
    int64_t keys = 1;
    for (const int32_t block : list) keys += rows.first[block + 1] - rows.first[block];
    return keys * part.count;
}

// Runs the queries of kv head `head` that fall to `share`: an even part of the work.
template <class T>
inline void backward_share(const Problem& p, const std::vector<QueryPart>& parts,
                           const PackedHead<T>& packed, const KeyGradients<T>& sums, int64_t head,
                           int64_t share, int64_t shares, const BackwardScratch<T>& w) {
    const int64_t group = p.q_heads / p.kv_heads, batch = head / p.kv_heads;
    const int64_t begin = head % p.kv_heads * group, end = begin + group;
    const auto work = [&](int64_t q_head, const QueryPart& part) {
        return work_of(list_of(p, batch, q_head, part.block), part, *packed.rows);
    };
    int64_t total = 0, before = 0;
    for (int64_t q_head = begin; q_head < end; ++q_head)
        for (const QueryPart& part : parts) total += work(q_head, part);
    std::fill(sums.touched, sums.touched + p.kv_blocks + 1, uint8_t(0));
    for (int64_t q_head = begin; q_head < end; ++q_head) {
        const QueryHead<T> queries = query_head<T>(p, batch, q_head);
        for (const QueryPart& part : parts) {
            if (before * shares / total == share)
                backward_item(p, packed, sums, queries, part, w);
            before += work(q_head, part);
        }
    }
}

// Adds up the units of one block of keys and writes its gradients.
template <class T>
inline void write_block(const Problem& p, const KeyRows& rows, const KeyGradients<T>* units,
                        int64_t shares, int64_t head, int64_t block) {
    const int64_t ldd = dim_stride<T>(p.dim);
    const int64_t begin = rows.first[block] * ldd, end = rows.first[block + 1] * ldd;
    const KeyGradients<T>* sum = nullptr;
    for (const KeyGradients<T>* unit = units; unit < units + shares; ++unit) {
        if (!unit->touched[block]) continue;
        if (!sum) {
            sum = unit;
            continue;
        }
        for (int64_t i = begin; i < end; ++i) sum->k[i] += unit->k[i];
        for (int64_t i = begin; i < end; ++i) sum->v[i] += unit->v[i];
    }
    if (!sum) {
        sum = units;
        std::fill(sum->k + begin, sum->k + end, T(0));
        std::fill(sum->v + begin, sum->v + end, T(0));
    }
    const int dim = static_cast<int>(p.dim);
    const Head grad_k = head_of(p.grad_k, p.dtype, head / p.kv_heads, head % p.kv_heads);
    const Head grad_v = head_of(p.grad_v, p.dtype, head / p.kv_heads, head % p.kv_heads);
    for (int32_t row = rows.first[block]; row < rows.first[block + 1]; ++row) {
        write_row(grad_k, rows.token[row], sum->k + row * ldd, dim, T(1));
        write_row(grad_v, rows.token[row], sum->v + row * ldd, dim, T(1));
    }
}

// Room for the KeyGradients of each unit; a unit is a thread's share of a wave.
template <class T>
class UnitGradients {
public:
    explicit UnitGradients(const Problem& p)
        : memory_(2 * p.threads * packed_elements<T>(p) * sizeof(T)),
          touched_(p.threads * (p.kv_blocks + 1)) {
        const int64_t elements = packed_elements<T>(p);
        for (int64_t unit = 0; unit < p.threads; ++unit)
            units_.push_back({memory_.template at<T>(2 * unit * elements),
                              memory_.template at<T>((2 * unit + 1) * elements),
                              touched_.data() + unit * (p.kv_blocks + 1)});
    }

    const KeyGradients<T>& operator[](int64_t unit) const { return units_[unit]; }

private:
    Buffer memory_;
    std::vector<uint8_t> touched_;
    std::vector<KeyGradients<T>> units_;
};

template <class T>
void backward(const Problem& p) {
    const std::vector<QueryPart> parts = query_parts(p);
    const Split split(p);
    const int64_t heads = p.batch * p.kv_heads, blocks = p.kv_blocks + 1;
    const PackedHeads<T> packed(p, split.wave);
    const UnitGradients<T> units(p);
    const ThreadScratch<T, BackwardScratch<T>> scratch(p);
#pragma omp parallel num_threads(p.threads)
    {
        const BackwardScratch<T> w = scratch.at(omp_get_thread_num());
        for (int64_t base = 0; base < heads; base += split.wave) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < split.wave * packed.tasks(); ++i) {
                const int64_t slot = i / packed.tasks();
                packed.pack(base + slot, slot, i % packed.tasks());
            }
#pragma omp for schedule(static)
            for (int64_t unit = 0; unit < p.threads; ++unit) {
                const int64_t slot = unit / split.shares;
                backward_share(p, parts, packed.at(base + slot, slot), units[unit], base + slot,
                               unit % split.shares, split.shares, w);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < split.wave * blocks; ++i) {
                const int64_t slot = i / blocks;
                write_block(p, *packed.at(base + slot, slot).rows, &units[slot * split.shares],
                            split.shares, base + slot, i % blocks);
            }
        }
    }
}

}  // namespace block_sparse
