#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace grok::cpu {

// Memory that grows to what was asked of it and is kept for the next call.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // `count` elements, aligned to a page; what was in them before is gone.
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

  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace grok::cpu
