/* What the kernels' files share: how work is dealt out, the form of x that products read, and the
 * table of functions that an instruction set fills. */
#ifndef INT4Q_COMMON_H
#define INT4Q_COMMON_H

#include "int4_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8") /* arrays indexed by a loop live in registers then */
#if defined(__x86_64__) && !defined(_MSC_VER)
#define INT4Q_X86
#elif defined(__aarch64__)
#define INT4Q_ARM
#endif
#else /* no target attributes: no kernels */
#define EXPORT __declspec(dllexport)
#define INLINE static __forceinline
#endif

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int has_feature(const int4q_args *a, int feature);
void *aligned_new(int64_t bytes); /* on a cache line's boundary; NULL where there is no memory */
void aligned_free(void *memory);

typedef struct {
    int64_t begin, end;
} range;

/* Share `part` of `parts` of [0, total). */
INLINE range share(int64_t total, int64_t part, int64_t parts) {
    const range r = {total * part / parts, total * (part + 1) / parts};
    return r;
}

/* Threads worth waking: no more than pieces of work, and `work` (bytes of weights, times the rows
 * of x that use them) enough for each. */
INLINE int64_t useful_threads(const int4q_args *a, int64_t pieces, int64_t work) {
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
 * Decode: x in the order and the numbers of the products
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
 * X_BF16_EXACT: the same, for weights that are q, and q * x exact.
 * X_FLOAT: float [8][16], lane i of row j is k = 8 i + j, likewise.
 * ------------------------------------------------------------------------------------------- */

enum { UNIT_K = 128, SPAN_K = 256, MAX_CHUNK_M = 8, ROWS = 16, MAX_R = 4 };
enum { X_INT8 = 1, X_INT16 = 2, X_INT24 = 3, X_BF16 = 4, X_FLOAT = 5, X_BF16_EXACT = 6, FORMS = 6 };

INLINE int64_t unit_bytes(int form) {
    if (form == X_BF16 || form == X_BF16_EXACT) return 4 * 64;
    if (form == X_FLOAT) return 8 * 64;
    return form * 128 + (form == X_INT24 ? 2 : 1) * 64 + 64;
}

/* Fixed point. The exponent field of a block's d, a power of two, is the least for which the largest
 * |x| of the block, rounded to nearest, fits the limbs:
 *   field = max((bits of amax + FIELD_CARRY) >> 23, bits) - (bits - 1),   bits = 15 or 23
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
 * as `bits` at least, and x below 2^-104 (2^-112 for 16 bits) are rounded to multiples of 2^-126.
 *
 * A block with NaN, Inf or a |x| from 2^121 on (FIELD_BEYOND), where the sum q * x of a lane could
 * leave the range of float before its scale brings it back, gets d = NaN, so that every result it
 * enters is NaN. */
enum { FIELD_CARRY = 65793, FIELD_BEYOND = 127 + 121 };

/* A chunk of at most 8 rows of x. */
typedef struct {
    int64_t m0, M, units, groups;
    int form;
    uint8_t *units_x;  /* [units][M][unit_bytes] */
    float *group_sum;  /* [M][groups]: sum of x over a group, which zero_point multiplies */
    int *out_of_range; /* set where fixed point met what it cannot hold */
} turned_x;

/* All of x: chunks of 8 rows, the last one maybe shorter, and the buffers that they share. */
typedef struct {
    turned_x whole;
    int64_t chunks;
} all_x;

INLINE turned_x chunk_of(const all_x *x, int64_t chunk) {
    turned_x t = x->whole;
    t.m0 = chunk * MAX_CHUNK_M;
    t.M = min64(MAX_CHUNK_M, x->whole.M - t.m0);
    t.units_x += t.m0 * t.units * unit_bytes(t.form);
    t.group_sum += t.m0 * t.groups;
    return t;
}

/* Parameters of blocks of 16 rows, float: scales as [K / step][16 rows], a step a group or, where
 * those are shorter than a unit, 32; zero points as [G][16 rows]. They are converted for a batch of
 * blocks at a time, because the entries of another g may lie in another page; a batch is short,
 * because nothing is done beside its first one's conversion. */
enum { MAX_BLOCKS = 4 };

typedef struct {
    int64_t scale_size, zero_size; /* floats of a block */
    int64_t blocks;                /* of a batch, no more than MAX_BLOCKS */
    float *scale, *zero;           /* [blocks] */
} block_params;

/* Blocks whose converted parameters fit in a second-level cache beside the weights. */
INLINE int64_t blocks_of_batch(int64_t floats_of_block) {
    enum { BATCH_FLOATS = 32 << 10 };
    const int64_t blocks = min64(MAX_BLOCKS, BATCH_FLOATS / floats_of_block);
    return blocks < 1 ? 1 : blocks;
}

INLINE void prefetch_entries(const void *p, int64_t size, int64_t stride_g, int64_t first,
                             int64_t count, range groups) {
    enum { LINE = 64 };
    for (int64_t g = groups.begin; p && g < groups.end; g++)
        for (int64_t i = 0; i < count * size; i += LINE)
            __builtin_prefetch((const char *)p + (g * stride_g + first) * size + i, 0, 2);
}

/* Ask for a part of what the batch from n0 on will convert, block `part` of this one: the entries
 * of one g are a few lines, and those of the next lie in another page, so that no prefetcher of the
 * CPU's finds them. */
INLINE void prefetch_params(const int4q_args *a, const block_params *params, int64_t n0,
                            int64_t part) {
    const range groups = share(a->K / a->group, part, params->blocks);
    const int64_t count = min64(params->blocks * ROWS, a->N - n0);
    const int64_t size = a->scale_kind == KIND_FP32 ? 4 : 2;
    if (a->scale_stride_n == 1)
        prefetch_entries(a->scale, size, a->scale_stride_g, n0, count, groups);
    if (a->zero_stride_n == 1)
        prefetch_entries(a->zero, size, a->zero_stride_g, n0, count, groups);
}

/* The functions of one instruction set. */
typedef struct {
    int feature; /* what the CPU must have */
    /* Whether some element of row m is more than 2^bits times as large as the row's elements are in
     * the (geometric) mean. Zeros do not count. */
    int (*has_outlier)(const int4q_args *a, int64_t m, float bits);
    /* Row m of the chunk, k in [span * 256, span * 256 + 256): whole groups, so that their sums are
     * final. */
    void (*turn_span)(const int4q_args *a, const turned_x *t, int64_t m, int64_t span);
    /* Blocks of 16 rows; `params` are this thread's to fill. */
    void (*decode_blocks)(const int4q_args *a, const all_x *x, range blocks,
                          const block_params *params);
    /* 16 rows from n0 on, or those that there are. */
    void (*dequant_rows)(const int4q_args *a, int64_t n0);
    void (*search_rows)(const int4q_search_args *a, int64_t r0);
} kernels_of;

extern const kernels_of avx512_kernels, avx_vnni_kernels, avx2_kernels, dotprod_kernels,
    neon_kernels;

#endif
