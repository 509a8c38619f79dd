/* int4 weight-only linear and dequantisation for x86-64 CPUs.
 *
 * Weights, logical [N, K], value[n, k] = q[n, k] * scale[g, n] + zero_point[g, n], g = k / group:
 *   qdata       int8 [N, K/2]; even k in the low nibble, odd k in the high one, signed q in -8..7
 *               (two's complement; with offset_binary the nibble is u = q + 8)
 *   scale       bf16, fp16 or fp32 [G, N], any strides
 *   zero_point  the same dtype [G, N], any strides; NULL where all are 0
 * group is 32, 64, 128 or 256 and divides K. Activations x are [M, K], results [M, N].
 *
 * int4q_decode   a few rows: the weights are read as they are stored, eight rows of x at a time.
 *                What a weight and an activation are in the products is the caller's choice:
 *                  PRODUCT_EXACT    weights as they are; x as 16 or 24 bit fixed point (VNNI)
 *                  PRODUCT_BF16     x bf16, weights rounded once to bf16; no zero points
 *                  PRODUCT_INT8     weights as they are; x as int8, a scale for 32 (VNNI)
 *                Sums are float32. INT4Q_OUT_OF_RANGE: done, and rows of x that fixed point cannot
 *                hold (NaN, Inf, 2^121 and more) gave rows of NaN.
 * int4q_gemm     any M, x bf16: weights rounded once to bf16, float32 sums (AMX tiles)
 * int4q_dequant  rows of the weight as bf16, fp16 or fp32
 *
 * Every function names its instruction set, so the file needs no -march; where it is not x86-64 or
 * the compiler is not gcc or clang, int4q_cpu_features() is 0 and the kernels return
 * INT4Q_UNSUPPORTED. Kernels hold no global state; several threads may call them at once.
 */
#include "int4_cpu.h"

#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(_MSC_VER)

#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma")))
#define TARGET_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,fma")))
#define TARGET_AMX \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,fma,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 8") /* arrays indexed by a loop live in registers then */
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

/* ---------------------------------------------------------------------------------------------
 * CPU features
 * ------------------------------------------------------------------------------------------- */

static uint64_t os_state_mask(void) {
    uint32_t eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return ((uint64_t)edx << 32) | eax;
}

/* Linux hands a process the AMX tile registers only on request. */
static int request_tiles(void) {
#ifdef __linux__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int detect_features(void) {
    unsigned a, b, c, d, b7, c7, d7;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0; /* OSXSAVE */
    const int has_fma = (c >> 12) & 1;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
    const uint64_t zmm = 0xe6, tiles = 3u << 17; /* XCR0: SSE, AVX, opmask, zmm; tile state */
    const uint64_t os = os_state_mask();
    const int avx512 = ((b7 >> 16) & 1) && ((b7 >> 30) & 1) && ((b7 >> 31) & 1); /* f, bw, vl */
    const int vnni = (c7 >> 11) & 1;
    if (!avx512 || !vnni || !has_fma || (os & zmm) != zmm) return 0;
    unsigned a71 = 0;
    __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    const int bf16 = (a71 >> 5) & 1, amx = ((d7 >> 22) & 1) && ((d7 >> 24) & 1);
    int features = FEATURE_VNNI | (bf16 ? FEATURE_BF16 : 0);
    if (bf16 && amx && (os & tiles) == tiles && request_tiles()) features |= FEATURE_AMX;
    return features;
}

EXPORT int int4q_cpu_features(void) {
    static int cached = -1; /* every thread would write the same value */
    int features = __atomic_load_n(&cached, __ATOMIC_RELAXED);
    if (features < 0) {
        features = detect_features();
        __atomic_store_n(&cached, features, __ATOMIC_RELAXED);
    }
    return features;
}

static int has_feature(const int4q_args *a, int feature) {
    return (a->features & int4q_cpu_features() & feature) != 0;
}

/* For the caller to see that both sides mean the same arguments. */
EXPORT int64_t int4q_args_bytes(void) { return sizeof(int4q_args); }

/* ---------------------------------------------------------------------------------------------
 * Loads, stores, small shared pieces
 * ------------------------------------------------------------------------------------------- */

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void *aligned_new(int64_t bytes) { return _mm_malloc((size_t)bytes, 64); }

INLINE TARGET_VNNI __m512 bf16_to_float(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Round to nearest even; a NaN keeps its upper bits and stays quiet. */
INLINE TARGET_VNNI __m256i float_to_bf16(__m512 f) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
}

/* Elements [i, i + 16) of p, those in the mask, as float. */
INLINE TARGET_VNNI __m512 load_floats(const void *p, int64_t kind, int64_t i, __mmask16 mask) {
    if (kind == KIND_FP32) return _mm512_maskz_loadu_ps(mask, (const float *)p + i);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + i);
    return kind == KIND_BF16 ? bf16_to_float(half) : _mm512_cvtph_ps(half);
}

INLINE TARGET_VNNI __m256i to_half(__m512 f, int64_t kind) {
    return kind == KIND_BF16 ? float_to_bf16(f)
                             : _mm512_cvtps_ph(f, NEAREST);
}

INLINE TARGET_VNNI void store_floats(void *p, int64_t kind, int64_t i, __mmask16 mask, __m512 f) {
    if (kind == KIND_FP32)
        _mm512_mask_storeu_ps((float *)p + i, mask, f);
    else
        _mm256_mask_storeu_epi16((uint16_t *)p + i, mask, to_half(f, kind));
}

/* Mask of the valid lanes when `count` elements are left. */
INLINE __mmask16 lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Entry [g, n0 .. n0 + 15] of scale or zero_point as float; lanes past N are 0. */
INLINE TARGET_VNNI __m512 load_params(const void *p, int64_t kind, int64_t stride_g,
                                      int64_t stride_n, int64_t g, int64_t n0, __mmask16 mask) {
    const int64_t first = g * stride_g + n0 * stride_n;
    if (stride_n == 1) return load_floats(p, kind, first, mask);
    union {
        uint32_t word[16];
        uint16_t half[16];
    } row = {{0}}; /* strided: bring the 16 elements together, then convert */
    for (int i = 0; i < 16 && (mask >> i); i++) {
        const int64_t at = first + i * stride_n;
        if (kind == KIND_FP32)
            row.word[i] = ((const uint32_t *)p)[at];
        else
            row.half[i] = ((const uint16_t *)p)[at];
    }
    return load_floats(&row, kind, 0, 0xffff);
}

INLINE TARGET_VNNI __m512 load_scale(const int4q_args *a, int64_t g, int64_t n0, __mmask16 mask) {
    return load_params(a->scale, a->scale_kind, a->scale_stride_g, a->scale_stride_n, g, n0, mask);
}

INLINE TARGET_VNNI __m512 load_zero(const int4q_args *a, int64_t g, int64_t n0, __mmask16 mask) {
    if (!a->zero) return _mm512_setzero_ps();
    return load_params(a->zero, a->scale_kind, a->zero_stride_g, a->zero_stride_n, g, n0, mask);
}

typedef struct {
    int64_t begin, end;
} range;

/* Share `part` of `parts` of [0, total). */
static range share(int64_t total, int64_t part, int64_t parts) {
    const range r = {total * part / parts, total * (part + 1) / parts};
    return r;
}

/* Threads worth waking: no more than pieces of work, and `work` (bytes of weights, times the rows
 * of x that use them) enough for each. */
static int64_t useful_threads(const int4q_args *a, int64_t pieces, int64_t work) {
    enum { WORK_PER_THREAD = 64 << 10 };
    const int64_t threads = min64(min64(a->threads, pieces), ceil_div(work, WORK_PER_THREAD));
    return threads < 1 ? 1 : threads;
}

/* OpenMP where it was compiled in; one thread elsewhere. */
#ifdef _OPENMP
#define PRAGMA(text) _Pragma(#text)
#define PARALLEL(count) PRAGMA(omp parallel num_threads((int)(count)) if ((count) > 1))
#define BARRIER PRAGMA(omp barrier)
#define THREAD_INDEX omp_get_thread_num()
#define THREAD_COUNT omp_get_num_threads()
#else
#define PARALLEL(count) (void)(count);
#define BARRIER
#define THREAD_INDEX 0
#define THREAD_COUNT 1
#endif

/* ---------------------------------------------------------------------------------------------
 * Decode, step 1: x in the order and the numbers of the products
 *
 * A "unit" is 128 k of one row, 64 bytes of weights; lane i of a register of 16 sees the k in
 * [8 i, 8 i + 8). x is held in one of these forms, whose 64-byte rows are:
 *
 * X_INT8, X_INT16, X_INT24: x = v * d, v a signed integer of 1, 2 or 3 int8 limbs,
 * v = sum_l limb[l] * 256^l, d a float that 32 k (one limb) or 8 k (a power of two) share.
 *   limb[l]     int8 [even k: 64][odd k: 64], as vpdpbusd wants it
 *   offset      int32 [16] (three limbs: one for limbs 0 and 1, one for limb 2): -8 * sum of v over
 *               the lane, since the weights enter as u = q + 8
 *   d           float [16]
 * X_BF16: bf16 [4][32], word i of row j is k = 4 i + j: shifting a word of weights right by 4 j
 * brings that k's nibble down.
 * X_FLOAT: float [8][16], lane i of row j is k = 8 i + j, likewise.
 * ------------------------------------------------------------------------------------------- */

