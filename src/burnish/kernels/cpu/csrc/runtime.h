// One decoder at work: its buffers, its threads, and the computation of a step.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace burnish {

// Zeroed memory on a cache line's boundary.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* data) const;
  };
  std::unique_ptr<char, Free> data_;
};

class Runtime {
 public:
  // max_tokens: most tokens of a step; max_context: longest sequence; the decoder's memory is the caller's.
  Runtime(const Decoder& decoder, const Kernels& kernels, int max_tokens, int max_context, int threads);

  void run(const Step& step);
  size_t bytes() const { return bytes_; }

 private:
  struct Item {
    int sequence, kv_head, first_row, num_rows;
  };

  Buffer make(size_t bytes);
  void list_items(const Step& step);
  void step_on(const Step& step, int thread);
  void share(int count, int thread, int* first, int* last) const;

  void embed(const Step& step, int row);
  void clear_block(const Step& step, const Layer& layer, int row);
  void before_attention(const Step& step, const Layer& layer, int row, float* scratch);
  void rotate_and_store(const Step& step, const Layer& layer, int index, int row, float* scratch);
  void attend(const Step& step, const Layer& layer, int index, int thread, Scratch scratch);
  void before_mlp(const Step& step, const Layer& layer, int index, int row, float* scratch);
  void inside_mlp(const Step& step, const Layer& layer, int index, int row, float* scratch);
  void join_mlp(const Step& step, const Layer& layer, int index, int row, float* scratch);
  void head(const Step& step, int thread, Scratch scratch);
  void bring_near(const Linear& linear, int thread, int part, int parts, size_t from) const;
  void product(const Linear& linear, int rows, const Output& output, int thread, Scratch scratch);
  void pack(const Linear& linear, const float* x, int64_t stride, int row, float* scratch);
  void adapt(const Step& step, int layer, AdapterPlace place, int row, const float* x, float* y,
             float* scratch) const;
  float* mlp_input(int row) const;

  Decoder decoder_;
  const Kernels& kernels_;
  int max_tokens_, max_context_;
  int hidden_, heads_, qkv_, inner_, raw_;  // strides of the buffers below, in floats
  size_t bytes_ = 0;
  Team team_;
  Buffer x_, normed_, branch_, qkv_rows_, attended_, mlp_, mlp_raw_, packed_, packed_scale_, packed_sums_, best_;
  std::vector<Buffer> scratch_;
  Rows rows_;
  std::vector<Item> items_;
  std::vector<int> sequence_of_;
  std::unique_ptr<std::atomic<int>[]> next_item_;
  bool adapting_ = false;
};

}  // namespace burnish
