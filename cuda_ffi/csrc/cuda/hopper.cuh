// Hopper's instructions for copies that report to barriers in shared memory, and for moving registers between warps.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace any4 {

__device__ __forceinline__ uint32_t SharedAddress(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// A barrier in shared memory, whose phases are told apart by their parity. Addresses are those of the shared window.
__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Arrives, and makes the phase also wait for that many bytes of copies.
__device__ __forceinline__ void ExpectBytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at the same place in another block of the cluster.
__device__ __forceinline__ void ArriveAt(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Waits for the end of the phase of that parity.
__device__ __forceinline__ void Wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// A barrier of all threads of the cluster in two parts: what is written before the first is seen after the second.
__device__ __forceinline__ void ArriveInCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Once all have passed, copies and the other blocks of the cluster see the barriers.
template <int kCluster>
__device__ __forceinline__ void SyncCluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    ArriveInCluster();
    WaitForCluster();
  }
}

template <int kCluster>
__device__ __forceinline__ uint32_t RankInCluster() {
  uint32_t rank = 0;
  if constexpr (kCluster > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in another block of the cluster of what is at the same place in its shared memory.
__device__ __forceinline__ uint32_t AddressIn(uint32_t block, uint32_t address) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

__device__ __forceinline__ void StoreAt(uint32_t there, float a, float b, float c, float d) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Copies the box at (column, row) of a matrix to shared memory; in a cluster, to the same place in all its blocks,
// whose barriers each count the bytes. What lies outside the matrix arrives as zero.
template <int kCluster = 1>
__device__ __forceinline__ void CopyIn(const CUtensorMap& from, int column, int row, uint32_t to, uint32_t barrier) {
  if constexpr (kCluster == 1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&from), "r"(column), "r"(row), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&from), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>((1 << kCluster) - 1))
        : "memory");
  }
}

// Copies a box from shared memory to (column, row) of a matrix. What lies outside the matrix is dropped.
__device__ __forceinline__ void CopyOut(const CUtensorMap& to, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(column),
               "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's copies out have read shared memory.
__device__ __forceinline__ void WaitCopiedOut() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Makes writes to shared memory visible to the copies out that follow a barrier.
__device__ __forceinline__ void FenceForCopies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier for some warps of the block. Number 0 is the one of __syncthreads().
__device__ __forceinline__ void SyncSome(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8 x 8 tiles of two-byte elements, transposed. Lane i gives the address of row i % 8 of tile i / 8.
__device__ __forceinline__ void StoreTransposed(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

}  // namespace any4
