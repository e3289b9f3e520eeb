// What Python calls for quantizing; see training_api.cpp for threads and what is returned.
#include <algorithm>
#include <atomic>
#include <exception>

#include "runtime.h"
#include "sharing.h"
#include "training.h"

using namespace burnish;

#if defined(__GNUC__)
#define BURNISH_API extern "C" __attribute__((visibility("default")))
#else
#define BURNISH_API extern "C"
#endif

// Returns 2 where there are no matrix tiles.
BURNISH_API int32_t burnish_gram(const char* name, const GramPass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr || kernels->gram_multiply == nullptr) return 2;
  try {
    const int strips = (pass->width + kGramStrip - 1) / kGramStrip;
    const size_t strip_numbers = static_cast<size_t>(kGramStrip) * kGramRows;
    const Buffer left(sizeof(uint16_t) * strip_numbers * strips), right(sizeof(uint16_t) * strip_numbers * strips);
    for (int first = 0; first < pass->rows; first += kGramRows) {
      const int count = std::min(kGramRows, pass->rows - first);
      // Strips lie as close as their rows let them.
      const size_t whole = static_cast<size_t>(kGramStrip) * ((count + 31) / 32 * 32);
      share_out(strips, threads, [&](int strip) {
        kernels->gram_lay_out(*pass, strip, first, count, left.as<uint16_t>() + strip * whole,
                              right.as<uint16_t>() + strip * whole);
      });
      // The longest first.
      share_out(strips, threads, [&](int index) {
        kernels->gram_multiply(*pass, strips - 1 - index, count, left.as<uint16_t>(), right.as<uint16_t>());
      });
    }
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Returns 5 where a scale is beyond float16; what was written then is of no use.
BURNISH_API int32_t burnish_gptq(const char* name, const GptqPass* pass, int32_t threads) {
  const TrainingKernels* kernels = training_named(name);
  if (kernels == nullptr) return 2;
  try {
    const int rows = kLanes * gptq_panels(*pass);
    std::atomic<int32_t> status{0};
    share_out((pass->rows + rows - 1) / rows, threads, [&](int item) {
      char* scratch = scratch_of(kernels->gptq_scratch(*pass));
      if (scratch == nullptr) {
        status = 1;
      } else if (!kernels->gptq_rows(*pass, item * rows, scratch)) {
        status = 5;
      }
    });
    return status;
  } catch (const std::exception&) {
    return 1;
  }
}
