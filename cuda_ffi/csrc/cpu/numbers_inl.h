// Stored numbers to floats and back. Each instruction set's files include it inside their own namespace.

inline float ToFloat(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float ToFloat(uint16_t bf16) { return ToFloat(uint32_t{bf16} << 16); }
inline float ToFloat(float value) { return value; }

__attribute__((noinline)) static void Widen(const void* from, Type type, int64_t begin, int64_t count, float* to) {
  if (type == Type::kFloat32) {
    __builtin_memcpy(to, static_cast<const float*>(from) + begin, count * sizeof(float));
  } else if (type == Type::kBfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(from) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(uint32_t{source[i]} << 16);
  } else {
    const uint8_t* source = static_cast<const uint8_t*>(from) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(uint32_t{source[i]} << 23);
  }
}

inline void Store(const Output& out, int64_t row, int64_t column, float value) {
  if (out.type == Type::kFloat32) {
    static_cast<float*>(out.y)[row * out.stride + column] = value;
    return;
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  // Rounds to nearest, ties to even; a NaN keeps its upper half and stays a NaN.
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  static_cast<uint16_t*>(out.y)[row * out.stride + column] = static_cast<uint16_t>(rounded >> 16);
}