enum { UNIT_K = 128, SPAN_K = 256, MAX_CHUNK_M = 8, ROWS = 16, MAX_R = 4 };
enum { X_INT8 = 1, X_INT16 = 2, X_INT24 = 3, X_BF16 = 4, X_FLOAT = 5, FORMS = 5 };

INLINE int64_t unit_bytes(int form) {
    if (form == X_BF16) return 4 * 64;
    if (form == X_FLOAT) return 8 * 64;
    return form * 128 + (form == X_INT24 ? 2 : 1) * 64 + 64;
}

/* A chunk of at most 8 rows of x. */
typedef struct {
    int64_t m0, M, units, groups;
    int form;
    uint8_t *units_x;  /* [units][M][unit_bytes] */
    float *group_sum;  /* [M][groups]: sum of x over a group, which zero_point multiplies */
    int *out_of_range; /* set where fixed point met what it cannot hold */
} turned_x;

INLINE TARGET_VNNI __m512i max_of_four(__m512i v) {
    v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    return _mm512_max_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
}

INLINE TARGET_VNNI __m512i sum_of_four(__m512i v) {
    v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
}

/* Lanes 0, 4, 8, 12. */
INLINE TARGET_VNNI __m128i every_fourth(__m512i v) {
    return _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, v));
}

/* Exponent field of the block's d, a power of two: the least for which the largest |x| of the
 * block, rounded to nearest, fits the limbs.
 *
 * Limbs are cut off from below as the int8 nearest to what is left, so L of them hold v up to
 * 127 * (1 + 256 + .. + 256^(L-1)) = 32639 for two and 8355711 for three (and more below 0). Let
 * amax = S * 2^e with 2^23 <= S < 2^24, the 24 bits of a float's significand. With field as the
 * exponent of amax, v = S / 2^9 (two limbs, 15 bits) or S / 2 (three, 23 bits), rounded to nearest,
 * ties to even. The first S that does not fit is the one at 32639.5 or 8355711.5, because both ties
 * go up to the even neighbour:
 *   two limbs    S = 32639.5 * 2^9 = 16711424 = 2^24 - 65792
 *   three limbs  S = 8355711.5 * 2 = 16711423 = 2^24 - 65793
 * Adding 65793 to the bits of amax carries into the exponent field exactly when S >= 2^24 - 65793;
 * d is twice as large then, and v <= 2^22 (2^14) fits. For two limbs this is early by the one value
 * S = 16711423. Smaller |x| of the block give smaller |v|.
 *
 * d is at least the smallest normal float, 2^-126, so that 1 / d is finite: the field of amax counts
 * as `bits` at least, and x below 2^-104 (2^-112 for 16 bits) are rounded to multiples of 2^-126. */
INLINE TARGET_VNNI __m512i block_exponent(__m512i amax_bits, int bits) {
    const __m512i field =
        _mm512_srli_epi32(_mm512_add_epi32(amax_bits, _mm512_set1_epi32(65793)), 23);
    return _mm512_sub_epi32(_mm512_max_epi32(field, _mm512_set1_epi32(bits)),
                            _mm512_set1_epi32(bits - 1));
}

/* The lanes whose largest |x| fixed point does not hold: NaN, Inf, and 2^121 or more, where the sum
 * q * x of a lane could leave the range of float before its scale brings it back. They get d = NaN,
 * so that every result they enter is NaN. */
INLINE TARGET_VNNI __mmask16 beyond_range(__m512i amax_bits) {
    return _mm512_cmpge_epi32_mask(amax_bits, _mm512_set1_epi32((127 + 121) << 23));
}

/* 8 k in each four lanes: their power of two d, and v. */
INLINE TARGET_VNNI __m512 to_fixed_point(__m512 even, __m512 odd, __m512i amax, int bits,
                                         __m512i *v_even, __m512i *v_odd) {
    const __m512i field = block_exponent(amax, bits);
    const __m512 inverse = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), field), 23));
    const __mmask16 bad = beyond_range(amax);
    *v_even = _mm512_maskz_cvtps_epi32((__mmask16)~bad, _mm512_mul_ps(even, inverse));
    *v_odd = _mm512_maskz_cvtps_epi32((__mmask16)~bad, _mm512_mul_ps(odd, inverse));
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(_mm512_slli_epi32(field, 23), bad, _mm512_set1_epi32(0x7fc00000)));
}

/* All 32 k: d = amax / 127 and v = x / d, to nearest even; where d rounds to 0 all v are 0. */
INLINE TARGET_VNNI __m512 to_int8(__m512 even, __m512 odd, __m512i amax, __m512i *v_even,
                                  __m512i *v_odd) {
    const __m512 limit = _mm512_set1_ps(127.0f), minus_limit = _mm512_set1_ps(-127.0f);
    const __m512i largest = _mm512_set1_epi32(_mm512_reduce_max_epi32(amax));
    const __mmask16 bad = beyond_range(largest);
    const __m512 d = _mm512_div_ps(_mm512_castsi512_ps(largest), limit);
    const __mmask16 live = (__mmask16)~bad & _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 to_even = _mm512_maskz_div_ps(live, even, d);
    const __m512 to_odd = _mm512_maskz_div_ps(live, odd, d);
    *v_even = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(to_even, minus_limit), limit));
    *v_odd = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(to_odd, minus_limit), limit));
    return _mm512_mask_mov_ps(d, bad, _mm512_set1_ps(__builtin_nanf("")));
}

/* 32 k of x (even and odd ones) -> 16 byte of each limb, 4 lanes of offset and d. Their sum: of int8
 * activations, which have another one than x, v * d; NaN where they are out of range. */
INLINE TARGET_VNNI float turn_limbs(__m512 even, __m512 odd, int limbs, uint8_t *unit, int chunk) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i abs_even = _mm512_and_si512(_mm512_castps_si512(even), magnitude);
    const __m512i abs_odd = _mm512_and_si512(_mm512_castps_si512(odd), magnitude);
    const __m512i amax = max_of_four(_mm512_max_epi32(abs_even, abs_odd));
    __m512i v_even, v_odd;
    const __m512 d = limbs == X_INT8
                         ? to_int8(even, odd, amax, &v_even, &v_odd)
                         : to_fixed_point(even, odd, amax, limbs == 2 ? 15 : 23, &v_even, &v_odd);
    const __m512i half = _mm512_set1_epi32(128);
    const __m512i all = _mm512_add_epi32(v_even, v_odd);
    __m512i low = _mm512_setzero_si512(), sum = all;
    for (int l = 0; l < limbs; l++) {
        uint8_t *to = unit + l * 128 + chunk * 16;
        if (l == 2) { /* what limbs 0 and 1 hold is v - limb2 * 2^16 */
            const __m512i top = _mm512_add_epi32(v_even, v_odd);
            low = _mm512_sub_epi32(sum, _mm512_slli_epi32(top, 16));
            sum = top;
        }
        _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(v_even));
        _mm_storeu_si128((__m128i *)(to + 64), _mm512_cvtepi32_epi8(v_odd));
        v_even = _mm512_srai_epi32(_mm512_add_epi32(v_even, half), 8);
        v_odd = _mm512_srai_epi32(_mm512_add_epi32(v_odd, half), 8);
    }
    const __m512i minus8 = _mm512_set1_epi32(-8);
    __m128i *offset = (__m128i *)(unit + limbs * 128 + chunk * 16);
    if (limbs == 3) {
        _mm_storeu_si128(offset, every_fourth(_mm512_mullo_epi32(sum_of_four(low), minus8)));
        offset += 4;
    }
    _mm_storeu_si128(offset, every_fourth(_mm512_mullo_epi32(sum_of_four(sum), minus8)));
    _mm_storeu_si128(offset + 4, every_fourth(_mm512_castps_si512(d)));
    if (_mm512_cmp_ps_mask(d, d, _CMP_UNORD_Q)) return __builtin_nanf("");
    if (limbs == X_INT8) return (float)_mm512_reduce_add_epi32(all) * _mm512_cvtss_f32(d);
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

/* The four 16-byte lanes of v to 64-byte rows first .. first + 3 of a unit. */
INLINE TARGET_VNNI void store_lanes(__m512i v, uint8_t *unit, int first, int chunk) {
    __m128i *to = (__m128i *)(unit + first * 64 + chunk * 16);
    _mm_storeu_si128(to, _mm512_castsi512_si128(v));
    _mm_storeu_si128(to + 4, _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128(to + 8, _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128(to + 12, _mm512_extracti32x4_epi32(v, 3));
}

/* 32 k of bf16 -> 8 words of each of the four rows. */
INLINE TARGET_VNNI void turn_bf16(__m512i x, uint8_t *unit, int chunk) {
    const __m512i fours = _mm512_broadcast_i32x4(
        _mm_set_epi16(28, 24, 20, 16, 12, 8, 4, 0));
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i index =
        _mm512_add_epi16(fours, _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)));
    store_lanes(_mm512_permutexvar_epi16(index, x), unit, 0, chunk);
}

