/* A plan: what one call of a kind does, every address as "slot + offset" (launch/plan.py).
 *
 * Plans never change, and parameters are filled in on the stack, so threads share them freely.
 */
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core.h"

namespace int4q {

constexpr size_t MAX_SLOTS = 16;

/* Torch did not do what it was asked for; mostly, memory ran out. */
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void check(AOTITorchError error) {
    if (error) throw Refused("int4q: torch refused a step of a plan");
}

/* What is another process's own in the plans of a file, as this one has it. */
struct Handles {
    virtual void *context(int32_t device) = 0;
    virtual void *function(int64_t saved, unsigned shared_bytes) = 0;
};

struct Words { /* what Plan.words() of plan.py gives */
    const int64_t *at, *end;
    Handles *handles = nullptr; /* none: they are this process's */

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

/* The memory of a call: the inputs', the outputs', the scratch memory. */
struct Memory {
    std::array<char *, MAX_SLOTS> starts{};
    std::array<AtenTensorHandle, MAX_SLOTS> tensors{};
    size_t size = 0;

    void add(AtenTensorHandle tensor); /* which may be none */
};

struct Where {
    Device device;
    void *context, *stream;
};

struct Sides {
    int32_t dtype;
    int64_t item_bytes;
    std::vector<int64_t> shape, stride;

    explicit Sides(Words &words);
    Handle allocate(Device device) const;
};

struct Address {
    size_t slot;
    int64_t offset;

    explicit Address(Words &words) : slot(words.count(MAX_SLOTS - 1)), offset(words.next()) {}
    char *in(const Memory &memory) const { return memory.starts[slot] + offset; }
};

struct Place { /* of an address among the parameters of a kernel */
    size_t at;
    Address address;

    explicit Place(Words &words, size_t bytes) : at(words.count(bytes - 8)), address(words) {}
};

struct Launch {
    void *function;
    unsigned grid[3], block, shared_bytes;
    bool dependent;
    std::vector<int64_t> parameters; /* their bytes, by eight */
    std::vector<int64_t> offsets;
    std::vector<Place> pointers, maps;

    explicit Launch(Words &words);
    void run(const Memory &memory, const Where &where) const;
};

struct View {
    Address address;
    Sides sides;

    explicit View(Words &words) : address(words), sides(words) {}
    Handle in(const Memory &memory, Device device) const;
};

/* A call of ATen: OPERATORS of plan.py, by number, the result first. */
struct Operator {
    enum Name { MM, ADDMM, COPY } name;
    std::vector<View> views;

    explicit Operator(Words &words);
    void run(const Memory &memory, const Where &where) const;
};

struct Plan {
    std::vector<int64_t> words;
    Device device;
    void *context;
    Sides scratch;
    std::vector<Sides> outputs;
    std::vector<std::variant<Launch, Operator>> steps;

    explicit Plan(Words &words);
    /* The results; `memory` holds the inputs. */
    std::vector<Handle> run(Memory &memory) const;
};

}  // namespace int4q
