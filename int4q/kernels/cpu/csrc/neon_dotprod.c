/* NEON with the dot product of bytes (Armv8.2 and later, and Apple's). */
#include "common.h"

#ifdef INT4Q_ARM

#define SIMD __attribute__((target("arch=armv8.2-a+dotprod")))
#define KERNELS dotprod_kernels
#define FEATURE FEATURE_DOTPROD

#include "neon.h"

/* u is below 16, so it is a signed byte too. */
INLINE SIMD ints dot_bytes(ints acc, bytes u, const uint8_t *x) {
    return vdotq_s32(acc, vreinterpretq_s8_u8(u), vld1q_s8((const int8_t *)x));
}

#include "simd.h"

#endif
