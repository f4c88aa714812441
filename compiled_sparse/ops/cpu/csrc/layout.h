// The problem as the caller states it, and how the kernels cut it into pieces.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "rounding.h"
#include "rows.h"
#include "vector.h"

namespace block_sparse {

// Mirrored field by field by `_Problem` in native.py.
struct Problem {
    int64_t batch, q_heads, kv_heads, q_len, kv_len, dim;
    int64_t q_blocks, q_block, kv_blocks, kv_block, list;
    // Strides of the lists in batch and head; 0 where they broadcast.
    int64_t indices_batch, indices_head, counts_batch, counts_head;
    const int32_t* indices;   // [.., q_blocks, list]
    const int32_t* counts;    // [.., q_blocks]
    const int32_t* q_tokens;  // [q_blocks, q_block], -1 pads the end of a row
    const int32_t* kv_tokens;
    const uint8_t* key_mask;  // [batch, kv_len] or null
    // In place of lists: [batch, q_heads, kv_blocks, ceil(q_len / 32)], a bit for each query.
    const uint32_t* selected;
    double scale;
    DType dtype;
    int32_t threads;
    Weights weights;  // float64 has exact ones only
    Tensor q, k, v, out;
    void* lse;  // [batch, q_heads, q_len] in the compute type
    // Backward only; grad_lse [batch, q_heads, q_len] may be null.
    Tensor grad_out, grad_q, grad_k, grad_v;
    const void* grad_lse;
};

constexpr int kMaxQueries = 64;
constexpr int kMaxKeys = 64;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Row stride of matrices whose minor dimension is the query. As all strides here it is no
// power of two, which would send all rows to a few cache sets.
template <class T>
constexpr int kQueryStride = kMaxQueries + kLanes<T>;

// Row stride of matrices whose minor dimension is the head dimension: an odd number of lines.
template <class T>
inline int64_t dim_stride(int64_t dim) {
    const int64_t line = kLineBytes / static_cast<int64_t>(sizeof(T));
    return ((dim + line - 1) / line | 1) * line;
}

// Uninitialised memory aligned to a cache line; huge pages, where there are any, save page faults
// on each call and misses of the TLB.
class Buffer {
public:
    explicit Buffer(size_t bytes) {
        const size_t alignment = bytes < kHugePage ? kLineBytes : kHugePage;
        const size_t size = round_up(std::max<size_t>(bytes, 1), alignment);
        data_ = std::aligned_alloc(alignment, size);
        if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        // Only advice: without it the memory works as well.
        if (bytes >= kHugePage) madvise(data_, size, MADV_HUGEPAGE);
#endif
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    template <class T>
    T* at(size_t element) const {
        return static_cast<T*>(data_) + element;
    }

private:
    static constexpr size_t kHugePage = 2 << 20;
    void* data_;
};

// Cuts consecutive aligned arrays from memory; without memory it only adds up their size.
template <class T>
class Carver {
public:
    explicit Carver(T* memory) : memory_(memory) {}

    template <class U = T>
    U* take(int64_t elements) {
        U* start = memory_ ? reinterpret_cast<U*>(memory_ + used_) : nullptr;
        const auto bytes = elements * static_cast<int64_t>(sizeof(U));
        used_ += round_up(bytes, kLineBytes) / static_cast<int64_t>(sizeof(T));
        return start;
    }
    int64_t used() const { return used_; }

private:
    T* memory_;
    int64_t used_ = 0;
};

// Memory for the Scratch of each thread, of the size that the problem asks for.
template <class T, class Scratch, class P = Problem>
class ThreadScratch {
public:
    explicit ThreadScratch(const P& p)
        : p_(p), elements_(needed(p)), memory_(p.threads * elements_ * sizeof(T)) {}

    Scratch at(int64_t thread) const {
        Carver<T> carver(memory_.template at<T>(thread * elements_));
        return Scratch(carver, p_);
    }

private:
    static int64_t needed(const P& p) {
        Carver<T> carver(nullptr);
        const Scratch unused(carver, p);
        // A gap of two lines, as lines are prefetched in pairs.
        return carver.used() + 2 * kLineBytes / static_cast<int64_t>(sizeof(T));
    }

