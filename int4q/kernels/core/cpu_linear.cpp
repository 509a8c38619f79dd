/* int4q::cpu_linear: the kernel for the CPU key. The schema and what it means are cpu/core.py's. */
#include "core.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "int4_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const char *const SCHEMA =
    "cpu_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int group_size, "
    "bool signed, Tensor? bias, Tensor? act_pre_scale, bool rounded, int decode_max_m, "
    "int tiles_min_m) -> Tensor";
constexpr int64_t BLOCK_ELEMENTS = 1 << 20; /* as blocked.py's, for the same bits */

int64_t kind(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16: return KIND_BF16;
        case ScalarType::Half: return KIND_FP16;
        case ScalarType::Float: return KIND_FP32;
        default: return -1;
    }
}

int64_t kind(const Tensor &t) { return kind(t.scalar_type()); }

struct Weight {
    Tensor qdata;
    Tensor scale;
    Optional zero_point;
    int64_t group_size;
    bool is_signed;

    int64_t N() const { return qdata.size(0); }
    int64_t K() const { return 2 * qdata.size(1); }

    Weight rows(int64_t first, int64_t last) const {
        const auto part = [&](Tensor t, int64_t dim) {
            return torch::stable::narrow(t, dim, first, last - first);
        };
        return {part(qdata, 0), part(scale, 1),
                zero_point ? Optional(part(*zero_point, 1)) : std::nullopt, group_size, is_signed};
    }
};

/* What memory safety asks for; the ops that users call have said more, and better. */
void check(const Tensor &x, const Weight &w, const Optional &bias, const Optional &act_pre_scale) {
    STD_TORCH_CHECK(!int4q::preference.refuse_cpu,
                    "int4q::cpu_linear: no kernel for the preference in force runs "
                    "on a CPU. Leave kernel_preference, or ask for \"torch\"");
    STD_TORCH_CHECK(int4q_cpu_features() & FEATURES_DECODE,
                    "int4q::cpu_linear needs an x86-64 CPU with AVX2, or an Arm one");
    const int64_t g = w.group_size;
    STD_TORCH_CHECK(w.qdata.dim() == 2 && w.qdata.element_size() == 1,
                    "int4q::cpu_linear: qdata must be int8 or uint8 [N, K/2]");
    STD_TORCH_CHECK((g == 32 || g == 64 || g == 128 || g == 256) && w.N() && w.K() &&
                        w.K() % g == 0,
                    "int4q::cpu_linear: group_size must be 32, 64, 128 or 256 and divide K = ",
                    w.K(), " (N = ", w.N(), "), got ", g);
    const auto check_part = [&](const char *name, const Tensor &t) {
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == w.K() / g && t.size(1) == w.N() &&
                            t.is_cpu() && kind(t) >= 0 && kind(t) == kind(w.scale),
                        "int4q::cpu_linear: ", name, " must have shape [n_groups, N] = [",
                        w.K() / g, ", ", w.N(), "], the dtype of scale (bfloat16, float16 or "
                        "float32), and be on the CPU");
    };
    check_part("scale", w.scale);
    if (w.zero_point) check_part("zero_point", *w.zero_point);
    STD_TORCH_CHECK(kind(x) >= 0 && x.dim() > 0 && x.size(x.dim() - 1) == w.K() && x.is_cpu() &&
                        w.qdata.is_cpu(),
                    "int4q::cpu_linear: x must be bfloat16, float16 or float32 [.., ", w.K(),
                    "] on the CPU");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w.N() && bias->is_cpu()),
                    "int4q::cpu_linear: bias must have shape [", w.N(), "] on the CPU");
    STD_TORCH_CHECK(!act_pre_scale || act_pre_scale->numel() == w.K(),
                    "int4q::cpu_linear: act_pre_scale must have ", w.K(), " entries");
}

Tensor empty_cpu(const int64_t *sizes, int64_t dims, ScalarType dtype) {
    std::vector<int64_t> strides(dims);
    int64_t stride = 1;
    for (int64_t i = dims - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    static const int32_t dtypes[] = {aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                                     aoti_torch_dtype_float32()};
    AtenTensorHandle out;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides.data(),
                                                    dtypes[kind(dtype)],
                                                    aoti_torch_device_type_cpu(), 0, &out));
    return Tensor(out);
}

