// How softmax weights are rounded before they meet the values.
#pragma once

#include "vector.h"

namespace block_sparse {

// Mirrored by `_WEIGHTS` in native.py.
enum class Weights : int32_t { kExact = 0, kFloat8 = 1, kFloat16 = 2 };

template <class T>
struct ExactWeights {
    static Vec<T> round(Vec<T> p) { return p; }
};

// Peak * p to the nearest number of kBits digits behind the leading one, of exponent kLowest at
// least: below it, steps are those of the lowest exponent.
template <int kPeak, int kBits, int kLowest>
struct RoundedWeights {
    static Vec<float> round(Vec<float> p) {
        using Int = Simd<float>::Int;
        const Vec<float> x = p * static_cast<float>(kPeak);
        Int exponent;
        std::memcpy(&exponent, &x, sizeof exponent);
        exponent &= 0x7f800000;
        const Int lowest = Int{} + ((kLowest + 127) << 23);
        exponent = exponent > lowest ? exponent : lowest;
        Vec<float> unit;
        std::memcpy(&unit, &exponent, sizeof unit);
        // Adding it leaves kBits digits; the half more keeps the sum within one exponent.
        const Vec<float> big = unit * (1.5f * static_cast<float>(1 << (23 - kBits)));
        return (x + big) - big;
    }
};

using Float8Weights = RoundedWeights<448, 3, -6>;
using Float16Weights = RoundedWeights<1, 10, -14>;

}  // namespace block_sparse
