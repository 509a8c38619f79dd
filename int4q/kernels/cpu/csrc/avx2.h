/* The operations of simd.h with AVX2; whoever includes this says how bytes are multiplied. */
#include <immintrin.h>

#include "common.h"

enum { LANES = 8 };
typedef __m256 floats;
typedef __m256i ints, bytes;
typedef __m128i bytes16;

INLINE SIMD bytes load_bytes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE SIMD ints load_ints(const uint8_t *p) { return _mm256_load_si256((const __m256i *)p); }
INLINE SIMD floats load_floats(const uint8_t *p) { return _mm256_load_ps((const float *)p); }
INLINE SIMD ints zero_ints(void) { return _mm256_setzero_si256(); }
INLINE SIMD floats set_all(float f) { return _mm256_set1_ps(f); }
INLINE SIMD floats to_floats(ints v) { return _mm256_cvtepi32_ps(v); }
INLINE SIMD ints add_ints(ints a, ints b) { return _mm256_add_epi32(a, b); }
INLINE SIMD ints times_256(ints v) { return _mm256_slli_epi32(v, 8); }
INLINE SIMD floats multiply(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE SIMD floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }

INLINE SIMD floats least(floats a, floats b) { return _mm256_min_ps(a, b); }
INLINE SIMD floats greatest(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE SIMD floats where_less(floats a, floats b, floats x, floats y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

INLINE SIMD float sum_of(floats v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* Entries 2 * part and 2 * part + 1, `stride` floats apart, each four times. */
INLINE SIMD floats spread(const float *four, int stride, int part) {
    const float *first = four + 2 * part * stride;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(first)),
                                _mm_broadcast_ss(first + stride), 1);
}

INLINE SIMD void unpack_unsigned(bytes w, uint8_t flip, bytes *even, bytes *odd) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    w = _mm256_xor_si256(w, _mm256_set1_epi8((char)flip));
    *even = _mm256_and_si256(w, low);
    *odd = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
}

INLINE SIMD bytes16 load_bytes16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE SIMD void store_bytes16(uint8_t *p, bytes16 v) { _mm_storeu_si128((__m128i *)p, v); }
INLINE SIMD bytes16 look_up(bytes16 table, bytes16 index) { return _mm_shuffle_epi8(table, index); }

INLINE SIMD void unpack_nibbles(bytes16 w, bytes16 *even, bytes16 *odd) {
    const __m128i low = _mm_set1_epi8(0x0f);
    *even = _mm_and_si128(w, low);
    *odd = _mm_and_si128(_mm_srli_epi16(w, 4), low);
}

INLINE SIMD void interleave(bytes16 a, bytes16 b, bytes16 *first, bytes16 *second) {
    *first = _mm_unpacklo_epi8(a, b);
    *second = _mm_unpackhi_epi8(a, b);
}

INLINE SIMD void interleave_pairs(bytes16 a, bytes16 b, bytes16 *first, bytes16 *second) {
    *first = _mm_unpacklo_epi16(a, b);
    *second = _mm_unpackhi_epi16(a, b);
}

INLINE SIMD float half_to_float(uint16_t half) { return _cvtsh_ss(half); }
INLINE SIMD uint16_t float_to_half(float f) {
    return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE SIMD void load_halves(const uint16_t *p, float *to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
}
