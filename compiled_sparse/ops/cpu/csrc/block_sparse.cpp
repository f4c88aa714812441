// C interface of the block-sparse attention kernels.
#include "backward.h"
#include "forward.h"
#include "layout.h"

using block_sparse::DType;
using block_sparse::ExactWeights;
using block_sparse::Float16Weights;
using block_sparse::Float8Weights;
using block_sparse::Problem;
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

// Starting a thread costs more than a piece of the work that leaves it idle.
Problem with_useful_threads(Problem p) {
    const int64_t parts = block_sparse::round_up(p.q_block, block_sparse::kMaxQueries) /
                          block_sparse::kMaxQueries;
    const int64_t items = p.batch * p.q_heads * p.q_blocks * parts;
    const int64_t useful = std::max<int64_t>(items, 1);
    p.threads = static_cast<int32_t>(std::clamp<int64_t>(p.threads, 1, useful));
    return p;
}

template <class Run>
int32_t checked(const Problem& given, Run run) {
    const Problem p = with_useful_threads(given);
    if (!tokens_fit(p.q_tokens, p.q_blocks * p.q_block, p.q_len)) return kOutOfRange;
    if (!tokens_fit(p.kv_tokens, p.kv_blocks * p.kv_block, p.kv_len)) return kOutOfRange;
    if (!lists_fit(p)) return kOutOfRange;
    try {
        run(p);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t block_sparse_forward(const Problem* p) {
    return checked(*p, [](const Problem& problem) {
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
    return checked(*p, [](const Problem& problem) {
        problem.dtype == DType::kFloat64 ? block_sparse::backward<double>(problem)
                                         : block_sparse::backward<float>(problem);
    });
}

// Bytes of a vector, for `describe`.
EXPORT int32_t block_sparse_vector_bytes() { return block_sparse::kVectorBytes; }
}
