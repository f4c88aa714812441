// Forward of attention over the chunks that each query selects.
//
// The softmax of all queries of a segment is under way at a time. Chunk by chunk, the queries that
// selected it are brought together and go on with their softmax over its keys.
#pragma once

#include "forward.h"
#include "segments.h"

namespace block_sparse {

// What one thread keeps for the segment at work.
template <class T>
struct ChunkForwardScratch {
    ForwardScratch<T> part;
    T* rows;  // [query][dim] as ForwardScratch keeps them for a part
    T* top;
    T* sum;
    int32_t* tokens;  // queries that selected the chunk at work

    ChunkForwardScratch(Carver<T>& carver, const Problem& p) : part(carver, p) {
        const int64_t queries = Segments(p).size();
        rows = carver.take(queries * dim_stride<T>(p.dim));
        top = carver.take(queries);
        sum = carver.take(queries);
        tokens = carver.template take<int32_t>(queries);
    }
};

// Takes the keys of a chunk into the softmax of the queries of `part`.
template <class T>
inline void attend_chunk(const PackedHead<T>& head, const List& list, const QueryPart& part,
                         int64_t begin, int dim, const ChunkForwardScratch<T>& w) {
    const int64_t ldd = dim_stride<T>(dim);
    for (int i = 0; i < part.count; ++i) {
        const int64_t query = part.tokens[i] - begin;
        w.part.top[i] = w.top[query];
        w.part.sum[i] = w.sum[query];
        std::copy_n(w.rows + query * ldd, ldd, w.part.rows + i * ldd);
    }
    attend<T, ExactWeights<T>>(head, list, dim, part.count, Start::kScale, w.part);
    for (int i = 0; i < part.count; ++i) {
        const int64_t query = part.tokens[i] - begin;
        w.top[query] = w.part.top[i];
        w.sum[query] = w.part.sum[i];
        std::copy_n(w.part.rows + i * ldd, ldd, w.rows + query * ldd);
    }
}

template <class T>
inline void chunk_forward_item(const Problem& p, const PackedHead<T>& head, int64_t batch,
                               int64_t q_head, const Segment& segment,
                               const ChunkForwardScratch<T>& w) {
    const int dim = static_cast<int>(p.dim);
    const int64_t ldd = dim_stride<T>(dim);
    const Head q = head_of(p.q, p.dtype, batch, q_head);
    const Head out = head_of(p.out, p.dtype, batch, q_head);
    T* lse = static_cast<T*>(p.lse) + (batch * p.q_heads + q_head) * p.q_len + segment.begin;

    std::fill_n(w.rows, segment.count * ldd, T(0));
    std::fill_n(w.top, segment.count, -std::numeric_limits<T>::infinity());
    std::fill_n(w.sum, segment.count, T(0));
    for_each_selection(p, *head.rows, batch, q_head, segment, kLanes<T>, w.tokens,
                       [&](const QueryPart& part, const List& list) {
                           load_queries(q, part, dim, T(p.scale), w.part);
                           attend_chunk(head, list, part, segment.begin, dim, w);
                       });
    for (int i = 0; i < segment.count; ++i) {
        lse[i] = w.top[i] + std::log(w.sum[i]);
        const T sum = w.sum[i] == 0 ? T(1) : w.sum[i];
        write_row(out, segment.begin + i, w.rows + i * ldd, dim, T(1) / sum);
    }
}

template <class T>
void chunk_forward(const Problem& p) {
    const Segments segments(p);
    const auto attend = [&](const PackedHead<T>& head, int64_t batch, int64_t q_head,
                            int64_t piece, const ChunkForwardScratch<T>& w) {
        chunk_forward_item(p, head, batch, q_head, segments[piece], w);
    };
    for_each_piece<T, ChunkForwardScratch<T>>(p, segments.count(), attend);
}

}  // namespace block_sparse
