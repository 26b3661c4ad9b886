// Included once for each instruction set, which defines: the target GROK_F32, the register type Vec of kWidth floats,
// how many registers of outputs a step uses (kColumns), and load, store, zero, splat, add and add_product.

GROK_F32 inline void convert(const uint8_t* w, DType type, int64_t column, int64_t columns, float* out) {
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

GROK_F32 void block(const BlockProduct& b) {
  float* stage = static_cast<float*>(b.stage);
  convert(b.w, b.type, b.column % (4 / size_of(b.type)), b.columns, stage);
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    kTiles[t.rows - 1](reinterpret_cast<const float*>(b.x->at(t, b.column)), stage, b.columns,
                       b.c + (t.row - b.rows->row) * kPanel, b.first);
  }
}
