// Keys and values of a head, converted to the compute type in the order of KeyRows.
#pragma once

#include "layout.h"

namespace block_sparse {

template <class T>
struct PackedHead {
    const KeyRows* rows;
    T* k;  // [row][dim]
    T* v;
};

// Elements of a packed K or V: gemm reads up to a tile past the last row.
template <class T>
inline int64_t packed_elements(const Problem& p) {
    return (p.kv_len + kTileRows) * dim_stride<T>(p.dim);
}

// Room for the packed keys and values of `slots` heads at a time.
template <class T>
class PackedHeads {
public:
    PackedHeads(const Problem& p, int64_t slots)
        : p_(p), elements_(packed_elements<T>(p)), memory_(2 * slots * elements_ * sizeof(T)) {
        for (int64_t batch = 0; batch < (p.key_mask ? p.batch : 1); ++batch)
            rows_.push_back(key_rows(p, batch));
    }

    // kv head `head`, which counts through batch and head, as kept in `slot`.
    PackedHead<T> at(int64_t head, int64_t slot) const {
        return {&rows_[p_.key_mask ? head / p_.kv_heads : 0],
                memory_.template at<T>(2 * slot * elements_),
                memory_.template at<T>((2 * slot + 1) * elements_)};
    }

    // Pieces that the packing of one head falls into.
    int64_t tasks() const { return (p_.kv_len + kMaxKeys - 1) / kMaxKeys; }

    void pack(int64_t head, int64_t slot, int64_t task) const {
        const PackedHead<T> packed = at(head, slot);
        const int64_t visible = packed.rows->first[p_.kv_blocks];
        const int64_t row = task * kMaxKeys;
        const int64_t count = std::min<int64_t>(kMaxKeys, visible - row);
        const int32_t* tokens = packed.rows->token.data() + row;
        const int dim = static_cast<int>(p_.dim);
        const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
        gather_rows(head_of(p_.k, p_.dtype, batch, kv_head), tokens, count, dim, T(1),
                    packed.k + row * dim_stride<T>(dim));
        gather_rows(head_of(p_.v, p_.dtype, batch, kv_head), tokens, count, dim, T(1),
                    packed.v + row * dim_stride<T>(dim));
    }

private:
    const Problem& p_;
    int64_t elements_;
    Buffer memory_;
    std::vector<KeyRows> rows_;
};

}  // namespace block_sparse
