#include "sharing.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#include "team.h"
#include "training.h"

namespace burnish {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> openmp{nullptr};

// Teams last as long as the process: joining threads while it ends, or in a fork that has none, would hang.
Team& team_of(int size) {
  static std::mutex mutex;
  static Team* teams[kMaxThreads + 1] = {};
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    std::fill(std::begin(teams), std::end(teams), nullptr);
    owner = getpid();
  }
  if (teams[size] == nullptr) teams[size] = new Team(size);
  return *teams[size];
}

struct Call {
  const std::function<void(int)>& job;
  int count;
  std::atomic<int> next{0};

  void work() {
    for (int piece = next++; piece < count; piece = next++) job(piece);
  }
};

void work_on(void* call) { static_cast<Call*>(call)->work(); }

}  // namespace

void share_out(int count, int threads, const std::function<void(int)>& job) {
  Call call{job, count};
  const int size = std::min({threads, count, kMaxThreads});
  if (size <= 1) return call.work();
  if (const Parallel parallel = openmp.load(std::memory_order_relaxed)) return parallel(work_on, &call, size, 0);
  team_of(std::min(threads, kMaxThreads)).run([&](int) { call.work(); });
}

char* scratch_of(size_t bytes) {
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  static thread_local std::unique_ptr<char, Free> data;
  static thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    data.reset();
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    data.reset(static_cast<char*>(std::aligned_alloc(64, whole)));
    if (data == nullptr) return nullptr;
    size = whole;
  }
  return data.get();
}

}  // namespace burnish

#if defined(__GNUC__)
#define BURNISH_API extern "C" __attribute__((visibility("default")))
#else
#define BURNISH_API extern "C"
#endif

// GOMP_parallel of the OpenMP that this process already runs; null: our own threads.
BURNISH_API void burnish_use_openmp(void* parallel) { burnish::openmp = reinterpret_cast<burnish::Parallel>(parallel); }
