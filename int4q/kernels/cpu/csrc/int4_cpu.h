/* int4 weight-only linear, dequantisation and the search of scales on CPUs: what the kernels offer.
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
 *                  PRODUCT_EXACT    weights as they are; x as it is where the CPU multiplies bf16
 *                                   (x bf16, AVX-512), else as 16 or 24 bit fixed point
 *                  PRODUCT_BF16     x bf16, weights rounded once to bf16; no zero points; AVX-512
 *                  PRODUCT_INT8     weights as they are; x as int8, a scale for 32
 *                Sums are float32. INT4Q_OUT_OF_RANGE: done, and rows of x that fixed point cannot
 *                hold (NaN, Inf, 2^121 and more) gave rows of NaN.
 * int4q_gemm     any M, x bf16: weights rounded once to bf16, float32 sums; AMX
 * int4q_dequant  rows of the weight as bf16, fp16 or fp32
 * int4q_search   scales and zero points for a weight that is yet to be quantised
 *
 * Every function names its instruction set, so no file needs -march; without one that is known here
 * int4q_cpu_features() is 0 and the kernels return INT4Q_UNSUPPORTED. Kernels hold no global state;
 * several threads may call them at once.
 */
#ifndef INT4Q_INT4_CPU_H
#define INT4Q_INT4_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { KIND_BF16 = 0, KIND_FP16 = 1, KIND_FP32 = 2 };
/* AVX512: with F, BW, VL and VNNI. AVX2: with FMA and F16C. BF16: products of bf16. */
enum {
    FEATURE_AVX512 = 1,
    FEATURE_AMX = 2,
    FEATURE_BF16 = 4,
    FEATURE_AVX2 = 8,
    FEATURE_AVX_VNNI = 16,
    FEATURE_NEON = 32,
    FEATURE_DOTPROD = 64
};
enum { FEATURES_DECODE = FEATURE_AVX512 | FEATURE_AVX2 | FEATURE_NEON }; /* any of them will do */
enum { INT4Q_OK = 0, INT4Q_UNSUPPORTED = 1, INT4Q_NO_MEMORY = 2, INT4Q_OUT_OF_RANGE = 3 };
enum { PRODUCT_EXACT = 0, PRODUCT_BF16 = 1, PRODUCT_INT8 = 2 };

/* All a kernel reads and writes. Strides count elements (bytes for qdata). */
typedef struct {
    const void *x;        /* [M, K], kind x_kind, inner stride 1 */
    const uint8_t *qdata; /* [N, K/2], inner stride 1 */
    const void *scale;    /* [G, N], kind scale_kind */
    const void *zero;     /* [G, N], kind scale_kind, or NULL */
    const float *bias;    /* [N] or NULL */
    void *out;            /* [M, N] (dequant: [N, K]), kind out_kind, inner stride 1 */
    int64_t x_stride, q_stride, out_stride;
    int64_t scale_stride_g, scale_stride_n, zero_stride_g, zero_stride_n;
    int64_t M, N, K, group;
    int64_t x_kind, scale_kind, out_kind, threads, offset_binary;
    int64_t product;  /* of int4q_decode */
    int64_t features; /* those of int4q_cpu_features() that may be used */
} int4q_args;

/* The search of scales and zero points, all arrays contiguous; `search` in qparams.py says what. */
typedef struct {
    const float *w;      /* [rows, n_groups, group] */
    const float *h;      /* [n_groups, group], what an error of an element weighs: positive */
    const float *ratios; /* [n_ratios] */
    float *scale, *zero; /* [rows, n_groups]; the scale is NaN where w is not finite */
    int64_t rows, n_groups, group, n_ratios, refits, threads, features;
} int4q_search_args;

int int4q_cpu_features(void);
int64_t int4q_args_bytes(void); /* for the caller to see that both sides mean the same arguments */
int int4q_decode(const int4q_args *a);
int int4q_gemm(const int4q_args *a);
int int4q_dequant(const int4q_args *a);
int int4q_search(const int4q_search_args *a);

#ifdef __cplusplus
}
#endif

#endif
