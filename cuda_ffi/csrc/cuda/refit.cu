// A block of threads refits one row after another: each warp fits groups, and all warps fit the table.
#include "refit_group.cuh"

namespace any4 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <int kLevels>
struct Shared {
  Table<kLevels> table, changed;
  double errors[kWarps];
  float mass[kWarps][kLevels], pull[kWarps][kLevels];
  float fitted[kLevels];
};

template <int kLevels>
struct Row {
  const RefitRows& rows;
  const RefitOptions& options;
  int64_t row;
  Shared<kLevels>& shared;
  float* scales;  // [groups], the ones that this round tries
  float* offsets;

  __device__ bool HasOffsets() const { return rows.offsets != nullptr; }

  __device__ Affine At(int g) const { return {scales[g], HasOffsets() ? offsets[g] : 0}; }

  // Calls body(g, group) for the warp's groups, which are the same every time.
  template <class Body>
  __device__ void ForGroups(const Body& body) const {
    for (int g = threadIdx.x / 32; g < rows.groups; g += kWarps) {
      const int first = g * rows.group_size, length = min(rows.group_size, rows.length - first);
      body(g, Group(rows.w + row * rows.length + first, rows.importance + first, length));
    }
  }

  __device__ void Put(int g, Affine at) const {
    // Until all lanes have read what was there.
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      scales[g] = at.scale;
      if (HasOffsets()) offsets[g] = at.offset;
    }
    __syncwarp();
  }

  // The sum over all warps, for all threads.
  __device__ double Sum(double warps) const {
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.errors[threadIdx.x / 32] = warps;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared.errors[warp];
    return total;
  }

  __device__ double Error(const Table<kLevels>& table) const {
    double sum = 0;
    ForGroups([&](int g, const Group& group) { sum += ErrorOf(group, table, At(g)); });
    return Sum(sum);
  }

  // Fills in the middles of a table that has its values.
  __device__ void Complete(Table<kLevels>& table) const {
    const int i = threadIdx.x;
    if (i < kLevels) table.middles[i] = i + 1 < kLevels ? (table.values[i] + table.values[i + 1]) / 2 : CUDART_INF_F;
    __syncthreads();
  }

  // Fills shared.changed: for each free entry, the least-squares value over the weights that use it; ascending.
  __device__ void FitTable() const {
    float mass[kLevels] = {}, pull[kLevels] = {};
    const Table<kLevels>& table = shared.table;
    if (options.first < options.stop) {
      ForGroups([&](int g, const Group& group) {
        const Affine at = At(g);
        const float inverse = 1.0f / at.scale;
        group.ForEach([&](float weight, float share) {
          const float target = weight - at.offset, pulled = share * at.scale;
          const int code = table.Code(target * inverse);
#pragma unroll
          for (int i = 0; i < kLevels; ++i) {
            mass[i] += code == i ? pulled * at.scale : 0;
            pull[i] += code == i ? pulled * target : 0;
          }
        });
      });
#pragma unroll
      for (int i = 0; i < kLevels; ++i) {
        const float masses = WarpSum(mass[i]), pulls = WarpSum(pull[i]);
        if (threadIdx.x % 32 == 0) {
          shared.mass[threadIdx.x / 32][i] = masses;
          shared.pull[threadIdx.x / 32][i] = pulls;
        }
      }
    }
    __syncthreads();
    const int i = threadIdx.x;
    if (i < kLevels) {
      const float old = table.values[i];
      float value = old;
      if (options.first <= i && i < options.stop) {
        // Equal entries are one level: each of them moves with all the weights of that level.
        float total = 0, pulled = 0;
        for (int other = 0; other < kLevels; ++other) {
          if (table.values[other] != old) continue;
          for (int warp = 0; warp < kWarps; ++warp) {
            total += shared.mass[warp][other];
            pulled += shared.pull[warp][other];
          }
        }
        const float mean = Rounded(pulled / (total == 0 ? 1.0f : total), options.lut_mantissa);
        if (total * (mean + old) * (mean - old) - 2 * pulled * (mean - old) < 0) value = mean;
      }
      shared.fitted[i] = value;
    }
    __syncthreads();
    if (i < kLevels) {
      const float value = shared.fitted[i];
      int rank = 0;
      for (int other = 0; other < kLevels; ++other) {
        rank += shared.fitted[other] < value || (shared.fitted[other] == value && other < i);
      }
      shared.changed.values[rank] = value;
    }
    __syncthreads();
    Complete(shared.changed);
  }

  // Improves the start that `shared.table`, `found_scales` and `found_offsets` hold.
  __device__ void Solve(float* found_scales, float* found_offsets) const {
    const auto copy = [&](const float* from_scales, const float* from_offsets, float* to_scales, float* to_offsets) {
      for (int g = threadIdx.x; g < rows.groups; g += kThreads) {
        to_scales[g] = from_scales[g];
        if (HasOffsets()) to_offsets[g] = from_offsets[g];
      }
      __syncthreads();
    };
    copy(found_scales, found_offsets, scales, offsets);
    double before = Error(shared.table), squares = 0;
    ForGroups([&](int, const Group& group) { squares += group.spread + group.mass * group.mean * group.mean; });
    // The error that a row has left when the start holds it exactly: float32 knows weights to 2^-24 of themselves.
    if (before <= Sum(squares) * 0x1p-44) return;
    for (int round = 0; round < options.max_rounds; ++round) {
      if (round < options.searches) {
        ForGroups([&](int g, const Group& group) {
          Put(g, Search(group, shared.table, At(g), HasOffsets(), options));
        });
      }
      FitTable();
      ForGroups([&](int g, const Group& group) {
        const Affine at = At(g);
        const Moments sums = MomentsOf(group, shared.changed, at);
        Put(g, LeastSquares(group, sums, at, HasOffsets(), options));
      });
      const double after = Error(shared.changed);
      if (!(after < before)) break;
      if (threadIdx.x < kLevels) shared.table.values[threadIdx.x] = shared.changed.values[threadIdx.x];
      __syncthreads();
      Complete(shared.table);
      copy(scales, offsets, found_scales, found_offsets);
      const bool settled = !(before - after > options.settled * before);
      if (settled && round + 1 >= options.searches) break;
      before = after;
    }
  }
};

