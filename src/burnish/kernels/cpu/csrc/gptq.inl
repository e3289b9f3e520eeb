// GPTQ's columns one after another, sixteen rows of the weight at once: a row is a lane, and no row looks at another.
// Included once per instruction set, after training_numbers.inl.
//
// Frantar et al., 2022, arXiv:2210.17323, Algorithm 1. Errors of up to kRunColumns columns are kept in registers and
// taken off all columns that follow, before the next ones are rounded.

constexpr int kRunColumns = 16;
constexpr int kTried = 5;             // scales whose errors are summed at once
constexpr float kLeastScale = 5.9604644775390625e-8f;  // the smallest number above zero that float16 holds
constexpr float kMostScale = 65504.0f;

// As float16 holds it, for x from 0 to kMostScale.
BURNISH_INLINE F16 as_half(F16 x) {
  const U16 bits = (U16)x;
  const F16 normal = (F16)((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu);
  return select(x < 6.103515625e-5f, (x + 0.5f) - 0.5f, normal);
}

BURNISH_INLINE F16 storable(F16 scale) { return larger(as_half(scale), splat(kLeastScale)); }

// The smaller one; b where a is NaN.
BURNISH_INLINE F16 smaller_of(F16 a, F16 b) {
#if defined(__AVX512F__)
  return (F16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return smaller(a, b);
#endif
}

// Half to even, for |x| < 2^22; beyond, what is returned is as far off.
BURNISH_INLINE F16 nearest(F16 x) { return (x + kRoundMagic) - kRoundMagic; }

struct RowGrids {
  F16 scale, inverse, zero;
};

// The grids of a group of sixteen rows; false where a scale is beyond float16.
static bool fit_grids(const GptqPass& pass, const float* columns, int count, const float* importance, RowGrids* grids) {
  const float max_int = static_cast<float>(pass.max_int);
  F16 low = {}, high = {};
  for (int i = 0; i < count; ++i) {
    const F16 w = load(columns + i * kLanes);
    low = smaller(low, w);
    high = larger(high, w);
  }
  F16 scale, zero;
  if (pass.symmetric) {
    scale = larger(high, -low) * (2.0f / max_int);
    zero = splat(static_cast<float>((pass.max_int + 1) / 2));
  } else {
    scale = (high - low) / max_int;
    zero = nearest(-low / select(scale > 0.0f, scale, splat(1.0f)));
    // Files store zero - 1 and readers disagree on what -1 wraps to: such a row gives up one level instead.
    const I16 positive = zero < 1.0f;
    scale = select(positive, high / (max_int - 1.0f), scale);
    zero = select(positive, splat(1.0f), zero);
  }
  scale = select(scale > 0.0f, scale, splat(1.0f));
  if (any(scale > kMostScale)) return false;
  F16 best = storable(scale), least = {};
  for (int from = -1; pass.num_shrinks > 0 && from < pass.num_shrinks; from += kTried) {
    F16 tried[kTried], inverse[kTried], error[kTried];
    BURNISH_UNROLL
    for (int k = 0; k < kTried; ++k) {
      const int index = from + k < pass.num_shrinks ? from + k : pass.num_shrinks - 1;
      tried[k] = storable(index < 0 ? scale : scale * pass.shrinks[index]);
      inverse[k] = 1.0f / tried[k];
      error[k] = F16{};
    }
    const F16 bottom = -zero, top = max_int - zero;
    for (int i = 0; i < count; ++i) {
      const F16 w = load(columns + i * kLanes);
      const float weight = importance[i];
      BURNISH_UNROLL
      for (int k = 0; k < kTried; ++k) {
        const F16 place = w * inverse[k];
        const F16 missed = smaller_of(larger_of(nearest(place), bottom), top) - place;
        error[k] += missed * missed * weight;
      }
    }
    for (int k = 0; k < kTried; ++k) {
      const F16 whole = error[k] * tried[k] * tried[k];
      const I16 better = from + k < 0 ? (whole == whole) : whole < least;
      least = select(better, whole, least);
      best = select(better, tried[k], best);
    }
  }
  *grids = {best, 1.0f / best, zero};
  return true;
}

// columns[first .. last - 1] -= their parts of `count` errors; factor: the first error's row.
template <int kCount>
BURNISH_INLINE void take_off(const float* factor, int64_t width, const F16* errors, int count, int first, int last,
                             float* columns) {
  F16 kept[kRunColumns];
  BURNISH_UNROLL
  for (int r = 0; r < kRunColumns; ++r) kept[r] = r < count ? errors[r] : F16{};
  int column = first;
  for (; column + 4 <= last; column += 4) {
    F16 sums[4];
    BURNISH_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = load(columns + (column + i) * kLanes);
    if (kCount == kRunColumns) {
      BURNISH_UNROLL
      for (int r = 0; r < kRunColumns; ++r) {
        const float* row = factor + r * width + column;
        BURNISH_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] -= kept[r] * row[i];
      }
    } else {
      for (int r = 0; r < count; ++r) {
        const float* row = factor + r * width + column;
        for (int i = 0; i < 4; ++i) sums[i] -= errors[r] * row[i];
      }
    }
    BURNISH_UNROLL
    for (int i = 0; i < 4; ++i) store(columns + (column + i) * kLanes, sums[i]);
  }
  for (; column < last; ++column) {
    F16 sum = load(columns + column * kLanes);
    for (int r = 0; r < count; ++r) sum -= errors[r] * factor[r * width + column];
    store(columns + column * kLanes, sum);
  }
}

// Rounds `count` columns of one group, from `first` on, and takes their errors off all that follow.
static void round_run(const GptqPass& pass, const RowGrids& grids, int first, int count, float* columns, uint8_t* ints) {
  const int64_t width = pass.width;
  const float* factor = pass.factor + first * width;
  const F16 most = splat(static_cast<float>(pass.max_int));
  F16 errors[kRunColumns];
  float* run = columns + first * kLanes;
  for (int c = 0; c < count; ++c) {
    const float* row = factor + c * width + first;
    const F16 w = load(run + c * kLanes);
    const F16 level = smaller_of(larger_of(nearest(w * grids.inverse) + grids.zero, F16{}), most);
    errors[c] = (w - (level - grids.zero) * grids.scale) * (1.0f / row[c]);
    const C16 bytes = __builtin_convertvector(__builtin_convertvector(level, I16), C16);
    std::memcpy(ints + c * kLanes, &bytes, kLanes);
    for (int later = c + 1; later < count; ++later) {
      store(run + later * kLanes, load(run + later * kLanes) - errors[c] * row[later]);
    }
  }
  if (count == kRunColumns) {
    take_off<kRunColumns>(factor, width, errors, count, first + count, pass.width, columns);
  } else {
    take_off<0>(factor, width, errors, count, first + count, pass.width, columns);
  }
}

// Bytes of scratch that gptq_panels(pass) panels need.
static size_t gptq_scratch(const GptqPass& pass) {
  return sizeof(float) * kLanes * (pass.width + kRunColumns) * gptq_panels(pass);
}

// Rows from `first` on, gptq_panels(pass) panels of them; false where a scale is beyond float16.
static bool gptq_rows(const GptqPass& pass, int first, char* scratch) {
  const int left = (pass.rows - first + kLanes - 1) / kLanes;
  const int panels = left < gptq_panels(pass) ? left : gptq_panels(pass);
  const int64_t size = static_cast<int64_t>(pass.width) * kLanes;
  const int num_groups = (pass.width + pass.group - 1) / pass.group;
  float* columns = reinterpret_cast<float*>(scratch);
  for (int panel = 0; panel < panels; ++panel) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = first + panel * kLanes + lane;
      float* to = columns + panel * size + lane;
      for (int i = 0; i < pass.width; ++i) to[i * kLanes] = row < pass.rows ? pass.weight[row * pass.weight_stride + i] : 0;
    }
  }
  RowGrids grids[4];
  for (int start = 0, end; start < pass.width; start = end) {
    const int group = start / pass.group, group_end = (group + 1) * pass.group;
    end = start + kRunColumns < group_end ? start + kRunColumns : group_end;
    end = end < pass.width ? end : pass.width;
    for (int panel = 0; panel < panels; ++panel) {
      float* own = columns + panel * size;
      const int row = first + panel * kLanes, rows = pass.rows - row < kLanes ? pass.rows - row : kLanes;
      if (start % pass.group == 0) {
        const int count = (group_end < pass.width ? group_end : pass.width) - start;
        const float* importance = pass.importance == nullptr ? nullptr : pass.importance + start;
        if (!fit_grids(pass, own + start * kLanes, count, importance, &grids[panel])) return false;
        for (int lane = 0; lane < rows; ++lane) {
          const int64_t at = static_cast<int64_t>(row + lane) * num_groups + group;
          pass.scales[at] = grids[panel].scale[lane];
          pass.zeros[at] = static_cast<uint8_t>(grids[panel].zero[lane]);
        }
      }
      uint8_t ints[kRunColumns * kLanes];
      round_run(pass, grids[panel], start, end - start, own, ints);
      for (int lane = 0; lane < rows; ++lane) {
        uint8_t* to = pass.ints + static_cast<int64_t>(row + lane) * pass.width + start;
        for (int c = 0; c < end - start; ++c) to[c] = ints[c * kLanes + lane];
      }
    }
  }
  return true;
}
