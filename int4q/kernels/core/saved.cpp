/* Plans in a file, for processes without Python. saved.py writes it:
 *
 *     MAGIC, the version of int4q
 *     ops:     their number here, name, arguments, dispatch key, schema of each
 *     modules: a binary each
 *     kernels: the CUfunction in the process that wrote it, its module, its name
 *     plans:   words of the key, words of the plan
 *
 * Everything is 64-bit words; a list begins with its length, a text with its bytes and ends in zeros.
 */
#include <algorithm>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <string_view>

#include "driver.h"
#include "launcher.h"
#include "table.h"

namespace int4q {

namespace {

constexpr int64_t MAGIC = 0x316e616c70713469; /* "i4qplan1" */
constexpr size_t MAX_LIST = size_t(1) << 20;
constexpr size_t MAX_BYTES = size_t(1) << 30;

std::string_view text(Words &words) {
    const size_t bytes = words.count(MAX_BYTES);
    const auto *start = reinterpret_cast<const char *>(words.at);
    const size_t filled = (bytes + 7) / 8;
    if (size_t(words.end - words.at) < filled)
        throw std::runtime_error("int4q: a text ends early");
    words.at += filled;
    return {start, bytes};
}

Words part(Words &words, Handles *handles) {
    const size_t n = words.count(size_t(words.end - words.at) - 1);
    const Words found{words.at, words.at + n, handles};
    words.at += n;
    return found;
}

/* The file's kernels, loaded when the first plan asks for them and kept for good. */
class Modules : public Handles {
    struct Kernel {
        size_t module;
        std::string name;
    };
    std::vector<std::string_view> images;
    std::map<int64_t, Kernel> kernels;
    std::map<int32_t, void *> contexts;
    std::map<std::pair<void *, size_t>, void *> loaded;
    void *current = nullptr;

   public:
    explicit Modules(Words &words) {
        for (size_t n = words.count(MAX_LIST); n--;) images.push_back(text(words));
        for (size_t n = words.count(MAX_LIST); n--;) {
            const int64_t handle = words.next();
            const size_t module = words.count(MAX_LIST);
            images.at(module); /* throws where it is not one of them */
            kernels[handle] = {module, std::string(text(words))};
        }
    }

    void *context(int32_t index) override {
        void *&context = contexts[index];
        if (!context) {
            int device;
            driver.check(driver.device(&device, index), "cuDeviceGet");
            driver.check(driver.retain(&context, device), "cuDevicePrimaryCtxRetain");
        }
        return current = context;
    }

    void *function(int64_t saved, unsigned shared_bytes) override {
        const Kernel &kernel = kernels.at(saved);
        const Context guard(current);
        void *&module = loaded[{current, kernel.module}], *function;
        if (!module)
            driver.check(driver.load(&module, images[kernel.module].data()), "cuModuleLoadData");
        driver.check(driver.function(&function, module, kernel.name.c_str()),
                     "cuModuleGetFunction");
        if (shared_bytes > FREE_SHARED)
            driver.check(driver.set_attribute(function, MAX_DYNAMIC_SHARED, int(shared_bytes)),
                         "cuFuncSetAttribute");
        return function;
    }
};

struct Op {
    int64_t number;
    std::string name, arguments, dispatch_key, schema;

    explicit Op(Words &words)
        : number(words.next()), name(text(words)), arguments(text(words)),
          dispatch_key(text(words)), schema(text(words)) {}

    void define() const {
        open_library(nullptr)->def(schema.c_str());
        register_launcher(name.c_str(), "", arguments.c_str(), dispatch_key.c_str());
    }
};

std::vector<int64_t> read(const char *path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const auto bytes = file.tellg();
    std::vector<int64_t> words(bytes > 0 ? size_t(bytes) / sizeof(int64_t) : 0);
    file.seekg(0).read(reinterpret_cast<char *>(words.data()), std::streamsize(words.size() * 8));
    if (!file) throw std::runtime_error("int4q: cannot read " + std::string(path));
    return words;
}

/* All of the file, or nothing. */
void load(const char *path) {
    const std::vector<int64_t> all = read(path);
    Words words{all.data(), all.data() + all.size()};
    if (words.next() != MAGIC) throw std::runtime_error("int4q: not a file of plans");
    if (const auto version = text(words); version != INT4Q_VERSION)
        throw std::runtime_error("int4q: the plans are of version " + std::string(version) +
                                 ", this is " INT4Q_VERSION ": save them again");
    if (!driver.launch && int4q_core_open("libcuda.so.1", "libtorch_cuda.so"))
        throw std::runtime_error(
            "int4q: plans need libcuda.so.1, and libtorch_cuda.so in the process already");
    std::vector<Op> fresh;
    std::map<int64_t, size_t> numbers;
    for (size_t n = words.count(MAX_LIST); n--;) {
        Op op(words);
        const size_t known = number_of(op.name);
        const bool is_new = known == number_of_ops();
        numbers[op.number] = is_new ? known + fresh.size() : known;
        if (is_new) fresh.push_back(std::move(op));
    }
    Modules modules(words);
    std::vector<std::pair<Key, KeptPlan>> plans;
    for (size_t n = words.count(MAX_LIST); n--;) {
        Words key = part(words, nullptr), plan = part(words, &modules);
        auto &[kind, kept] = plans.emplace_back();
        kind.add(int64_t(numbers.at(key.next())));
        kind.add(key.at, key.end - key.at);
        kept = std::make_shared<const Plan>(plan);
    }
    for (const auto &op : fresh) op.define();
    for (auto &[key, plan] : plans) table.keep(key, std::move(plan));
}

}  // namespace

}  // namespace int4q

/* Take up the plans of a file, before the package whose calls they are is loaded; ops that no Python
 * has defined are defined. Null, or what went wrong, until this thread's next call. */
EXPORT const char *int4q_core_load(const char *path) try {
    static std::mutex one;
    const std::scoped_lock lock(one);
    int4q::load(path);
    return nullptr;
} catch (const std::exception &error) {
    static thread_local std::string text;
    text = error.what();
    return text.c_str();
}

/* All plans as the file has them, behind the CUfunctions in them and the numbers of the ops that
 * have kinds without a plan. The number of words, which are written if there is `room`. */
EXPORT int64_t int4q_core_export(int64_t *out, int64_t room) {
    std::set<int64_t> functions, without;
    std::vector<int64_t> plans;
    int64_t count = 0;
    int4q::table.each([&](const auto &key, const int4q::KeptPlan &plan) {
        if (!plan) {
            without.insert(key[0]);
            return;
        }
        for (const auto &step : plan->steps)
            if (const auto *launch = std::get_if<int4q::Launch>(&step))
                functions.insert(reinterpret_cast<int64_t>(launch->function));
        for (const auto *list : {&key, &plan->words}) {
            plans.push_back(int64_t(list->size()));
            plans.insert(plans.end(), list->begin(), list->end());
        }
        count++;
    });
    std::vector<int64_t> all;
    for (const auto *set : {&functions, &without}) {
        all.push_back(int64_t(set->size()));
        all.insert(all.end(), set->begin(), set->end());
    }
    all.push_back(count);
    all.insert(all.end(), plans.begin(), plans.end());
    if (int64_t(all.size()) <= room) std::copy(all.begin(), all.end(), out);
    return int64_t(all.size());
}
