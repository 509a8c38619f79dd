/* The search of scale and zero point with AVX-512. */
#include "common.h"

#ifdef INT4Q_X86

#include <immintrin.h>

#define SIMD __attribute__((target("avx512f,fma")))

enum { LANES = 16 };
typedef __m512 floats;

INLINE SIMD floats load_floats(const uint8_t *p) { return _mm512_load_ps(p); }
INLINE SIMD floats set_all(float f) { return _mm512_set1_ps(f); }
INLINE SIMD floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE SIMD floats least(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE SIMD floats greatest(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE SIMD floats where_less(floats a, floats b, floats x, floats y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}

#include "simd_search.h"

SIMD void avx512_search_rows(const int4q_search_args *a, int64_t r0) { search_rows(a, r0); }

#endif
