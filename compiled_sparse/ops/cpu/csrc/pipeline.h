// Two-stage work on a sequence of heads, shared by threads without barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace block_sparse {

// Each head is first prepared, by independent tasks, then used, by independent items. `slots`
// heads have room at a time. A thread that falls behind holds up the others only once they are
// that many heads ahead, where a barrier would at every head.
class Pipeline {
public:
    Pipeline(int64_t heads, int64_t tasks, int64_t items, int64_t slots)
        : tickets_(heads * (tasks + items)), tasks_(tasks), items_(items), slots_(slots),
          progress_(heads) {}

    // Called by every thread. Tickets wait only for earlier ones, which other threads hold and
    // do not let go of before they are done.
    template <class Prepare, class Use>
    void run(Prepare prepare, Use use) {
        for (int64_t ticket; (ticket = next_.fetch_add(1)) < tickets_;) {
            const int64_t head = ticket / (tasks_ + items_), step = ticket % (tasks_ + items_);
            Progress& own = progress_[head];
            if (step < tasks_) {
                if (head >= slots_) wait_for(progress_[head - slots_].used, items_);
                prepare(head, step);
                own.prepared.fetch_add(1, std::memory_order_release);
            } else {
                wait_for(own.prepared, tasks_);
                use(head, step - tasks_);
                own.used.fetch_add(1, std::memory_order_release);
            }
        }
    }

private:
    struct Progress {
        std::atomic<int64_t> prepared{0};
        std::atomic<int64_t> used{0};
    };

    static void wait_for(const std::atomic<int64_t>& count, int64_t target) {
        while (count.load(std::memory_order_acquire) < target) std::this_thread::yield();
    }

    const int64_t tickets_, tasks_, items_, slots_;
    std::atomic<int64_t> next_{0};
    std::vector<Progress> progress_;
};

}  // namespace block_sparse
