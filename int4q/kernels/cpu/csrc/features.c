/* What instruction sets this CPU has, and those of them that may be used. */
#include <stdlib.h>
#include <string.h>

#include "common.h"

#ifdef INT4Q_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#ifdef INT4Q_X86

static uint64_t os_state_mask(void) {
    uint32_t eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return ((uint64_t)edx << 32) | eax;
}

/* Linux hands a process the AMX tile registers only on request. */
static int request_tiles(void) {
#ifdef __linux__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int all(unsigned word, unsigned bits) { return (word & bits) == bits; }

static int detect_features(void) {
    enum { FMA_OSXSAVE_F16C = 1u << 12 | 1u << 27 | 1u << 29, AVX2 = 1u << 5 };
    const unsigned f_bw_vl = 1u << 16 | 1u << 30 | 1u << 31, tile_bf16 = 1u << 22 | 1u << 24;
    const uint64_t ymm = 0x6, zmm = 0xe6, tiles = 3u << 17; /* of XCR0 */
    unsigned a, b, c, d, b7, c7, d7, a71 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, FMA_OSXSAVE_F16C)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !all(b7, AVX2)) return 0;
    const uint64_t os = os_state_mask();
    if ((os & ymm) != ymm) return 0;
    __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    int features = FEATURE_AVX2;
    if ((a71 >> 4) & 1) features |= FEATURE_AVX_VNNI;
    const int vnni = (c7 >> 11) & 1, bf16 = (a71 >> 5) & 1;
    if (!all(b7, f_bw_vl) || !vnni || (os & zmm) != zmm) return features;
    features |= FEATURE_AVX512 | (bf16 ? FEATURE_BF16 : 0);
    if (bf16 && all(d7, tile_bf16) && (os & tiles) == tiles && request_tiles())
        features |= FEATURE_AMX;
    return features;
}

#elif defined(INT4Q_ARM)

#ifdef __APPLE__
static int has(const char *name) {
    int yes = 0;
    size_t size = sizeof yes;
    return !sysctlbyname(name, &yes, &size, NULL, 0) && yes;
}
#endif

static int detect_features(void) {
    int dotprod = 0, bf16 = 0;
#if defined(__linux__)
    dotprod = (getauxval(AT_HWCAP) >> 20) & 1;
    bf16 = (getauxval(AT_HWCAP2) >> 14) & 1;
#elif defined(__APPLE__)
    dotprod = has("hw.optional.arm.FEAT_DotProd");
    bf16 = has("hw.optional.arm.FEAT_BF16");
#endif
    return FEATURE_NEON | (dotprod ? FEATURE_DOTPROD : 0) | (bf16 ? FEATURE_BF16 : 0);
}

#else

static int detect_features(void) { return 0; }

#endif

/* Those that INT4Q_CPU_ISA in the environment leaves: the one it names and what comes before. */
static int allowed_features(void) {
    static const struct {
        const char *name;
        int features;
    } levels[] = {
        {"none", 0},
        {"neon", FEATURE_NEON},
        {"dotprod", FEATURE_NEON | FEATURE_DOTPROD},
        {"avx2", FEATURE_AVX2},
        {"avx_vnni", FEATURE_AVX2 | FEATURE_AVX_VNNI},
        {"avx512", FEATURE_AVX2 | FEATURE_AVX_VNNI | FEATURE_AVX512 | FEATURE_BF16},
    };
    const char *limit = getenv("INT4Q_CPU_ISA");
    for (size_t i = 0; limit && i < sizeof levels / sizeof *levels; i++)
        if (!strcmp(limit, levels[i].name)) return levels[i].features;
    return ~0;
}

EXPORT int int4q_cpu_features(void) {
    static int cached = -1; /* every thread would write the same value */
#if defined(__GNUC__) || defined(__clang__)
    int features = __atomic_load_n(&cached, __ATOMIC_RELAXED);
    if (features < 0) {
        features = detect_features() & allowed_features();
        __atomic_store_n(&cached, features, __ATOMIC_RELAXED);
    }
    return features;
#else
    return cached = 0;
#endif
}

int has_feature(const int4q_args *a, int feature) {
    return (a->features & int4q_cpu_features() & feature) != 0;
}
