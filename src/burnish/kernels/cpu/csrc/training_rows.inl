// What fine-tuning does row by row: norms, activations, rotation, the loss. Included once per instruction set, after
// training_numbers.inl.

// ---- norms ---------------------------------------------------------------------------------------------------------

template <typename T, typename W>
static void norm_forward_with(const NormPass& pass, int first, int last) {
  const int width = pass.width;
  const W* weight = static_cast<const W*>(pass.weight);
  const W* bias = static_cast<const W*>(pass.bias);
  const bool layer = pass.kind == 2;
  const bool rounds = !layer && pass.offset == 0.0f;
  for (int row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(pass.x) + row * pass.x_stride;
    T* y = static_cast<T*>(pass.y) + row * pass.y_stride;
    float* stats = pass.stats + 2 * static_cast<int64_t>(row);
    if (!pass.again) {
      F16 total = {}, squares = {};
      float mean = 0.0f;
      if (layer) {
        for (int j = 0; j < width; j += kLanes) total += get(x + j, width - j);
        mean = total_of(total) / width;
      }
      for (int j = 0; j < width; j += kLanes) {
        const F16 centred = keep(get(x + j, width - j) - mean, width - j);
        squares += centred * centred;
      }
      stats[0] = mean;
      stats[1] = 1.0f / std::sqrt(total_of(squares) / width + pass.eps);
    }
    const float mean = stats[0], factor = stats[1];
    for (int j = 0; j < width; j += kLanes) {
      const int count = width - j;
      F16 normed = (get(x + j, count) - mean) * factor;
      if (rounds) normed = rounded<T>(normed);
      normed *= get(weight + j, count) + pass.offset;
      if (bias != nullptr) normed += get(bias + j, count);
      put(y + j, normed, count);
    }
  }
}

template <typename T, typename W>
static void norm_backward_with(const NormPass& pass, int first, int last, float* grad_weight, float* grad_bias) {
  const int width = pass.width;
  const W* weight = static_cast<const W*>(pass.weight);
  const bool layer = pass.kind == 2;
  for (int row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(pass.x) + row * pass.x_stride;
    const T* grad_y = static_cast<const T*>(pass.y) + row * pass.y_stride;
    const T* residual = static_cast<const T*>(pass.residual);
    if (residual != nullptr) residual += row * pass.residual_stride;
    T* grad_x = static_cast<T*>(pass.grad_x) + row * pass.grad_x_stride;
    const float mean = pass.stats[2 * static_cast<int64_t>(row)];
    const float factor = pass.stats[2 * static_cast<int64_t>(row) + 1];
    F16 total = {}, product = {};
    for (int j = 0; j < width; j += kLanes) {
      const int count = width - j;
      const F16 normed = (get(x + j, count) - mean) * factor, coming = get(grad_y + j, count);
      const F16 grad = coming * (get(weight + j, count) + pass.offset);
      total += grad;
      product += keep(grad * normed, count);
      if (grad_weight != nullptr) store(grad_weight + j, load(grad_weight + j) + coming * rounded<T>(normed));
      if (grad_bias != nullptr) store(grad_bias + j, load(grad_bias + j) + coming);
    }
    const float mean_product = total_of(product) / width;
    const float mean_grad = layer ? total_of(total) / width : 0.0f;
    for (int j = 0; j < width; j += kLanes) {
      const int count = width - j;
      const F16 normed = (get(x + j, count) - mean) * factor;
      const F16 grad = get(grad_y + j, count) * (get(weight + j, count) + pass.offset);
      F16 out = (grad - mean_grad - normed * mean_product) * factor;
      if (residual != nullptr) out += get(residual + j, count);
      put(grad_x + j, out, count);
    }
  }
}

