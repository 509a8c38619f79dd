#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace int4q {

Driver driver{};

void Driver::check(int status, const char *what) const {
    if (!status) return;
    const char *text = nullptr;
    error_text(status, &text);
    throw std::runtime_error(std::string("int4q: ") + what + " failed: CUDA driver error " +
                             std::to_string(status) + " (" + (text ? text : "unknown") + ")");
}

}  // namespace int4q

EXPORT int int4q_core_open(const char *cuda, const char *torch_cuda) {
    void *const opened = dlopen(cuda, RTLD_NOW);
    void *const torch = dlopen(torch_cuda, RTLD_NOW | RTLD_NOLOAD);
    if (!opened || !torch) return 1;
    const auto find = [](void *library, const char *name, auto &function) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
        return function != nullptr;
    };
    int4q::Driver found{};
    const bool all = find(opened, "cuLaunchKernelEx", found.launch) &&
                     find(opened, "cuCtxGetCurrent", found.context) &&
                     find(opened, "cuCtxSetCurrent", found.set_context) &&
                     find(opened, "cuTensorMapReplaceAddress", found.move_map) &&
                     find(opened, "cuGetErrorString", found.error_text) &&
                     find(opened, "cuDeviceGet", found.device) &&
                     find(opened, "cuDevicePrimaryCtxRetain", found.retain) &&
                     find(opened, "cuModuleLoadData", found.load) &&
                     find(opened, "cuModuleGetFunction", found.function) &&
                     find(opened, "cuFuncSetAttribute", found.set_attribute) &&
                     find(torch, "aoti_torch_get_current_cuda_stream", found.stream) &&
                     find(torch, "aoti_torch_cuda_mm_out", found.mm) &&
                     find(torch, "aoti_torch_cuda_addmm_out", found.addmm);
    if (all) int4q::driver = found;
    return all ? 0 : 1;
}
