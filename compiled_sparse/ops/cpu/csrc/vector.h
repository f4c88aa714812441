// SIMD vectors through the GCC/Clang vector extensions, and exp on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace block_sparse {

// kTileRows x 2 vectors of accumulators fill the register file of each target.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

constexpr int kLineBytes = 64;

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
    typedef int32_t Int __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr int kMantissaBits = 23;
    // Adding it rounds to an integer and leaves that integer, biased, in the low bits.
    static constexpr float kRound = 12582912.0f + 127.0f;
    // e^kLowest is far below any rounding, yet far from denormal products.
    static constexpr float kLowest = -69.0f;
    // Minimax polynomial of 2^f on [-1/2, 1/2], highest degree first.
    static constexpr float kExp2[] = {1.534581216e-4f, 1.339993121e-3f, 9.618488957e-3f,
                                      5.550328777e-2f, 2.402264689e-1f, 6.931472057e-1f,
                                      1.0f};
};

template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(kVectorBytes), may_alias));
    typedef int64_t Int __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr int kMantissaBits = 52;
    static constexpr double kRound = 6755399441055744.0 + 1023.0;
    static constexpr double kLowest = -600.0;
    static constexpr double kExp2[] = {
        4.4352809446103362e-10, 7.0741056262456594e-9, 1.0178198033328528e-7,
        1.3215433089594629e-6,  1.5252733489960805e-5, 1.5403530462514613e-4,
        1.333355814678995e-3,   9.6181291075883351e-3, 5.5504108664819921e-2,
        2.4022650695910156e-1,  6.9314718055994533e-1, 1.0};
};

template <class T>
using Vec = typename Simd<T>::Vec;

// Elements of a vector.
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
inline void store(T* p, Vec<T> value) {
    *reinterpret_cast<Vec<T>*>(p) = value;
}

template <class T>
inline Vec<T> broadcast(T value) {
    return value - Vec<T>{};  // Unlike 0 + value, no operation: it keeps the sign of -0.
}

// e^x for x < 88 (709 for double); x below kLowest counts as kLowest, NaN stays NaN.
template <class T>
inline Vec<T> exp(Vec<T> x) {
    using S = Simd<T>;
    constexpr T log2_e = T(1.44269504088896340735992468100189214L);
    const Vec<T> low = broadcast<T>(S::kLowest);
    x = x < low ? low : x;
    const Vec<T> rounded = x * log2_e + S::kRound;
    const Vec<T> f = x * log2_e - (rounded - S::kRound);
    Vec<T> p = broadcast<T>(S::kExp2[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof(S::kExp2) / sizeof(T); ++i) p = p * f + S::kExp2[i];
    typename S::Int bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits <<= S::kMantissaBits;
    Vec<T> power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

}  // namespace block_sparse
