// Included once for each instruction set, which defines: the target GROK_F32, the register type Vec of kWidth floats,
// how many registers of outputs a step uses (kColumns), and load, store, zero, splat, add, add_product and scaled_code
// (S · code − M).

// aligned(1): weights of bytes may begin at any address.
typedef uint32_t Ints __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));
typedef int32_t SignedInts __attribute__((vector_size(4 * kWidth)));
typedef float Floats __attribute__((vector_size(4 * kWidth)));

// Columns of a unit of 8: codes of kBits, or int8 values for kBits = 8, of kWidth outputs.
template <int kBits>
struct Unit {
  Ints bytes[2];  // columns 0, 4, 1, 5 and 2, 6, 3, 7; of int8: 0–3 and 4–7; of 4 bits: the dword as it is

  // w: the block's first run, from the first of these outputs on.
  GROK_F32 GROK_INLINE Unit(const uint8_t* w, int unit) {
    const auto run = [&](int i) GROK_F32 { return *reinterpret_cast<const Ints*>(w + i * kRunBytes); };
    if constexpr (kBits == 8) {
      bytes[0] = run(2 * unit);
      bytes[1] = run(2 * unit + 1);
    } else if constexpr (kBits == 4) {
      bytes[0] = run(unit);
    } else {
      constexpr uint32_t kMask = kBits == 5 ? 0x10101010u : 0x30303030u;
      const Ints low = run(unit), high = run(high_run(kBits, unit));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int up = 4 - high_shift(kBits, unit, half);
        bytes[half] = (low >> 4 * half & 0x0f0f0f0fu) | ((up > 0 ? high << up : high >> -up) & kMask);
      }
    }
  }

  GROK_F32 GROK_INLINE Vec operator[](int column) const {
    SignedInts code;
    if constexpr (kBits == 8) {
      code = (SignedInts)(bytes[column / 4] << (24 - column % 4 * 8)) >> 24;
    } else if constexpr (kBits == 4) {
      code = (SignedInts)(bytes[0] >> (column / 2 * 4 + column % 2 * 16) & 0xfu);
    } else {
      code = (SignedInts)(bytes[column / 2 % 2] >> (column % 2 * 16 + column / 4 * 8) & 0xffu);
    }
    return (Vec)__builtin_convertvector(code, Floats);
  }
};

// Writes columns of codes as fp32, S · code − M: whole units. w: the block of column 0.
template <int kBits>
GROK_F32 void convert_codes(const uint8_t* w, int64_t column, int64_t columns, const float* s, const float* m,
                            float* out) {
  for (int64_t k = column; k < column + columns; k += kUnit, out += kUnit * kPanel) {
    const uint8_t* block = w + k / kCodeColumns * code_block_bytes(kBits);
#pragma GCC unroll 4
    for (int unit = 0; unit < kUnits; ++unit) {
      if (k / kUnit % kUnits != unit) continue;
      for (int64_t n = 0; n < kPanel; n += kWidth) {
        const Unit<kBits> u(block + 4 * n, unit);
#pragma GCC unroll 8
        for (int i = 0; i < kUnit; ++i) {
          store(out + i * kPanel + n, scaled_code(u[i], load(s + n), load(m + n)));
        }
      }
    }
  }
}

GROK_F32 inline void convert_runs(const uint8_t* w, DType type, int64_t column, int64_t columns, float* out) {
  for (int64_t k = column; k < column + columns; ++k, out += kPanel) {
    if (type == DType::f32) {
      convert_run<DType::f32>(w, k, out);
    } else if (type == DType::bf16) {
      convert_run<DType::bf16>(w, k, out);
    } else if (type == DType::int8) {
      convert_run<DType::int8>(w, k, out);
    } else {
      convert_run<DType::e4m3>(w, k, out);
    }
  }
}

// Converts a block into the stage, with S and M applied where b.scaled.
GROK_F32 void convert(const BlockProduct& b, float* out) {
  const int64_t run_columns = 4 / size_of(b.type);
  if (!b.scaled) return convert_runs(b.w, b.type, b.column % run_columns, b.columns, out);
  const int64_t group = b.weights->group();
  const float zero_point = b.bits ? 0.0f : static_cast<float>(b.weights->zero_point);  // of values, to make them codes
  alignas(64) float s[kPanel], m[kPanel];
  for (int64_t k = b.column, last; k < b.column + b.columns; k = last) {
    last = std::min(b.column + b.columns, (k / group + 1) * group);
    group_scales(*b.weights, b.expert, b.output, k / group, b.x->isa, s, m);
    float* to = out + (k - b.column) * kPanel;
    if (b.bits) {
      const auto codes = b.bits == 4 ? convert_codes<4> : b.bits == 5 ? convert_codes<5> : convert_codes<6>;
      codes(b.w, k - b.column, last - k, s, m, to);
      continue;
    }
    convert_runs(b.w, b.type, k - b.column / run_columns * run_columns, last - k, to);
    for (const float* end = to + (last - k) * kPanel; to < end; to += kPanel) {
      for (int64_t n = 0; n < kPanel; n += kWidth) {
        const Vec code = add(load(to + n), splat(&zero_point));
        store(to + n, scaled_code(code, load(s + n), load(m + n)));
      }
    }
  }
}

