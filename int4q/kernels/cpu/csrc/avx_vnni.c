/* AVX2 with VNNI for 32-byte registers. */
#include "common.h"

#ifdef INT4Q_X86

#define SIMD __attribute__((target("avx2,fma,f16c,avxvnni")))
#define KERNELS avx_vnni_kernels
#define FEATURE FEATURE_AVX_VNNI

#include "avx2.h"

INLINE SIMD ints dot_bytes(ints acc, bytes u, const uint8_t *x) {
    return _mm256_dpbusd_avx_epi32(acc, u, _mm256_load_si256((const __m256i *)x));
}

#include "simd.h"

#endif
