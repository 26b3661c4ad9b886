#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace grok::cpu {

// Workspace that grows to the largest request and keeps its memory for the next call.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // `count` elements, page-aligned. Their contents are undefined, also where the memory was used before.
  template <class T>
  T* get(size_t count) {
    constexpr size_t kPage = 4096;
    if (const size_t bytes = count * sizeof(T); bytes > size_) {
      release();
      const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
      data_ = std::aligned_alloc(kPage, rounded);
      if (!data_) throw std::bad_alloc();
      size_ = rounded;
    }
    return static_cast<T*>(data_);
  }

  // Frees the memory where it is more than is worth keeping between calls.
  void trim() {
    constexpr size_t kKept = size_t{256} << 20;
    if (size_ > kKept) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace grok::cpu
