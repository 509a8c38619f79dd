/* Plans of GPU work, kept and replayed: the kernels of the ops on a GPU.
 *
 * A plan is what one call of a kind did (launch/plan.py): memory to allocate, kernels to launch, ATen
 * products between them, every address as "slot + offset". A kind is what may tell calls apart:
 * dtypes, shapes, strides, devices and alignment of the tensors, and the other arguments. A call whose
 * kind has a plan allocates, fills in addresses and calls cuLaunchKernelEx. Any other calls the op's
 * planner, which is Python, runs the call there and hands in its plan: int4q_core_keep().
 *
 * Plans never change, and parameters are filled in on the stack, so threads share them freely. What
 * the CUDA driver is asked for is looked up at run time: nothing of CUDA is needed to build this.
 */
#include "core.h"

#include <dlfcn.h>

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace {

using torch::stable::detail::to;

template <typename T>
StableIValue boxed_value(T value) {
    return torch::stable::detail::from(value);
}

constexpr size_t MAX_OPS = 32;
constexpr size_t MAX_PLANS = 2048; /* record.py's */
constexpr size_t MAX_KEY = 160;
constexpr size_t MAX_PARAMETER_BYTES = 4096; /* what every driver takes */
constexpr size_t MAX_PARAMETERS = 64;
constexpr size_t MAX_SLOTS = 16;
constexpr uintptr_t ALIGN = 16; /* that plans count on, of new memory */

void check(AOTITorchError error) {
    if (error) throw std::runtime_error("int4q: torch refused a step of a plan");
}

/* ---------------------------------------------------------------------------------------------
 * The driver
 * ------------------------------------------------------------------------------------------- */

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

constexpr int PROGRAMMATIC_SERIALIZATION = 6;

struct Driver {
    int (*launch)(const LaunchConfig *, void *function, void **parameters, void **extra);
    int (*context)(void **);
    int (*set_context)(void *);
    int (*move_map)(void *map, void *address);
    int (*error_text)(int, const char **);
    AOTITorchError (*stream)(int32_t device, void **);

    void check(int status, const char *what) const {
        if (!status) return;
        const char *text = nullptr;
        error_text(status, &text);
        throw std::runtime_error(std::string("int4q: ") + what + " failed: CUDA driver error " +
                                 std::to_string(status) + " (" + (text ? text : "unknown") + ")");
    }
};

Driver driver{};

/* The plan's context made this thread's current one; a thread new to CUDA has none. */
class Context {
    void *before = nullptr;
    const bool changed;

   public:
    explicit Context(void *wanted)
        : changed((driver.check(driver.context(&before), "cuCtxGetCurrent"), before != wanted)) {
        if (changed) driver.check(driver.set_context(wanted), "cuCtxSetCurrent");
    }
    ~Context() {
        if (changed) driver.set_context(before);
    }
    Context(const Context &) = delete;
    Context &operator=(const Context &) = delete;
};

/* ---------------------------------------------------------------------------------------------
 * Plans
 * ------------------------------------------------------------------------------------------- */

struct Words { /* what Plan.words() of plan.py gives */
    const int64_t *at, *end;

    int64_t next() {
        if (at == end) throw std::runtime_error("int4q: a plan ends early");
        return *at++;
    }
    size_t count(size_t limit) {
        const int64_t n = next();
        if (n < 0 || size_t(n) > limit) throw std::runtime_error("int4q: a plan is too large");
        return size_t(n);
    }
    std::vector<int64_t> list(size_t n) {
        std::vector<int64_t> found(n);
        for (auto &word : found) word = next();
        return found;
    }
};

struct Handle { /* owns a tensor */
    AtenTensorHandle tensor = nullptr;

    Handle() = default;
    Handle(Handle &&other) noexcept : tensor(std::exchange(other.tensor, nullptr)) {}
    Handle &operator=(Handle &&other) noexcept {
        std::swap(tensor, other.tensor);
        return *this;
    }
    ~Handle() {
        if (tensor) aoti_torch_delete_tensor_object(tensor);
    }
    AtenTensorHandle release() { return std::exchange(tensor, nullptr); }
};

struct Device {
    int32_t type, index;
};

struct Sides {
    int32_t dtype;
    std::vector<int64_t> shape, stride;

    explicit Sides(Words &words) : dtype(int32_t(words.next())) {
        const size_t dims = words.count(64);
        shape = words.list(dims);
        stride = words.list(dims);
    }

    /* New memory; nothing where there is none left. */
    Handle allocate(Device device) const {
        Handle out;
        const int64_t dims = int64_t(shape.size());
        if (aoti_torch_empty_strided(dims, shape.data(), stride.data(), dtype, device.type,
                                     device.index, &out.tensor))
            out.tensor = nullptr;
        return out;
    }

    Handle over(char *data, Device device) const {
        Handle out;
        check(aoti_torch_create_tensor_from_blob(data, int64_t(shape.size()), shape.data(),
                                                 stride.data(), 0, dtype, device.type,
                                                 device.index, &out.tensor));
        return out;
    }
};

using Starts = std::array<char *, MAX_SLOTS>;

struct Address {
    size_t slot;
    int64_t offset;

    explicit Address(Words &words) : slot(words.count(MAX_SLOTS - 1)), offset(words.next()) {}
    char *in(const Starts &starts) const { return starts[slot] + offset; }
};

struct Place {
    size_t at; /* byte of the parameters */
    Address address;

    Place(Words &words, size_t bytes) : at(words.count(bytes - 8)), address(words) {}
};

struct Launch {
    void *function;
    unsigned grid[3], block, shared_bytes;
    bool dependent;
    std::vector<int64_t> parameters; /* bytes, by eight */
    std::vector<int64_t> offsets;
    std::vector<Place> pointers, maps;

    explicit Launch(Words &words) : function(reinterpret_cast<void *>(words.next())) {
        for (auto &side : grid) side = unsigned(words.next());
        block = unsigned(words.next());
        shared_bytes = unsigned(words.next());
        dependent = words.next() != 0;
        parameters = words.list(words.count(MAX_PARAMETER_BYTES / 8));
        offsets = words.list(words.count(MAX_PARAMETERS));
        for (auto *places : {&pointers, &maps})
            for (size_t n = words.count(MAX_PARAMETERS); n--;)
                places->emplace_back(words, parameters.size() * 8);
    }

    void run(const Starts &starts, Device, void *stream) const {
        alignas(64) char block_of[MAX_PARAMETER_BYTES];
        std::memcpy(block_of, parameters.data(), parameters.size() * 8);
        for (const auto &place : pointers) {
            const char *address = place.address.in(starts);
            std::memcpy(block_of + place.at, &address, sizeof address);
        }
        for (const auto &place : maps)
            driver.check(driver.move_map(block_of + place.at, place.address.in(starts)),
                         "cuTensorMapReplaceAddress");
        void *each[MAX_PARAMETERS];
        for (size_t i = 0; i < offsets.size(); i++) each[i] = block_of + offsets[i];
        LaunchAttribute attribute{};
        attribute.id = PROGRAMMATIC_SERIALIZATION;
        attribute.value = 1;
        LaunchConfig config{{grid[0], grid[1], grid[2]}, {block, 1, 1}, shared_bytes, stream,
                            dependent ? &attribute : nullptr, dependent ? 1u : 0u};
        driver.check(driver.launch(&config, function, each, nullptr), "cuLaunchKernelEx");
    }
};

struct View {
    Address address;
    Sides sides;

    explicit View(Words &words) : address(words), sides(words) {}
};

/* A call of ATen: OPERATORS of plan.py, by number, the result first. */
struct Operator {
    enum Name { LINEAR, COPY } name;
    std::vector<View> views;

    explicit Operator(Words &words) : name(Name(words.count(COPY))) {
        for (size_t n = words.count(4); n--;) views.emplace_back(words);
        const size_t n = views.size();
        if (name == COPY ? n != 2 : n != 3 && n != 4)
            throw std::runtime_error("int4q: an operand is missing");
    }

    void run(const Starts &starts, Device device, void *) const {
        const auto tensor = [&](size_t i) {
            const View &view = views[i];
            return boxed_value(view.sides.over(view.address.in(starts), device).release());
        };
        StableIValue stack[4];
        if (name == COPY) {
            stack[0] = tensor(0), stack[1] = tensor(1), stack[2] = boxed_value(false);
            check(torch_call_dispatcher("aten::copy_", "", stack, TORCH_ABI_VERSION));
        } else {
            stack[0] = tensor(1), stack[1] = tensor(2);
            stack[2] = views.size() == 4 ? boxed_value(new StableIValue(tensor(3)))
                                         : boxed_value(std::nullopt);
            stack[3] = tensor(0);
            check(torch_call_dispatcher("aten::linear", "out", stack, TORCH_ABI_VERSION));
        }
        aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[0]));
    }
};

