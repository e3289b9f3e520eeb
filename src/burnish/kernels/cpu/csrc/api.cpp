// What Python calls: plain C, no exceptions out, memory owned by the caller except a runtime's own buffers.
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "runtime.h"

using namespace burnish;

#if defined(__GNUC__)
#define BURNISH_API extern "C" __attribute__((visibility("default")))
#else
#define BURNISH_API extern "C"
#endif

namespace {

const Kernels* find(const char* name) { return name == nullptr || *name == 0 ? best_kernels() : kernels_named(name); }

}  // namespace

BURNISH_API int32_t burnish_abi() { return kAbiVersion; }

// Sizes of the structs, for the binding to compare with its own.
BURNISH_API int64_t burnish_size_of(int32_t which) {
  const size_t sizes[] = {sizeof(Linear), sizeof(Norm), sizeof(Adapter), sizeof(Layer), sizeof(Decoder), sizeof(Step)};
  return which >= 0 && which < 6 ? static_cast<int64_t>(sizes[which]) : -1;
}

// The name of the instruction set that `name` (null: the best) gives here; null where it does not run.
BURNISH_API const char* burnish_kernels(const char* name) {
  const Kernels* kernels = find(name);
  return kernels == nullptr ? nullptr : kernels->name;
}

// Null: no such kernels, or no memory.
BURNISH_API void* burnish_create(const Decoder* decoder, const char* name, int32_t max_tokens, int32_t max_context,
                                 int32_t threads) {
  const Kernels* kernels = find(name);
  if (kernels == nullptr) return nullptr;
  try {
    return new Runtime(*decoder, *kernels, max_tokens, max_context, threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}

BURNISH_API int64_t burnish_bytes(const void* runtime) { return static_cast<const Runtime*>(runtime)->bytes(); }

// 0, or 1 when memory ran out.
BURNISH_API int32_t burnish_run(void* runtime, const Step* step) {
  try {
    static_cast<Runtime*>(runtime)->run(*step);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

BURNISH_API void burnish_destroy(void* runtime) { delete static_cast<Runtime*>(runtime); }

BURNISH_API void burnish_pack_f32(const float* w, int32_t n, int32_t k, int64_t stride, int32_t k_padded, float* to) {
  pack_f32(w, n, k, stride, k_padded, to);
}

BURNISH_API void burnish_pack_bf16(const uint16_t* w, int32_t n, int32_t k, int64_t stride, int32_t k_padded,
                                   uint16_t* to) {
  pack_bf16(w, n, k, stride, k_padded, to);
}

BURNISH_API void burnish_pack_bytes(const uint8_t* w, int32_t n, int32_t k, int64_t stride, int32_t k_padded,
                                    int32_t offset, uint8_t* to) {
  pack_bytes(w, n, k, stride, k_padded, offset, to);
}

BURNISH_API void burnish_pack_nibbles(const uint8_t* w, int32_t n, int32_t k, int64_t stride, int32_t k_padded,
                                      uint8_t* to) {
  pack_nibbles(w, n, k, stride, k_padded, to);
}

// ---- single kernels, for tests and measurements ---------------------------------------------------------------------

// out[m][n] for `rows` rows of x; finish, activation and softcap as in Output. best is used for kArgMax only.
BURNISH_API int32_t burnish_linear(const char* name, const Linear* linear, const float* x, int64_t x_stride,
                                   int32_t rows, int32_t finish, int32_t activation, float softcap, float* out,
                                   int64_t out_stride, int64_t* best) {
  const Kernels* kernels = find(name);
  if (kernels == nullptr) return 2;
  try {
    const size_t padded = rows + kRowAlign;
    const Buffer data(padded * linear->k_padded * sizeof(float)), scale(padded * sizeof(float));
    const Buffer sums(padded * linear->num_groups * sizeof(int32_t)), scratch(2u * kLanes * linear->k_padded + 4096u);
    const Buffer order(linear->k_padded * sizeof(float));
    const Rows packed = {data.as<void>(), scale.as<float>(), sums.as<int32_t>()};
    std::vector<Best> top(rows, Best{0.0f, -1});
    kernels->pack_rows(*linear, x, x_stride, 0, rows, packed, order.as<float>());
    const Output output = {finish, activation, out, out_stride, softcap, top.data()};
    kernels->linear(*linear, packed, rows, 0, linear->num_panels, output, {scratch.as<char>()});
    if (finish == kArgMax) {
      for (int row = 0; row < rows; ++row) best[row] = top[row].index < 0 ? -1 : top[row].index;
    }
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

BURNISH_API int32_t burnish_norm(const char* name, const Norm* norm, const float* x, float* out, int32_t rows) {
  const Kernels* kernels = find(name);
  if (kernels == nullptr) return 2;
  for (int row = 0; row < rows; ++row) kernels->norm(*norm, x + row * norm->width, out + row * norm->width);
  return 0;
}

BURNISH_API int32_t burnish_activate(const char* name, int32_t gated, int32_t activation, const float* raw, float* out,
                                     int32_t width) {
  const Kernels* kernels = find(name);
  if (kernels == nullptr) return 2;
  kernels->activate(gated != 0, activation, raw, out, width);
  return 0;
}
