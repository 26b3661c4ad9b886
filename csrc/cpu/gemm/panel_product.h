#pragma once

#include "cpu/gemm/packed_rows.h"

namespace grok::cpu {

// c (rows, 64) fp32 = the rows of a row block · the 64 outputs of w from `output` on, with w's scales applied;
// `output` is a multiple of 64 in Layout::panels, and columns past n are zeros. c lies in memory of this thread, in
// one of two slots, until the thread uses the slot again. `next` is the panel that this thread reads after this one,
// for prefetching; null if unknown.
float* panel_product(const PackedRows& x, const Weights& w, const PackedRows::RowBlock& block, int64_t output, int slot,
                     const uint8_t* next);

// The tasks of a product: every row block with outputs 0..n−1, `width` of them at a time. They are ordered by expert,
// then by output, so that consecutive tasks read the same panel.
class PanelTasks {
 public:
  struct Task {
    const PackedRows::RowBlock& block;
    int64_t output;
  };

  PanelTasks(const PackedRows& x, int64_t n, int64_t width) : blocks_(x.blocks), width_(width) {
    const int64_t steps = (n + width - 1) / width, count = static_cast<int64_t>(blocks_.size());
    for (int64_t first = 0, last; first < count; first = last) {
      for (last = first; last < count && blocks_[last].expert == blocks_[first].expert;) ++last;
      experts_.push_back({count_, first, last - first});
      count_ += steps * (last - first);
    }
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

  // The first panel of w that a task reads; null for task −1, which is none.
  const uint8_t* panel(const Weights& w, int64_t task) const {
    return task < 0 ? nullptr : w.panel((*this)[task].block.expert, (*this)[task].output);
  }

  Task operator[](int64_t task) const {
    size_t e = experts_.size() - 1;
    while (task < experts_[e].first_task) --e;
    const int64_t i = task - experts_[e].first_task;
    return {blocks_[experts_[e].first_block + i % experts_[e].blocks], i / experts_[e].blocks * width_};
  }

 private:
  struct Expert {
    int64_t first_task, first_block, blocks;
  };
  const std::vector<PackedRows::RowBlock>& blocks_;
  int64_t width_;
  std::vector<Expert> experts_;
  int64_t count_ = 0;
};

}  // namespace grok::cpu