struct Plan {
    void *context;
    Device device;
    int64_t scratch_bytes;
    std::vector<Sides> outputs;
    std::vector<std::variant<Launch, Operator>> steps;

    explicit Plan(Words words) : context(reinterpret_cast<void *>(words.next())) {
        const bool cuda = words.next() != 0;
        device = {cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
                  int32_t(words.next())};
        scratch_bytes = words.next();
        for (size_t n = words.count(4); n--;) outputs.emplace_back(words);
        for (size_t n = words.count(64); n--;) {
            if (words.next())
                steps.emplace_back(std::in_place_type<Operator>, words);
            else
                steps.emplace_back(std::in_place_type<Launch>, words);
        }
        if (words.at != words.end) throw std::runtime_error("int4q: a plan is too long");
    }

    /* The results, or none where memory ran out. `starts` has the addresses of the inputs. */
    std::optional<std::vector<Handle>> run(Starts &starts, size_t inputs) const {
        std::vector<Handle> made;
        made.reserve(outputs.size() + 1);
        for (const auto &output : outputs) made.push_back(output.allocate(device));
        if (scratch_bytes) {
            /* From the caching allocator: streams never share it, and a graph keeps its own. */
            const int64_t one = 1;
            Handle scratch;
            if (aoti_torch_empty_strided(1, &scratch_bytes, &one, aoti_torch_dtype_uint8(),
                                         device.type, device.index, &scratch.tensor))
                scratch.tensor = nullptr;
            made.push_back(std::move(scratch));
        }
        for (size_t i = 0; i < made.size(); i++) {
            if (!made[i].tensor) return std::nullopt;
            void *start;
            check(aoti_torch_get_data_ptr(made[i].tensor, &start));
            if (reinterpret_cast<uintptr_t>(start) % ALIGN)
                throw std::runtime_error("int4q: the allocator must align to 16 bytes at least");
            starts[inputs + i] = static_cast<char *>(start);
        }
        if (!steps.empty()) {
            void *stream;
            check(driver.stream(device.index, &stream));
            const Context current(context);
            for (const auto &step : steps)
                std::visit([&](const auto &s) { s.run(starts, device, stream); }, step);
        }
        made.resize(outputs.size());
        return made;
    }
};

