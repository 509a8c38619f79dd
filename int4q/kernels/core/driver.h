/* The CUDA driver and torch's own CUDA library, looked up at run time: nothing of CUDA is needed to
 * build this. */
#pragma once

#include <cstdint>

#include "core.h"

namespace int4q {

struct LaunchAttribute { /* CUlaunchAttribute */
    int id;
    char pad[4];
    int value;
    char rest[60];
};

struct LaunchConfig { /* CUlaunchConfig */
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    void *stream;
    LaunchAttribute *attributes;
    unsigned attribute_count;
};

constexpr int PROGRAMMATIC_SERIALIZATION = 6; /* CU_LAUNCH_ATTRIBUTE_.. */
constexpr int MAX_DYNAMIC_SHARED = 8;         /* CU_FUNC_ATTRIBUTE_.._SIZE_BYTES */
constexpr unsigned FREE_SHARED = 48 * 1024;   /* what every kernel may take */

struct Driver {
    int (*launch)(const LaunchConfig *, void *function, void **parameters, void **extra);
    int (*context)(void **);
    int (*set_context)(void *);
    int (*move_map)(void *map, void *address);
    int (*error_text)(int, const char **);
    int (*device)(int *, int index);
    int (*retain)(void **context, int device);
    int (*load)(void **module, const void *image);
    int (*function)(void **, void *module, const char *name);
    int (*set_attribute)(void *function, int attribute, int value);

    AOTITorchError (*stream)(int32_t device, void **);
    AOTITorchError (*mm)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
    AOTITorchError (*addmm)(AtenTensorHandle out, AtenTensorHandle bias, AtenTensorHandle a,
                            AtenTensorHandle b, double beta, double alpha);

    /* Throws with the driver's own text where `status` is an error. */
    void check(int status, const char *what) const;
};

/* Empty until int4q_core_open(). */
extern Driver driver;

/* A context made this thread's current one; a thread new to CUDA has none. */
class Context {
    void *before = nullptr;
    bool changed = false;

   public:
    explicit Context(void *wanted) {
        driver.check(driver.context(&before), "cuCtxGetCurrent");
        if (before == wanted) return;
        driver.check(driver.set_context(wanted), "cuCtxSetCurrent");
        changed = true;
    }
    ~Context() {
        if (changed) driver.set_context(before);
    }
    Context(const Context &) = delete;
    Context &operator=(const Context &) = delete;
};

}  // namespace int4q

/* Look up what plans need in the CUDA driver and in torch's CUDA library, which is loaded already.
 * 0, or 1 if something is missing. */
EXPORT int int4q_core_open(const char *cuda, const char *torch_cuda);
