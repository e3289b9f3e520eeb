// What Python calls for fine-tuning: one pass over all rows at a time, shared out among threads.
//
// Rows go out in pieces of a fixed size, and sums over rows are added up piece by piece in order: no result depends on
// the number of threads. All functions return 0, 1 when memory ran out, or 2 where there are no such kernels.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "runtime.h"
#include "sharing.h"
#include "training.h"

using namespace burnish;

#if defined(__GNUC__)
#define BURNISH_API extern "C" __attribute__((visibility("default")))
#else
#define BURNISH_API extern "C"
#endif

namespace burnish {

const TrainingKernels* training_named(const char* name) {
  const Kernels* kernels = kernels_named(name);
  if (kernels == nullptr) return nullptr;
  for (const auto table : {amx_training, avx512_bf16_training, avx512_training, avx2_training, generic_training}) {
    if (table() != nullptr && std::strcmp(table()->name, name) == 0) return table();
  }
  return nullptr;
}

}  // namespace burnish

namespace {

// Queries of one forward attention item at most, a multiple of every block of queries.
constexpr int kItemQueries = 512;

int32_t attend(const char* name, const AttentionPass* pass, int threads, bool backward) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  for (int sequence = 0; sequence < pass->num_sequences; ++sequence) {
    if (pass->starts[sequence + 1] < pass->starts[sequence]) return 4;
  }
  try {
    std::vector<AttentionItem> items;
    for (int sequence = 0; sequence < pass->num_sequences; ++sequence) {
      const int begin = pass->starts[sequence], length = pass->starts[sequence + 1] - begin;
      for (int head = 0; head < pass->num_kv_heads; ++head) {
        for (int first = 0; first < length; first += backward ? length : kItemQueries) {
          items.push_back({begin, length, head, first, backward ? length : std::min(length, first + kItemQueries)});
        }
      }
    }
    const auto cost = [](const AttentionItem& item) {
      return static_cast<int64_t>(item.last - item.first) * (item.first + item.last);
    };
    std::stable_sort(items.begin(), items.end(),
                     [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
    std::atomic<bool> failed{false};
    share_out(static_cast<int>(items.size()), threads, [&](int index) {
      char* scratch = scratch_of(kernels->attention_scratch(*pass, items[index].length, backward));
      if (scratch == nullptr) {
        failed = true;
      } else if (backward) {
        kernels->attention_backward(*pass, items[index], scratch);
      } else {
        kernels->attention_forward(*pass, items[index], scratch);
      }
    });
    return failed ? 1 : 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace

BURNISH_API int32_t burnish_norm_forward(const char* name, const NormPass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  return over_rows(pass->rows, pass->width, threads,
                   [&](int first, int last) { kernels->norm_forward(*pass, first, last); });
}

BURNISH_API int32_t burnish_norm_backward(const char* name, const NormPass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  if (pass->grad_weight == nullptr && pass->grad_bias == nullptr) {
    return over_rows(pass->rows, pass->width, threads,
                     [&](int first, int last) { kernels->norm_backward(*pass, first, last, nullptr, nullptr); });
  }
  try {
    const int pieces = (pass->rows + kPieceRows - 1) / kPieceRows;
    const size_t width = (pass->width + kLanes - 1) / kLanes * kLanes;
    const Buffer partial(2 * sizeof(float) * width * pieces);
    share_out(pieces, threads, [&](int piece) {
      float* weight = partial.as<float>() + 2 * width * piece;
      kernels->norm_backward(*pass, piece * kPieceRows, std::min(pass->rows, (piece + 1) * kPieceRows),
                             pass->grad_weight == nullptr ? nullptr : weight,
                             pass->grad_bias == nullptr ? nullptr : weight + width);
    });
    const auto add_up = [&](float* to, size_t from) {
      if (to == nullptr) return;
      for (int j = 0; j < pass->width; ++j) to[j] = 0.0f;
      for (int piece = 0; piece < pieces; ++piece) {
        const float* part = partial.as<float>() + 2 * width * piece + from;
        for (int j = 0; j < pass->width; ++j) to[j] += part[j];
      }
    };
    add_up(pass->grad_weight, 0);
    add_up(pass->grad_bias, width);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

BURNISH_API int32_t burnish_gate_forward(const char* name, const GatePass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  return over_rows(pass->rows, pass->width, threads,
                   [&](int first, int last) { kernels->gate_forward(*pass, first, last); });
}

BURNISH_API int32_t burnish_gate_backward(const char* name, const GatePass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  return over_rows(pass->rows, pass->width, threads,
                   [&](int first, int last) { kernels->gate_backward(*pass, first, last); });
}

BURNISH_API int32_t burnish_rotate(const char* name, const RotatePass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  return over_rows(pass->rows, pass->heads * pass->head_dim, threads,
                   [&](int first, int last) { kernels->rotate(*pass, first, last); });
}

// Returns 3, and does nothing, where a label is not of the vocabulary.
BURNISH_API int32_t burnish_loss(const char* name, const LossPass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  for (int row = 0; row < pass->rows; ++row) {
    const int64_t label = pass->labels[row];
    if (label != -100 && (label < 0 || label >= pass->width)) return 3;
  }
  return over_rows(pass->rows, pass->width, threads, [&](int first, int last) { kernels->loss(*pass, first, last); });
}

BURNISH_API int32_t burnish_dequantize(const char* name, const DequantizePass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  return over_rows(pass->rows, pass->width, threads,
                   [&](int first, int last) { kernels->dequantize(*pass, first, last); });
}

// Attention returns 4, and does nothing, where a sequence ends before it begins.
BURNISH_API int32_t burnish_attention_forward(const char* name, const AttentionPass* pass, int32_t threads) {
  return attend(name, pass, threads, false);
}

BURNISH_API int32_t burnish_attention_backward(const char* name, const AttentionPass* pass, int32_t threads) {
  return attend(name, pass, threads, true);
}

// Sizes of the structs, for the binding to compare with its own.
BURNISH_API int64_t burnish_size_of_pass(int32_t which) {
  const size_t sizes[] = {sizeof(NormPass), sizeof(GatePass), sizeof(RotatePass), sizeof(LossPass),
                          sizeof(AttentionPass), sizeof(DequantizePass), sizeof(GramPass), sizeof(GptqPass)};
  return which >= 0 && which < 8 ? static_cast<int64_t>(sizes[which]) : -1;
}
