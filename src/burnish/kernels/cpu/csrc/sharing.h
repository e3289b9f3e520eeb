// Sharing out pieces of work among threads, and a thread's own memory.
//
// Pieces have a fixed size, whatever the number of threads: no result depends on it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

namespace burnish {

// Values of a row-wise pass that one thread takes at a time, and the most rows.
constexpr int64_t kPieceValues = 16384;
constexpr int kPieceRows = 64;

// job(piece) for every piece, on up to `threads` threads: those of the OpenMP that torch brought, which would otherwise
// wait for work on the same cores, or else our own. Jobs do not throw.
void share_out(int count, int threads, const std::function<void(int)>& job);

// A thread's memory from call to call, on a cache line's boundary; null where there is none.
char* scratch_of(size_t bytes);

// job(first, last) for all rows; 1 when memory ran out.
template <typename Job>
int32_t over_rows(int rows, int width, int threads, Job job) {
  const int piece = static_cast<int>(std::min<int64_t>(kPieceRows, std::max<int64_t>(1, kPieceValues / std::max(width, 1))));
  try {
    share_out((rows + piece - 1) / piece, threads,
              [&](int index) { job(index * piece, std::min(rows, (index + 1) * piece)); });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace burnish
