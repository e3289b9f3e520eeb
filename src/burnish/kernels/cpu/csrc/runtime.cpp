#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "scalar.h"

namespace burnish {

namespace {

int round_up(int value, int step) { return (value + step - 1) / step * step; }

// Floats from row to row: whole pairs of panels, and a line more, as rows a power of two apart would share cache sets.
int stride_of(int width) { return round_up(width, 2 * kLanes) + kLanes; }

// Query rows that share one pass over the keys.
constexpr int kItemRows = 32;

// Rows of packed activations that stay in a core's second-level cache while the weights stream past.
constexpr size_t kRowsInCache = 1280 << 10;

// Weights of the next product that a thread brings near while it is busy with something else, and the largest step for
// which that is worth it: with more rows the products are not bound by memory.
constexpr size_t kBroughtNear = 256 << 10;
constexpr int kParts = 16;
constexpr int kFewRows = 64;

size_t row_bytes(const Linear& linear) {
  const size_t item = linear.format == kF32 ? 4 : linear.format == kBf16 ? 2 : 1;
  return item * linear.k_padded;
}

}  // namespace

Buffer::Buffer(size_t bytes) {
  const size_t whole = (bytes + 127) / 64 * 64;
  void* data = std::aligned_alloc(64, whole);
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, whole);
  data_.reset(static_cast<char*>(data));
}

void Buffer::Free::operator()(void* data) const { std::free(data); }

Buffer Runtime::make(size_t bytes) {
  bytes_ += bytes;
  return Buffer(bytes);
}

