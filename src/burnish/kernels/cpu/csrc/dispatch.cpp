#include <cstring>

#include "kernels.h"

namespace burnish {

namespace {
const Kernels* (*const kBestFirst[])() = {amx_kernels, avx512_bf16_kernels, avx512_kernels, avx2_kernels,
                                          generic_kernels};
}  // namespace

const Kernels* best_kernels() {
  for (const auto kernels : kBestFirst) {
    if (kernels() != nullptr) return kernels();
  }
  return nullptr;
}

const Kernels* kernels_named(const char* name) {
  for (const auto kernels : kBestFirst) {
    if (kernels() != nullptr && std::strcmp(kernels()->name, name) == 0) return kernels();
  }
  return nullptr;
}

}  // namespace burnish
