/* The kernels of the ops on a GPU: plans, kept by kind and replayed.
 *
 * A call whose kind has a plan allocates, fills in addresses and launches. Any other calls the op's
 * planner, which is Python: it runs the call and hands in its plan (int4q_core_keep). A process
 * without Python has the plans of a file (saved.cpp), and no planners.
 */
#include "launcher.h"

#include <algorithm>
#include <optional>

#include "driver.h"
#include "table.h"

namespace int4q {

namespace {

using torch::stable::detail::to;

constexpr size_t MAX_OPS = 32;
constexpr size_t MAX_MADE = 5; /* slots that a plan itself may fill */

/* What this thread's planner is to make a plan of, and what it says went wrong. */
struct Pending {
    const Key *key = nullptr;
    bool kept = false;
    std::optional<std::string> failure;
};
thread_local Pending pending;

/* ---------------------------------------------------------------------------------------------
 * Ops
 * ------------------------------------------------------------------------------------------- */

struct Op {
    std::string name, planner, arguments;
};
std::array<Op, MAX_OPS> ops;
size_t n_ops = 0;

AtenTensorHandle tensor_at(char letter, StableIValue value) {
    if (letter == 'T') return to<AtenTensorHandle>(value);
    const auto *box = to<StableIValue *>(value);
    return box ? to<AtenTensorHandle>(*box) : nullptr;
}

void add_tensor(Key &key, AtenTensorHandle tensor, const char *start) {
    int32_t dtype, type, index;
    int64_t dims, *shape, *stride;
    check(aoti_torch_get_dtype(tensor, &dtype));
    check(aoti_torch_get_device_type(tensor, &type));
    check(aoti_torch_get_device_index(tensor, &index));
    check(aoti_torch_get_dim(tensor, &dims));
    check(aoti_torch_get_sizes(tensor, &shape));
    check(aoti_torch_get_strides(tensor, &stride));
    const int64_t alignment = int64_t(reinterpret_cast<uintptr_t>(start) & 15);
    key.add(dims << 32 | int64_t(dtype) << 16 | int64_t(type) << 8 | alignment);
    key.add(index);
    key.add(shape, dims);
    key.add(stride, dims);
}

/* The kind of a call; its tensors go into `memory`. */
void add_arguments(Key &key, const Op &op, const StableIValue *stack, Memory &memory) {
    for (size_t i = 0; i < op.arguments.size(); i++) {
        const char letter = op.arguments[i];
        if (letter == 'i') {
            key.add(int64_t(stack[i]));
            continue;
        }
        const AtenTensorHandle tensor = tensor_at(letter, stack[i]);
        memory.add(tensor);
        if (tensor)
            add_tensor(key, tensor, memory.starts[memory.size - 1]);
        else
            key.add(-1);
    }
}

/* Whoever is called owns its arguments. */
void release(const Op &op, StableIValue *stack) {
    for (size_t i = 0; i < op.arguments.size(); i++) {
        const char letter = op.arguments[i];
        if (letter == 'i') continue;
        if (const auto tensor = tensor_at(letter, stack[i])) aoti_torch_delete_tensor_object(tensor);
        if (letter == 'O') delete to<StableIValue *>(stack[i]);
    }
}

/* What a process without Python is told. */
std::string not_saved(const Op &op, const StableIValue *stack) {
    std::string sizes;
    if (const auto first = tensor_at(op.arguments[0], stack[0])) {
        int64_t dims = 0, *shape = nullptr;
        check(aoti_torch_get_dim(first, &dims));
        check(aoti_torch_get_sizes(first, &shape));
        for (int64_t i = 0; i < dims; i++) sizes += (i ? ", " : "") + std::to_string(shape[i]);
    }
    return "int4q: no plan is saved of this call of int4q::" + op.name +
           ", whose first argument has shape [" + sizes +
           "]: make the call in Python before int4q.save_plans() writes the file";
}

/* The planner's call, which takes the arguments over. */
void plan(const Op &op, StableIValue *stack, uint64_t n_outputs, const Key *key) {
    if (op.planner.empty()) {
        const std::string text = not_saved(op, stack);
        release(op, stack);
        throw std::runtime_error(text);
    }
    if (pending.key) key = nullptr; /* a part of another call that is being noted */
    const Pending outer = std::exchange(pending, Pending{key, false, std::nullopt});
    const auto error =
        torch_call_dispatcher(op.planner.c_str(), "", stack, TORCH_ABI_VERSION);
    const Pending mine = std::exchange(pending, outer);
    if (error) throw std::runtime_error(op.planner + ", which needs Python, did not run");
    if (mine.failure) {
        for (uint64_t i = 0; i < n_outputs; i++)
            aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[i]));
        throw std::runtime_error(*mine.failure);
    }
    if (key && !mine.kept) table.keep(*key, nullptr);
}

