/* The kernels' entry points: what is worth running here, memory, and threads. */
#include <stdlib.h>

#include "common.h"

/* For the caller to see that both sides mean the same arguments. */
EXPORT int64_t int4q_args_bytes(void) { return sizeof(int4q_args); }

#if defined(INT4Q_X86) || defined(INT4Q_ARM)

enum { CACHE_LINE = 64 };

void *aligned_new(int64_t bytes) {
    void *memory;
    return posix_memalign(&memory, CACHE_LINE, (size_t)bytes) ? NULL : memory;
}

void aligned_free(void *memory) { free(memory); }

/* The best instruction set that may be used; NULL where none may. */
static const kernels_of *choose_kernels(int64_t features) {
#ifdef INT4Q_X86
    static const kernels_of *const best_first[] = {&avx512_kernels, &avx_vnni_kernels,
                                                   &avx2_kernels};
#else
    static const kernels_of *const best_first[] = {&dotprod_kernels, &neon_kernels};
#endif
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if (features & int4q_cpu_features() & best_first[i]->feature) return best_first[i];
    return NULL;
}

/* Limbs of fixed point for 16-bit x. Two leave an error of up to 2^-16 of the largest of eight
 * elements. Beside one that is 2^r times as large as the rest, whose own weight may be 0, that is
 * about 2^(r - 16) / sqrt(K) of the result, to compare with the result's rounding, 2^-9 (fp16:
 * 2^-12). A third limb where it would show: from r = 6 + log2(K) / 2 (fp16: 3) on. */
static int form_of_halves(const int4q_args *a, const kernels_of *kernels) {
    float bits = a->x_kind == KIND_BF16 ? 6 : 3;
    for (int64_t k = a->K; k > 1; k /= 2) bits += 0.5f;
    for (int64_t m = 0; m < a->M; m++)
        if (kernels->has_outlier(a, m, bits)) return X_INT24;
    return X_INT16;
}

/* How the products want x; 0 where they are not to be had. */
static int form_of_x(const int4q_args *a, const kernels_of *kernels) {
    const int bf16_products =
        a->x_kind == KIND_BF16 && kernels->feature == FEATURE_AVX512 && has_feature(a, FEATURE_BF16);
    if (a->product == PRODUCT_INT8) return X_INT8;
    if (a->product == PRODUCT_EXACT && bf16_products) return X_BF16_EXACT;
    if (a->product == PRODUCT_EXACT)
        return a->x_kind == KIND_FP32 ? X_INT24 : form_of_halves(a, kernels);
    if (a->x_kind != KIND_BF16 || a->zero || kernels->feature != FEATURE_AVX512) return 0;
    return bf16_products ? X_BF16 : X_FLOAT;
}

enum { SMALL_BYTES = 8 << 10 }; /* what a decode takes from the stack */

/* What the threads of a decode share. */
typedef struct {
    const int4q_args *a;
    const kernels_of *kernels;
    const all_x *x;
    int64_t spans, blocks, params_size;
    block_params params; /* of part 0; the next one's are `params_size` floats further on */
} decode_job;

static void decode_part(const decode_job *job, int64_t part, int64_t parts) {
    const range blocks = share(job->blocks, part, parts);
    for (int64_t i = 0; i < job->params.blocks; i++) /* on their way while x is turned */
        prefetch_params(job->a, &job->params, blocks.begin * ROWS, i);
    const range spans = share(job->spans * job->a->M, part, parts);
    for (int64_t i = spans.begin; i < spans.end; i++) {
        const int64_t m = i / job->spans;
        const turned_x chunk = chunk_of(job->x, m / MAX_CHUNK_M);
        job->kernels->turn_span(job->a, &chunk, m % MAX_CHUNK_M, i % job->spans);
    }
    if (parts > 1) {
        BARRIER;
    }
    block_params params = job->params;
    params.scale += part * job->params_size;
    params.zero += part * job->params_size;
    job->kernels->decode_blocks(job->a, job->x, blocks, &params);
}

EXPORT int int4q_decode(const int4q_args *a) {
    const kernels_of *kernels = choose_kernels(a->features);
    const int form = kernels ? form_of_x(a, kernels) : 0;
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
    const int64_t scale_size = a->group < UNIT_K ? t->units * ROWS * 4 : t->groups * ROWS;
    const int64_t zero_size = t->groups * ROWS, block_size = scale_size + zero_size;
    const int64_t batch = min64(blocks_of_batch(block_size), ceil_div(blocks, threads));
    const int64_t params_size = batch * block_size;
    const int64_t size = units_size + sums_size + threads * params_size * 4;
    uint8_t small[SMALL_BYTES] __attribute__((aligned(CACHE_LINE)));
    uint8_t *memory = size <= SMALL_BYTES ? small : aligned_new(size);
    if (!memory) return INT4Q_NO_MEMORY;
    t->units_x = memory;
    t->group_sum = (float *)(memory + units_size);
    float *params = (float *)(memory + units_size + sums_size);
    const decode_job job = {a, kernels, &x, spans, blocks, params_size,
                            {scale_size, zero_size, batch, params, params + batch * scale_size}};
    if (threads == 1) {
        decode_part(&job, 0, 1); /* a team of one costs as much as a small product */
    } else {
        PARALLEL(threads) decode_part(&job, THREAD_INDEX, THREAD_COUNT);
    }
    if (memory != small) aligned_free(memory);
    return out_of_range ? INT4Q_OUT_OF_RANGE : INT4Q_OK;
}

EXPORT int int4q_dequant(const int4q_args *a) {
    const kernels_of *kernels = choose_kernels(a->features);
    if (!kernels) return INT4Q_UNSUPPORTED;
    const int64_t blocks = ceil_div(a->N, ROWS);
    const int64_t threads = useful_threads(a, blocks, a->N * a->K / 2);
    PARALLEL(threads) {
        const range mine = share(blocks, THREAD_INDEX, THREAD_COUNT);
        for (int64_t block = mine.begin; block < mine.end; block++)
            kernels->dequant_rows(a, block * ROWS);
    }
    return INT4Q_OK;
}

EXPORT int int4q_search(const int4q_search_args *a) {
    const kernels_of *kernels = choose_kernels(a->features);
    if (!kernels) return INT4Q_UNSUPPORTED;
    const int64_t blocks = ceil_div(a->rows, ROWS);
    const int64_t threads = min64(a->threads, blocks);
    PARALLEL(threads) {
        const range mine = share(blocks, THREAD_INDEX, THREAD_COUNT);
        for (int64_t block = mine.begin; block < mine.end; block++)
            kernels->search_rows(a, block * ROWS);
    }
    return INT4Q_OK;
}

#else

EXPORT int int4q_decode(const int4q_args *a) { return (void)a, INT4Q_UNSUPPORTED; }
EXPORT int int4q_dequant(const int4q_args *a) { return (void)a, INT4Q_UNSUPPORTED; }
EXPORT int int4q_search(const int4q_search_args *a) { return (void)a, INT4Q_UNSUPPORTED; }

#endif
