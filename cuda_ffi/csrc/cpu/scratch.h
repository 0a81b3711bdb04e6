// Arrays one after another in memory that the caller owns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace any4 {
namespace {

// With a null base it hands out null pointers, and measures how many bytes the same calls will take.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}

  bool measures() const { return base_ == nullptr; }
  int64_t used() const { return used_; }

  template <class T>
  T* Take(int64_t count) {
    T* const taken = measures() ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace any4
