// Rows of a tensor of any element type, read into and written from the compute type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace block_sparse {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float decode(float x) { return x; }
inline double decode(double x) { return x; }
inline float decode(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float decode(Float16 x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    // Multiplying by 2^112 rebiases the exponent and also normalises denormals.
    const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    return float_of(sign | (magnitude < 0x0f800000u ? finite : special));
}

inline void encode(float x, float& y) { y = x; }
inline void encode(double x, double& y) { y = x; }

inline void encode(float x, BFloat16& y) {
    const uint32_t bits = bits_of(x);
    const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : nearest_even);
}

inline void encode(float x, Float16& y) {
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Rebias the exponent by -112, round the 13 dropped bits to nearest even.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 1/2 aligns the last bit of a half denormal with the last bit of the float.
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // From 2^16 on; just below it, rounding up carries into infinity by itself.
    y.bits = static_cast<uint16_t>(sign | (magnitude < 0x47800000u ? finite : special));
}

// A tensor [batch, head, token, dim] with unit stride in dim; strides count elements.
struct Tensor {
    void* data;
    int64_t batch;
    int64_t head;
    int64_t token;
};

// One head of a Tensor.
struct Head {
    char* data;
    int64_t token_bytes;
    DType dtype;
};

inline int64_t element_bytes(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kFloat64: return 8;
        default: return 2;
    }
}

inline Head head_of(const Tensor& t, DType dtype, int64_t batch, int64_t head) {
    const int64_t bytes = element_bytes(dtype);
    char* data = static_cast<char*>(t.data) + (batch * t.batch + head * t.head) * bytes;
    return {data, t.token * bytes, dtype};
}

template <class E, class T>
inline void decode_row(const void* source, T* row, int dim, T factor) {
    const E* from = static_cast<const E*>(source);
    for (int d = 0; d < dim; ++d) row[d] = decode(from[d]) * factor;
}

template <class E, class T>
inline void encode_row(const T* row, void* target, int dim, T factor) {
    E* to = static_cast<E*>(target);
    for (int d = 0; d < dim; ++d) encode(row[d] * factor, to[d]);
}

// row[0:dim] = factor * source[token]; double serves float64 only.
inline void read_row(const Head& h, int64_t token, double* row, int dim, double factor) {
    decode_row<double>(h.data + token * h.token_bytes, row, dim, factor);
}

inline void read_row(const Head& h, int64_t token, float* row, int dim, float factor) {
    const char* source = h.data + token * h.token_bytes;
    switch (h.dtype) {
        case DType::kBFloat16: return decode_row<BFloat16>(source, row, dim, factor);
        case DType::kFloat16: return decode_row<Float16>(source, row, dim, factor);
        default: return decode_row<float>(source, row, dim, factor);
    }
}

// target[token] = factor * row[0:dim].
inline void write_row(const Head& h, int64_t token, const double* row, int dim, double factor) {
    encode_row<double>(row, h.data + token * h.token_bytes, dim, factor);
}

inline void write_row(const Head& h, int64_t token, const float* row, int dim, float factor) {
    char* target = h.data + token * h.token_bytes;
    switch (h.dtype) {
        case DType::kBFloat16: return encode_row<BFloat16>(row, target, dim, factor);
        case DType::kFloat16: return encode_row<Float16>(row, target, dim, factor);
        default: return encode_row<float>(row, target, dim, factor);
    }
}

}  // namespace block_sparse
