// Subnormal numbers, which x86 processors multiply many times slower than others, and products that become so.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace curveball::cpu {
namespace {

// While one lives, its thread takes subnormal numbers for zero. On other processors than x86 it does nothing.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

#if defined(__x86_64__)
  SubnormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kResultsAreZero | kOperandsAreZero); }
  ~SubnormalsAreZero() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kResultsAreZero = 1 << 15, kOperandsAreZero = 1 << 6;
  const unsigned before_;
#else
  SubnormalsAreZero() {}
#endif
};

}  // namespace
}  // namespace curveball::cpu