/* 32 k of float -> 4 lanes of each of the eight rows. */
INLINE TARGET_VNNI void turn_floats(__m512 lo, __m512 hi, uint8_t *unit, int chunk) {
    const __m512i index =
        _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    const __m512i upper = _mm512_add_epi32(index, _mm512_set1_epi32(4));
    store_lanes(_mm512_castps_si512(_mm512_permutex2var_ps(lo, index, hi)), unit, 0, chunk);
    store_lanes(_mm512_castps_si512(_mm512_permutex2var_ps(lo, upper, hi)), unit, 4, chunk);
}

/* 32 k of a row of x from element `at` on, those in the mask; their sum. */
INLINE TARGET_VNNI float turn_chunk(const int4q_args *a, int form, int64_t at, __mmask16 mask,
                                    uint8_t *unit, int chunk) {
    const __m512i even_index = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4,
                                                2, 0);
    const __m512i odd_index = _mm512_add_epi32(even_index, _mm512_set1_epi32(1));
    if (form == X_BF16) {
        const uint16_t *x = (const uint16_t *)a->x + at;
        turn_bf16(mask ? _mm512_loadu_si512(x) : _mm512_setzero_si512(), unit, chunk);
        return 0; /* no zero points */
    }
    const __m512 lo = load_floats(a->x, a->x_kind, at, mask);
    const __m512 hi = load_floats(a->x, a->x_kind, at + (mask ? 16 : 0), mask);
    if (form == X_FLOAT) {
        turn_floats(lo, hi, unit, chunk);
        return 0;
    }
    return turn_limbs(_mm512_permutex2var_ps(lo, even_index, hi),
                      _mm512_permutex2var_ps(lo, odd_index, hi), form, unit, chunk);
}

/* Row m of the chunk, k in [span * 256, span * 256 + 256): whole groups, so that their sums are
 * final. */
static TARGET_VNNI void turn_span(const int4q_args *a, const turned_x *t, int64_t m, int64_t span) {
    const int64_t last = min64(SPAN_K, t->units * UNIT_K - span * SPAN_K);
    float sum = 0;
    for (int64_t i = 0; i < last; i += 32) {
        const int64_t k = span * SPAN_K + i, unit = k / UNIT_K;
        const __mmask16 mask = k < a->K ? 0xffff : 0; /* K is a multiple of 32, the units' of 128 */
        const int64_t at = k < a->K ? (t->m0 + m) * a->x_stride + k : 0;
        uint8_t *to = t->units_x + (unit * t->M + m) * unit_bytes(t->form);
        const float of_chunk = turn_chunk(a, t->form, at, mask, to, (int)(k % UNIT_K) / 32);
        if (__builtin_isnan(of_chunk)) __atomic_store_n(t->out_of_range, 1, __ATOMIC_RELAXED);
        sum += of_chunk;
        if (mask && (k + 32) % a->group == 0) {
            t->group_sum[m * t->groups + k / a->group] = sum;
            sum = 0;
        }
    }
}

/* ---------------------------------------------------------------------------------------------
 * Decode, step 2: 16 rows of the weight at a time
 * ------------------------------------------------------------------------------------------- */

/* Scales of a block of 16 rows, float. Groups of 128 and more: [G][16 rows], one value for a whole
 * register of weights. Smaller ones ("quads"): [unit][slot of the row][4], a value for each 32 k of
 * a unit. Zero points: [G][16 rows]. They are converted for several blocks at a time, because the
 * entries of another g may lie in another page. */
enum { MAX_BLOCKS = 16 };

typedef struct {
    int64_t scale_size, zero_size; /* floats of a block */
    float *scale, *zero;           /* [MAX_BLOCKS] blocks */
} block_params;

INLINE int row_slot(int row) { return (row & 3) * 4 + (row >> 2); }

INLINE TARGET_VNNI void zeros_by_group(const int4q_args *a, int64_t n0, int blocks,
                                       int64_t groups, const block_params *to) {
    for (int64_t g = 0; g < groups; g++)
        for (int b = 0; b < blocks; b++) {
            const int64_t n = n0 + b * ROWS;
            _mm512_store_ps(to->zero + b * to->zero_size + g * ROWS,
                            load_zero(a, g, n, lanes(a->N - n)));
        }
}

INLINE TARGET_VNNI void scales_by_group(const int4q_args *a, int64_t n0, int blocks,
                                        int64_t groups, const block_params *to) {
    for (int64_t g = 0; g < groups; g++)
        for (int b = 0; b < blocks; b++) {
            const int64_t n = n0 + b * ROWS;
            _mm512_store_ps(to->scale + b * to->scale_size + g * ROWS,
                            load_scale(a, g, n, lanes(a->N - n)));
        }
}

/* [4 groups][16 rows] -> [slot of the row][4]: 4x4 transposes inside each 128-bit lane put row
 * 4 * lane + j into lane `lane` of register j. */
INLINE TARGET_VNNI void store_quads(const __m512 r[4], float *quad) {
    const __m512 ab_lo = _mm512_unpacklo_ps(r[0], r[1]), ab_hi = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 cd_lo = _mm512_unpacklo_ps(r[2], r[3]), cd_hi = _mm512_unpackhi_ps(r[2], r[3]);
    _mm512_store_ps(quad, _mm512_shuffle_ps(ab_lo, cd_lo, 0x44));
    _mm512_store_ps(quad + 16, _mm512_shuffle_ps(ab_lo, cd_lo, 0xee));
    _mm512_store_ps(quad + 32, _mm512_shuffle_ps(ab_hi, cd_hi, 0x44));
    _mm512_store_ps(quad + 48, _mm512_shuffle_ps(ab_hi, cd_hi, 0xee));
}

INLINE TARGET_VNNI void scales_by_quad(const int4q_args *a, int64_t n0, int blocks,
                                       int64_t units, const block_params *to) {
    for (int64_t unit = 0; unit < units; unit++) {
        __m512 r[MAX_BLOCKS][4];
        for (int i = 0; i < 4; i++) {
            const int64_t k = unit * UNIT_K + i * 32;
            for (int b = 0; b < blocks; b++) {
                const int64_t n = n0 + b * ROWS;
                const __mmask16 mask = k < a->K ? lanes(a->N - n) : 0;
                r[b][i] = load_scale(a, k < a->K ? k / a->group : 0, n, mask);
            }
        }
        for (int b = 0; b < blocks; b++)
            store_quads(r[b], to->scale + b * to->scale_size + unit * ROWS * 4);
    }
}

INLINE TARGET_VNNI __m512 row_scale(const float *scales, int quads, int64_t unit, int row,
                                    int unit_shift) {
    if (!quads) return _mm512_set1_ps(scales[(unit >> unit_shift) * ROWS + row]);
    const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m128 four = _mm_load_ps(scales + (unit * ROWS + row_slot(row)) * 4);
    return _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(four));
}

/* Sum over one unit of u * v - 8 * v = q * v for one row of x, exact, times d. */
INLINE TARGET_VNNI __m512 dot_unit(__m512i even, __m512i odd, const uint8_t *x, int limbs) {
    const __m512i *limb = (const __m512i *)x;
    const __m512i *offset = limb + 2 * limbs;
    __m512i l0 = _mm512_dpbusd_epi32(_mm512_load_si512(offset), even, _mm512_load_si512(limb));
    l0 = _mm512_dpbusd_epi32(l0, odd, _mm512_load_si512(limb + 1));
    if (limbs == X_INT8)
        return _mm512_mul_ps(_mm512_cvtepi32_ps(l0), _mm512_load_ps((const float *)(offset + 1)));
    __m512i l1 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(limb + 2));
    l1 = _mm512_dpbusd_epi32(l1, odd, _mm512_load_si512(limb + 3));
    __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(l1, 8), l0));
    if (limbs == X_INT24) {
        __m512i l2 =
            _mm512_dpbusd_epi32(_mm512_load_si512(offset + 1), even, _mm512_load_si512(limb + 4));
        l2 = _mm512_dpbusd_epi32(l2, odd, _mm512_load_si512(limb + 5));
        dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(l2), _mm512_set1_ps(65536.0f), dot);
    }
    return _mm512_mul_ps(dot, _mm512_load_ps((const float *)(offset + limbs - 1)));
}

/* u = q + 8 of the even and the odd k in 64 bytes; flip is 0x88 a byte for signed nibbles. */
INLINE TARGET_VNNI void unpack_unsigned(__m512i w, __m512i flip, __m512i *even, __m512i *odd) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    enum { XOR_THEN_AND = 0x28 };
    *even = _mm512_ternarylogic_epi32(w, flip, low, XOR_THEN_AND);
    *odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 4), flip, low, XOR_THEN_AND);
}