static void norm_forward(const NormPass& pass, int first, int last) {
  if (pass.format == kF32) {
    if (pass.weight_format == kF32) return norm_forward_with<float, float>(pass, first, last);
    return norm_forward_with<float, uint16_t>(pass, first, last);
  }
  if (pass.weight_format == kF32) return norm_forward_with<uint16_t, float>(pass, first, last);
  norm_forward_with<uint16_t, uint16_t>(pass, first, last);
}

static void norm_backward(const NormPass& pass, int first, int last, float* grad_weight, float* grad_bias) {
  if (pass.format == kF32) {
    if (pass.weight_format == kF32) return norm_backward_with<float, float>(pass, first, last, grad_weight, grad_bias);
    return norm_backward_with<float, uint16_t>(pass, first, last, grad_weight, grad_bias);
  }
  if (pass.weight_format == kF32) return norm_backward_with<uint16_t, float>(pass, first, last, grad_weight, grad_bias);
  norm_backward_with<uint16_t, uint16_t>(pass, first, last, grad_weight, grad_bias);
}

// ---- activations ---------------------------------------------------------------------------------------------------

template <typename T, int A>
static void gate_rows(const GatePass& pass, int first, int last, bool backward) {
  const auto at = [](const void* data, int64_t stride, int row) {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + row * stride;
  };
  for (int row = first; row < last; ++row) {
    const T* gate = at(pass.gate, pass.gate_stride, row);
    const T* up = at(pass.up, pass.up_stride, row);
    const T* grad = at(pass.grad, pass.grad_stride, row);
    T* product = const_cast<T*>(at(pass.product, pass.product_stride, row));
    T* grad_gate = const_cast<T*>(at(pass.grad_gate, pass.grad_gate_stride, row));
    T* grad_up = const_cast<T*>(at(pass.grad_up, pass.grad_up_stride, row));
    for (int j = 0; j < pass.width; j += kLanes) {
      const int count = pass.width - j;
      const F16 x = get(gate + j, count);
      const F16 other = up == nullptr ? splat(1.0f) : get(up + j, count);
      if (!backward) {
        put(product + j, activate(A, x) * other, count);
        continue;
      }
      const F16 coming = get(grad + j, count);
      F16 value, slope;
      derive<A>(x, &value, &slope);
      if (product != nullptr) put(product + j, value * other, count);
      put(grad_gate + j, coming * other * slope, count);
      if (grad_up != nullptr) put(grad_up + j, coming * value, count);
    }
  }
}

template <typename T>
static void gate_with(const GatePass& pass, int first, int last, bool backward) {
  switch (pass.activation) {
    case kSilu:
      return gate_rows<T, kSilu>(pass, first, last, backward);
    case kGelu:
      return gate_rows<T, kGelu>(pass, first, last, backward);
    case kGeluTanh:
      return gate_rows<T, kGeluTanh>(pass, first, last, backward);
    case kRelu:
      return gate_rows<T, kRelu>(pass, first, last, backward);
    case kQuickGelu:
      return gate_rows<T, kQuickGelu>(pass, first, last, backward);
    default:
      return gate_rows<T, kIdentity>(pass, first, last, backward);
  }
}

static void gate_forward(const GatePass& pass, int first, int last) {
  if (pass.format == kF32) return gate_with<float>(pass, first, last, false);
  gate_with<uint16_t>(pass, first, last, false);
}

static void gate_backward(const GatePass& pass, int first, int last) {
  if (pass.format == kF32) return gate_with<float>(pass, first, last, true);
  gate_with<uint16_t>(pass, first, last, true);
}

// ---- rotation ------------------------------------------------------------------------------------------------------

