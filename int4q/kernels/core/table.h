/* Kinds of calls and their plans.
 *
 * A kind is what may tell calls of an op apart: dtypes, shapes, strides, devices and alignment of
 * the tensors, and the other arguments.
 */
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <shared_mutex>
#include <unordered_map>

#include "plan.h"

namespace int4q {

constexpr size_t MAX_KEY = 160;

struct Key { /* the number of the op first */
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

using KeptPlan = std::shared_ptr<const Plan>; /* null for a kind of which none can be made */

class Table {
    struct Entry {
        std::vector<int64_t> words;
        KeptPlan plan;
    };
    mutable std::shared_mutex mutex;
    std::unordered_multimap<uint64_t, Entry> entries;
    std::deque<uint64_t> order; /* the oldest first */

   public:
    /* Whether the kind is known, and its plan. */
    bool find(const Key &key, KeptPlan &plan) const;
    void keep(const Key &key, KeptPlan plan);
    void clear();
    size_t size() const;
    /* Of every kind. */
    void each(const std::function<void(const std::vector<int64_t> &key, const KeptPlan &)> &) const;
};

extern Table table;

}  // namespace int4q
