/* run_saved CORE DRIVER PLANS ROWS: call the op of test_saved.py in a process without Python, for ROWS
 * rows, and print what the driver was asked for. */
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <cstdlib>

static AtenTensorHandle empty(int64_t rows, int64_t columns, int32_t dtype) {
    const int64_t shape[] = {rows, columns}, stride[] = {columns, 1};
    AtenTensorHandle out = nullptr;
    aoti_torch_empty_strided(2, shape, stride, dtype, aoti_torch_device_type_cpu(), 0, &out);
    return out;
}

int main(int, char **argv) {
    void *core = dlopen(argv[1], RTLD_NOW), *driver = dlopen(argv[2], RTLD_NOW);
    const auto open = (int (*)(const char *, const char *))dlsym(core, "int4q_core_open");
    const auto load = (const char *(*)(const char *))dlsym(core, "int4q_core_load");
    if (open(argv[2], argv[2])) return std::fprintf(stderr, "no driver\n"), 1;
    if (const char *error = load(argv[3])) return std::fprintf(stderr, "%s\n", error), 1;
    const int64_t rows = std::atoi(argv[4]);
    StableIValue stack[] = {(StableIValue)empty(rows, 16, aoti_torch_dtype_bfloat16()),
                            (StableIValue)empty(4, 8, aoti_torch_dtype_int8()), 0, 5, 0};
    if (torch_call_dispatcher("int4q::test_two_launches", "", stack, TORCH_ABI_VERSION)) {
        /* Before torch 2.12 it has said so itself. */
        const auto what = (const char *(*)())dlsym(RTLD_DEFAULT, "torch_exception_get_what");
        if (what) std::fprintf(stderr, "%s\n", what());
        return 2;
    }
    const auto log = (const char *(*)())dlsym(driver, "fake_log");
    std::fputs(log(), stdout);
    return 0;
}