/* The part of the kernels' arguments that a weight fills. */
int4q_args weight_args(const Weight &w) {
    int4q_args a{};
    a.qdata = static_cast<const uint8_t *>(w.qdata.data_ptr());
    a.q_stride = w.qdata.stride(0);
    a.scale = w.scale.data_ptr();
    a.scale_kind = kind(w.scale);
    a.scale_stride_g = w.scale.stride(0);
    a.scale_stride_n = w.scale.stride(1);
    if (w.zero_point) {
        a.zero = w.zero_point->data_ptr();
        a.zero_stride_g = w.zero_point->stride(0);
        a.zero_stride_n = w.zero_point->stride(1);
    }
    a.N = w.N();
    a.K = w.K();
    a.group = w.group_size;
    a.offset_binary = !w.is_signed;
    a.threads = torch::stable::get_num_threads();
    a.features = int4q_cpu_features();
    return a;
}

void check_status(int status) {
    STD_TORCH_CHECK(status != INT4Q_UNSUPPORTED, "int4q: this CPU lacks the instructions");
    STD_TORCH_CHECK(status != INT4Q_NO_MEMORY, "int4q: out of memory");
}

/* ---------------------------------------------------------------------------------------------
 * Many rows: blocks of the weight, dequantised, for torch's own product (blocked.py)
 * ------------------------------------------------------------------------------------------- */