    const P& p_;
    int64_t elements_;
    Buffer memory_;
};

// The keys of one batch entry in block order, masked ones last; packed rows follow this order.
struct KeyRows {
    std::vector<int32_t> token;
    // Rows of block i: first[i] .. first[i + 1]; the masked keys count as one block more.
    std::vector<int32_t> first;
};

inline KeyRows key_rows(const Problem& p, int64_t batch) {
    const uint8_t* mask = p.key_mask ? p.key_mask + batch * p.kv_len : nullptr;
    KeyRows rows;
    rows.token.reserve(p.kv_len);
    rows.first.reserve(p.kv_blocks + 2);
    std::vector<int32_t> masked;
    for (int64_t block = 0; block < p.kv_blocks; ++block) {
        rows.first.push_back(static_cast<int32_t>(rows.token.size()));
        const int32_t* tokens = p.kv_tokens + block * p.kv_block;
        for (int64_t slot = 0; slot < p.kv_block && tokens[slot] >= 0; ++slot)
            (mask && !mask[tokens[slot]] ? masked : rows.token).push_back(tokens[slot]);
    }
    rows.first.push_back(static_cast<int32_t>(rows.token.size()));
    rows.token.insert(rows.token.end(), masked.begin(), masked.end());
    rows.first.push_back(static_cast<int32_t>(rows.token.size()));
    return rows;
}

// Up to kMaxQueries queries of one block.
struct QueryPart {
    int64_t block;
    const int32_t* tokens;
    int count;
};

inline std::vector<QueryPart> query_parts(const Problem& p) {
    std::vector<QueryPart> parts;
    for (int64_t block = 0; block < p.q_blocks; ++block) {
        const int32_t* tokens = p.q_tokens + block * p.q_block;
        const auto unused = [](int32_t token) { return token < 0; };
        const int64_t used = std::find_if(tokens, tokens + p.q_block, unused) - tokens;
        for (int64_t slot = 0; slot < used; slot += kMaxQueries)
            parts.push_back({block, tokens + slot,
                             static_cast<int>(std::min<int64_t>(kMaxQueries, used - slot))});
    }
    return parts;
}

// The key blocks that one query block attends.
struct List {
    const int32_t* block;
    int32_t count;

    const int32_t* begin() const { return block; }
    const int32_t* end() const { return block + count; }
};

inline List list_of(const Problem& p, int64_t batch, int64_t head, int64_t q_block) {
    const int64_t indices = batch * p.indices_batch + head * p.indices_head + q_block * p.list;
    const int64_t counts = batch * p.counts_batch + head * p.counts_head + q_block;
    return {p.indices + indices, p.counts[counts]};
}

// Size of each of the fewest even parts, of at most `most` and a multiple of `multiple` each, that
// `count` falls into; the last one may be smaller.
inline int32_t even_share(int32_t count, int32_t most, int32_t multiple) {
    const int32_t parts = std::max((count + most - 1) / most, 1);
    return std::min(static_cast<int32_t>(round_up((count + parts - 1) / parts, multiple)), most);
}

// Up to kMaxKeys packed rows of one block.
struct Chunk {
    int32_t block;
    int32_t row;
    int32_t count;
};

// Calls visit(chunk, next) for the chunks, of like size, of each listed block in turn; next is the
// chunk that follows, of count 0 at the end.
template <class Visit>
inline void for_each_chunk(const List& list, const KeyRows& rows, Visit visit) {
    Chunk last{};
    for (const int32_t block : list) {
        const int32_t end = rows.first[block + 1], begin = rows.first[block];
        const int32_t size = even_share(end - begin, kMaxKeys, kTileRows);
        for (int32_t row = begin; row < end; row += size) {
            const Chunk chunk{block, row, std::min(size, end - row)};
            if (last.count) visit(last, chunk);
            last = chunk;
        }
    }
    if (last.count) visit(last, Chunk{});
}

// rows[i, 0:dim] = factor * source[tokens[i]], zero up to the stride.
template <class T>
inline void gather_rows(const Head& source, const int32_t* tokens, int64_t count, int dim,
                        T factor, T* rows) {
    const int64_t stride = dim_stride<T>(dim);
    for (int64_t i = 0; i < count; ++i, rows += stride) {
        read_row(source, tokens[i], rows, dim, factor);
        std::fill(rows + dim, rows + stride, T(0));
    }
}

// The same for the queries of a part, and zero rows until the vectors of queries are full.
template <class T>
inline void gather_queries(const Head& source, const QueryPart& part, int dim, T factor, T* rows) {
    const int64_t stride = dim_stride<T>(dim);
    gather_rows(source, part.tokens, part.count, dim, factor, rows);
    std::fill(rows + part.count * stride, rows + round_up(part.count, kLanes<T>) * stride, T(0));
}

}  // namespace block_sparse
