// Which chunks each query selects: the best by the product of query and mean key.
#pragma once

#include <omp.h>

#include <numeric>

#include "gemm.h"
#include "layout.h"
#include "transpose.h"

namespace block_sparse {

// Mirrored field by field by `_Selection` in native_selection.py. A sequence is text, video tokens
// and text; chunks are runs of text, chunks of video and runs of text.
struct Selection {
    int64_t batch, q_heads, kv_heads, q_len, dim;
    int64_t chunks;  // of video, as everywhere below
    int64_t text_before, text_after, runs_before, runs_after;
    int64_t count;     // chunks to select besides the own one
    double threshold;  // share of the gates to select, where `by_threshold`
    Tensor q;
    const void* means;             // [batch, kv_heads, chunks, dim] in the compute type
    const int32_t* own;            // [video tokens] the chunk a token lies in
    const uint8_t* chunk_visible;  // [batch, chunks] or null
    const uint8_t* query_visible;  // [batch, video tokens] or null
    uint32_t* selected;            // as in Problem
    DType dtype;
    int32_t threads;
    int32_t by_threshold;

    int64_t videos() const { return q_len - text_before - text_after; }
    const uint8_t* visible_chunks(int64_t b) const {
        return chunk_visible ? chunk_visible + b * chunks : nullptr;
    }
};

// Gates as integers of the same order; both zeros are equal and NaN is the lowest.
template <class T>
using Rank = typename Simd<T>::Int;

template <class T>
using RankElement = std::remove_reference_t<decltype(Rank<T>{}[0])>;

template <class T>
constexpr RankElement<T> kNoCandidate = std::numeric_limits<RankElement<T>>::min();

// Its own inverse on bits of numbers.
template <class T>
inline Rank<T> order_of(Rank<T> bits) {
    return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<RankElement<T>>::max());
}

template <class T>
inline Rank<T> rank_of(Vec<T> gate) {
    const Vec<T> positive_zero = gate + T(0);
    Rank<T> bits;
    std::memcpy(&bits, &positive_zero, sizeof bits);
    const Rank<T> nan = Rank<T>{} + (kNoCandidate<T> + 1);
    return gate == gate ? order_of<T>(bits) : nan;
}

// What one thread keeps for kMaxQueries queries at work.
template <class T>
struct SelectionScratch {
    T* rows;         // [query][dim]
    T* q;            // [dim][query]
    T* gate;         // [chunk][query] gates, then their ranks
    double* total;   // [query] sum of the gates
    uint64_t* bits;  // [chunk] a bit for each query
    int32_t* tokens;

    SelectionScratch(Carver<T>& carver, const Selection& s) {
        constexpr int64_t stride = kQueryStride<T>;
        rows = carver.take(kMaxQueries * dim_stride<T>(s.dim));
        q = carver.take(round_up(s.dim, kLanes<T>) * stride);
        gate = carver.take((s.chunks + kTileRows) * stride);
        total = carver.template take<double>(kMaxQueries);
        bits = carver.template take<uint64_t>(s.chunks);
        tokens = carver.template take<int32_t>(kMaxQueries);
    }
};

