// Runs of consecutive queries, and which queries of one selected a chunk of keys.
#pragma once

#include "layout.h"

namespace block_sparse {

constexpr int64_t kWordBits = 32;

// The queries [begin, begin + count) of one head.
struct Segment {
    int64_t begin;
    int count;
};

// All queries, cut into whole words of bits: long segments fill the parts that are worked on
// together, but what is kept of one must stay in the cache and every thread needs its share.
class Segments {
public:
    explicit Segments(const Problem& p) : length_(p.q_len) {
        const int64_t heads = p.batch * p.q_heads;
        const int64_t wanted = std::min((kItemsPerThread * p.threads + heads - 1) / heads,
                                        length_ / kShortest);
        const int64_t count = std::max({int64_t(1), wanted, (length_ + kLongest - 1) / kLongest});
        size_ = std::max(kWordBits, round_up((length_ + count - 1) / count, kWordBits));
    }

    int64_t size() const { return size_; }
    int64_t count() const { return (length_ + size_ - 1) / size_; }
    Segment operator[](int64_t i) const {
        return {i * size_, static_cast<int>(std::min(size_, length_ - i * size_))};
    }

private:
    static constexpr int64_t kItemsPerThread = 6;
    static constexpr int64_t kShortest = 512, kLongest = 2048;

    int64_t length_, size_;
};

// Calls visit(word, number of its first query in the segment) for the words of `segment` in the
// row of `chunk`, without bits past the last query.
template <class Visit>
inline void for_each_word(const Problem& p, int64_t batch, int64_t q_head, int64_t chunk,
                          const Segment& segment, Visit visit) {
    const int64_t words = (p.q_len + kWordBits - 1) / kWordBits;
    const int64_t row = (batch * p.q_heads + q_head) * p.kv_blocks + chunk;
    const uint32_t* word = p.selected + row * words + segment.begin / kWordBits;
    for (int first = 0; first < segment.count; first += kWordBits, ++word) {
        const int used = segment.count - first;
        visit(used < kWordBits ? *word & ((uint32_t(1) << used) - 1) : *word, first);
    }
}

// Writes the tokens of the queries of `segment` that selected `chunk`; returns how many.
inline int selecting_tokens(const Problem& p, int64_t batch, int64_t q_head, int64_t chunk,
                            const Segment& segment, int32_t* tokens) {
    int count = 0;
    for_each_word(p, batch, q_head, chunk, segment, [&](uint32_t word, int first) {
        for (; word; word &= word - 1)
            tokens[count++] = static_cast<int32_t>(segment.begin) + first + __builtin_ctz(word);
    });
    return count;
}

// Calls visit(part, list of the one chunk) for parts of the queries of `segment` that selected a
// chunk with visible keys; `tokens` has room for the segment.
template <class Visit>
inline void for_each_selection(const Problem& p, const KeyRows& rows, int64_t batch, int64_t q_head,
                               const Segment& segment, int lanes, int32_t* tokens, Visit visit) {
    for (int32_t chunk = 0; chunk < p.kv_blocks; ++chunk) {
        if (rows.first[chunk] == rows.first[chunk + 1]) continue;
        const int count = selecting_tokens(p, batch, q_head, chunk, segment, tokens);
        const int size = even_share(count, kMaxQueries, lanes);
        for (int i = 0; i < count; i += size)
            visit(QueryPart{chunk, tokens + i, std::min(size, count - i)}, List{&chunk, 1});
    }
}

}  // namespace block_sparse
