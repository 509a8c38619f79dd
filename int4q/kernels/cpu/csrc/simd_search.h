/* The search of scale and zero point, written once: see `search` in int4q/qparams.py, whose numbers
 * these are but for the order of float32 sums and a product with 1 / scale for a quotient by it. A
 * register holds one element of LANES rows, so every row is searched alone and no sum runs across
 * lanes.
 *
 * A file that includes this has defined SIMD, LANES, floats (a vector type, with its operators),
 * load_floats, set_all, multiply_add as for simd.h, and
 *   least, greatest       of two floats
 *   where_less            (a, b, x, y): x where a < b (not where one is NaN), y elsewhere
 */
#include <math.h>
#include <string.h>

#include "common.h"

enum { MAX_GROUP = 256 };

/* What the values q nearest to a pair tell, as sums over a group. With u, which is q less a number
 * near its mean, the sums are no larger than what is made of them. */
typedef struct {
    floats error;     /* h (w - q scale - zero)^2 */
    floats u, uu, uw; /* h u, h u^2, h u (w - mean) */
    floats centre;    /* q - u */
} sums_of_values;

/* To nearest, ties to even, of |v| < 2^22. */
INLINE SIMD floats round_to_nearest(floats v) {
    const floats shift = set_all(3 << 22);
    return v + shift - shift;
}

INLINE SIMD sums_of_values look_at(const float *w, const float *h, int64_t group, floats mean,
                                   floats scale, floats zero) {
    const floats inverse = set_all(1) / scale, low = set_all(-8), high = set_all(7);
    sums_of_values s = {set_all(0), set_all(0), set_all(0), set_all(0), (mean - zero) * inverse};
    for (int64_t k = 0; k < group; k++) {
        const floats g = load_floats((const uint8_t *)(w + k * LANES)), hk = set_all(h[k]);
        const floats above = g - zero;
        const floats q = round_to_nearest(least(greatest(above * inverse, low), high));
        const floats rest = multiply_add(set_all(0) - q, scale, above);
        const floats u = q - s.centre, hu = hk * u;
        s.error = multiply_add(hk * rest, rest, s.error);
        s.u = s.u + hu;
        s.uu = multiply_add(hu, u, s.uu);
        s.uw = multiply_add(hu, g - mean, s.uw);
    }
    return s;
}

/* One group of LANES rows, w [group][LANES]. */
INLINE SIMD void search_group(const int4q_search_args *a, const float *w, const float *h,
                              float *scale_of_lane, float *zero_of_lane) {
    const floats smallest = set_all(1e-6f / 15), half_of_one = set_all(0.5f);
    floats low = load_floats((const uint8_t *)w), high = low, mean = set_all(0), wrong = mean;
    float total = 0;
    for (int64_t k = 0; k < a->group; k++) {
        const floats g = load_floats((const uint8_t *)(w + k * LANES));
        low = least(low, g);
        high = greatest(high, g);
        mean = multiply_add(set_all(h[k]), g, mean);
        wrong = multiply_add(set_all(0), g, wrong); /* NaN, from NaN and Inf */
        total += h[k];
    }
    const floats inverse_total = set_all(1) / set_all(total);
    mean = mean * inverse_total;
    low = low * half_of_one; /* halves, so that the range of finite weights is finite */
    high = high * half_of_one;
    floats best_error = set_all(INFINITY), best_scale = low, best_zero = low;
    for (int64_t start = 0; start < a->n_ratios; start++) {
        const floats half = (high - low) * set_all(a->ratios[start]);
        floats scale = greatest(half, set_all(0.5e-6f)) / set_all(7.5f);
        floats zero = (low + high - half) * half_of_one + scale * set_all(4);
        zero = zero + zero;
        if (start == 0) best_scale = scale, best_zero = zero; /* even if its error is infinite */
        for (int64_t refit = 0;; refit++) {
            const sums_of_values s = look_at(w, h, a->group, mean, scale, zero);
            best_scale = where_less(s.error, best_error, scale, best_scale);
            best_zero = where_less(s.error, best_error, zero, best_zero);
            best_error = where_less(s.error, best_error, s.error, best_error);
            if (refit == a->refits) break;
            /* Least squares: the covariance of q and w over the variance of q, 0 / 0 (NaN) where
             * all values are the same. */
            const floats mean_u = s.u * inverse_total, fitted = s.uw / (s.uu - s.u * mean_u);
            zero = where_less(smallest, fitted, mean - fitted * (s.centre + mean_u), zero);
            scale = where_less(smallest, fitted, fitted, scale);
        }
    }
    best_scale = best_scale + wrong;
    memcpy(scale_of_lane, &best_scale, sizeof best_scale);
    memcpy(zero_of_lane, &best_zero, sizeof best_zero);
}

/* Rows [r0, r0 + ROWS), or those that there are; lanes beyond hold the last one again. */
static SIMD void search_rows(const int4q_search_args *a, int64_t r0) {
    __attribute__((aligned(64))) float w[MAX_GROUP * LANES];
    const int64_t end = min64(r0 + ROWS, a->rows);
    for (int64_t first = r0; first < end; first += LANES)
        for (int64_t g = 0; g < a->n_groups; g++) {
            float scale[LANES], zero[LANES];
            for (int64_t lane = 0; lane < LANES; lane++) {
                const int64_t row = min64(first + lane, a->rows - 1);
                const float *group = a->w + (row * a->n_groups + g) * a->group;
                for (int64_t k = 0; k < a->group; k++) w[k * LANES + lane] = group[k];
            }
            search_group(a, w, a->h + g * a->group, scale, zero);
            for (int64_t lane = 0; lane < min64(LANES, end - first); lane++) {
                a->scale[(first + lane) * a->n_groups + g] = scale[lane];
                a->zero[(first + lane) * a->n_groups + g] = zero[lane];
            }
        }
}
