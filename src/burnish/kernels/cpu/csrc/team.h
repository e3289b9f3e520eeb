// A fixed team of threads that run one function together and meet at barriers inside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace burnish {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs job(thread) on every thread, the caller being thread 0; returns when all are done. One caller at a time.
  void run(const std::function<void(int)>& job);

  // Called by every thread of a running job: none goes on before all have come.
  void barrier();

 private:
  void work(int thread);

  const int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::mutex mutex_, call_;
  std::condition_variable wake_;
};

}  // namespace burnish
