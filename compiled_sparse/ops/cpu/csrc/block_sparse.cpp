// C interface of the sparse attention kernels.
#include "backward.h"
#include "chunk_backward.h"
#include "chunk_forward.h"
#include "forward.h"
#include "layout.h"
#include "selection.h"

using block_sparse::DType;
using block_sparse::ExactWeights;
using block_sparse::Float16Weights;
using block_sparse::Float8Weights;
using block_sparse::ListedQueries;
using block_sparse::Problem;
using block_sparse::SelectingQueries;
using block_sparse::Selection;
using block_sparse::Weights;
using block_sparse::forward;

namespace {

enum Status : int32_t { kOk = 0, kNoMemory = 1, kOutOfRange = 2 };

// Whether a map holds `length` tokens, each in range.
bool tokens_fit(const int32_t* tokens, int64_t slots, int64_t length) {
    const int32_t* end = tokens + slots;
    return std::count_if(tokens, end, [](int32_t token) { return token >= 0; }) == length &&
           std::all_of(tokens, end, [&](int32_t token) { return token < length; });
}

bool lists_fit(const Problem& p) {
    const int64_t batches = p.counts_batch || p.indices_batch ? p.batch : 1;
    const int64_t heads = p.counts_head || p.indices_head ? p.q_heads : 1;
    for (int64_t i = 0; i < batches * heads * p.q_blocks; ++i) {
        const auto list = block_sparse::list_of(p, i / p.q_blocks / heads,
                                                i / p.q_blocks % heads, i % p.q_blocks);
        if (list.count < 0 || list.count > p.list) return false;
        if (!std::all_of(list.block, list.block + list.count,
                         [&](int32_t block) { return block >= 0 && block < p.kv_blocks; }))
            return false;
    }
    return true;
}

bool keys_fit(const Problem& p) {
    return tokens_fit(p.kv_tokens, p.kv_blocks * p.kv_block, p.kv_len);
}

// Starting a thread costs more than a piece of the work that leaves it idle.
template <class P>
P with_useful_threads(P p, int64_t items) {
    const int64_t useful = std::max<int64_t>(items, 1);
    p.threads = static_cast<int32_t>(std::clamp<int64_t>(p.threads, 1, useful));
    return p;
}

template <class Run>
int32_t status_of(Run run) {
    try {
        run();
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}

template <class Run>
int32_t run_blocks(const Problem& given, Run run) {
    const int64_t parts = block_sparse::round_up(given.q_block, block_sparse::kMaxQueries) /
                          block_sparse::kMaxQueries;
    const int64_t items = given.batch * given.q_heads * given.q_blocks * parts;
    const Problem p = with_useful_threads(given, items);
    if (!tokens_fit(p.q_tokens, p.q_blocks * p.q_block, p.q_len)) return kOutOfRange;
    if (!keys_fit(p) || !lists_fit(p)) return kOutOfRange;
    return status_of([&] { run(p); });
}

template <class Run>
int32_t run_chunks(const Problem& given, Run run) {
    const int64_t items = given.batch * given.q_heads * block_sparse::Segments(given).count();
    const Problem p = with_useful_threads(given, items);
    if (p.q_len != p.kv_len || !keys_fit(p)) return kOutOfRange;
    return status_of([&] { run(p); });
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t block_sparse_forward(const Problem* p) {
    return run_blocks(*p, [](const Problem& problem) {
        if (problem.dtype == DType::kFloat64)
            return forward<double, ExactWeights<double>>(problem);
        switch (problem.weights) {
            case Weights::kFloat8: return forward<float, Float8Weights>(problem);
            case Weights::kFloat16: return forward<float, Float16Weights>(problem);
            default: return forward<float, ExactWeights<float>>(problem);
        }
    });
}

EXPORT int32_t block_sparse_backward(const Problem* p) {
    return run_blocks(*p, [](const Problem& problem) {
        problem.dtype == DType::kFloat64
            ? block_sparse::backward<double, ListedQueries<double>>(problem)
            : block_sparse::backward<float, ListedQueries<float>>(problem);
    });
}

EXPORT int32_t chunk_sparse_forward(const Problem* p) {
    return run_chunks(*p, [](const Problem& problem) {
        problem.dtype == DType::kFloat64 ? block_sparse::chunk_forward<double>(problem)
                                         : block_sparse::chunk_forward<float>(problem);
    });
}

EXPORT int32_t chunk_sparse_backward(const Problem* p) {
    return run_chunks(*p, [](const Problem& problem) {
        problem.dtype == DType::kFloat64
            ? block_sparse::backward<double, SelectingQueries<double>>(problem)
            : block_sparse::backward<float, SelectingQueries<float>>(problem);
    });
}

EXPORT int32_t select_per_query(const Selection* given) {
    const int64_t steps = block_sparse::round_up(given->q_len, block_sparse::kMaxQueries) /
                          block_sparse::kMaxQueries;
    const Selection s = with_useful_threads(*given, given->batch * given->q_heads * steps);
    if (!std::all_of(s.own, s.own + s.videos(),
                     [&](int32_t chunk) { return chunk >= 0 && chunk < s.chunks; }))
        return kOutOfRange;
    return status_of([&] {
        s.dtype == DType::kFloat64 ? block_sparse::select_per_query<double>(s)
                                   : block_sparse::select_per_query<float>(s);
    });
}

// Bytes of a vector, for `describe`.
EXPORT int32_t block_sparse_vector_bytes() { return block_sparse::kVectorBytes; }
}
