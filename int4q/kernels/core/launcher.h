/* The ops that run from plans. */
#pragma once

#include <cstddef>
#include <string>

namespace int4q {

/* Throws what torch throws. An op without a planner runs the plans that are there. */
void register_launcher(const char *name, const char *planner, const char *arguments,
                       const char *dispatch_key);

size_t number_of_ops();
/* Of an op; number_of_ops() where it is none yet. */
size_t number_of(const std::string &name);

}  // namespace int4q
