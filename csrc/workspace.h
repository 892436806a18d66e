// Scratch memory that is kept between calls: fresh pages cost more than the work done in them.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace l0 {

// Grow-only and 64-byte aligned; one per calling thread and use, freed when the thread ends.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  void* get(size_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;  // slack: extents change every step
      data_ = std::aligned_alloc(4096, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = rounded;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace l0
