// How sums over some of the slots become one: those of the warps of a block, and those of the parts.
#pragma once

#include "attention_running.cuh"

namespace any4 {
namespace {

// The result's element (row's head, channel) from what its parts left: sums [size], their highest score, their total.
template <typename T>
__device__ __forceinline__ void Combine(const AttentionStep& step, int64_t head, int channel, int parts) {
  const float* const partials = step.partials + head * kMostParts * (step.size + 2);
  // All loads are under way at once.
  float heights[kMostParts], totals[kMostParts], sums[kMostParts], highest = kNothing, total = 0, mixed = 0;
#pragma unroll
  for (int p = 0; p < kMostParts; ++p) {
    const float* const part = partials + p * (step.size + 2);
    heights[p] = p < parts ? __ldcg(part + step.size) : kNothing;
    totals[p] = p < parts ? __ldcg(part + step.size + 1) : 0;
    sums[p] = p < parts ? __ldcg(part + channel) : 0;
  }
#pragma unroll
  for (int p = 0; p < kMostParts; ++p) highest = fmaxf(highest, heights[p]);
#pragma unroll
  for (int p = 0; p < kMostParts; ++p) {
    const float share = exp2f(heights[p] - highest);
    total = fmaf(share, totals[p], total);
    mixed = fmaf(share, sums[p], mixed);
  }
  static_cast<T*>(step.mixed)[head * step.size + channel] = static_cast<T>(total > 0 ? mixed / total : 0.0f);
}

__device__ __forceinline__ void Add(float4& sums, float share, const float* more) {
  const float4 quad = *reinterpret_cast<const float4*>(more);
  sums.x = fmaf(share, quad.x, sums.x), sums.y = fmaf(share, quad.y, sums.y);
  sums.z = fmaf(share, quad.z, sums.z), sums.w = fmaf(share, quad.w, sums.w);
}

// Nothing over nothing is zero.
__device__ __forceinline__ float4 Over(float4 sums, float total) {
  const float by = total > 0 ? total : 1;
  return {sums.x / by, sums.y / by, sums.z / by, sums.w / by};
}

template <typename T>
__device__ __forceinline__ void Write(const AttentionStep& step, int row, int head, int channel, float4 mixed) {
  if (channel >= step.size) return;
  T* const to = static_cast<T*>(step.mixed) + (row * int64_t{step.heads} + head) * step.size + channel;
  to[0] = static_cast<T>(mixed.x), to[1] = static_cast<T>(mixed.y);
  to[2] = static_cast<T>(mixed.z), to[3] = static_cast<T>(mixed.w);
}

// Of a head, over the warps of a block; `found` has kFound floats of each warp, which don't depend on the channels.
__device__ __forceinline__ float Highest(const float* found, int head, int warps) {
  float highest = kNothing;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) highest = fmaxf(highest, found[w * kFound + head]);
  return highest;
}

// What a warp's sums and total count for beside those of the others.
__device__ __forceinline__ void Share(float* found, int warp, int head, int warps) {
  found[warp * kFound + 2 * kHeads + head] = Power(found[warp * kFound + head] - Highest(found, head, warps));
}

// What the parts of a cluster tell each other. In its own shared memory, each gets the sums of its share of the results
// from all parts, and the highest scores and totals of all parts and heads. Nobody reads another's memory, so a block
// may end as soon as it has what it needs.
template <int kSize>
class PartSums {
 public:
  using Of = PartOf<kSize>;

  __device__ PartSums(float* memory, int quads)
      : memory_(memory), parts_(gridDim.x), part_(blockIdx.x), share_((quads + parts_ - 1) / parts_) {}

  // All threads; before a part may write to others, these must run.
  __device__ void Announce() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ void AwaitOthers() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  }

  __device__ void Tell(int quad, float4 sums) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                     Remote(4 * (part_ * share_ + quad % share_), quad / share_)),
                 "f"(sums.x), "f"(sums.y), "f"(sums.z), "f"(sums.w)
                 : "memory");
