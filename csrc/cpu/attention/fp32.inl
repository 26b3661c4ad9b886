// Attention over bf16 or e4m3 pages in fp32. Included once for each instruction set, which defines: the target
// GROK_FP32, GROK_FP32_NAME, which puts its name behind that of a function, the register type Vec of kWidth floats, what
// is done with it, how many of them a step uses (kRowsAtOnce, score_vectors, value_pairs), and for blocks of keys and
// values the functions transpose_bf16 and load_e4m3.
//
// Keys are transposed as numbers of 16 bits and widened in the inner loops: a block of fp32 keys would fill the L1
// cache. bf16 pages hold such numbers; e4m3 codes become fp16 numbers of 2⁻⁸ times their value, exactly, by shifts of
// their bits, and the scales of their rows take 2⁸.
//
// A row of the sums over bf16 values holds, of every 2 · kWidth columns, the even ones and then the odd ones, as a
// register of bf16 widens.

// w.keys: 4 · kBlock bytes for each pair of columns.
template <int rows, bool half>
GROK_FP32 __attribute__((noinline)) void GROK_FP32_NAME(scores)(Workspace& w, const float* q, int64_t width) {
  constexpr int kVectors = score_vectors(rows), kKeys = kWidth * kVectors;
  constexpr int kSteps = 16, kAhead = std::max<int>(1, kKeys * kScoresAhead / kSteps / kBlock);  // width: 32 times a number
  const int64_t pairs = width / (2 * kSteps);
  const bool ahead = w.ahead < 2 * kBlock;
  for (int64_t at = 0; at < kBlock; at += kKeys) {
    Vec sums[rows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
    }
    const char* k = reinterpret_cast<const char*>(w.keys) + (half ? 2 : 4) * at;
    const float* x = q;
    for (int step = 0; step < kSteps; ++step) {
      for (int64_t i = 0; i < pairs; ++i, k += 4 * kBlock, x += 2 * kRowsAtOnce) {
        if (ahead) {
          for (int64_t n = i; n < kAhead; n += pairs) prefetch_rows(w, 1);
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          Vec key[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (half) {
              key[v] = widen_half(k + 2 * kBlock * odd + 2 * kWidth * v);
            } else {
              key[v] = odd ? high_bf16(k + 4 * kWidth * v) : low_bf16(k + 4 * kWidth * v);
            }
          }
#pragma GCC unroll 12
          for (int r = 0; r < rows; ++r) {
            const Vec value = splat(x + kRowsAtOnce * odd + r);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product(sums[r][v], value, key[v]);
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(w.scores + r * kBlock + at + kWidth * v, sums[r][v]);
    }
  }
}

// Of 2 · kWidth · kPairs columns.
template <int rows, bool half, int kPairs>
GROK_FP32 __attribute__((noinline)) void GROK_FP32_NAME(accumulate)(Workspace& w, int64_t column, int64_t from,
                                                                    int64_t to, float* out, int64_t width) {
  constexpr int kVectors = 2 * kPairs;
  Vec sums[rows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    const Vec keep = splat(w.keep + r);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = multiply(load(out + r * width + column + kWidth * v), keep);
    }
  }
  const char* staged = reinterpret_cast<const char*>(w.values) + 2 * column;
  const int64_t passes = width / (2 * kWidth * kPairs);  // over the block's values
  int64_t wait = passes;
  const bool ahead = w.ahead < 2 * kBlock;
  for (int64_t j = from; j < to; ++j) {
    if (ahead && --wait == 0) prefetch_rows(w, 1), wait = passes;
    const char* row = half ? staged + 2 * j * width : static_cast<const char*>(w.block->v[j]) + 2 * column;
    Vec value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      const char* pair = row + 4 * kWidth * v;
      value[2 * v] = half ? widen_half(pair) : low_bf16(pair);
      value[2 * v + 1] = half ? widen_half(pair + 2 * kWidth) : high_bf16(pair);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vec weight = splat(w.scores + r * kBlock + j);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product(sums[r][v], weight, value[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * width + column + kWidth * v, sums[r][v]);
  }
}

template <int rows, bool half>
GROK_FP32 void GROK_FP32_NAME(accumulate)(Workspace& w, int64_t from, int64_t to, float* out, int64_t width) {
  constexpr int kPairs = value_pairs(rows), kColumns = 2 * kWidth * kPairs;
  int64_t column = 0;
  for (; column + kColumns <= width; column += kColumns) {
    GROK_FP32_NAME(accumulate)<rows, half, kPairs>(w, column, from, to, out, width);
  }
  for (; column < width; column += 32) {  // width is a multiple of 32
    GROK_FP32_NAME(accumulate)<rows, half, 16 / kWidth>(w, column, from, to, out, width);
  }
}

template <bool half>
struct GROK_FP32_NAME(Fp32) {
  static constexpr bool kFused = true;
  static constexpr int64_t kRows = kRowsAtOnce;

  GROK_FP32 static float fold_max(const float* m) {
    const __m256 a = _mm256_max_ps(_mm256_loadu_ps(m + 8), _mm256_loadu_ps(m));
    const __m128 b = _mm_max_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));
    const __m128 c = _mm_max_ps(_mm_movehl_ps(b, b), b);
    return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(c), c));
  }
  GROK_FP32 static float fold_sum(const float* m) {
    const __m256 a = _mm256_add_ps(_mm256_loadu_ps(m), _mm256_loadu_ps(m + 8));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }

  // Column c of row r of kRows is number c · kRows + r.
  GROK_INLINE static void load_query(const PagedAttention& p, const void* q, float* queries, int64_t r) {
    const int64_t width = padded(p.head_size);
    float* y = queries + r / kRows * kRows * width + r % kRows;
    for (int64_t c = 0; c < p.head_size; ++c) {
      const bool f32 = p.q_type == DType::f32;
      y[c * kRows] = f32 ? static_cast<const float*>(q)[c] : to_float(static_cast<const BF16*>(q)[c]);
    }
    for (int64_t c = p.head_size; c < width; ++c) y[c * kRows] = 0.0f;
  }

  GROK_INLINE static void load_block(const PagedAttention& p, Workspace& w) {
    const int64_t width = padded(p.head_size), bytes = p.head_size * w.element;
    if (width != p.head_size) {
      char* k = reinterpret_cast<char*>(w.staged);
      char* v = k + kBlock * width * w.element;
      for (int64_t j = 0; j < kBlock; ++j, k += width * w.element, v += width * w.element) {
        std::memcpy(k, w.block->k[j], bytes);
        std::memset(k + bytes, 0, width * w.element - bytes);
        std::memcpy(v, w.block->v[j], bytes);
        std::memset(v + bytes, 0, width * w.element - bytes);
        w.block->k[j] = k;
        w.block->v[j] = v;
      }
    }
    char* keys = reinterpret_cast<char*>(w.keys);
    if constexpr (half) {
      uint16_t* values = reinterpret_cast<uint16_t*>(w.values);
      load_e4m3(w, width, keys, values);
      for (int64_t j = 0; j < kBlock; ++j) w.block->k_scale[j] *= 256.0f, w.block->v_scale[j] *= 256.0f;
    } else {
      transpose_bf16(w, width, keys);
    }
  }

  template <int64_t rows>
  GROK_INLINE static void scores_of(Workspace& w, int64_t row, int64_t count, int64_t width) {
    if constexpr (rows > 1) {
      if (count < rows) return scores_of<rows - 1>(w, row, count, width);
    }
    GROK_FP32_NAME(scores)<rows, half>(w, w.queries + row * width, width);
  }
  GROK_INLINE static void scores(Workspace& w, int64_t row, int64_t rows, int64_t width) {
    scores_of<kRows>(w, row, rows, width);
  }

  template <int64_t rows>
  GROK_INLINE static void accumulate_of(Workspace& w, int64_t count, int64_t from, int64_t to,
                                        float* out, int64_t width) {
    if constexpr (rows > 1) {
      if (count < rows) return accumulate_of<rows - 1>(w, count, from, to, out, width);
    }
    GROK_FP32_NAME(accumulate)<rows, half>(w, from, to, out, width);
  }
  GROK_INLINE static void accumulate(Workspace& w, int64_t /*row*/, int64_t rows, int64_t from, int64_t to,
                                     float* out, int64_t width) {
    accumulate_of<kRows>(w, rows, from, to, out, width);
  }

  GROK_INLINE static void store(const PagedAttention& p, const float* out, float total, void* y) {
    const float divisor = total < 0.5f ? 0.5f : total;  // at least 1 wherever a score is not −inf
    for (int64_t at = 0; at < p.head_size; at += 2 * kWidth) {
      float x[2 * kWidth];
      for (int i = 0; i < kWidth; ++i) {
        x[half ? i : 2 * i] = out[at + i];
        x[half ? i + kWidth : 2 * i + 1] = out[at + kWidth + i];
      }
      const int64_t count = std::min<int64_t>(2 * kWidth, p.head_size - at);
      if (p.q_type == DType::f32) {
        divide(x, divisor, count, static_cast<float*>(y) + at);
      } else {
        divide(x, divisor, count, static_cast<BF16*>(y) + at);
      }
    }
  }
};

template <bool half>
GROK_FP32 void GROK_FP32_NAME(attend_pages)(const PagedAttention& p, const Piece& piece, const Piece* next) {
  attend<GROK_FP32_NAME(Fp32)<half>>(p, piece, next);
}
template <bool half>
GROK_FP32 void GROK_FP32_NAME(merge_pages)(const PagedAttention& p, const Piece& tile) {
  merge_spans<GROK_FP32_NAME(Fp32)<half>>(p, tile);
}

inline Kernel kernel_of(DType kv) {
  if (kv == DType::e4m3) return {GROK_FP32_NAME(attend_pages)<true>, GROK_FP32_NAME(merge_pages)<true>};
  return {GROK_FP32_NAME(attend_pages)<false>, GROK_FP32_NAME(merge_pages)<false>};
}