/* Entry i: q of nibble i. */
INLINE TARGET_VNNI __m512 q_of_nibbles(int64_t offset_binary) {
    const __m512 halves = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0);
    return offset_binary ? _mm512_shuffle_f32x4(halves, halves, 0x4e) : halves;
}

typedef struct {
    const uint8_t *row[ROWS]; /* past N: the last row again */
    const float *scales, *zeros;
    int64_t full_units;  /* of these 64 bytes may be read */
    __mmask16 tail_mask; /* dwords of the last, shorter unit */
    int unit_shift;      /* log2 of the units in a group */
    int64_t prefetch;    /* from a byte to the one that is needed some rows later */
    __m512 q;  /* of each nibble */
    char flip; /* what turns a byte of nibbles into offset binary */
} weight_rows;

/* acc[row][m] += one unit of R rows from `first` on; x in one form. */
typedef void (*unit_fn)(const weight_rows *w, const uint8_t *const row[], int first, int64_t unit,
                        __mmask16 mask, const uint8_t *x, __m512 *acc, const int M, const int R,
                        const int form, const int quads);

INLINE TARGET_VNNI void limbs_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                   int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                   const int M, const int R, const int form, const int quads) {
    __m512i even[MAX_R], odd[MAX_R];
    __m512 scale[MAX_R];
    const __m512i flip = _mm512_set1_epi8(w->flip);
    UNROLL
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        unpack_unsigned(_mm512_maskz_loadu_epi32(mask, at), flip, &even[r], &odd[r]);
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        scale[r] = row_scale(w->scales, quads, unit, first + r, w->unit_shift);
    }
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int r = 0; r < R; r++)
            acc[r * M + m] =
                _mm512_fmadd_ps(dot_unit(even[r], odd[r], x + m * unit_bytes(form), form),
                                scale[r], acc[r * M + m]);
}

INLINE const float *scales_of_row(const weight_rows *w, const int quads, int64_t unit, int row) {
    if (quads) return w->scales + (unit * ROWS + row_slot(row)) * 4;
    return w->scales + (unit >> w->unit_shift) * ROWS + row;
}

/* The bf16 values of the nibbles that `shift` brings to the bottom of each word. vpermw looks at 5
 * bits of an index and vpermt2w at 6: with one scale a unit the fifth is some other nibble's and the
 * table holds its 16 entries twice, with four they say which 32 k the word is in. */
INLINE TARGET_BF16 __m512i look_up_bf16(__m512i shifted, const __m512i table[2],
                                        const int quads) {
    if (!quads) return _mm512_permutexvar_epi16(shifted, table[0]);
    const __m512i low = _mm512_set1_epi16(0x0f);
    const __m512i quad = _mm512_set_epi64(
        0x0030003000300030, 0x0030003000300030, 0x0020002000200020, 0x0020002000200020,
        0x0010001000100010, 0x0010001000100010, 0, 0);
    enum { AND_THEN_OR = 0xea };
    const __m512i index = _mm512_ternarylogic_epi32(shifted, low, quad, AND_THEN_OR);
    return _mm512_permutex2var_epi16(table[0], index, table[1]);
}

INLINE TARGET_BF16 void bf16_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                  int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                  const int M, const int R, const int form, const int quads) {
    UNROLL
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        const float *scale = scales_of_row(w, quads, unit, first + r);
        const __m512i nibbles = _mm512_maskz_loadu_epi32(mask, at);
        __m512 value[4]; /* of each nibble, with each of the unit's scales */
        __m512i table[2], weight[4];
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        for (int i = 0; i < (quads ? 4 : 1); i++)
            value[i] = _mm512_mul_ps(w->q, _mm512_set1_ps(scale[i]));
        table[0] = (__m512i)_mm512_cvtne2ps_pbh(value[quads ? 1 : 0], value[0]);
        table[1] = quads ? (__m512i)_mm512_cvtne2ps_pbh(value[3], value[2]) : table[0];
        weight[0] = look_up_bf16(nibbles, table, quads);
        weight[1] = look_up_bf16(_mm512_srli_epi16(nibbles, 4), table, quads);
        weight[2] = look_up_bf16(_mm512_srli_epi16(nibbles, 8), table, quads);
        weight[3] = look_up_bf16(_mm512_srli_epi16(nibbles, 12), table, quads);
        UNROLL
        for (int m = 0; m < M; m++) {
            const __m512i *from = (const __m512i *)(x + m * unit_bytes(form));
            __m512bh x_row[4];
            UNROLL
            for (int j = 0; j < 4; j++) x_row[j] = (__m512bh)_mm512_load_si512(from + j);
            __m512 sum = acc[r * M + m];
            sum = _mm512_dpbf16_ps(sum, (__m512bh)weight[0], x_row[0]);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)weight[1], x_row[1]);
            /* One row of x has too few sums to hide the latency of a chain of four. */
            __m512 rest = M == 1 ? _mm512_setzero_ps() : sum;
            rest = _mm512_dpbf16_ps(rest, (__m512bh)weight[2], x_row[2]);
            rest = _mm512_dpbf16_ps(rest, (__m512bh)weight[3], x_row[3]);
            acc[r * M + m] = M == 1 ? _mm512_add_ps(sum, rest) : rest;
        }
    }
}

/* Rounded to bf16, still float. */
INLINE TARGET_VNNI __m512 through_bf16(__m512 f) { return bf16_to_float(float_to_bf16(f)); }

/* bf16_unit for a CPU without bf16 products. vpermps looks at 4 bits of an index: four scales a unit
 * are four tables, each for its lanes. */
INLINE TARGET_VNNI void float_unit(const weight_rows *w, const uint8_t *const row[], int first,
                                   int64_t unit, __mmask16 mask, const uint8_t *x, __m512 *acc,
                                   const int M, const int R, const int form, const int quads) {
    for (int r = 0; r < R; r++) {
        const uint8_t *at = row[r] + unit * 64;
        const float *scale = scales_of_row(w, quads, unit, first + r);
        __m512i nibbles = _mm512_maskz_loadu_epi32(mask, at);
        __m512 table[4];
        _mm_prefetch((const char *)at + w->prefetch, _MM_HINT_T0);
        for (int i = 0; i < (quads ? 4 : 1); i++)
            table[i] = through_bf16(_mm512_mul_ps(w->q, _mm512_set1_ps(scale[i])));
        for (int j = 0; j < 8; j++, nibbles = _mm512_srli_epi32(nibbles, 4)) {
            __m512 weight = _mm512_permutexvar_ps(nibbles, table[0]);
            for (int i = 1; i < (quads ? 4 : 1); i++)
                weight = _mm512_mask_permutexvar_ps(weight, (__mmask16)(0xf << 4 * i), nibbles,
                                                    table[i]);
            UNROLL
            for (int m = 0; m < M; m++) {
                const float *to = (const float *)(x + m * unit_bytes(form)) + j * 16;
                acc[r * M + m] = _mm512_fmadd_ps(weight, _mm512_load_ps(to), acc[r * M + m]);
            }
        }
    }
}

/* Adds units [begin, end) of R rows from `first` on to sums[row][m], 16 partial sums each. */
INLINE TARGET_VNNI void decode_rows(const weight_rows *w, const turned_x *t, int first,
                                    int64_t begin, int64_t end, __m512 *sums, const int M,
                                    const int R, const int form, const int quads,
                                    const unit_fn decode_unit) {
    __m512 acc[MAX_R * MAX_CHUNK_M];
    const uint8_t *row[MAX_R];
    UNROLL
    for (int r = 0; r < R; r++) row[r] = w->row[first + r];
    UNROLL
    for (int i = 0; i < R * M; i++) acc[i] = sums[first * M + i];
    const uint8_t *x = t->units_x + begin * M * unit_bytes(form);
    const int64_t full = min64(end, w->full_units);
    int64_t unit = begin;
    for (; unit < full; unit++, x += M * unit_bytes(form))
        decode_unit(w, row, first, unit, 0xffff, x, acc, M, R, form, quads);
    if (unit < end)
        decode_unit(w, row, first, unit, w->tail_mask, x, acc, M, R, form, quads);
    UNROLL
    for (int i = 0; i < R * M; i++) sums[first * M + i] = acc[i];
}

/* Bytes of turned x that one sweep over the 16 rows uses: half of a first-level cache. */
enum { SWEEP_BYTES = 24 << 10 };

