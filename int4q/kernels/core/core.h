/* What the parts of the C++ core share. */
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace int4q {

/* The kernel preference in force in this thread: what runs nothing on a CPU is refused there, and
 * plans, which are made under none, are left alone. */
struct Preference {
    bool none = true;
    bool refuse_cpu = false;
};
extern thread_local Preference preference;

/* A library of the namespace that is open for good: closing one takes its registrations back. */
torch::stable::detail::StableLibrary *open_library(const char *dispatch_key);

/* Throws what torch throws. */
void register_cpu_linear(bool define_schema);

}  // namespace int4q