// A block's sums begin at zero, and are then added to those of the blocks before: in one chain over all of K, rounding
// errors would be twice as large.
template <int kRows>
GROK_F32 void tile(const float* x, const float* w, int64_t columns, float* c, bool first) {
  for (int64_t from = 0; from < kPanel; from += kColumns * kWidth) {
    Vec sum[kRows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) sum[r][j] = zero();
    }
    for (int64_t k = 0; k < columns; ++k) {
      Vec v[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) v[j] = load(w + k * kPanel + from + j * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec value = splat(x + k * kRows + r);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) sum[r][j] = add_product(sum[r][j], v[j], value);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        float* to = c + r * kPanel + from + j * kWidth;
        store(to, first ? sum[r][j] : add(load(to), sum[r][j]));
      }
    }
  }
}

using TileKernel = void (*)(const float*, const float*, int64_t, float*, bool);
constexpr TileKernel kTiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// Adds 8 columns of codes to the sums of a lone tile. s: S and, kPanel further on, M. A pair of registers of outputs
// keeps its S and M in registers, and is two chains of additions, which overlap with those of the next pair.
template <int kUnitOfBlock, int kBits, int kRows, int kWide>
GROK_F32 GROK_INLINE void add_unit(const uint8_t* w, const float* x, const float* s, Vec (&sum)[kRows][kWide]) {
  constexpr int kPair = kWide > 1 ? 2 : 1;
#pragma GCC unroll 4
  for (int j = 0; j < kWide; j += kPair) {
    const int last = j + kPair - 1;
    const Unit<kBits> u[] = {{w + j * 4 * kWidth, kUnitOfBlock}, {w + last * 4 * kWidth, kUnitOfBlock}};
    const Vec scale[] = {load(s + j * kWidth), load(s + last * kWidth)};
    const Vec minimum[] = {load(s + kPanel + j * kWidth), load(s + kPanel + last * kWidth)};
#pragma GCC unroll 8
    for (int i = 0; i < kUnit; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < kPair; ++p) {
        const Vec v = scaled_code(u[p][i], scale[p], minimum[p]);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][j + p] = add_product(sum[r][j + p], v, splat(x + i * kRows + r));
      }
    }
  }
}

// As convert and tile, of a lone tile of codes or of int8: weights stay in registers. `scales` has S and M, 64 each, of
// every 2^group_shift columns, 16 at least.
template <int kRows, int kBits>
GROK_F32 void fused_tile(const BlockProduct& b, const float* scales, int group_shift) {
  // enough chains of additions, in 16 registers
  constexpr int kWide = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  const float* x = reinterpret_cast<const float*>(b.x->at(b.x->tiles[b.rows->first_tile], b.column));
  for (int64_t from = 0; from < kPanel; from += kWide * kWidth) {
    Vec sum[kRows][kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) sum[r][j] = zero();
    }
    for (int64_t k = 0; k < b.columns; k += kCodeColumns) {
      const uint8_t* w = b.w + k / kCodeColumns * kBits * kRunBytes + 4 * from;
#pragma GCC unroll 8
      for (int64_t byte = 0; byte < kBits * kRunBytes; byte += kRunBytes) {
        for (int64_t line = 0; line < 4 * kWide * kWidth; line += 64) __builtin_prefetch(w + kFusedAhead + byte + line);
      }
      const float* row = x + k * kRows;
      const auto at = [&](int64_t column) { return scales + (column >> group_shift) * 2 * kPanel + from; };
      const float *s = at(k), *later = at(k + kCodeColumns / 2);
      add_unit<0, kBits>(w, row, s, sum);
      add_unit<1, kBits>(w, row + kUnit * kRows, s, sum);
      add_unit<2, kBits>(w, row + 2 * kUnit * kRows, later, sum);
      add_unit<3, kBits>(w, row + 3 * kUnit * kRows, later, sum);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) {
        float* to = b.c + r * kPanel + from + j * kWidth;
        store(to, b.first ? sum[r][j] : add(load(to), sum[r][j]));
      }
    }
  }
}

