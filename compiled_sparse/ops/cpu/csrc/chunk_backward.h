// Backward of attention over the chunks that each query selects; see chunk_forward.h.
#pragma once

#include "backward.h"
#include "segments.h"

namespace block_sparse {

// What one thread keeps for the segment at work.
template <class T>
struct ChunkBackwardScratch {
    BackwardScratch<T> part;
    T* grad_q;  // [query][dim], of scaled queries
    T* lse;
    T* delta;
    int32_t* tokens;  // queries at work: up to a part, or those that selected a chunk

    ChunkBackwardScratch(Carver<T>& carver, const Problem& p) : part(carver, p) {
        const int64_t queries = Segments(p).size();
        grad_q = carver.take(queries * dim_stride<T>(p.dim));
        lse = carver.take(queries);
        delta = carver.take(queries);
        tokens = carver.template take<int32_t>(std::max<int64_t>(queries, kMaxQueries));
    }
};

// Queries that each select chunks: the pieces of the work are segments.
template <class T>
class SelectingQueries {
public:
    using Scratch = ChunkBackwardScratch<T>;

    explicit SelectingQueries(const Problem& p) : p_(p), segments_(p) {}

    int64_t pieces() const { return segments_.count(); }

    // Measure of the work: the (query, key) pairs, and one per query for the rest.
    int64_t work(const KeyRows& rows, int64_t batch, int64_t head, int64_t piece) const {
        const Segment segment = segments_[piece];
        int64_t pairs = segment.count;
        for (int64_t chunk = 0; chunk < p_.kv_blocks; ++chunk) {
            const int64_t keys = rows.first[chunk + 1] - rows.first[chunk];
            for_each_word(p_, batch, head, chunk, segment, [&](uint32_t word, int) {
                pairs += keys * __builtin_popcount(word);
            });
        }
        return pairs;
    }

    void run(const PackedHead<T>& packed, const KeyGradients<T>& sums, const QueryHead<T>& head,
             int64_t piece, const Scratch& w) const {
        const Segment segment = segments_[piece];
        const int dim = static_cast<int>(p_.dim);
        const int64_t ldd = dim_stride<T>(dim);
        segment_statistics(head, segment, w);
        std::fill_n(w.grad_q, segment.count * ldd, T(0));
        for_each_selection(p_, *packed.rows, head.batch, head.head, segment, kLanes<T>, w.tokens,
                           [&](const QueryPart& part, const List& list) {
                               load_part(head, part, segment.begin, w);
                               differentiate(packed, sums, list, part.count, dim, w.part);
                               store_part(part, segment.begin, w);
                           });
        for (int i = 0; i < segment.count; ++i)
            write_row(head.grad_q, segment.begin + i, w.grad_q + i * ldd, dim, T(p_.scale));
    }

private:
    void segment_statistics(const QueryHead<T>& head, const Segment& segment,
                            const Scratch& w) const {
        for (int first = 0; first < segment.count; first += kMaxQueries) {
            const int count = std::min(kMaxQueries, segment.count - first);
            std::iota(w.tokens, w.tokens + count, static_cast<int32_t>(segment.begin) + first);
            load_statistics(head, {0, w.tokens, count}, static_cast<int>(p_.dim), w.part);
            std::copy_n(w.part.lse, count, w.lse + first);
            std::copy_n(w.part.delta, count, w.delta + first);
        }
    }

    void load_part(const QueryHead<T>& head, const QueryPart& part, int64_t begin,
                   const Scratch& w) const {
        const int dim = static_cast<int>(p_.dim);
        const int64_t ldd = dim_stride<T>(dim);
        const int padded = static_cast<int>(round_up(part.count, kLanes<T>));
        for (int i = 0; i < part.count; ++i) {
            const int64_t query = part.tokens[i] - begin;
            w.part.lse[i] = w.lse[query];
            w.part.delta[i] = w.delta[query];
            std::copy_n(w.grad_q + query * ldd, ldd, w.part.grad_q + i * ldd);
        }
        std::fill(w.part.lse + part.count, w.part.lse + padded, T(0));
        std::fill(w.part.delta + part.count, w.part.delta + padded, T(0));
        load_rows(head, part, dim, T(p_.scale), w.part);
    }

    void store_part(const QueryPart& part, int64_t begin, const Scratch& w) const {
        const int64_t ldd = dim_stride<T>(p_.dim);
        for (int i = 0; i < part.count; ++i)
            std::copy_n(w.part.grad_q + i * ldd, ldd, w.grad_q + (part.tokens[i] - begin) * ldd);
    }

    const Problem& p_;
    Segments segments_;
};

}  // namespace block_sparse
