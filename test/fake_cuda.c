/* A CUDA driver that writes down what it is asked for.
 *
 * A CUfunction is a list of 64-bit words: the number of its parameters, then their sizes in bytes.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int id; char pad[4]; int value; char rest[60]; } Attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    Attribute *attributes;
    unsigned n_attributes;
} Config;

enum { SIZE = 1 << 20 };
static char log_text[SIZE];
static size_t used;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int next_status;
static __thread void *context;

const char *fake_log(void) { return log_text; }
void fake_clear(void) { used = 0, log_text[0] = 0; }
void fake_fail(int status) { next_status = status; }

int cuLaunchKernelEx(const Config *c, void *function, void **parameters, void **extra) {
    if (next_status || extra) {
        const int status = next_status ? next_status : 1;
        next_status = 0;
        return status;
    }
    pthread_mutex_lock(&mutex);
#define SAY(...) used += used < SIZE ? (size_t)snprintf(log_text + used, SIZE - used, __VA_ARGS__) : 0
    SAY("%u %u %u|%u %u %u|%u|%p|%p|", c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1],
        c->block[2], c->shared, c->stream, context);
    for (unsigned i = 0; i < c->n_attributes; i++)
        SAY("%d=%d ", c->attributes[i].id, c->attributes[i].value);
    const int64_t *sizes = function;
    for (int64_t i = 0; i < sizes[0]; i++) {
        SAY("|");
        for (int64_t j = 0; j < sizes[i + 1]; j++) SAY("%02x", ((uint8_t *)parameters[i])[j]);
    }
    SAY("\n");
    pthread_mutex_unlock(&mutex);
    return 0;
}

int cuCtxGetCurrent(void **c) { return *c = context, 0; }
int cuCtxSetCurrent(void *c) { return context = c, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void **c, int device) {
    return *c = (void *)(intptr_t)(0xc0 + device), 0;
}
int cuTensorMapReplaceAddress(void *map, void *address) {
    if ((uintptr_t)map % 64) return 1;
    memcpy(map, &address, sizeof address);
    return 0;
}
int cuGetErrorString(int status, const char **text) {
    return *text = status == 700 ? "an illegal address" : "something", 0;
}

int aoti_torch_get_current_cuda_stream(int device, void **stream) {
    return *stream = (void *)(intptr_t)(0x42 + device), 0;
}

/* torch's products, for tensors on the CPU */
static void *torch(const char *name) {
    return dlsym(dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD), name);
}

int aoti_torch_cuda_mm_out(void *out, void *a, void *b) {
    return ((int (*)(void *, void *, void *))torch("aoti_torch_cpu_mm_out"))(out, a, b);
}

int aoti_torch_cuda_addmm_out(void *out, void *c, void *a, void *b, double beta, double alpha) {
    typedef int (*addmm)(void *, void *, void *, void *, double, double);
    return ((addmm)torch("aoti_torch_cpu_addmm_out"))(out, c, a, b, beta, alpha);
}

/* A binary is the words of its one function. */
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)image, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    const int64_t *words = module;
    if (strcmp(name, "kernel")) return 500;
    void *copy = malloc((words[0] + 1) * sizeof *words);
    return *function = memcpy(copy, words, (words[0] + 1) * sizeof *words), 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    return !function || attribute != 8 || value <= 48 * 1024;
}
