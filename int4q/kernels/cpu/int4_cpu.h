/* What int4_cpu.c offers; see there. */
#ifndef INT4Q_INT4_CPU_H
#define INT4Q_INT4_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { KIND_BF16 = 0, KIND_FP16 = 1, KIND_FP32 = 2 };
enum { FEATURE_VNNI = 1, FEATURE_AMX = 2, FEATURE_BF16 = 4 };
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

int int4q_cpu_features(void);
int64_t int4q_args_bytes(void); /* for the caller to see that both sides mean the same arguments */
int int4q_decode(const int4q_args *a);
int int4q_gemm(const int4q_args *a);
int int4q_dequant(const int4q_args *a);

#ifdef __cplusplus
}
#endif

#endif
