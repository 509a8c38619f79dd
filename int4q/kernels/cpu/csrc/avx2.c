/* AVX2 (with FMA and F16C). */
#include "common.h"

#ifdef INT4Q_X86

#define SIMD __attribute__((target("avx2,fma,f16c")))
#define KERNELS avx2_kernels
#define FEATURE FEATURE_AVX2

#include "avx2.h"

/* Pairs of products fit 16 bits: 2 * 15 * 128. */
INLINE SIMD ints dot_bytes(ints acc, bytes u, const uint8_t *x) {
    const __m256i pairs = _mm256_maddubs_epi16(u, _mm256_load_si256((const __m256i *)x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "simd.h"

#endif