/* ---------------------------------------------------------------------------------------------
 * Kinds
 * ------------------------------------------------------------------------------------------- */

struct Key {
    std::array<int64_t, MAX_KEY> words;
    size_t size = 0;
    uint64_t hash = 0x9e3779b97f4a7c15;
    bool full = false;

    void add(int64_t word) {
        if (size == MAX_KEY) {
            full = true;
            return;
        }
        words[size++] = word;
        hash = (hash ^ uint64_t(word)) * 0xff51afd7ed558ccd;
        hash ^= hash >> 32;
    }
    void add(const int64_t *list, int64_t n) {
        for (int64_t i = 0; i < n; i++) add(list[i]);
    }
};

/* Kinds and their plans; a kind of which none can be made has a null one. */
class Table {
    struct Entry {
        std::vector<int64_t> words;
        std::shared_ptr<const Plan> plan;
    };
    mutable std::shared_mutex mutex;
    std::unordered_multimap<uint64_t, Entry> entries;
    std::deque<uint64_t> order; /* the oldest first */

    static bool same(const Entry &entry, const Key &key) {
        return entry.words.size() == key.size &&
               !std::memcmp(entry.words.data(), key.words.data(), key.size * sizeof(int64_t));
    }

   public:
    /* Whether the kind is known, and its plan. */
    bool find(const Key &key, std::shared_ptr<const Plan> &plan) const {
        const std::shared_lock lock(mutex);
        for (auto [it, end] = entries.equal_range(key.hash); it != end; ++it) {
            if (!same(it->second, key)) continue;
            plan = it->second.plan;
            return true;
        }
        return false;
    }

    void keep(const Key &key, std::shared_ptr<const Plan> plan) {
        std::shared_ptr<const Plan> other;
        if (find(key, other)) return;
        const std::unique_lock lock(mutex);
        while (order.size() >= MAX_PLANS) {
            entries.erase(entries.find(order.front()));
            order.pop_front();
        }
        const auto *words = key.words.data();
        entries.emplace(key.hash, Entry{{words, words + key.size}, std::move(plan)});
        order.push_back(key.hash);
    }

    void clear() {
        const std::unique_lock lock(mutex);
        entries.clear();
        order.clear();
    }

    size_t size() const {
        const std::shared_lock lock(mutex);
        return order.size();
    }
};

Table table;

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
    std::string planner, arguments;
};
std::array<Op, MAX_OPS> ops;
size_t n_ops = 0;

AtenTensorHandle tensor_at(char letter, StableIValue value) {
    if (letter == 'T') return to<AtenTensorHandle>(value);
    const auto *box = to<StableIValue *>(value);
    return box ? to<AtenTensorHandle>(*box) : nullptr;
}

