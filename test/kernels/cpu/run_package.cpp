/* run_package CORE PACKAGE ROWS: run an AOTInductor package in a process without Python and print
 * what it gives for ROWS rows of ones, in hexadecimal. */
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int, char **argv) {
    void *core = dlopen(argv[1], RTLD_NOW);
    if (!core) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    const auto register_ops = (int (*)(int))dlsym(core, "int4q_core_register");
    if (register_ops(1)) return std::fprintf(stderr, "torch refused the ops\n"), 1;
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const at::Tensor y = model.run({at::ones({std::atoi(argv[3]), 256})})[0].contiguous();
    for (int64_t i = 0; i < y.numel(); i++) std::printf("%a\n", y.data_ptr<float>()[i]);
    return 0;
}