// As convert and tile, of weights without scales: they stay in registers. A lone tile of int8; bf16, whose conversion
// costs less than a load, of any number of tiles.
template <int kRows, DType kType>
GROK_F32 void direct_tile(const BlockProduct& b, int64_t tile) {
  const PackedRows::Tile& t = b.x->tiles[tile];
  constexpr int kWide = std::min<int>(kPanel / kWidth, kRows == 1 ? 8 : kRows <= 3 ? 4 : 2);  // chains, in 16 registers
  constexpr int kEach = 4 / static_cast<int>(size_of(kType));
  const float* x = reinterpret_cast<const float*>(b.x->at(t, b.column));
  const int64_t runs = (b.columns + kEach - 1) / kEach, bytes = runs * kRunBytes;  // rows are zero past their end
  const bool lone = alone(b);
  Ahead ahead = ahead_of(b, tile, runs * (kPanel / (kWide * kWidth)));
  for (int64_t from = 0; from < kPanel; from += kWide * kWidth) {
    Vec sum[kRows][kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) sum[r][j] = zero();
    }
    for (int64_t run = 0; run < bytes; run += kRunBytes) {
      const uint8_t* w = b.w + run + 4 * from;
      if (lone) {
        const uint8_t* next = b.next && run + kFusedAhead >= bytes ? b.next - bytes + run + 4 * from : w;
        for (int64_t line = 0; line < 4 * kWide * kWidth; line += 64) __builtin_prefetch(next + kFusedAhead + line);
      } else {
        __builtin_prefetch(ahead.from, 0, 2);
        ahead.from += ahead.step;
      }
      const float* row = x + run / kRunBytes * kEach * kRows;
#pragma GCC unroll 4
      for (int i = 0; i < kEach; ++i) {
        Vec v[kWide];
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) {
          const Ints bits = *reinterpret_cast<const Ints*>(w + 4 * j * kWidth);
          if constexpr (kType == DType::bf16) {
            v[j] = (Vec)(i ? bits & 0xffff0000u : bits << 16);
          } else {
            v[j] = (Vec)__builtin_convertvector((SignedInts)(bits << (24 - 8 * i)) >> 24, Floats);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec value = splat(row + i * kRows + r);
#pragma GCC unroll 8
          for (int j = 0; j < kWide; ++j) sum[r][j] = add_product(sum[r][j], v[j], value);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) {
        float* to = b.c + (t.row - b.rows->row + r) * kPanel + from + j * kWidth;
        store(to, b.first ? sum[r][j] : add(load(to), sum[r][j]));
      }
    }
  }
}

using DirectKernel = void (*)(const BlockProduct&, int64_t);
template <DType kType>
constexpr DirectKernel kDirect[] = {direct_tile<1, kType>, direct_tile<2, kType>, direct_tile<3, kType>,
                                    direct_tile<4, kType>, direct_tile<5, kType>, direct_tile<6, kType>};

using FusedKernel = void (*)(const BlockProduct&, const float*, int);
template <int kBits>
constexpr FusedKernel kFused[] = {fused_tile<1, kBits>, fused_tile<2, kBits>, fused_tile<3, kBits>,
                                  fused_tile<4, kBits>, fused_tile<5, kBits>, fused_tile<6, kBits>};

GROK_F32 void fused(const BlockProduct& b) {
  const int64_t group = std::min(b.weights->group(), kRunBlock);
  float* scales = static_cast<float*>(b.stage);
  for (int64_t k = 0; k < b.columns; k += group) {
    float* s = scales + k / group * 2 * kPanel;
    group_scales(*b.weights, b.expert, b.output, (b.column + k) / b.weights->group(), b.x->isa, s, s + kPanel);
  }
  const auto kernels = b.bits == 0 ? kFused<8> : b.bits == 4 ? kFused<4> : b.bits == 5 ? kFused<5> : kFused<6>;
  kernels[b.rows->rows - 1](b, scales, __builtin_ctzll(group));
}

GROK_F32 void block(const BlockProduct& b) {
  if (fuses(b)) return fused(b);
  if (const auto direct = b.type == DType::bf16 ? kDirect<DType::bf16> : kDirect<DType::int8>; is_direct(b)) {
    for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
      direct[b.x->tiles[i].rows - 1](b, i);
    }
    return;
  }
  float* stage = static_cast<float*>(b.stage);
  convert(b, stage);
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    kTiles[t.rows - 1](reinterpret_cast<const float*>(b.x->at(t, b.column)), stage, b.columns,
                       b.c + (t.row - b.rows->row) * kPanel, b.first);
  }
}