#endif
  }
  __device__ void Tell(int head, float highest, float total) const {
#if __CUDA_ARCH__ >= 900
    for (int p = 0; p < parts_; ++p) {
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(Remote(Pair(part_, head), p)), "f"(highest),
                   "f"(total)
                   : "memory");
    }
#endif
  }
  // All threads; after it, what all parts told is here.
  __device__ void Exchange() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  __device__ int first() const { return part_ * share_; }
  __device__ int stop() const { return first() + share_; }

  // The mixture of a quad of this part's share.
  __device__ float4 Mixed(int quad) const {
    const int head = quad / (kSize / 4);
    float highest = kNothing, total = 0;
    float4 mixed{0, 0, 0, 0};
#pragma unroll 4
    for (int p = 0; p < parts_; ++p) highest = fmaxf(highest, memory_[Pair(p, head)]);
#pragma unroll 4
    for (int p = 0; p < parts_; ++p) {
      const float2 told = *reinterpret_cast<const float2*>(memory_ + Pair(p, head));
      const float share = Power(told.x - highest);
      total = fmaf(share, told.y, total);
      Add(mixed, share, memory_ + 4 * (p * share_ + quad - first()));
    }
    return Over(mixed, total);
  }

 private:
  static __device__ int Pair(int part, int head) { return 4 * (Of::kQuads + kMostParts) + 2 * (part * kHeads + head); }
  __device__ uint32_t Remote(int at, int part) const {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(memory_ + at));
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(part));
#endif
    return address;
  }

  float* const memory_;
  const int parts_, part_, share_;
};

// All threads: the results of a block, or its part of them, from what its warps left: their sums, `next` floats from one
// warp's to the next one's, and `found`.
template <typename T, int kSize>
__device__ __forceinline__ void CombineWarps(const AttentionStep& step, const float* left, int next, float* found,
                                             const PartSums<kSize>& sums, bool clustered, int row, int head, int quads) {
  const int warps = blockDim.x / 32, parts = gridDim.x, part = blockIdx.x;
  __syncthreads();
  for (int o = threadIdx.x; o < warps * kHeads; o += blockDim.x) Share(found, o / kHeads, o % kHeads, warps);
  __syncthreads();
  if (clustered) sums.AwaitOthers();
  for (int quad = threadIdx.x; quad < quads; quad += blockDim.x) {
    const int g = quad / (kSize / 4), channel = quad % (kSize / 4) * 4;
    float total = 0;
    float4 mixed{0, 0, 0, 0};
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      const float* const of_warp = found + w * kFound;
      total = fmaf(of_warp[2 * kHeads + g], of_warp[kHeads + g], total);
      Add(mixed, of_warp[2 * kHeads + g], left + w * next + 4 * quad);
    }
    if (parts == 1) {
      Write<T>(step, row, head + g, channel, Over(mixed, total));
      continue;
    }
    const float highest = channel == 0 ? Highest(found, g, warps) : 0;
    if (clustered) {
      sums.Tell(quad, mixed);
      if (channel == 0) sums.Tell(g, highest, total);
      continue;
    }
    if (channel >= step.size) continue;
    float* const partial = step.partials +
        ((row * int64_t{step.heads} + head + g) * kMostParts + part) * (step.size + 2);
    partial[channel] = mixed.x, partial[channel + 1] = mixed.y;
    partial[channel + 2] = mixed.z, partial[channel + 3] = mixed.w;
    if (channel == 0) partial[step.size] = highest, partial[step.size + 1] = total;
  }
  if (clustered) {
    sums.Exchange();
    for (int quad = sums.first() + threadIdx.x; quad < min(sums.stop(), quads); quad += blockDim.x) {
      Write<T>(step, row, head + quad / (kSize / 4), quad % (kSize / 4) * 4, sums.Mixed(quad));
    }
  }
}

}  // namespace
}  // namespace any4