char *add_tensor(Key &key, AtenTensorHandle tensor) {
    int32_t dtype, type, index;
    int64_t dims, *shape, *stride;
    void *start;
    check(aoti_torch_get_dtype(tensor, &dtype));
    check(aoti_torch_get_device_type(tensor, &type));
    check(aoti_torch_get_device_index(tensor, &index));
    check(aoti_torch_get_dim(tensor, &dims));
    check(aoti_torch_get_sizes(tensor, &shape));
    check(aoti_torch_get_strides(tensor, &stride));
    check(aoti_torch_get_data_ptr(tensor, &start));
    const int64_t alignment = int64_t(reinterpret_cast<uintptr_t>(start) & 15);
    key.add(dims << 32 | int64_t(dtype) << 16 | int64_t(type) << 8 | alignment);
    key.add(index);
    key.add(shape, dims);
    key.add(stride, dims);
    return static_cast<char *>(start);
}

/* The kind of a call; the addresses of its tensors go into `starts`. */
size_t add_arguments(Key &key, const Op &op, const StableIValue *stack, Starts &starts) {
    size_t inputs = 0;
    for (size_t i = 0; i < op.arguments.size(); i++) {
        const char letter = op.arguments[i];
        if (letter == 'i') {
            key.add(int64_t(stack[i]));
            continue;
        }
        const AtenTensorHandle tensor = tensor_at(letter, stack[i]);
        if (!tensor) key.add(-1);
        starts[inputs++] = tensor ? add_tensor(key, tensor) : nullptr;
    }
    return inputs;
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

/* The planner's call, which takes the arguments over. */
void plan(const Op &op, StableIValue *stack, uint64_t n_outputs, const Key *key) {
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
    Starts starts{};
    const size_t inputs = add_arguments(key, op, stack, starts);
    if (!int4q::preference.none || key.full) return plan(op, stack, n_outputs, nullptr);
    std::shared_ptr<const Plan> found;
    if (!table.find(key, found)) return plan(op, stack, n_outputs, &key);
    if (!found) return plan(op, stack, n_outputs, nullptr);
    std::optional<std::vector<Handle>> made;
    try {
        made = found->run(starts, inputs);
    } catch (...) {
        release(op, stack);
        throw;
    }
    /* Memory ran out: Python's way says so as torch does. */
    if (!made) return plan(op, stack, n_outputs, nullptr);
    release(op, stack);
    for (size_t i = 0; i < made->size(); i++) stack[i] = boxed_value((*made)[i].release());
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

void int4q::register_launcher(const char *name, const char *planner, const char *arguments,
                              const char *dispatch_key) {
    if (n_ops == MAX_OPS) throw std::runtime_error("int4q: too many ops");
    ops[n_ops] = {planner, arguments};
    open_library(dispatch_key)->impl(name, FUNCTIONS[n_ops]);
    n_ops++;
}

/* Open the driver and torch's own CUDA library; "" is one that the process has loaded. 0, or 1 if
 * something is missing. */
EXPORT int int4q_core_open(const char *cuda, const char *torch_cuda) {
    void *const opened = dlopen(cuda, RTLD_NOW);
    void *const streams = dlopen(torch_cuda, RTLD_NOW | RTLD_NOLOAD);
    if (!opened || !streams) return 1;
    const auto find = [](void *library, const char *name, auto &function) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
        return function != nullptr;
    };
    Driver found{};
    const bool all = find(opened, "cuLaunchKernelEx", found.launch) &&
                     find(opened, "cuCtxGetCurrent", found.context) &&
                     find(opened, "cuCtxSetCurrent", found.set_context) &&
                     find(opened, "cuTensorMapReplaceAddress", found.move_map) &&
                     find(opened, "cuGetErrorString", found.error_text) &&
                     find(streams, "aoti_torch_get_current_cuda_stream", found.stream);
    if (all) driver = found;
    return all ? 0 : 1;
}

/* Whether the call that a planner runs is to be noted. */
EXPORT int int4q_core_pending(void) { return pending.key != nullptr; }

/* The plan of the call that this thread's planner runs. 0, or 1 if it cannot be kept. */
EXPORT int int4q_core_keep(const int64_t *words, int64_t n) try {
    if (!pending.key || !driver.launch) return 1;
    table.keep(*pending.key, std::make_shared<const Plan>(Words{words, words + n}));
    pending.kept = true;
    return 0;
} catch (const std::exception &) {
    return 1;
}

/* What this thread's planner gives in place of a result: the text of an error. */
EXPORT void int4q_core_fail(const char *text) { pending.failure = text; }

EXPORT void int4q_core_clear(void) { table.clear(); }

EXPORT int64_t int4q_core_plans(void) { return int64_t(table.size()); }