/* sums[row][m] and total[m], 16 rows of the weight: products with q * scale and zero_point. */
INLINE TARGET_VNNI void decode_block(const weight_rows *w, const turned_x *t, __m512 *sums,
                                     __m512 *total, const int M, const int R, const int form,
                                     const int quads, const unit_fn decode_unit) {
    const int64_t step = SWEEP_BYTES / (M * unit_bytes(form));
    for (int i = 0; i < ROWS * M; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < t->units; begin += step)
        for (int first = 0; first < ROWS; first += R)
            decode_rows(w, t, first, begin, min64(begin + step, t->units), sums, M, R, form,
                        quads, decode_unit);
    __m512 acc[MAX_CHUNK_M];
    UNROLL
    for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < t->groups; g++) {
        const __m512 zero = _mm512_load_ps(w->zeros + g * ROWS);
        UNROLL
        for (int m = 0; m < M; m++) {
            const __m512 sum = _mm512_set1_ps(t->group_sum[m * t->groups + g]);
            acc[m] = _mm512_fmadd_ps(zero, sum, acc[m]);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) total[m] = acc[m];
}

typedef void (*block_fn)(const weight_rows *, const turned_x *, __m512 *sums, __m512 *total);

#define DEFINE_BLOCK(target, form, unit, M, R, quads)                                          \
    static target void block_##form##_##M##_##quads(const weight_rows *w, const turned_x *t,  \
                                                    __m512 *sums, __m512 *total) {            \
        decode_block(w, t, sums, total, M, R, form, quads, unit);                             \
    }
#define DEFINE_BLOCKS_OF(M, R, quads)                          \
    DEFINE_BLOCK(TARGET_VNNI, X_INT8, limbs_unit, M, R, quads)  \
    DEFINE_BLOCK(TARGET_VNNI, X_INT16, limbs_unit, M, R, quads) \
    DEFINE_BLOCK(TARGET_VNNI, X_INT24, limbs_unit, M, R, quads) \
    DEFINE_BLOCK(TARGET_BF16, X_BF16, bf16_unit, M, R, quads)   \
    DEFINE_BLOCK(TARGET_VNNI, X_FLOAT, float_unit, M, R, quads)
#define DEFINE_BLOCKS(M, R)   \
    DEFINE_BLOCKS_OF(M, R, 0) \
    DEFINE_BLOCKS_OF(M, R, 1)
DEFINE_BLOCKS(1, 4)
DEFINE_BLOCKS(2, 4)
DEFINE_BLOCKS(3, 4)
DEFINE_BLOCKS(4, 2)
DEFINE_BLOCKS(5, 2)
DEFINE_BLOCKS(6, 2)
DEFINE_BLOCKS(7, 2)
DEFINE_BLOCKS(8, 2)

static block_fn choose_block(int64_t M, int form, int quads) {
#define OF_FORM(form, M) {block_##form##_##M##_0, block_##form##_##M##_1}
#define OF_M(M)                                                                          \
    {OF_FORM(X_INT8, M), OF_FORM(X_INT16, M), OF_FORM(X_INT24, M), OF_FORM(X_BF16, M), \
     OF_FORM(X_FLOAT, M)}
    static const block_fn table[MAX_CHUNK_M][FORMS][2] = {OF_M(1), OF_M(2), OF_M(3), OF_M(4),
                                                          OF_M(5), OF_M(6), OF_M(7), OF_M(8)};
    return table[M - 1][form - 1][quads];
}

/* Results of 16 rows of the weight: partial sums + zero points + bias. */
INLINE TARGET_VNNI void finish_block(const int4q_args *a, const turned_x *t, const __m512 *sums,
                                     const __m512 *total, int64_t n0, __mmask16 mask) {
    const __m512 bias = a->bias ? _mm512_maskz_loadu_ps(mask, a->bias + n0) : _mm512_setzero_ps();
    for (int64_t m = 0; m < t->M; m++) {
        float dot[ROWS];
        for (int r = 0; r < ROWS; r++) dot[r] = _mm512_reduce_add_ps(sums[r * t->M + m]);
        const __m512 y = _mm512_add_ps(_mm512_loadu_ps(dot), total[m]);
        const int64_t at = (t->m0 + m) * a->out_stride + n0;
        store_floats(a->out, a->out_kind, at, mask, _mm512_add_ps(y, bias));
    }
}

/* All of x: chunks of 8 rows, the last one maybe shorter, and the buffers that they share. */
typedef struct {
    turned_x whole;
    int64_t chunks;
} all_x;

static turned_x chunk_of(const all_x *x, int64_t chunk) {
    turned_x t = x->whole;
    t.m0 = chunk * MAX_CHUNK_M;
    t.M = min64(MAX_CHUNK_M, x->whole.M - t.m0);
    t.units_x += t.m0 * t.units * unit_bytes(t.form);
    t.group_sum += t.m0 * t.groups;
    return t;
}

/* Blocks of 16 rows; `params` are this thread's to fill. A block meets one chunk of x after the
 * other while its weights are in cache. */
static TARGET_VNNI void decode_blocks(const int4q_args *a, const all_x *x, range blocks,
                                      const block_params *params) {
    const int quads = a->group < UNIT_K;
    const int64_t units = x->whole.units, groups = x->whole.groups;
    weight_rows w = {.full_units = a->K / UNIT_K,
                     .tail_mask = lanes(a->K % UNIT_K / 8),
                     .unit_shift = a->group > UNIT_K,
                     .prefetch = 4 * a->q_stride,
                     .q = q_of_nibbles(a->offset_binary),
                     .flip = a->offset_binary ? 0 : (char)0x88};
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
        const int64_t n0 = block * ROWS;
        const int at = (int)((block - blocks.begin) % MAX_BLOCKS);
        if (at == 0) {
            const int count = (int)min64(MAX_BLOCKS, blocks.end - block);
            if (quads)
                scales_by_quad(a, n0, count, units, params);
            else
                scales_by_group(a, n0, count, groups, params);
            zeros_by_group(a, n0, count, groups, params);
        }
        w.scales = params->scale + at * params->scale_size;
        w.zeros = params->zero + at * params->zero_size;
        for (int r = 0; r < ROWS; r++)
            w.row[r] = a->qdata + min64(n0 + r, a->N - 1) * a->q_stride;
        for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
            const turned_x t = chunk_of(x, chunk);
            __m512 sums[ROWS * MAX_CHUNK_M], total[MAX_CHUNK_M];
            choose_block(t.M, t.form, quads)(&w, &t, sums, total);
            finish_block(a, &t, sums, total, n0, lanes(a->N - n0));
        }
    }
}

/* Whether some element of a row is more than 2^bits times as large as the row's elements are in the
 * (geometric) mean. Zeros do not count. */
static TARGET_VNNI int has_outlier(const int4q_args *a, int64_t m, float bits) {
    __m512i largest = _mm512_setzero_si512(), sum = largest, count = largest;
    const __m512i one = _mm512_set1_epi32(1);
    for (int64_t k = 0; k < a->K; k += 16) { /* K is a multiple of 32 */
        const __m512i x =
            _mm512_castps_si512(load_floats(a->x, a->x_kind, m * a->x_stride + k, 0xffff));
        const __m512i field = _mm512_srli_epi32(_mm512_slli_epi32(x, 1), 24); /* the exponent */
        largest = _mm512_max_epi32(largest, field);
        sum = _mm512_add_epi32(sum, field);
        count = _mm512_mask_add_epi32(count, _mm512_test_epi32_mask(field, field), count, one);
    }
    const float elements = (float)_mm512_reduce_add_epi32(count);
    const float all = (float)_mm512_reduce_add_epi32(sum);
    return elements * ((float)_mm512_reduce_max_epi32(largest) - bits) > all;
}

/* Limbs of fixed point for 16-bit x. Two leave an error of up to 2^-16 of the largest of eight
 * elements. Beside one that is 2^r times as large as the rest, whose own weight may be 0, that is
 * about 2^(r - 16) / sqrt(K) of the result, to compare with the result's rounding, 2^-9 (fp16:
 * 2^-12). A third limb where it would show: from r = 6 + log2(K) / 2 (fp16: 3) on. */
static int form_of_halves(const int4q_args *a) {
    float bits = a->x_kind == KIND_BF16 ? 6 : 3;
    for (int64_t k = a->K; k > 1; k /= 2) bits += 0.5f;
    for (int64_t m = 0; m < a->M; m++)
        if (has_outlier(a, m, bits)) return X_INT24;
    return X_INT16;
}

/* How the products want x; 0 where they are not to be had. */
static int form_of_x(const int4q_args *a) {
    if (a->product == PRODUCT_INT8) return X_INT8;
    if (a->product == PRODUCT_EXACT) return a->x_kind == KIND_FP32 ? X_INT24 : form_of_halves(a);
    if (a->x_kind != KIND_BF16 || a->zero) return 0;
    return has_feature(a, FEATURE_BF16) ? X_BF16 : X_FLOAT;
}

