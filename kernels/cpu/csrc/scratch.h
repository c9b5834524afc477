// A buffer, aligned to 64 bytes, that only grows. Kernels keep one per thread, so that calls do not allocate.
#pragma once
#include <cstdlib>
#include <new>

namespace bi {

class Scratch {
 public:
  ~Scratch() { std::free(p_); }
  template <class T> T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(p_);
      p_ = std::aligned_alloc(64, bytes);
      size_ = p_ ? bytes : 0;
      if (!p_) throw std::bad_alloc();
    }
    return static_cast<T*>(p_);
  }

 private:
  void* p_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bi
