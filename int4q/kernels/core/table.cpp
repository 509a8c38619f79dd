#include "table.h"

#include <cstring>
#include <mutex>

namespace int4q {

namespace {

constexpr size_t MAX_PLANS = 2048; /* record.py's */

}  // namespace

Table table;

bool Table::find(const Key &key, KeptPlan &plan) const {
    const std::shared_lock lock(mutex);
    for (auto [it, end] = entries.equal_range(key.hash); it != end; ++it) {
        const Entry &entry = it->second;
        if (entry.words.size() != key.size ||
            std::memcmp(entry.words.data(), key.words.data(), key.size * sizeof(int64_t)))
            continue;
        plan = entry.plan;
        return true;
    }
    return false;
}

void Table::keep(const Key &key, KeptPlan plan) {
    KeptPlan other;
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

void Table::clear() {
    const std::unique_lock lock(mutex);
    entries.clear();
    order.clear();
}

size_t Table::size() const {
    const std::shared_lock lock(mutex);
    return order.size();
}

void Table::each(
    const std::function<void(const std::vector<int64_t> &, const KeptPlan &)> &see) const {
    const std::shared_lock lock(mutex);
    for (const auto &[hash, entry] : entries) see(entry.words, entry.plan);
}

}  // namespace int4q

EXPORT void int4q_core_clear(void) { int4q::table.clear(); }

EXPORT int64_t int4q_core_plans(void) { return int64_t(int4q::table.size()); }