void call(const Op &op, size_t number, StableIValue *stack, uint64_t n_outputs) {
    Key key;
    key.add(int64_t(number));
    Memory memory;
    add_arguments(key, op, stack, memory);
    if (!preference.none || key.full) return plan(op, stack, n_outputs, nullptr);
    KeptPlan found;
    if (!table.find(key, found)) return plan(op, stack, n_outputs, &key);
    if (!found) return plan(op, stack, n_outputs, nullptr);
    std::vector<Handle> made;
    try {
        made = found->run(memory);
    } catch (const Refused &) {
        if (!op.planner.empty()) /* Python's way says why, as torch does */
            return plan(op, stack, n_outputs, nullptr);
        release(op, stack);
        throw;
    } catch (...) {
        release(op, stack);
        throw;
    }
    release(op, stack);
    for (size_t i = 0; i < made.size(); i++)
        stack[i] = torch::stable::detail::from(made[i].release());
}

/* The dispatcher passes nothing that would tell ops apart, so each has a function of its own. */
template <size_t I>
void boxed(StableIValue *stack, uint64_t, uint64_t n_outputs) {
    call(ops[I], I, stack, n_outputs);
}

template <size_t... I>
constexpr auto functions(std::index_sequence<I...>) {
    return std::array{&boxed<I>...};
}
constexpr auto FUNCTIONS = functions(std::make_index_sequence<MAX_OPS>{});

}  // namespace

size_t number_of(const std::string &name) {
    return size_t(std::find_if(ops.begin(), ops.begin() + n_ops,
                               [&](const Op &op) { return op.name == name; }) - ops.begin());
}

size_t number_of_ops() { return n_ops; }

void register_launcher(const char *name, const char *planner, const char *arguments,
                       const char *dispatch_key) {
    const std::string letters = arguments;
    if (n_ops == MAX_OPS || letters.size() > MAX_SLOTS - MAX_MADE)
        throw std::runtime_error("int4q: too many ops or arguments");
    ops[n_ops] = {name, planner, letters};
    open_library(dispatch_key)->impl(name, FUNCTIONS[n_ops]);
    n_ops++;
}

}  // namespace int4q

/* Whether the call that a planner runs is to be noted. */
EXPORT int int4q_core_pending(void) { return int4q::pending.key != nullptr; }

/* The plan of the call that this thread's planner runs. 0, or 1 if it cannot be kept. */
EXPORT int int4q_core_keep(const int64_t *words, int64_t n) try {
    if (!int4q::pending.key || !int4q::driver.launch) return 1;
    int4q::Words all{words, words + n};
    int4q::table.keep(*int4q::pending.key, std::make_shared<const int4q::Plan>(all));
    int4q::pending.kept = true;
    return 0;
} catch (const std::exception &) {
    return 1;
}

/* What this thread's planner gives in place of a result: the text of an error. */
EXPORT void int4q_core_fail(const char *text) { int4q::pending.failure = text; }