// Scales the gates of kLanes queries to [0, 1] over the visible chunks and adds them up; NaN stays
// and does not count.
template <class T>
inline void normalise(T* gate, int64_t chunks, const uint8_t* visible, double* total) {
    constexpr int W = kLanes<T>;
    constexpr int64_t stride = kQueryStride<T>;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    Vec<T> low = broadcast<T>(infinity), high = broadcast<T>(-infinity);
    for (int64_t c = 0; c < chunks; ++c) {
        if (visible && !visible[c]) continue;
        const Vec<T> x = load(gate + c * stride);
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    Vec<T> width = high - low;
    width = width <= T(1e-6) ? broadcast<T>(1) : width;
    std::fill_n(total, W, 0.0);
    for (int64_t c = 0; c < chunks; ++c) {
        if (visible && !visible[c]) continue;
        T* g = gate + c * stride;
        store(g, (load(g) - low) / width);
        for (int i = 0; i < W; ++i) total[i] += g[i] == g[i] ? g[i] : T(0);
    }
}

// Turns the gates of kLanes queries into ranks.
template <class T>
inline void rank_gates(T* gate, int64_t chunks, const uint8_t* visible) {
    const Rank<T> hidden = Rank<T>{} + kNoCandidate<T>;
    for (int64_t c = 0; c < chunks; ++c) {
        T* g = gate + c * kQueryStride<T>;
        const Rank<T> rank = visible && !visible[c] ? hidden : rank_of<T>(load(g));
        std::memcpy(g, &rank, sizeof rank);
    }
}

// Calls take(lane, chunk, rank) for the candidates of the `open` ones of kLanes queries, best
// first, the lower chunk first among equals, until it returns false or no candidate is left.
template <class T, class Take>
inline void take_candidates(T* ranks, int64_t chunks, uint32_t open, Take take) {
    constexpr int64_t stride = kQueryStride<T>;
    while (open) {
        Rank<T> best = Rank<T>{} + kNoCandidate<T>, chunk{}, c{};
        for (int64_t i = 0; i < chunks; ++i, c += 1) {
            Rank<T> rank;
            std::memcpy(&rank, ranks + i * stride, sizeof rank);
            chunk = rank > best ? c : chunk;
            best = rank > best ? rank : best;
        }
        for (uint32_t lanes = open; lanes; lanes &= lanes - 1) {
            const int lane = __builtin_ctz(lanes);
            const RankElement<T> rank = best[lane], none = kNoCandidate<T>;
            if (rank != none) {
                std::memcpy(ranks + chunk[lane] * stride + lane, &none, sizeof none);
                if (take(lane, chunk[lane], rank)) continue;
            }
            open &= ~(uint32_t(1) << lane);
        }
    }
}

// Up to kLanes queries at work, as lanes.
struct Lanes {
    int first;           // among the kMaxQueries ones
    uint32_t open;       // that select by gates
    const int32_t* own;  // [lane], defined for open ones
};

template <class T>
inline void hide_own(T* ranks, const Lanes& lanes) {
    const RankElement<T> none = kNoCandidate<T>;
    for (uint32_t open = lanes.open; open; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        std::memcpy(ranks + lanes.own[lane] * kQueryStride<T> + lane, &none, sizeof none);
    }
}

template <class T>
inline void select_count(const Selection& s, const uint8_t* visible, const Lanes& lanes,
                         const SelectionScratch<T>& w) {
    if (s.count <= 0) return;
    T* gate = w.gate + lanes.first;
    rank_gates(gate, s.chunks, visible);
    hide_own(gate, lanes);
    int64_t taken[kLanes<T>] = {};
    take_candidates(gate, s.chunks, lanes.open, [&](int lane, int64_t chunk, RankElement<T>) {
        w.bits[chunk] |= uint64_t(1) << (lanes.first + lane);
        return ++taken[lane] < s.count;
    });
}

template <class T>
inline T gate_of(RankElement<T> rank) {
    if (rank == kNoCandidate<T> + 1) return T(0);
    const Rank<T> bits = order_of<T>(Rank<T>{} + rank);
    T gate;
    std::memcpy(&gate, &bits, sizeof gate);
    return gate;
}

template <class T>
inline void select_share(const Selection& s, const uint8_t* visible, const Lanes& lanes,
                         const SelectionScratch<T>& w) {
    constexpr double tiny = 1e-6;
    T* gate = w.gate + lanes.first;
    double* total = w.total + lanes.first;
    normalise(gate, s.chunks, visible, total);
    double needed[kLanes<T>], sum[kLanes<T>] = {};
    for (uint32_t open = lanes.open; open; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        const int64_t chunk = lanes.own[lane];
        const T own = visible && !visible[chunk] ? T(0) : gate[chunk * kQueryStride<T> + lane];
        const double share = (own == own ? own : T(0)) / (total[lane] + tiny);
        needed[lane] = std::max(0.0, s.threshold - share);
    }
    rank_gates(gate, s.chunks, visible);
    hide_own(gate, lanes);
    take_candidates(gate, s.chunks, lanes.open,
                    [&](int lane, int64_t chunk, RankElement<T> rank) {
                        w.bits[chunk] |= uint64_t(1) << (lanes.first + lane);
                        sum[lane] += gate_of<T>(rank);
                        return !(sum[lane] / (total[lane] + tiny) >= needed[lane]);
                    });
}

// Which of some queries are text, and which video ones see others than their own chunk.
struct Kinds {
    uint64_t text = 0, seeing = 0;
    int32_t own[kMaxQueries];  // of video queries
};

inline Kinds kinds_of(const Selection& s, int64_t batch, int64_t first, int count) {
    Kinds kinds;
    for (int i = 0; i < count; ++i) {
        const int64_t video = first + i - s.text_before;
        const uint64_t bit = uint64_t(1) << i;
        if (video < 0 || video >= s.videos()) {
            kinds.text |= bit;
            continue;
        }
        kinds.own[i] = s.own[video];
        if (!s.query_visible || s.query_visible[batch * s.videos() + video]) kinds.seeing |= bit;
    }
    return kinds;
}

// Writes the words of `count` queries from `first` on: all of the text's chunks, and w.bits.
inline void write_words(const Selection& s, int64_t head, int64_t first, int count,
                        const uint64_t* bits) {
    const int64_t words = (s.q_len + 31) / 32, video_end = s.runs_before + s.chunks;
    const uint64_t all = count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0);
    for (int64_t chunk = 0; chunk < video_end + s.runs_after; ++chunk) {
        const bool video = chunk >= s.runs_before && chunk < video_end;
        const uint64_t pair = video ? bits[chunk - s.runs_before] : all;
        uint32_t* word =
            s.selected + (head * (video_end + s.runs_after) + chunk) * words + first / 32;
        word[0] = static_cast<uint32_t>(pair);
        if (count > 32) word[1] = static_cast<uint32_t>(pair >> 32);
    }
}