EXPORT int int4q_decode(const int4q_args *a) {
    if (!has_feature(a, FEATURE_VNNI)) return INT4Q_UNSUPPORTED;
    const int form = form_of_x(a);
    if (!form) return INT4Q_UNSUPPORTED;
    int out_of_range = 0;
    all_x x = {.whole = {.M = a->M,
                         .units = ceil_div(a->K, UNIT_K),
                         .groups = a->K / a->group,
                         .form = form,
                         .out_of_range = &out_of_range},
               .chunks = ceil_div(a->M, MAX_CHUNK_M)};
    turned_x *t = &x.whole;
    const int64_t blocks = ceil_div(a->N, ROWS), spans = ceil_div(a->K, SPAN_K);
    const int64_t threads = useful_threads(a, blocks, a->N * (a->K / 2) * a->M);
    const int64_t units_size = t->units * t->M * unit_bytes(t->form);
    const int64_t sums_size = ceil_div(t->M * t->groups, 16) * 64;
    /* The tail of K may make a unit of a group that does not exist: groups + 1. */
    const int64_t scale_size = a->group < UNIT_K ? t->units * ROWS * 4 : (t->groups + 1) * ROWS;
    const int64_t zero_size = t->groups * ROWS, params_size = MAX_BLOCKS * (scale_size + zero_size);
    uint8_t *memory = aligned_new(units_size + sums_size + threads * params_size * 4);
    if (!memory) return INT4Q_NO_MEMORY;
    t->units_x = memory;
    t->group_sum = (float *)(memory + units_size);
    float *all_params = (float *)(memory + units_size + sums_size);
    PARALLEL(threads) {
        const int64_t part = THREAD_INDEX, parts = THREAD_COUNT;
        const range spans_here = share(spans * t->M, part, parts);
        for (int64_t i = spans_here.begin; i < spans_here.end; i++) {
            const int64_t m = i / spans;
            const turned_x chunk = chunk_of(&x, m / MAX_CHUNK_M);
            turn_span(a, &chunk, m % MAX_CHUNK_M, i % spans);
        }
        BARRIER;
        float *mine = all_params + part * params_size;
        const block_params params = {scale_size, zero_size, mine, mine + MAX_BLOCKS * scale_size};
        decode_blocks(a, &x, share(blocks, part, parts), &params);
    }
    _mm_free(memory);
    return out_of_range ? INT4Q_OUT_OF_RANGE : INT4Q_OK;
}

/* ---------------------------------------------------------------------------------------------
 * Dequantisation: a nibble indexes a table of its 16 values, made once for each (row, group)
 * ------------------------------------------------------------------------------------------- */

/* scale and zero_point of 16 rows, groups [g0, g0 + count), as float [count][16 rows]. */
INLINE TARGET_VNNI void params_of_rows(const int4q_args *a, int64_t n0, int64_t g0, int64_t count,
                                       float *scale, float *zero) {
    const __mmask16 mask = lanes(a->N - n0);
    for (int64_t g = 0; g < count; g++) {
        _mm512_store_ps(scale + g * ROWS, load_scale(a, g0 + g, n0, mask));
        _mm512_store_ps(zero + g * ROWS, load_zero(a, g0 + g, n0, mask));
    }
}

/* Entry i: the value of nibble i, q * scale + zero_point, the product rounded before the sum as in
 * the reference (the rounding variant keeps compilers from fusing the two). */
INLINE TARGET_VNNI __m512 value_table(float scale, float zero, int64_t offset_binary) {
    const __m512 q = q_of_nibbles(offset_binary);
    return _mm512_add_ps(_mm512_mul_round_ps(q, _mm512_set1_ps(scale), NEAREST),
                         _mm512_set1_ps(zero));
}

/* 16 bytes -> 32 table entries in the order of k. vpermw looks at 5 bits of each index; the fifth
 * is some other nibble's, so the table holds its 16 halves twice. */
INLINE TARGET_VNNI __m512i expand_halves(const uint8_t *w, __m512i table) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w));
    const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
    return _mm512_permutexvar_epi16(index, table);
}

/* 8 bytes -> 16 table entries in the order of k; vpermps looks at 4 bits of each index. */
INLINE TARGET_VNNI __m512 expand_floats(const uint8_t *w, __m512 table) {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)w));
    const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi64(byte, 28));
    return _mm512_permutexvar_ps(index, table);
}

/* One group of one row. */
INLINE TARGET_VNNI void dequant_group(const uint8_t *w, __m512 table, int64_t group, int64_t kind,
                                      void *out, int64_t at) {
    if (kind == KIND_FP32) {
        for (int64_t k = 0; k < group; k += 16)
            _mm512_storeu_ps((float *)out + at + k, expand_floats(w + k / 2, table));
        return;
    }
    const __m512i halves = _mm512_broadcast_i64x4(to_half(table, kind));
    for (int64_t k = 0; k < group; k += 32)
        _mm512_storeu_si512((uint16_t *)out + at + k, expand_halves(w + k / 2, halves));
}

enum { PARAM_GROUPS = 64 }; /* groups whose parameters are converted at a time */

static TARGET_VNNI void dequant_rows(const int4q_args *a, int64_t n0) {
    const int64_t groups = a->K / a->group, rows = min64(ROWS, a->N - n0);
    __attribute__((aligned(64))) float scale[PARAM_GROUPS * ROWS], zero[PARAM_GROUPS * ROWS];
    for (int64_t g0 = 0; g0 < groups; g0 += PARAM_GROUPS) {
        const int64_t count = min64(PARAM_GROUPS, groups - g0);
        params_of_rows(a, n0, g0, count, scale, zero);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < count; g++) {
                const int64_t k = (g0 + g) * a->group;
                dequant_group(a->qdata + (n0 + r) * a->q_stride + k / 2,
                              value_table(scale[g * ROWS + r], zero[g * ROWS + r],
                                          a->offset_binary),
                              a->group, a->out_kind, a->out, (n0 + r) * a->out_stride + k);
            }
    }
}

EXPORT int int4q_dequant(const int4q_args *a) {
    if (!has_feature(a, FEATURE_VNNI)) return INT4Q_UNSUPPORTED;
    const int64_t blocks = ceil_div(a->N, ROWS);
    const int64_t threads = useful_threads(a, blocks, a->N * a->K / 2);
    PARALLEL(threads) {
        const range mine = share(blocks, THREAD_INDEX, THREAD_COUNT);
        for (int64_t block = mine.begin; block < mine.end; block++) dequant_rows(a, block * ROWS);
    }
    return INT4Q_OK;
}

/* ---------------------------------------------------------------------------------------------
 * GEMM on AMX tiles
 *
 * Transposed, C^T[n, m] = W[n, :] x^T[:, m], so that weights are the A operand and need no
 * transposition: a tile row is 32 k of one weight row. Tiles are 1 KiB:
 *   A  bf16 [16 n][32 k]              dequantised on the fly into a buffer that stays in cache
 *   B  bf16 [16 k pairs][16 m][2]     x, packed once
 *   C  fp32 [16 n][16 m]
 * A panel is 32 weight rows (two A tiles); a step is 32 k of a panel. The four steps of a unit
 * (128 k, 64 bytes of weights) take its k in the order in which unpacking yields them, in A and B
 * alike: word i of step t is k = 32 (i / 8) + 2 (i % 8) + 16 (t % 2) + t / 2.
 * ------------------------------------------------------------------------------------------- */

enum {
    TILE = 1024,
    TILE_K = 32,
    PANEL = 32,
    STEP_BYTES = 2 * TILE,
    UNIT_STEPS = UNIT_K / TILE_K,
    UNIT_BYTES = UNIT_STEPS * STEP_BYTES,
    CHUNK_UNITS = 2,  /* of a dequantised panel: as large as the B tiles it meets, both fit in L1 */
    BLOCK_PANELS = 8, /* panels that share a chunk of packed x while it is in cache */
    BLOCK_M = 512     /* rows of x packed at a time */
};

typedef struct {
    int64_t m0, rows; /* rows of x in this block */
    int64_t m_tiles, units;
    uint8_t *tiles; /* B tiles, [chunks of K][m_tiles][k tiles of the chunk] */
} packed_x;

/* The four B tiles of a unit. Chunks are contiguous: a power of two between m tiles would map them
 * all to the same few sets of the second-level cache. The last chunk may be shorter. */
INLINE uint8_t *b_tiles(const packed_x *p, int64_t m_tile, int64_t unit) {
    const int64_t first = unit / CHUNK_UNITS * CHUNK_UNITS;
    const int64_t length = min64(CHUNK_UNITS, p->units - first);
    return p->tiles + (first * p->m_tiles + m_tile * length + unit - first) * UNIT_STEPS * TILE;
}

INLINE TARGET_AMX void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

INLINE TARGET_VNNI void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) { /* 4x4 inside each 128-bit lane */
        const __m512i ab_lo = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        const __m512i ab_hi = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i cd_lo = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        const __m512i cd_hi = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(ab_lo, cd_lo);
        t[i + 1] = _mm512_unpackhi_epi64(ab_lo, cd_lo);
        t[i + 2] = _mm512_unpacklo_epi64(ab_hi, cd_hi);
        t[i + 3] = _mm512_unpackhi_epi64(ab_hi, cd_hi);
    }
    for (int j = 0; j < 4; j++) { /* 4x4 of the lanes */
        const __m512i lo = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x44);
        const __m512i hi = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xee);
        const __m512i lo2 = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x44);
        const __m512i hi2 = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xee);
        r[j] = _mm512_shuffle_i32x4(lo, lo2, 0x88);
        r[j + 4] = _mm512_shuffle_i32x4(lo, lo2, 0xdd);
        r[j + 8] = _mm512_shuffle_i32x4(hi, hi2, 0x88);
        r[j + 12] = _mm512_shuffle_i32x4(hi, hi2, 0xdd);
    }
}

