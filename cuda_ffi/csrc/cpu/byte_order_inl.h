// 32 bytes with the even ones first; for vectors of 256 bits and more. See byte_round_inl.h.
inline __m256i EvenThenOdd(__m256i bytes) {
  const __m256i within = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                          0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, within), 0xd8);
}
