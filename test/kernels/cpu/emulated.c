/* The kernels for a caller who cannot load them, on another CPU: calls come in on standard input and
 * results go out on standard output. A call is 8 numbers (kernel: 0 decode, 1 dequant, 2 features; bytes
 * of x, qdata, scale, zero, bias and out; a spare one), the arguments, and the arrays that it reads;
 * a result is the status, and out. */
#include <stdio.h>
#include <stdlib.h>

#include "int4_cpu.h"

enum { ALIGN = 64, ARRAYS = 5 };

static int read_all(void *to, size_t bytes) { return fread(to, 1, bytes, stdin) == bytes; }

static void *read_array(int64_t bytes) {
    void *array = NULL;
    if (!bytes) return NULL;
    if (posix_memalign(&array, ALIGN, (size_t)bytes) || !read_all(array, (size_t)bytes)) exit(2);
    return array;
}

int main(void) {
    int64_t call[8];
    int4q_args a;
    while (read_all(call, sizeof call) && read_all(&a, sizeof a)) {
        void *arrays[ARRAYS], *out = calloc(1, (size_t)call[6] + 1);
        for (int i = 0; i < ARRAYS; i++) arrays[i] = read_array(call[1 + i]);
        a.x = arrays[0];
        a.qdata = arrays[1];
        a.scale = arrays[2];
        a.zero = arrays[3];
        a.bias = arrays[4];
        a.out = out;
        const int64_t status = call[0] == 0   ? int4q_decode(&a)
                               : call[0] == 1 ? int4q_dequant(&a)
                                              : int4q_cpu_features();
        fwrite(&status, sizeof status, 1, stdout);
        fwrite(out, 1, (size_t)call[6], stdout);
        fflush(stdout);
        for (int i = 0; i < ARRAYS; i++) free(arrays[i]);
        free(out);
    }
    return 0;
}