struct NoGrad {
    const bool before = aoti_torch_grad_mode_is_enabled();
    NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
    ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

Tensor aten_linear(const Tensor &x, const Tensor &w, const Optional &bias) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                      torch::stable::detail::from(w),
                                      torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

/* What blocks are multiplied in: bfloat16 where it is asked for, unless torch multiplies float32 faster
 * (blocked.py). */
ScalarType product_dtype(bool bf16) {
    const bool fast = int4q_cpu_features() & (FEATURE_AVX512 | FEATURE_BF16);
    return bf16 && fast ? ScalarType::BFloat16 : ScalarType::Float;
}

/* x [M, K] times the weight, into out [M, N]. */
void by_blocks(const Tensor &x, const Weight &w, const Optional &bias, bool rounded,
               ScalarType product, Tensor out) {
    const NoGrad guard;
    const ScalarType dtype = rounded ? x.scalar_type() : product;
    const Tensor xc = torch::stable::to(x, product);
    const Optional bc = bias ? Optional(torch::stable::to(*bias, product)) : std::nullopt;
    const int64_t N = w.N(), K = w.K(), step = std::max<int64_t>(1, BLOCK_ELEMENTS / K);
    const int64_t shape[2] = {std::min(step, N), K};
    Tensor buffer = empty_cpu(shape, 2, dtype);
    for (int64_t first = 0; first < N; first += step) {
        const int64_t last = std::min(first + step, N);
        int4q_args a = weight_args(w.rows(first, last));
        Tensor block = torch::stable::narrow(buffer, 0, 0, last - first);
        a.out = block.data_ptr();
        a.out_stride = K;
        a.out_kind = kind(dtype);
        check_status(int4q_dequant(&a));
        Optional part;
        if (bc) {
            Tensor all = *bc;
            part = torch::stable::narrow(all, 0, first, last - first);
        }
        Tensor to = torch::stable::narrow(out, 1, first, last - first);
        torch::stable::copy_(to, aten_linear(xc, torch::stable::to(block, product), part));
    }
}

/* ---------------------------------------------------------------------------------------------
 * Few rows: int4_cpu.c's kernels
 * ------------------------------------------------------------------------------------------- */

/* Whether fixed point holds a row of K numbers: all finite and below 2^121 (int4_cpu.c). */
bool in_range(const void *row, int64_t kind, int64_t K) {
    for (int64_t i = 0; i < K; i++) {
        uint32_t bits;
        if (kind == KIND_FP16) {
            if ((static_cast<const uint16_t *>(row)[i] & 0x7c00) == 0x7c00) return false;
            continue;
        }
        bits = kind == KIND_BF16 ? uint32_t(static_cast<const uint16_t *>(row)[i]) << 16
                                 : static_cast<const uint32_t *>(row)[i];
        if ((bits & 0x7fffffff) >= uint32_t(127 + 121) << 23) return false;
    }
    return true;
}

/* Rows that fixed point does not hold, again by blocks. */
void repair_rows(const int4q_args &a, const Tensor &x, const Weight &w, const Optional &bias,
                 Tensor out) {
    const int64_t row_bytes = a.x_stride * (a.x_kind == KIND_FP32 ? 4 : 2);
    const bool bf16 = a.x_kind == KIND_BF16 && a.scale_kind == KIND_BF16; /* as exact as the kernels */
    for (int64_t m = 0; m < a.M; m++) {
        const char *row = static_cast<const char *>(a.x) + m * row_bytes;
        if (in_range(row, a.x_kind, a.K)) continue;
        Tensor rows = x;
        by_blocks(torch::stable::narrow(rows, 0, m, 1), w, bias, false, product_dtype(bf16),
                  torch::stable::narrow(out, 0, m, 1));
    }
}

Tensor scaled(const Tensor &x, const Tensor &act_pre_scale) {
    const Tensor flat = torch::stable::to(torch::stable::reshape(act_pre_scale, {-1}),
                                          x.scalar_type());
    std::array<StableIValue, 2> stack{torch::stable::detail::from(x),
                                      torch::stable::detail::from(flat)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

/* Rows of x side by side with one distance between them, which is what the kernels take. */
bool has_plain_rows(const Tensor &x) {
    return x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1);
}

Tensor cpu_linear(const Tensor &x_in, const Tensor &qdata, const Tensor &scale,
                  const Optional &zero_point, int64_t group_size, bool is_signed,
                  const Optional &bias, const Optional &act_pre_scale, bool rounded,
                  int64_t decode_max_m, int64_t tiles_min_m) {
    Weight w{qdata, scale, zero_point, group_size, is_signed};
    check(x_in, w, bias, act_pre_scale);
    if (w.qdata.stride(1) != 1) w.qdata = torch::stable::contiguous(w.qdata);
    Tensor x = act_pre_scale ? scaled(x_in, *act_pre_scale) : x_in;
    if (!has_plain_rows(x)) x = torch::stable::contiguous(x);

    int4q_args a = weight_args(w);
    const int64_t dims = x.dim();
    int64_t small[4];
    std::vector<int64_t> large(dims > 4 ? dims : 0);
    int64_t *sizes = dims > 4 ? large.data() : small;
    a.M = 1;
    for (int64_t i = 0; i < dims - 1; i++) a.M *= sizes[i] = x.size(i);
    sizes[dims - 1] = a.N;
    Tensor out = empty_cpu(sizes, dims, x.scalar_type());
    if (a.M == 0) return out;

    const auto matrix = [&](Tensor t, int64_t columns) {
        return dims == 2 ? t : torch::stable::view(t, {a.M, columns});
    };
    const bool tiles = kind(x) == KIND_BF16 && a.M >= tiles_min_m && (a.features & FEATURE_AMX);
    const bool few = a.M <= decode_max_m && (!rounded || (a.features & FEATURE_AVX512));
    if (!few && !tiles) {
        by_blocks(matrix(x, a.K), w, bias, rounded, product_dtype(kind(x) == KIND_BF16),
                  matrix(out, a.N));
        return out;
    }
    Optional floats;
    if (bias) {
        const bool as_is = kind(*bias) == KIND_FP32 && bias->is_contiguous();
        const auto convert = [&] { return torch::stable::to(*bias, ScalarType::Float); };
        floats = as_is ? *bias : torch::stable::contiguous(convert());
        a.bias = static_cast<const float *>(floats->data_ptr());
    }
    a.x = x.data_ptr();
    a.x_stride = dims == 2 ? x.stride(0) : a.K;
    a.x_kind = a.out_kind = kind(x);
    a.out = out.data_ptr();
    a.out_stride = a.N;
    a.product = rounded ? PRODUCT_BF16 : PRODUCT_EXACT;
    const int status = tiles ? int4q_gemm(&a) : int4q_decode(&a);
    check_status(status);
    if (status == INT4Q_OUT_OF_RANGE)
        repair_rows(a, matrix(x, a.K), w, bias, matrix(out, a.N));
    return out;
}

}  // namespace

void int4q::register_cpu_linear(bool define_schema) {
    if (define_schema) open_library(nullptr)->def(SCHEMA);
    open_library("CPU")->impl("cpu_linear", TORCH_BOX(&cpu_linear));
}