// Selects for up to kMaxQueries queries from `first` on; `head` counts through batch and head.
template <class T>
inline void select_queries(const Selection& s, const T* means, int64_t head, int64_t first,
                           const SelectionScratch<T>& w) {
    constexpr int64_t stride = kQueryStride<T>;
    const int64_t batch = head / s.q_heads, q_head = head % s.q_heads;
    const int64_t kv_head = batch * s.kv_heads + q_head / (s.q_heads / s.kv_heads);
    const int count = static_cast<int>(std::min<int64_t>(kMaxQueries, s.q_len - first));
    const int dim = static_cast<int>(s.dim), chunks = static_cast<int>(s.chunks);
    const Kinds kinds = kinds_of(s, batch, first, count);
    std::iota(w.tokens, w.tokens + count, static_cast<int32_t>(first));
    gather_queries(head_of(s.q, s.dtype, batch, q_head), {0, w.tokens, count}, dim, T(1), w.rows);
    transpose(w.rows, dim_stride<T>(dim), w.q, stride, count, dim);
    gemm<T, Layout::kRows>({means + kv_head * chunks * dim, dim, w.q, stride, w.gate, stride,
                            nullptr},
                           chunks, count, dim, Start::kZero);
    std::fill_n(w.bits, chunks, kinds.text);
    constexpr uint64_t all_lanes = (uint64_t(1) << kLanes<T>) - 1;
    for (int i = 0; i < count; i += kLanes<T>) {
        const Lanes lanes{i, static_cast<uint32_t>(kinds.seeing >> i & all_lanes), kinds.own + i};
        (s.by_threshold ? select_share<T> : select_count<T>)(s, s.visible_chunks(batch), lanes, w);
    }
    for (int i = 0; i < count; ++i)
        if (!(kinds.text >> i & 1)) w.bits[kinds.own[i]] |= uint64_t(1) << i;
    write_words(s, head, first, count, w.bits);
}

template <class T>
void select_per_query(const Selection& s) {
    const int64_t elements = s.batch * s.kv_heads * s.chunks * s.dim;
    // A copy, as gemm reads up to a tile past the last row.
    const Buffer memory((elements + kTileRows * s.dim) * sizeof(T));
    T* means = memory.at<T>(0);
    std::copy_n(static_cast<const T*>(s.means), elements, means);
    const ThreadScratch<T, SelectionScratch<T>, Selection> scratch(s);
    const int64_t steps = (s.q_len + kMaxQueries - 1) / kMaxQueries;
#pragma omp parallel num_threads(s.threads)
    {
        const SelectionScratch<T> w = scratch.at(omp_get_thread_num());
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < s.batch * s.q_heads * steps; ++i)
            select_queries(s, means, i / steps, i % steps * kMaxQueries, w);
    }
}

}  // namespace block_sparse