/* 128 k of a row of x, in the order of the steps. */
INLINE TARGET_VNNI void order_row(const uint16_t *x, int64_t valid, __m512i step[UNIT_STEPS]) {
    const __m512i fours =
        _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i evens = _mm512_or_si512( /* words 0, 2, .. 62 of two registers */
        fours, _mm512_slli_epi32(_mm512_add_epi32(fours, _mm512_set1_epi32(2)), 16));
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    __m512i part[4]; /* 32 k each; past K: 0 */
    for (int i = 0; i < 4; i++)
        part[i] = i * 32 < valid ? _mm512_loadu_si512(x + i * 32) : _mm512_setzero_si512();
    for (int odd = 0; odd < 2; odd++) {
        const __m512i index = odd ? odds : evens;
        const __m512i a = _mm512_permutex2var_epi16(part[0], index, part[1]);
        const __m512i b = _mm512_permutex2var_epi16(part[2], index, part[3]);
        step[2 * odd] = _mm512_shuffle_i32x4(a, b, 0x88);
        step[2 * odd + 1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
}

/* B tiles of 16 rows of x and one unit; rows past M are 0. */
static TARGET_VNNI void pack_unit(const int4q_args *a, const packed_x *p, int64_t m_tile,
                                  int64_t unit) {
    const int64_t rows = min64(16, p->rows - m_tile * 16);
    const uint16_t *x =
        (const uint16_t *)a->x + (p->m0 + m_tile * 16) * a->x_stride + unit * UNIT_K;
    __m512i tile[UNIT_STEPS][16];
    for (int i = 0; i < 16; i++) {
        __m512i step[UNIT_STEPS];
        order_row(i < rows ? x + i * a->x_stride : x, i < rows ? a->K - unit * UNIT_K : 0, step);
        for (int t = 0; t < UNIT_STEPS; t++) tile[t][i] = step[t];
    }
    __m512i *to = (__m512i *)b_tiles(p, m_tile, unit);
    for (int t = 0; t < UNIT_STEPS; t++) {
        transpose16(tile[t]);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + t * 16 + i, tile[t][i]);
    }
}

/* scale and zero_point of a panel for one unit: a value for each row (groups of 128 and more), or
 * quads as in decode. */
typedef struct {
    __attribute__((aligned(64))) float scale[2][ROWS * 4];
    __attribute__((aligned(64))) float zero[2][ROWS * 4];
} panel_params;

INLINE TARGET_VNNI void load_panel_params(const int4q_args *a, int64_t n0, int64_t unit,
                                          panel_params *p, const int quads) {
    for (int half = 0; half < 2; half++) {
        const int64_t n = n0 + half * ROWS;
        const __mmask16 mask = lanes(a->N - n);
        __m512 scale[4], zero[4];
        for (int i = 0; i < (quads ? 4 : 1); i++) {
            const int64_t k = unit * UNIT_K + i * 32;
            const __mmask16 valid = k < a->K ? mask : 0;
            const int64_t g = k < a->K ? k / a->group : 0;
            scale[i] = load_scale(a, g, n, valid);
            zero[i] = load_zero(a, g, n, valid);
        }
        if (quads) {
            store_quads(scale, p->scale[half]);
            store_quads(zero, p->zero[half]);
        } else {
            _mm512_store_ps(p->scale[half], scale[0]);
            _mm512_store_ps(p->zero[half], zero[0]);
        }
    }
}

/* Values of nibbles 0..7 (q = 0..7) or 8..15 (q = -8..-1) for two groups, eight lanes each. */
INLINE TARGET_VNNI __m512 half_tables(__m512 scale, __m512 zero, const int upper) {
    const __m512 low = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 q = upper ? _mm512_sub_ps(low, _mm512_set1_ps(8.0f)) : low;
    return _mm512_add_ps(_mm512_mul_round_ps(q, scale, NEAREST), zero);
}

/* Tables of a row for a unit, as vpshufb wants them: lane i serves the k in [32 i, 32 i + 32), the
 * lower bytes of its 16 bf16 values in one register, the upper bytes in another. */
INLINE TARGET_AMX void byte_tables(const panel_params *p, int row, const int quads,
                                   int64_t offset_binary, __m512i *lower, __m512i *upper) {
    const int half = row / ROWS, r = row % ROWS;
    __m512i first, last; /* nibbles 0..7 and 8..15 (if signed); lane i for its 32 k */
    if (quads) {
        const __m512i groups01 = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        const __m512i groups23 = _mm512_add_epi32(groups01, _mm512_set1_epi32(2));
        const __m512 s = _mm512_castps128_ps512(_mm_load_ps(p->scale[half] + row_slot(r) * 4));
        const __m512 z = _mm512_castps128_ps512(_mm_load_ps(p->zero[half] + row_slot(r) * 4));
        const __m512 s01 = _mm512_permutexvar_ps(groups01, s);
        const __m512 z01 = _mm512_permutexvar_ps(groups01, z);
        const __m512 s23 = _mm512_permutexvar_ps(groups23, s);
        const __m512 z23 = _mm512_permutexvar_ps(groups23, z);
        first = (__m512i)_mm512_cvtne2ps_pbh(half_tables(s23, z23, 0), half_tables(s01, z01, 0));
        last = (__m512i)_mm512_cvtne2ps_pbh(half_tables(s23, z23, 1), half_tables(s01, z01, 1));
    } else {
        const __m512 s = _mm512_set1_ps(p->scale[half][r]), z = _mm512_set1_ps(p->zero[half][r]);
        const __m512 low = half_tables(s, z, 0), high = half_tables(s, z, 1);
        first = (__m512i)_mm512_cvtne2ps_pbh(low, low);
        last = (__m512i)_mm512_cvtne2ps_pbh(high, high);
    }
    if (offset_binary) { /* nibbles 0..7 are q = -8..-1 */
        const __m512i swapped = first;
        first = last;
        last = swapped;
    }
    const __m512i byte = _mm512_set1_epi16(0xff);
    *lower = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(last, byte));
    *upper = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(last, 8));
}

/* Rows [first, last) of the panel at n0, one unit, into A tiles [step][2][16 rows][32 k]. */
INLINE TARGET_AMX void dequant_unit(const int4q_args *a, int64_t n0, int64_t unit, int first,
                                    int last, const panel_params *p, uint8_t *tiles,
                                    int64_t prefetch, const int quads) {
    const __mmask16 mask = lanes((a->K - unit * UNIT_K) / 8); /* dwords of weights */
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int r = first; r < last; r++) {
        const uint8_t *at = a->qdata + min64(n0 + r, a->N - 1) * a->q_stride + unit * 64;
        _mm_prefetch((const char *)at + prefetch, _MM_HINT_T0);
        const __m512i w = _mm512_maskz_loadu_epi32(mask, at);
        __m512i lower, upper;
        byte_tables(p, r, quads, a->offset_binary, &lower, &upper);
        __m512i *to = (__m512i *)(tiles + r * 64);
        for (int odd = 0; odd < 2; odd++, to += 2 * STEP_BYTES / 64) {
            const __m512i nibble = _mm512_and_si512(odd ? _mm512_srli_epi16(w, 4) : w, low);
            const __m512i lo = _mm512_shuffle_epi8(lower, nibble);
            const __m512i hi = _mm512_shuffle_epi8(upper, nibble);
            _mm512_store_si512(to, _mm512_unpacklo_epi8(lo, hi));
            _mm512_store_si512(to + STEP_BYTES / 64, _mm512_unpackhi_epi8(lo, hi));
        }
    }
}

