// Codes from words in registers; see lut_kernel.h for the order and lut_kernel_inl.h for V.

// A number that the compiler knows, as shifts by a constant need it.
template <int kValue>
struct Step {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};
template <int kTimes, int kValue>
constexpr Step<kTimes * kValue> Times(Step<kValue>) {
  return {};
}
template <int kTimes>
constexpr int Times(int value) {
  return kTimes * value;
}

// body(0), body(1), ..., body(kEnd - 1): unrolled with Steps, or a loop if the vectors are loops themselves.
template <class V, int kEnd, int kBegin = 0, class Body>
inline __attribute__((always_inline)) void ForSteps(const Body& body) {
  if constexpr (!V::kUnrolled) {
    for (int step = 0; step < kEnd; ++step) body(step);
  } else if constexpr (kBegin < kEnd) {
    body(Step<kBegin>());
    ForSteps<V, kEnd, kBegin + 1>(body);
  }
}

// The codes of one block, in registers.
template <class V, int kBits>
struct Codes {
  typename V::Int low, high;

  void Load(const uint8_t* codes, const uint8_t* upper) {
    low = V::LoadWords(codes);
    if constexpr (kBits == 5) high = V::ShiftLeft(V::LoadBytes(upper), Step<4>());
    if constexpr (kBits == 3 || kBits == 6) high = V::ShiftLeft(V::LoadHalves(upper), Step<LowBits(kBits)>());
  }

  // Half as many codes, from words of 16 bits; for codes of one plane.
  void LoadHalf(const uint8_t* codes) { low = V::LoadHalves(codes); }

  // The codes of a step, in the low bits; the bits above them are arbitrary.
  template <class S>
  typename V::Int At(S step) const {
    auto index = V::ShiftRight(low, Times<LowBits(kBits)>(step));
    if constexpr (HighBits(kBits) > 0) {
      auto upper = V::ShiftRight(high, Times<HighBits(kBits)>(step));
      index = V::template Select<(1 << LowBits(kBits)) - 1>(index, upper);
    }
    return index;
  }
};