Runtime::Runtime(const Decoder& decoder, const Kernels& kernels, int max_tokens, int max_context, int threads)
    : decoder_(decoder),
      kernels_(kernels),
      max_tokens_(max_tokens),
      max_context_(max_context),
      hidden_(stride_of(decoder.hidden)),
      heads_(stride_of(decoder.num_heads * decoder.head_dim)),
      qkv_(stride_of((decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim)),
      inner_(stride_of(decoder.inner)),
      raw_(stride_of(round_up(decoder.inner, kLanes) * (decoder.gated ? 2 : 1))),
      team_(std::min(threads, kMaxThreads)),
      sequence_of_(max_tokens),
      next_item_(new std::atomic<int>[decoder.num_layers]) {
  const size_t rows = max_tokens + kRowAlign;
  x_ = make(rows * hidden_ * sizeof(float));
  normed_ = make(rows * hidden_ * sizeof(float));
  branch_ = make(rows * hidden_ * sizeof(float));
  qkv_rows_ = make(rows * qkv_ * sizeof(float));
  attended_ = make(rows * heads_ * sizeof(float));
  mlp_ = make(rows * inner_ * sizeof(float));
  if (decoder_.num_adapters > 0) mlp_raw_ = make(rows * raw_ * sizeof(float));
  size_t widest = row_bytes(decoder_.head), groups = decoder_.head.num_groups, most_k = decoder_.head.k_padded;
  const auto measure = [&](const Linear& linear) {
    widest = std::max(widest, row_bytes(linear));
    groups = std::max<size_t>(groups, linear.num_groups);
    most_k = std::max<size_t>(most_k, linear.k_padded);
  };
  int rank = 0;
  for (int index = 0; index < decoder_.num_layers; ++index) {
    const Layer& layer = decoder_.layers[index];
    for (const Linear* linear : {&layer.qkv, &layer.o, &layer.up, &layer.down}) measure(*linear);
  }
  for (int i = 0; i < decoder_.num_adapters * decoder_.num_layers * kNumAdapterPlaces; ++i) {
    rank = std::max(rank, decoder_.adapters[i].rank);
  }
  packed_ = make(rows * widest);
  packed_scale_ = make(rows * sizeof(float));
  packed_sums_ = make(rows * groups * sizeof(int32_t));
  rows_ = {packed_.as<void>(), packed_scale_.as<float>(), packed_sums_.as<int32_t>()};
  best_ = make(team_.size() * rows * sizeof(Best));
  // Attention: queries and scores. Products: two widened panels. Rows: one row in another order, an adapter's ranks.
  const int group = decoder_.num_heads / decoder_.num_kv_heads;
  const size_t query_rows = std::max(kItemRows, group);
  // Twice the scores: weights may stand beside them.
  const size_t attention =
      2 * query_rows * (decoder_.head_dim + round_up(max_context_, kBlockSize) + kBlockSize) * sizeof(float);
  const size_t row_floats = std::max<size_t>(most_k, inner_) + rank;
  const size_t scratch = std::max({attention, 2 * kLanes * most_k, row_floats * sizeof(float)}) + 4096;
  for (int thread = 0; thread < team_.size(); ++thread) scratch_.push_back(make(scratch));
}

void Runtime::share(int count, int thread, int* first, int* last) const {
  *first = static_cast<int>(static_cast<int64_t>(count) * thread / team_.size());
  *last = static_cast<int>(static_cast<int64_t>(count) * (thread + 1) / team_.size());
}

void Runtime::list_items(const Step& step) {
  const int group = decoder_.num_heads / decoder_.num_kv_heads;
  const int tokens = std::max(1, kItemRows / group);
  items_.clear();
  for (int sequence = 0; sequence < step.num_sequences; ++sequence) {
    const int begin = step.row_starts[sequence], end = step.row_starts[sequence + 1];
    for (int row = begin; row < end; ++row) sequence_of_[row] = sequence;
    // Late tokens see more keys: their items go first.
    for (int row = end; row > begin; row -= tokens) {
      const int first = std::max(begin, row - tokens);
      for (int head = 0; head < decoder_.num_kv_heads; ++head) items_.push_back({sequence, head, first, row - first});
    }
  }
}

void Runtime::run(const Step& step) {
  list_items(step);
  for (int layer = 0; layer < decoder_.num_layers; ++layer) next_item_[layer].store(0, std::memory_order_relaxed);
  adapting_ = false;
  for (int sequence = 0; decoder_.num_adapters > 0 && sequence < step.num_sequences; ++sequence) {
    adapting_ = adapting_ || step.adapters[sequence] >= 0;
  }
  team_.run([&](int thread) { step_on(step, thread); });
}

void Runtime::step_on(const Step& step, int thread) {
  const Scratch scratch = {scratch_[thread].as<char>()};
  float* floats = scratch_[thread].as<float>();
  int first, last;
  share(step.num_tokens, thread, &first, &last);
  for (int row = first; row < last; ++row) embed(step, row);
  for (int index = 0; index < decoder_.num_layers; ++index) {
    const Layer& layer = decoder_.layers[index];
    const bool few = step.num_tokens <= kFewRows;
    for (int row = first; row < last; ++row) {
      if (few) bring_near(layer.qkv, thread, row - first, kParts, 0);
      before_attention(step, layer, row, floats);
    }
    team_.barrier();
    product(layer.qkv, step.num_tokens, {kStore, 0, qkv_rows_.as<float>(), qkv_, 0.0f, nullptr}, thread, scratch);
    team_.barrier();
    for (int row = first; row < last; ++row) {
      if (few) bring_near(layer.o, thread, row - first, kParts, 0);
      rotate_and_store(step, layer, index, row, floats);
    }
    team_.barrier();
    attend(step, layer, index, thread, scratch);
    team_.barrier();
    for (int row = first; row < last; ++row) {
      pack(layer.o, attended_.as<float>() + static_cast<size_t>(row) * heads_, heads_, row, floats);
    }
    team_.barrier();
    const bool apart = layer.attention_output_norm.kind != 0;
    float* to = apart ? branch_.as<float>() : x_.as<float>();
    product(layer.o, step.num_tokens, {apart ? kStore : kAdd, 0, to, hidden_, 0.0f, nullptr}, thread, scratch);
    team_.barrier();
    for (int row = first; row < last; ++row) {
      if (few) bring_near(layer.up, thread, row - first, kParts, 0);
      before_mlp(step, layer, index, row, floats);
    }
    team_.barrier();
    Output inner = {decoder_.gated ? kGate : kActivate, decoder_.activation, mlp_.as<float>(), inner_, 0.0f, nullptr};
    if (adapting_) inner = {kStore, 0, mlp_raw_.as<float>(), raw_, 0.0f, nullptr};
    product(layer.up, step.num_tokens, inner, thread, scratch);
    team_.barrier();
    for (int row = first; row < last; ++row) {
      if (few) bring_near(layer.down, thread, row - first, kParts, 0);
      inside_mlp(step, layer, index, row, floats);
    }
    team_.barrier();
    const bool normed = layer.mlp_output_norm.kind != 0;
    to = normed ? branch_.as<float>() : x_.as<float>();
    product(layer.down, step.num_tokens, {normed ? kStore : kAdd, 0, to, hidden_, 0.0f, nullptr}, thread, scratch);
    team_.barrier();
    for (int row = first; row < last; ++row) join_mlp(step, layer, index, row, floats);
  }
  team_.barrier();
  head(step, thread, scratch);
}

void Runtime::embed(const Step& step, int row) {
  const int width = decoder_.hidden;
  const size_t at = static_cast<size_t>(step.tokens[row]) * width;
  float* x = x_.as<float>() + static_cast<size_t>(row) * hidden_;
  if (decoder_.embedding_format == kF32) {
    std::memcpy(x, static_cast<const float*>(decoder_.embedding) + at, sizeof(float) * width);
  } else if (decoder_.embedding_format == kBf16) {
    const uint16_t* from = static_cast<const uint16_t*>(decoder_.embedding) + at;
    for (int j = 0; j < width; ++j) x[j] = bf16_to_float(from[j]);
  } else {
    const int8_t* from = static_cast<const int8_t*>(decoder_.embedding) + at;
    const float scale = decoder_.embedding_row_scale[step.tokens[row]];
    for (int j = 0; j < width; ++j) x[j] = from[j] * scale;
  }
  if (decoder_.embedding_scale != 1.0f) {
    for (int j = 0; j < width; ++j) x[j] *= decoder_.embedding_scale;
  }
  if (decoder_.position_embedding != nullptr) {
    const size_t place = static_cast<size_t>(step.positions[row]) * width;
    kernels_.add(x, decoder_.position_embedding + place, x, width);
  }
  if (decoder_.embedding_norm.kind != 0) kernels_.norm(decoder_.embedding_norm, x, x);
}

void Runtime::pack(const Linear& linear, const float* x, int64_t stride, int row, float* scratch) {
  kernels_.pack_rows(linear, x, stride, row, 1, rows_, scratch);
}

// A token that opens a block clears its values: what an earlier owner left there is weighed with zero, which a NaN
// would survive.
void Runtime::clear_block(const Step& step, const Layer& layer, int row) {
  if (step.positions[row] % kBlockSize != 0) return;
  const int32_t* table = step.block_tables + static_cast<size_t>(sequence_of_[row]) * step.table_width;
  const size_t item = decoder_.kv_format == kF32 ? 4 : decoder_.kv_format == kBf16 ? 2 : 1;
  const size_t bytes = item * round_up(decoder_.head_dim, kLanes) * kBlockSize * decoder_.num_kv_heads;
  std::memset(static_cast<char*>(layer.values) + table[step.positions[row] / kBlockSize] * bytes, 0, bytes);
}

void Runtime::before_attention(const Step& step, const Layer& layer, int row, float* scratch) {
  clear_block(step, layer, row);
  float* x = x_.as<float>() + static_cast<size_t>(row) * hidden_;
  float* normed = normed_.as<float>() + static_cast<size_t>(row) * hidden_;
  kernels_.norm(layer.input_norm, x, normed);
  pack(layer.qkv, normed, hidden_, row, scratch);
  if (decoder_.residual_from_norm) std::memcpy(x, normed, sizeof(float) * decoder_.hidden);
  // In parallel the MLP reads x too, which attention's output is about to join.
  if (decoder_.parallel_residual && !decoder_.shared_norm) {
    kernels_.norm(layer.post_attention_norm, x, mlp_input(row));
  }
}

float* Runtime::mlp_input(int row) const {
  const bool own = decoder_.parallel_residual && !decoder_.shared_norm;
  return (own ? branch_ : normed_).as<float>() + static_cast<size_t>(row) * hidden_;
}

void Runtime::adapt(const Step& step, int layer, AdapterPlace place, int row, const float* x, float* y,
                    float* scratch) const {
  const int which = step.adapters[sequence_of_[row]];
  if (which < 0) return;
  const Adapter& adapter =
      decoder_.adapters[(static_cast<size_t>(which) * decoder_.num_layers + layer) * kNumAdapterPlaces + place];
  if (adapter.rank > 0) kernels_.adapt(adapter, x, y, scratch);
}

void Runtime::rotate_and_store(const Step& step, const Layer& layer, int index, int row, float* scratch) {
  const int dim = decoder_.head_dim, heads = decoder_.num_heads, kv_heads = decoder_.num_kv_heads;
  const int half = decoder_.rotary_dim / 2;
  // Angles come by position from the decoder's tables, or by row with the step.
  const bool by_row = step.rope_cos != nullptr;
  const float* cosines = by_row ? step.rope_cos : decoder_.rope_cos;
  const float* sines = by_row ? step.rope_sin : decoder_.rope_sin;
  if (layer.local_rope) {
    cosines = by_row ? step.local_rope_cos : decoder_.local_rope_cos;
    sines = by_row ? step.local_rope_sin : decoder_.local_rope_sin;
  }
  const size_t item = decoder_.kv_format == kF32 ? 4 : decoder_.kv_format == kBf16 ? 2 : 1;
  const size_t key_bytes = item * dim * kBlockSize, value_bytes = item * round_up(dim, kLanes) * kBlockSize;
  float* q = qkv_rows_.as<float>() + static_cast<size_t>(row) * qkv_;
  float* k = q + static_cast<size_t>(heads) * dim;
  float* v = k + static_cast<size_t>(kv_heads) * dim;
  if (adapting_) {
    const float* normed = normed_.as<float>() + static_cast<size_t>(row) * hidden_;
    adapt(step, index, kAtQ, row, normed, q, scratch);
    adapt(step, index, kAtK, row, normed, k, scratch);
    adapt(step, index, kAtV, row, normed, v, scratch);
  }
  const size_t place = static_cast<size_t>(step.positions[row]);
  const size_t angles = (by_row ? row : place) * half;
  for (int head = 0; head < heads + kv_heads; ++head) {
    float* at = q + static_cast<size_t>(head) * dim;
    const Norm& norm = head < heads ? layer.q_norm : layer.k_norm;
    if (norm.kind != 0) kernels_.norm(norm, at, at);
    if (cosines != nullptr) {
      kernels_.rotate(at, cosines + angles, sines + angles, decoder_.rotary_dim, decoder_.rotary_interleaved != 0);
    }
    if (head < heads) {
      kernels_.scale(at, layer.scale, dim);
    }
  }
  const int sequence = sequence_of_[row];
  const int block = step.block_tables[static_cast<size_t>(sequence) * step.table_width + place / kBlockSize];
  const int within = static_cast<int>(place % kBlockSize);
  for (int head = 0; head < kv_heads; ++head) {
    const size_t slot = static_cast<size_t>(block) * kv_heads + head;
    float* key_scale = layer.key_scale == nullptr ? nullptr : layer.key_scale + slot * kBlockSize;
    float* value_scale = layer.value_scale == nullptr ? nullptr : layer.value_scale + slot * kBlockSize;
    kernels_.store_key(decoder_.kv_format, k + static_cast<size_t>(head) * dim, dim,
                       static_cast<char*>(layer.keys) + slot * key_bytes, key_scale, within);
    kernels_.store_value(decoder_.kv_format, v + static_cast<size_t>(head) * dim, dim,
                         static_cast<char*>(layer.values) + slot * value_bytes, value_scale, within);
  }
}

void Runtime::attend(const Step& step, const Layer& layer, int index, int thread, Scratch scratch) {
  AttentionArgs args = {};
  args.q = qkv_rows_.as<float>();
  args.q_stride = qkv_;
  args.out = attended_.as<float>();
  args.out_stride = heads_;
  args.positions = step.positions;
  args.keys = layer.keys;
  args.values = layer.values;
  args.key_scale = layer.key_scale;
  args.value_scale = layer.value_scale;
  args.num_heads = decoder_.num_heads;
  args.num_kv_heads = decoder_.num_kv_heads;
  args.head_dim = decoder_.head_dim;
  args.window = layer.window;
  args.softcap = decoder_.attention_softcap;
  args.alibi_slopes = decoder_.alibi_slopes;
  args.alibi_scale = decoder_.alibi_scale;
  args.alibi_bfloat16 = decoder_.alibi_bfloat16 != 0;
  const int count = static_cast<int>(items_.size());
  for (int i = next_item_[index].fetch_add(1); i < count; i = next_item_[index].fetch_add(1)) {
    const Item& item = items_[i];
    if (step.num_tokens <= kFewRows) bring_near(layer.o, thread, i, std::max(count, 4 * kParts), kBroughtNear);
    args.table = step.block_tables + static_cast<size_t>(item.sequence) * step.table_width;
    args.kv_head = item.kv_head;
    args.first_row = item.first_row;
    args.num_rows = item.num_rows;
    kernels_.attend(decoder_.kv_format, args, scratch);
  }
}

void Runtime::before_mlp(const Step& step, const Layer& layer, int index, int row, float* scratch) {
  float* x = x_.as<float>() + static_cast<size_t>(row) * hidden_;
  float* normed = normed_.as<float>() + static_cast<size_t>(row) * hidden_;
  float* branch = branch_.as<float>() + static_cast<size_t>(row) * hidden_;
  const bool apart = layer.attention_output_norm.kind != 0;
  if (adapting_) {
    const float* attended = attended_.as<float>() + static_cast<size_t>(row) * heads_;
    adapt(step, index, kAtO, row, attended, apart ? branch : x, scratch);
  }
  if (apart) {
    kernels_.norm(layer.attention_output_norm, branch, branch);
    kernels_.add(x, branch, x, decoder_.hidden);
  }
  if (!decoder_.parallel_residual) {
    kernels_.norm(layer.post_attention_norm, x, normed);
    if (decoder_.residual_from_norm) std::memcpy(x, normed, sizeof(float) * decoder_.hidden);
  }
  pack(layer.up, mlp_input(row), hidden_, row, scratch);
}

void Runtime::inside_mlp(const Step& step, const Layer& layer, int index, int row, float* scratch) {
  float* inner = mlp_.as<float>() + static_cast<size_t>(row) * inner_;
  if (adapting_) {
    const float* normed = mlp_input(row);
    const int stride = raw_;
    float* raw = mlp_raw_.as<float>() + static_cast<size_t>(row) * stride;
    // An adapter's outputs are in plain order, the raw rows hold sixteen gates and sixteen ups in turn.
    if (decoder_.gated) {
      float* plain = scratch;
      for (const AdapterPlace place : {kAtGate, kAtUp}) {
        std::memset(plain, 0, sizeof(float) * decoder_.inner);
        adapt(step, index, place, row, normed, plain, scratch + inner_);
        float* to = raw + (place == kAtUp ? kLanes : 0);
        for (int j = 0; j < decoder_.inner; ++j) to[j / kLanes * 2 * kLanes + j % kLanes] += plain[j];
      }
    } else {
      adapt(step, index, kAtUp, row, normed, raw, scratch);
    }
    kernels_.activate(decoder_.gated != 0, decoder_.activation, raw, inner, round_up(decoder_.inner, kLanes));
  }
  pack(layer.down, inner, inner_, row, scratch);
}

void Runtime::join_mlp(const Step& step, const Layer& layer, int index, int row, float* scratch) {
  const bool apart = layer.mlp_output_norm.kind != 0;
  float* x = x_.as<float>() + static_cast<size_t>(row) * hidden_;
  float* branch = branch_.as<float>() + static_cast<size_t>(row) * hidden_;
  if (adapting_) {
    const float* inner = mlp_.as<float>() + static_cast<size_t>(row) * inner_;
    adapt(step, index, kAtDown, row, inner, apart ? branch : x, scratch);
  }
  if (apart) {
    kernels_.norm(layer.mlp_output_norm, branch, branch);
    kernels_.add(x, branch, x, decoder_.hidden);
  }
}

void Runtime::head(const Step& step, int thread, Scratch scratch) {
  int first, last;
  share(step.num_logits, thread, &first, &last);
  for (int row = first; row < last; ++row) {
    const float* x = x_.as<float>() + static_cast<size_t>(step.logit_rows[row]) * hidden_;
    float* normed = normed_.as<float>() + static_cast<size_t>(row) * hidden_;
    kernels_.norm(decoder_.final_norm, x, normed);
    pack(decoder_.head, normed, hidden_, row, reinterpret_cast<float*>(scratch.data));
  }
  Best* best = best_.as<Best>() + static_cast<size_t>(thread) * (max_tokens_ + kRowAlign);
  for (int row = 0; row < step.num_logits; ++row) best[row] = {0.0f, -1};
  team_.barrier();
  Output output = {kStore, 0, step.logits, decoder_.vocab, decoder_.logit_softcap, best};
  if (step.greedy) output.finish = kArgMax;
  product(decoder_.head, step.num_logits, output, thread, scratch);
  if (!step.greedy) return;
  team_.barrier();
  if (thread != 0) return;
  for (int row = 0; row < step.num_logits; ++row) {
    Best top = best[row];
    for (int other = 1; other < team_.size(); ++other) {
      const Best& found = best_.as<Best>()[static_cast<size_t>(other) * (max_tokens_ + kRowAlign) + row];
      if (top.index == -2 || found.index == -1) continue;
      if (found.index == -2 || top.index == -1 || found.value > top.value) top = found;
    }
    step.ids[row] = top.index < 0 ? -1 : top.index;
  }
}

// Part `part` of `parts` of the first weights of this thread's share, from byte `from` of it on.
void Runtime::bring_near(const Linear& linear, int thread, int part, int parts, size_t from) const {
  if (part >= parts) return;
  int first, last;
  share(linear.num_panels / 2, thread, &first, &last);
  const size_t pair = row_bytes(linear) * 2 * kLanes / (linear.format == kInt4 ? 2 : 1);
  const size_t begin = std::min(from + kBroughtNear * part / parts, pair * (last - first));
  const size_t end = std::min(from + kBroughtNear * (part + 1) / parts, pair * (last - first));
  const char* share_of = static_cast<const char*>(linear.weight) + pair * first;
  for (size_t at = begin; at < end; at += 64) __builtin_prefetch(share_of + at, 0, 2);
}

void Runtime::product(const Linear& linear, int rows, const Output& output, int thread, Scratch scratch) {
  int first, last;
  share(linear.num_panels / 2, thread, &first, &last);
  const size_t bytes = row_bytes(linear);
  const int most = std::max<int>(kRowAlign, static_cast<int>(kRowsInCache / bytes) / kRowAlign * kRowAlign);
  const int at_once = round_up((rows + (rows + most - 1) / most - 1) / std::max(1, (rows + most - 1) / most), kRowAlign);
  for (int row = 0; row < rows; row += at_once) {
    Output part = output;
    if (part.data != nullptr) part.data += row * part.stride;
    if (part.best != nullptr) part.best += row;
    const Rows x = {static_cast<char*>(rows_.data) + row * bytes, rows_.scale + row,
                    rows_.sums + static_cast<size_t>(row) * linear.num_groups};
    kernels_.linear(linear, x, std::min(at_once, rows - row), 2 * first, 2 * last, part, scratch);
  }
}

}  // namespace burnish
