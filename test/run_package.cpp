/* run_package CORE PACKAGE ROWS COLUMNS [PLANS]: run an AOTInductor package in a process without
 * Python on sin(0), sin(1), .. as [ROWS, COLUMNS]: float32 on the CPU or, with plans, bfloat16 on a
 * GPU. Prints the result in hexadecimal, and the best microseconds of a call to the error output. */
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

static double microseconds(torch::inductor::AOTIModelPackageLoader &model, const at::Tensor &x) {
    using clock = std::chrono::steady_clock;
    constexpr int CALLS = 20;
    double best = 1e9;
    for (int round = 0; round < 20; round++) {
        const auto start = clock::now();
        for (int i = 0; i < CALLS; i++) model.run({x});
        const std::chrono::duration<double, std::micro> time = clock::now() - start;
        best = std::min(best, time.count() / CALLS);
        at::empty({}, x.options()).zero_().item(); /* the queue of a GPU is empty again */
    }
    return best;
}

int main(int count, char **argv) {
    void *core = dlopen(argv[1], RTLD_NOW);
    if (!core) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    const auto register_ops = (int (*)(int))dlsym(core, "int4q_core_register");
    if (register_ops(1)) return std::fprintf(stderr, "torch refused the ops\n"), 1;
    const int64_t rows = std::atoi(argv[3]), columns = std::atoi(argv[4]);
    auto x = at::arange(rows * columns).to(at::kDouble).sin().view({rows, columns}).to(at::kFloat);
    if (count > 5) {
        x = x.to(at::kCUDA, at::kBFloat16);
        const auto load = (const char *(*)(const char *))dlsym(core, "int4q_core_load");
        if (const char *error = load(argv[5])) return std::fprintf(stderr, "%s\n", error), 1;
    }
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const at::Tensor y = model.run({x})[0].cpu().to(at::kFloat).contiguous();
    for (int64_t i = 0; i < y.numel(); i++) std::printf("%a\n", y.data_ptr<float>()[i]);
    std::fprintf(stderr, "%.1f\n", microseconds(model, x));
    return 0;
}
