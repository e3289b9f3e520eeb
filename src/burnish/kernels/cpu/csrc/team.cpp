#include "team.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace burnish {

namespace {

// Waiting in place costs a core but wakes at once; after this many looks the thread lets others run.
constexpr int kLooks = 4000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

template <typename Done>
bool wait_in_place(Done done) {
  for (int look = 0; look < kLooks; ++look) {
    if (done()) return true;
    pause();
  }
  return done();
}

}  // namespace

Team::Team(int size) : size_(size) {
  for (int thread = 1; thread < size_; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    epoch_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& job) {
  std::lock_guard<std::mutex> one(call_);
  job_ = &job;
  running_.store(size_ - 1, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    epoch_.fetch_add(1, std::memory_order_release);
  }
  if (size_ > 1) wake_.notify_all();
  job(0);
  const auto finished = [this] { return running_.load(std::memory_order_acquire) == 0; };
  while (!wait_in_place(finished)) std::this_thread::yield();
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto called = [this, seen] { return epoch_.load(std::memory_order_acquire) != seen; };
    if (!wait_in_place(called)) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, called);
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stopping_) return;
    (*job_)(thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void Team::barrier() {
  if (size_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    return;
  }
  const auto opened = [this, phase] { return phase_.load(std::memory_order_acquire) != phase; };
  while (!wait_in_place(opened)) std::this_thread::yield();
}

}  // namespace burnish