template <int kLevels>
__global__ void __launch_bounds__(kThreads) RefitAll(const RefitRows rows, const RefitOptions options,
                                                     const RefitResult result, char* scratch,
                                                     const int64_t slot_bytes) {
  __shared__ Shared<kLevels> shared;
  float* const slot = reinterpret_cast<float*>(scratch + blockIdx.x * slot_bytes);
  for (int64_t r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const Row<kLevels> row{rows, options, r, shared, slot, slot + rows.groups};
    float* const scales = result.scales + r * rows.groups;
    float* const offsets = rows.offsets == nullptr ? nullptr : result.offsets + r * rows.groups;
    for (int g = threadIdx.x; g < rows.groups; g += kThreads) {
      scales[g] = rows.scales[r * rows.groups + g];
      if (offsets != nullptr) offsets[g] = rows.offsets[r * rows.groups + g];
    }
    if (threadIdx.x < kLevels) shared.table.values[threadIdx.x] = rows.lut[r * kLevels + threadIdx.x];
    __syncthreads();
    row.Complete(shared.table);
    row.Solve(scales, offsets);
    if (threadIdx.x < kLevels) result.lut[r * kLevels + threadIdx.x] = shared.table.values[threadIdx.x];
    __syncthreads();
  }
}

auto KernelOf(int levels) { return levels == 4 ? RefitAll<4> : levels == 8 ? RefitAll<8> : RefitAll<16>; }

}  // namespace

Slots RefitSlots(const RefitRows& rows) {
  const int64_t bytes = 2 * int64_t{rows.groups} * static_cast<int64_t>(sizeof(float));
  return SlotsFor(reinterpret_cast<const void*>(KernelOf(rows.levels)), kThreads, rows.count, bytes);
}

cudaError_t Refit(const RefitRows& rows, const RefitOptions& options, const RefitResult& result, const Slots& slots,
                  void* scratch, cudaStream_t stream) {
  KernelOf(rows.levels)<<<slots.count, kThreads, 0, stream>>>(rows, options, result, static_cast<char*>(scratch),
                                                              slots.bytes);
  return cudaGetLastError();
}

}  // namespace any4
