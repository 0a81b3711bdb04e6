// Codes of every width in fields of 4 or 8 bits, in the order of k. Each instruction set's file includes this one inside
// its own namespace, and the compiler makes vectors of the loops.

// Ones in the lowest `ones` bits of every `lane` bits.
constexpr uint64_t LowOfLanes(int ones, int lane) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += lane) mask |= ((uint64_t{1} << ones) - 1) << at;
  return mask;
}

// 64 / kField codes of kWidth bits, which are the lowest bits of `word`, in fields of kField bits: within each lane, which
// halve until they are fields, the upper half of the codes moves to the upper half of the bits.
template <int kField, int kWidth, int kLane = 32>
inline uint64_t Spread(uint64_t word) {
  if constexpr (kWidth < kField && kLane >= kField) {
    constexpr int kBits = kLane / kField * kWidth;
    constexpr uint64_t kMask = LowOfLanes(kBits, kLane);
    return Spread<kField, kWidth, kLane / 2>((word | word << (kLane - kBits)) & kMask);
  }
  return word;
}

// An unsigned integer of kBytes bytes.
template <int kBytes>
struct UnsignedOf;
template <>
struct UnsignedOf<1> { using Type = uint8_t; };
template <>
struct UnsignedOf<2> { using Type = uint16_t; };
template <>
struct UnsignedOf<4> { using Type = uint32_t; };
template <>
struct UnsignedOf<8> { using Type = uint64_t; };

// The codes of one word of fields, from their place in a plane.
template <int kField, int kWidth>
inline uint64_t SpreadAt(const uint8_t* plane) {
  typename UnsignedOf<8 * kWidth / kField>::Type word;
  __builtin_memcpy(&word, plane, sizeof word);
  return Spread<kField, kWidth>(word);
}

template <int kField, int kLow, int kHigh>
inline void SpreadCodes(const uint8_t* low, const uint8_t* high, int64_t count, uint8_t* to) {
  constexpr int64_t kCodes = 64 / kField, kLowBytes = kCodes * kLow / 8, kHighBytes = kCodes * kHigh / 8;
  const int64_t words = count / kCodes, left = count % kCodes;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word = SpreadAt<kField, kLow>(low + i * kLowBytes);
    if constexpr (kHigh > 0) word |= SpreadAt<kField, kHigh>(high + i * kHighBytes) << kLow;
    __builtin_memcpy(to + i * 8, &word, 8);
  }
  if (left == 0) return;
  uint64_t word = 0;
  __builtin_memcpy(&word, low + words * kLowBytes, (left * kLow + 7) / 8);
  word = Spread<kField, kLow>(word);
  if constexpr (kHigh > 0) {
    uint64_t upper = 0;
    __builtin_memcpy(&upper, high + words * kHighBytes, (left * kHigh + 7) / 8);
    word |= Spread<kField, kHigh>(upper) << kLow;
  }
  __builtin_memcpy(to + words * 8, &word, (left * kField + 7) / 8);
}

// `count` codes from the first of a byte of each plane on, as ceil(count * kField / 8) bytes.
template <int kField>
__attribute__((noinline)) void UnpackCodes(int bits, const uint8_t* low, const uint8_t* high, int64_t count, uint8_t* to) {
  switch (bits) {
    case 1: return SpreadCodes<kField, 1, 0>(low, high, count, to);
    case 2: return SpreadCodes<kField, 2, 0>(low, high, count, to);
    case 3: return SpreadCodes<kField, 2, 1>(low, high, count, to);
    default: break;
  }
  if constexpr (kField == 8) {
    switch (bits) {
      case 4: return SpreadCodes<8, 4, 0>(low, high, count, to);
      case 5: return SpreadCodes<8, 4, 1>(low, high, count, to);
      default: return SpreadCodes<8, 4, 2>(low, high, count, to);
    }
  }
}

// Row n's codes as codes of kField bits, then zeros up to `size` bytes; those of a ramp keep their distance to its middle.
template <int kField>
void UnpackRow(const Weight& w, int64_t n, int64_t size, uint8_t* to) {
  const uint8_t* const low = w.codes + n * PlaneBytes(w.k, LowBits(w.bits));
  const uint8_t* const high = w.high + n * PlaneBytes(w.k, HighBits(w.bits));
  UnpackCodes<kField>(w.bits, low, high, w.k, to);
  const int64_t bytes = PlaneBytes(w.k, kField);
  if constexpr (kField == 8) {
    const int bias = 128 - (1 << (w.bits - 1));
    for (int64_t i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(to[i] + bias);
  }
  for (int64_t i = bytes; i < size; ++i) to[i] = 0;
}