template <typename T>
static void rotate_with(const RotatePass& pass, int first, int last) {
  const int pairs = pass.pairs;
  const float sign = pass.inverse ? -1.0f : 1.0f;
  for (int row = first; row < last; ++row) {
    const float* cos = pass.cos + static_cast<int64_t>(row) * pairs;
    const float* sin = pass.sin + static_cast<int64_t>(row) * pairs;
    for (int head = 0; head < pass.heads; ++head) {
      T* x = static_cast<T*>(pass.x) + row * pass.stride + static_cast<int64_t>(head) * pass.head_dim;
      if (pass.interleaved) {
        for (int j = 0; j < pairs; ++j) {
          const float a = as_float(x[2 * j]), b = as_float(x[2 * j + 1]), s = sin[j] * sign;
          set(x + 2 * j, a * cos[j] - b * s);
          set(x + 2 * j + 1, b * cos[j] + a * s);
        }
        continue;
      }
      for (int j = 0; j < pairs; j += kLanes) {
        const int count = pairs - j;
        const F16 a = get(x + j, count), b = get(x + pairs + j, count);
        const F16 c = get(cos + j, count), s = get(sin + j, count) * sign;
        put(x + j, a * c - b * s, count);
        put(x + pairs + j, b * c + a * s, count);
      }
    }
  }
}

static void rotate(const RotatePass& pass, int first, int last) {
  if (pass.format == kF32) return rotate_with<float>(pass, first, last);
  rotate_with<uint16_t>(pass, first, last);
}

// ---- loss ----------------------------------------------------------------------------------------------------------

template <typename T, bool Capped>
static void loss_with(const LossPass& pass, int first, int last) {
  const int width = pass.width, whole = width / kLanes * kLanes;
  const float cap = pass.softcap, inverse_cap = Capped ? 1.0f / cap : 0.0f;
  const float lowest = bits_to_float(0xff800000u);
  const auto capped = [&](F16 x) { return Capped ? tanh_of(x * inverse_cap) * cap : x; };
  for (int row = first; row < last; ++row) {
    T* logits = static_cast<T*>(pass.logits) + static_cast<int64_t>(row) * width;
    const int64_t label = pass.labels[row];
    pass.losses[row] = 0.0f;
    if (label < 0) {
      if (pass.with_grad) std::memset(logits, 0, sizeof(T) * width);
      continue;
    }
    // What stands behind the last whole sixteen.
    F16 rest = splat(lowest);
    for (int lane = 0; lane < width - whole; ++lane) rest[lane] = as_float(logits[whole + lane]);
    // NaN is passed over here and comes back with the sum.
    F16 peak = larger(rest, splat(lowest));
    for (int j = 0; j < whole; j += kLanes) peak = larger_of(get(logits + j), peak);
    peak = capped(peak);
    const float top = peak_of(peak);
    F16 total = width > whole ? keep(exp_below(capped(rest) - top), width - whole) : F16{};
    for (int j = 0; j < whole; j += kLanes) total += exp_below(capped(get(logits + j)) - top);
    const float lse = top + std::log(total_of(total));
    const float right = capped(splat(as_float(logits[label])))[0];
    pass.losses[row] = lse - right;
    if (!pass.with_grad) continue;
    const auto gradient = [&](F16 x) {
      const F16 y = capped(x);
      F16 grad = exp_below(y - lse) * pass.grad_scale;
      if (Capped) {
        const F16 t = y * inverse_cap;
        grad *= 1.0f - t * t;
      }
      return grad;
    };
    const F16 own = splat(as_float(logits[label]));
    float at_label = gradient(own)[0];
    const float t = Capped ? right * inverse_cap : 0.0f;
    at_label -= pass.grad_scale * (1.0f - t * t);
    if (lse - right != lse - right) at_label = lse - right;
    for (int j = 0; j < whole; j += kLanes) put(logits + j, gradient(get(logits + j)));
    if (width > whole) put(logits + whole, gradient(rest), width - whole);
    set(logits + label, at_label);
  }
}

static void loss(const LossPass& pass, int first, int last) {
  if (pass.format == kF32) {
    if (pass.softcap != 0.0f) return loss_with<float, true>(pass, first, last);
    return loss_with<float, false>(pass, first, last);
  }
  if (pass.softcap != 0.0f) return loss_with<uint16_t, true>(pass, first, last);
  loss_with<uint16_t, false>(pass, first, last);
}
