/* The C++ core of int4q on torch's stable ABI: one binary for torch 2.10 and later and for every
 * Python, or none. library.py loads it.
 *
 * Loading it registers nothing: whoever loads it compares int4q_core_version() with its own first.
 */
#include "core.h"

#include <exception>

#include "launcher.h"

namespace int4q {

thread_local Preference preference;

torch::stable::detail::StableLibrary *open_library(const char *dispatch_key) {
    using torch::stable::detail::StableLibrary;
    const auto kind = dispatch_key ? StableLibrary::Kind::IMPL : StableLibrary::Kind::FRAGMENT;
    return new StableLibrary(kind, "int4q", dispatch_key, __FILE__, __LINE__);
}

}  // namespace int4q

EXPORT const char *int4q_core_version(void) { return INT4Q_VERSION; }

/* The preference in force in this thread: none (1), and whether it runs nothing on a CPU. */
EXPORT void int4q_core_prefer(int none, int refuse_cpu) {
    int4q::preference = {none != 0, refuse_cpu != 0};
}

/* Register cpu_linear's kernel, and its schema where no Python has (define_schema); once a process.
 * 0, or 1 if torch refused. */
EXPORT int int4q_core_register(int define_schema) try {
    int4q::register_cpu_linear(define_schema != 0);
    return 0;
} catch (const std::exception &) {
    return 1;
}

/* Register a kernel that runs the op `name` of the namespace from plans, for a dispatch key (once a
 * process); `planner`, of the same schema and with its namespace, is called where there is none.
 * `arguments` has a letter for each: T a tensor, O an optional one, i a number. 0, or 1 if refused. */
EXPORT int int4q_core_register_launcher(const char *name, const char *planner,
                                        const char *arguments, const char *dispatch_key) try {
    int4q::register_launcher(name, planner, arguments, dispatch_key);
    return 0;
} catch (const std::exception &) {
    return 1;
}
