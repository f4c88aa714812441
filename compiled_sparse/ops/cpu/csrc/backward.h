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
    T* grad_q;     // [query][dim]
    T* lse;        // [query]
    T* delta;      // [query]

    BackwardScratch(Carver<T>& carver, const Problem& problem) {
        constexpr int64_t stride = kQueryStride<T>;
        const int64_t dim = problem.dim;
        q_rows = carver.take(kMaxQueries * dim_stride<T>(dim));
        grad_rows = carver.take(kMaxQueries * dim_stride<T>(dim));
        q = carver.take(round_up(dim, kLanes<T>) * stride);
        grad = carver.take(round_up(dim, kLanes<T>) * stride);
        p = carver.take((kMaxKeys + kTileRows) * stride);
        ds = carver.take((kMaxKeys + kTileRows) * stride);
        grad_q = carver.take(kMaxQueries * dim_stride<T>(dim));
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

// Fills w.lse and w.delta, up to whole vectors; overwrites the rows.
template <class T>
inline void load_statistics(const QueryHead<T>& head, const QueryPart& part, int dim,
                            const BackwardScratch<T>& w) {
    const int64_t ldd = dim_stride<T>(dim);
    const int padded = static_cast<int>(round_up(part.count, kLanes<T>));
    std::fill(w.lse, w.lse + padded, T(0));
    std::fill(w.delta, w.delta + padded, T(0));
    gather_queries(head.out, part, dim, T(1), w.q_rows);
    gather_queries(head.grad_out, part, dim, T(1), w.grad_rows);
    for (int i = 0; i < part.count; ++i) {
        const int32_t token = part.tokens[i];
        w.lse[i] = head.lse[token];
        w.delta[i] = dot(w.q_rows + i * ldd, w.grad_rows + i * ldd, dim);
        if (head.grad_lse) w.delta[i] -= head.grad_lse[token];
    }
}

// Fills the rows and their transposes; queries with a w.lse of -inf become all zero.
template <class T>
inline void load_rows(const QueryHead<T>& head, const QueryPart& part, int dim, T factor,
                      const BackwardScratch<T>& w) {
    constexpr int64_t stride = kQueryStride<T>;
    const int64_t ldd = dim_stride<T>(dim);
    gather_queries(head.grad_out, part, dim, T(1), w.grad_rows);
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
                           const BackwardScratch<T>& w) {
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
    gemm<T, Layout::kColumns>({w.ds, stride, head.k + at, ldd, w.grad_q, ldd, nullptr}, queries,
                              dim, keys, Start::kAdd);
    const bool block_ends = next.count == 0 || next.block != chunk.block;
    if (block_ends) sums.touched[chunk.block] = 1;
}

// Adds the share of the listed blocks to w.grad_q and the sums.
template <class T>
inline void differentiate(const PackedHead<T>& packed, const KeyGradients<T>& sums,
                          const List& list, int queries, int dim, const BackwardScratch<T>& w) {
    for_each_chunk(list, *packed.rows, [&](const Chunk& chunk, const Chunk& next) {
        backward_chunk(packed, sums, chunk, next, queries, dim, w);
    });
}

// Queries with lists: the pieces of the work are the parts of the blocks.
template <class T>
class ListedQueries {
public:
    using Scratch = BackwardScratch<T>;

    explicit ListedQueries(const Problem& p) : p_(p), parts_(query_parts(p)) {}

    int64_t pieces() const { return static_cast<int64_t>(parts_.size()); }

    // Measure of the work: the (query, key) pairs, and one per query for the rest.
    int64_t work(const KeyRows& rows, int64_t batch, int64_t head, int64_t piece) const {
        int64_t keys = 1;
        for (const int32_t block : list_of(p_, batch, head, parts_[piece].block))
            keys += rows.first[block + 1] - rows.first[block];
        return keys * parts_[piece].count;
    }

    void run(const PackedHead<T>& packed, const KeyGradients<T>& sums, const QueryHead<T>& head,
             int64_t piece, const Scratch& w) const {
        const QueryPart& part = parts_[piece];
        const int dim = static_cast<int>(p_.dim);
        const int64_t ldd = dim_stride<T>(dim);
        load_statistics(head, part, dim, w);
        load_rows(head, part, dim, T(p_.scale), w);
        std::fill_n(w.grad_q, part.count * ldd, T(0));
        differentiate(packed, sums, list_of(p_, head.batch, head.head, part.block), part.count,
                      dim, w);
        for (int i = 0; i < part.count; ++i)
            write_row(head.grad_q, part.tokens[i], w.grad_q + i * ldd, dim, T(p_.scale));
    }

private:
    const Problem& p_;
    std::vector<QueryPart> parts_;
};

// The split of the work: `wave` heads at a time, each by `shares` units, one for each thread.
struct Split {
    int64_t wave;
    int64_t shares;

    explicit Split(const Problem& p)
        : wave(std::gcd(p.batch * p.kv_heads, static_cast<int64_t>(p.threads))),
          shares(p.threads / wave) {}
};

// Runs the pieces of kv head `head` that fall to `share`: an even part of the work.
template <class T, class Queries>
inline void backward_share(const Problem& p, const Queries& queries, const PackedHead<T>& packed,
                           const KeyGradients<T>& sums, int64_t head, int64_t share,
                           int64_t shares, const typename Queries::Scratch& w) {
    const int64_t group = p.q_heads / p.kv_heads, batch = head / p.kv_heads;
    const int64_t begin = head % p.kv_heads * group, pieces = queries.pieces();
    const auto work = [&](int64_t item) {
        return queries.work(*packed.rows, batch, begin + item / pieces, item % pieces);
    };
    int64_t total = 0, before = 0;
    for (int64_t item = 0; item < group * pieces; ++item) total += work(item);
    std::fill(sums.touched, sums.touched + p.kv_blocks + 1, uint8_t(0));
    for (int64_t item = 0; item < group * pieces; ++item) {
        if (before * shares / total == share) {
            const auto q_head = query_head<T>(p, batch, begin + item / pieces);
            queries.run(packed, sums, q_head, item % pieces, w);
        }
        before += work(item);
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

template <class T, class Queries>
void backward(const Problem& p) {
    const Queries queries(p);
    const Split split(p);
    const int64_t heads = p.batch * p.kv_heads, blocks = p.kv_blocks + 1;
    const PackedHeads<T> packed(p, split.wave);
    const UnitGradients<T> units(p);
    const ThreadScratch<T, typename Queries::Scratch> scratch(p);
#pragma omp parallel num_threads(p.threads)
    {
        const typename Queries::Scratch w = scratch.at(omp_get_thread_num());
        for (int64_t base = 0; base < heads; base += split.wave) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < split.wave * packed.tasks(); ++i) {
                const int64_t slot = i / packed.tasks();
                packed.pack(base + slot, slot, i % packed.tasks());
            }
#pragma omp for schedule(static)
            for (int64_t unit = 0; unit < p.threads; ++unit) {
                const int64_t slot = unit / split.shares;
                backward_share(p, queries, packed.at(base + slot, slot), units[unit],
                               base + slot, unit % split.shares, split.shares, w);
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
