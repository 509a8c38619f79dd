#include "plan.h"

#include <cstring>

#include "driver.h"

namespace int4q {

namespace {

constexpr size_t MAX_PARAMETER_BYTES = 4096; /* what every driver takes */
constexpr size_t MAX_PARAMETERS = 64;
constexpr size_t MAX_DIMS = 64, MAX_OUTPUTS = 4, MAX_STEPS = 64;
constexpr uintptr_t ALIGN = 16; /* of new memory, which plans count on */

Device device_of(Words &words) {
    const bool cuda = words.next() != 0;
    return {cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
            int32_t(words.next())};
}

void *context_of(Words &words, Device device) {
    const int64_t handle = words.next();
    return words.handles ? words.handles->context(device.index) : reinterpret_cast<void *>(handle);
}

}  // namespace

void Memory::add(AtenTensorHandle tensor) {
    void *start = nullptr;
    if (tensor) check(aoti_torch_get_data_ptr(tensor, &start));
    starts[size] = static_cast<char *>(start);
    tensors[size++] = tensor;
}

Sides::Sides(Words &words) : dtype(int32_t(words.next())), item_bytes(words.next()) {
    const size_t dims = words.count(MAX_DIMS);
    shape = words.list(dims);
    stride = words.list(dims);
    if (item_bytes <= 0) throw std::runtime_error("int4q: a dtype without a size");
}

Handle Sides::allocate(Device device) const {
    Handle out;
    check(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), stride.data(), dtype,
                                   device.type, device.index, &out.tensor));
    return out;
}

/* ---------------------------------------------------------------------------------------------
 * Steps
 * ------------------------------------------------------------------------------------------- */

Launch::Launch(Words &words) {
    const int64_t handle = words.next();
    for (auto &side : grid) side = unsigned(words.next());
    block = unsigned(words.next());
    shared_bytes = unsigned(words.next());
    function = words.handles ? words.handles->function(handle, shared_bytes)
                             : reinterpret_cast<void *>(handle);
    dependent = words.next() != 0;
    parameters = words.list(words.count(MAX_PARAMETER_BYTES / 8));
    offsets = words.list(words.count(MAX_PARAMETERS));
    for (auto *places : {&pointers, &maps})
        for (size_t n = words.count(MAX_PARAMETERS); n--;)
            places->emplace_back(words, parameters.size() * 8);
}

void Launch::run(const Memory &memory, const Where &where) const {
    alignas(64) char bytes[MAX_PARAMETER_BYTES]; /* 64: tensor maps lie on it */
    std::memcpy(bytes, parameters.data(), parameters.size() * 8);
    for (const auto &place : pointers) {
        const char *address = place.address.in(memory);
        std::memcpy(bytes + place.at, &address, sizeof address);
    }
    for (const auto &place : maps)
        driver.check(driver.move_map(bytes + place.at, place.address.in(memory)),
                     "cuTensorMapReplaceAddress");
    void *each[MAX_PARAMETERS];
    for (size_t i = 0; i < offsets.size(); i++) each[i] = bytes + offsets[i];
    LaunchAttribute attribute{};
    attribute.id = PROGRAMMATIC_SERIALIZATION;
    attribute.value = 1;
    const LaunchConfig config{{grid[0], grid[1], grid[2]}, {block, 1, 1}, shared_bytes,
                              where.stream, &attribute, dependent ? 1u : 0u};
    const Context current(where.context); /* a product may leave another one */
    driver.check(driver.launch(&config, function, each, nullptr), "cuLaunchKernelEx");
}

Handle View::in(const Memory &memory, Device device) const {
    Handle out;
    const AtenTensorHandle base = memory.tensors[address.slot];
    const int64_t dims = int64_t(sides.shape.size());
    int32_t dtype = -1;
    if (base) check(aoti_torch_get_dtype(base, &dtype));
    if (dtype == sides.dtype && address.offset % sides.item_bytes == 0)
        check(aoti_torch__reinterpret_tensor(base, dims, sides.shape.data(), sides.stride.data(),
                                             address.offset / sides.item_bytes, &out.tensor));
    else
        check(aoti_torch_create_tensor_from_blob(address.in(memory), dims, sides.shape.data(),
                                                 sides.stride.data(), 0, sides.dtype, device.type,
                                                 device.index, &out.tensor));
    return out;
}

Operator::Operator(Words &words) : name(Name(words.count(COPY))) {
    for (size_t n = words.count(MAX_OUTPUTS); n--;) views.emplace_back(words);
    const size_t wanted[] = {3, 4, 2};
    if (views.size() != wanted[name]) throw std::runtime_error("int4q: an operand is missing");
}

void Operator::run(const Memory &memory, const Where &where) const {
    std::array<Handle, 4> t;
    for (size_t i = 0; i < views.size(); i++) t[i] = views[i].in(memory, where.device);
    switch (name) {
        case MM: return check(driver.mm(t[0].tensor, t[1].tensor, t[2].tensor));
        case ADDMM:
            return check(
                driver.addmm(t[0].tensor, t[1].tensor, t[2].tensor, t[3].tensor, 1, 1));
        case COPY: return check(aoti_torch_copy_(t[0].tensor, t[1].tensor, 0));
    }
}

/* ---------------------------------------------------------------------------------------------
 * All of them
 * ------------------------------------------------------------------------------------------- */

Plan::Plan(Words &all)
    : words(all.at, all.end),
      device(device_of(all)),
      context(context_of(all, device)),
      scratch(all) {
    for (size_t n = all.count(MAX_OUTPUTS); n--;) outputs.emplace_back(all);
    for (size_t n = all.count(MAX_STEPS); n--;) {
        if (all.next())
            steps.emplace_back(std::in_place_type<Operator>, all);
        else
            steps.emplace_back(std::in_place_type<Launch>, all);
    }
    if (scratch.shape.size() != 1 || all.at != all.end)
        throw std::runtime_error("int4q: a plan is too long");
}

std::vector<Handle> Plan::run(Memory &memory) const {
    std::vector<Handle> made;
    made.reserve(outputs.size() + 1);
    for (const auto &output : outputs) made.push_back(output.allocate(device));
    /* From the caching allocator: streams never share it, and a graph keeps its own. */
    if (scratch.shape[0]) made.push_back(scratch.allocate(device));
    for (const auto &one : made) {
        memory.add(one.tensor);
        if (reinterpret_cast<uintptr_t>(memory.starts[memory.size - 1]) % ALIGN)
            throw std::runtime_error("int4q: the allocator must align to 16 bytes at least");
    }
    if (!steps.empty()) {
        Where where{device, context, nullptr};
        check(driver.stream(device.index, &where.stream));
        for (const auto &step : steps)
            std::visit([&](const auto &s) { s.run(memory, where); }, step);
    }
    made.resize(outputs.size());
    return made;
}

}  // namespace int4q