/* C tiles 0 1 (first 16 rows; m tiles 0, 1) and 2 3 (last 16 rows) += one step. */
INLINE TARGET_AMX void multiply_step(const uint8_t *A, const uint8_t *B0, const uint8_t *B1,
                                     const int two) {
    _tile_loadd(6, B0, 64);
    _tile_loadd(4, A, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, A + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (!two) return;
    _tile_loadd(7, B1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE TARGET_AMX void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums of a panel and two m tiles: [2 halves][2 m tiles] C tiles. */
INLINE TARGET_AMX void load_sums(const float *sums, const int two) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, sums + 512, 64);
    if (!two) return;
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(3, sums + 768, 64);
}

INLINE TARGET_AMX void store_sums(float *sums, const int two) {
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if (!two) return;
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
}

/* 16 rows of out: two C tiles of 16 weight rows each, with the bias, rounded once. */
INLINE TARGET_AMX void write_m_tile(const int4q_args *a, int64_t m, int64_t rows, int64_t n,
                                    const float *upper, const float *lower) {
    const __mmask16 left = lanes(a->N - n), right = lanes(a->N - n - 16);
    const __mmask32 mask = (__mmask32)left | (__mmask32)right << 16;
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (a->bias) {
        bias[0] = _mm512_maskz_loadu_ps(left, a->bias + n);
        bias[1] = _mm512_maskz_loadu_ps(right, a->bias + n + 16);
    }
    __m512i u[16], l[16];
    for (int i = 0; i < 16; i++) {
        u[i] = _mm512_load_si512(upper + i * 16);
        l[i] = _mm512_load_si512(lower + i * 16);
    }
    transpose16(u);
    transpose16(l);
    for (int i = 0; i < rows; i++) {
        const __m512 to_left = _mm512_add_ps(_mm512_castsi512_ps(u[i]), bias[0]);
        const __m512 to_right = _mm512_add_ps(_mm512_castsi512_ps(l[i]), bias[1]);
        _mm512_mask_storeu_epi16((uint16_t *)a->out + (m + i) * a->out_stride + n, mask,
                                 (__m512i)_mm512_cvtne2ps_pbh(to_right, to_left));
    }
}

/* Sums of a panel and two m tiles, the first `m_tile`, to out. */
static TARGET_AMX void write_sums(const int4q_args *a, const packed_x *p, int64_t n0,
                                  int64_t m_tile, const float *sums) {
    for (int i = 0; i < 2; i++) {
        const int64_t m = (m_tile + i) * 16, rows = min64(16, p->rows - m);
        if (rows > 0)
            write_m_tile(a, p->m0 + m, rows, n0, sums + i * 256, sums + 512 + i * 256);
    }
}

/* At most 32 rows of x: a panel's sums stay in tiles over all of K, and the weights of the next
 * unit are dequantised between this one's tile products, which run beside them. */
INLINE TARGET_AMX void small_panel(const int4q_args *a, const packed_x *p, int64_t n0,
                                   uint8_t *buffer, const int two, const int quads) {
    panel_params params;
    zero_sums();
    for (int64_t unit = 0; unit <= p->units; unit++) {
        uint8_t *fill = buffer + (unit & 1) * UNIT_BYTES;
        const uint8_t *use = buffer + (~unit & 1) * UNIT_BYTES;
        const uint8_t *B0 = unit ? b_tiles(p, 0, unit - 1) : NULL;
        const uint8_t *B1 = unit && two ? b_tiles(p, 1, unit - 1) : B0;
        if (unit < p->units) load_panel_params(a, n0, unit, &params, quads);
        for (int i = 0; i < UNIT_STEPS; i++) {
            if (unit < p->units)
                dequant_unit(a, n0, unit, i * 8, i * 8 + 8, &params, fill, 4 * 64, quads);
            if (unit)
                multiply_step(use + i * STEP_BYTES, B0 + i * TILE, B1 + i * TILE, two);
        }
    }
    __attribute__((aligned(64))) float sums[4 * 256];
    store_sums(sums, two);
    write_sums(a, p, n0, 0, sums);
}

static TARGET_AMX void small_panels(const int4q_args *a, const packed_x *p, range panels,
                                    uint8_t *buffer) {
    const int quads = a->group < UNIT_K, two = p->m_tiles > 1;
    configure_tiles();
    for (int64_t i = panels.begin; i < panels.end; i++) {
        if (quads && two) small_panel(a, p, i * PANEL, buffer, 1, 1);
        if (quads && !two) small_panel(a, p, i * PANEL, buffer, 0, 1);
        if (!quads && two) small_panel(a, p, i * PANEL, buffer, 1, 0);
        if (!quads && !two) small_panel(a, p, i * PANEL, buffer, 0, 0);
    }
    _tile_release();
}

/* A dequantised chunk of a panel times two m tiles. */
INLINE TARGET_AMX void chunk_product(const uint8_t *A, const uint8_t *B0, const uint8_t *B1,
                                     int64_t steps, float *sums, int first, const int two) {
    if (first)
        zero_sums();
    else
        load_sums(sums, two);
    for (int64_t i = 0; i < steps; i++)
        multiply_step(A + i * STEP_BYTES, B0 + i * TILE, B1 + i * TILE, two);
    store_sums(sums, two);
}

INLINE TARGET_AMX void dequant_chunk(const int4q_args *a, int64_t n0, range units, uint8_t *A,
                                     const int quads) {
    panel_params params;
    for (int64_t unit = units.begin; unit < units.end; unit++) {
        load_panel_params(a, n0, unit, &params, quads);
        dequant_unit(a, n0, unit, 0, PANEL, &params, A + (unit - units.begin) * UNIT_BYTES,
                     PANEL * a->q_stride, quads);
    }
}

/* Up to BLOCK_PANELS panels; sums are [panels][pairs of m tiles][2][2] C tiles. */
INLINE TARGET_AMX void panel_block(const int4q_args *a, const packed_x *p, range panels,
                                   uint8_t *A, float *sums, const int quads) {
    const int64_t pairs = ceil_div(p->m_tiles, 2);
    for (int64_t unit = 0; unit < p->units; unit += CHUNK_UNITS) {
        const range units = {unit, min64(unit + CHUNK_UNITS, p->units)};
        const int64_t steps = (units.end - units.begin) * UNIT_STEPS;
        for (int64_t i = panels.begin; i < panels.end; i++) {
            dequant_chunk(a, i * PANEL, units, A, quads);
            for (int64_t j = 0; j < pairs; j++) {
                const uint8_t *B0 = b_tiles(p, 2 * j, unit);
                float *to = sums + ((i - panels.begin) * pairs + j) * 1024;
                if (2 * j + 1 < p->m_tiles)
                    chunk_product(A, B0, B0 + steps * TILE, steps, to, unit == 0, 1);
                else
                    chunk_product(A, B0, B0, steps, to, unit == 0, 0);
            }
        }
    }
    /* Panel by panel within a row of out: the next row is in another page. */
    for (int64_t j = 0; j < pairs; j++)
        for (int64_t i = panels.begin; i < panels.end; i++)
            write_sums(a, p, i * PANEL, 2 * j, sums + ((i - panels.begin) * pairs + j) * 1024);
}

static TARGET_AMX void large_panels(const int4q_args *a, const packed_x *p, range panels,
                                    uint8_t *A, float *sums) {
    configure_tiles();
    for (int64_t i = panels.begin; i < panels.end; i += BLOCK_PANELS) {
        const range block = {i, min64(i + BLOCK_PANELS, panels.end)};
        if (a->group < UNIT_K)
            panel_block(a, p, block, A, sums, 1);
        else
            panel_block(a, p, block, A, sums, 0);
    }
    _tile_release();
}

EXPORT int int4q_gemm(const int4q_args *a) {
    if (!has_feature(a, FEATURE_AMX) || a->x_kind != KIND_BF16) return INT4Q_UNSUPPORTED;
    const int64_t panels = ceil_div(a->N, PANEL), units = ceil_div(a->K, UNIT_K);
    const int64_t threads = useful_threads(a, panels, a->N * (a->K / 2) * a->M);
    const int64_t max_tiles = ceil_div(min64(a->M, BLOCK_M), 16);
    const int64_t x_size = max_tiles * units * UNIT_STEPS * TILE, a_size = 2 * UNIT_BYTES;
    const int64_t sums_size = ceil_div(max_tiles, 2) * BLOCK_PANELS * 4 * TILE;
    uint8_t *memory = aligned_new(x_size + threads * (a_size + sums_size));
    if (!memory) return INT4Q_NO_MEMORY;
    PARALLEL(threads) {
        const int64_t part = THREAD_INDEX, parts = THREAD_COUNT;
        uint8_t *A = memory + x_size + part * (a_size + sums_size);
        const range mine = share(panels, part, parts), pack = share(units, part, parts);
        for (int64_t m0 = 0; m0 < a->M; m0 += BLOCK_M) {
            packed_x p = {.m0 = m0, .rows = min64(BLOCK_M, a->M - m0), .units = units};
            p.m_tiles = ceil_div(p.rows, 16);
            p.tiles = memory;
            for (int64_t unit = pack.begin; unit < pack.end; unit++)
                for (int64_t i = 0; i < p.m_tiles; i++) pack_unit(a, &p, i, unit);
            BARRIER;
            if (p.m_tiles <= 2)
                small_panels(a, &p, mine, A);
            else
                large_panels(a, &p, mine, A, (float *)(A + a_size));
            BARRIER;
        }
    }
    _mm_free(memory);
    return INT4Q_OK;
}

#else /* not x86-64, or a compiler without GNU attributes */

#ifdef _MSC_VER
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int int4q_cpu_features(void) { return 0; }
EXPORT int64_t int4q_args_bytes(void) { return sizeof(int4q_args); }
EXPORT int int4q_decode(const int4q_args *a) { return (void)a, INT4Q_UNSUPPORTED; }
EXPORT int int4q_gemm(const int4q_args *a) { return (void)a, INT4Q_UNSUPPORTED; }
EXPORT int int4q_dequant(const int4q_args *a) { return (void)a, INT4Q_UNSUPPORTED; }

#endif
