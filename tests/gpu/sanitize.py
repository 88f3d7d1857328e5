"""Runs the kernels' tests under compute-sanitizer, once it has found a fault of its kind that is planted here.

    python tests/gpu/sanitize.py memcheck|racecheck|synccheck|initcheck [--every N] [pytest's arguments]

Only kernels of the project are watched, but by initcheck, which must see who wrote what they read. Memory then comes
from cudaMalloc, each array alone, so that an access behind its end is one. racecheck also tells whether it objects to
what the GEMMs and attention rest on, done right: a barrier at which some arrive and others wait, and copies that
report to a barrier. If it does, what it says of them is no news. Tests take some ten times as long; `--every 7` runs
each seventh.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

SANITIZED_VARIABLE = "TPSERVE_SANITIZED"
"""Set for the tests: each how-manieth runs."""
ALONE_TIMEOUT_S = 120.0
"""For one of the kernels below, CuPy's import under the tool included."""
FOUND = 9
"""Exit code of compute-sanitizer that has found something."""
PLANTED = r"""
extern "C" __global__ void tpserve_memcheck(int* x) { x[threadIdx.x] = 1; }  // 64 threads, 32 places
extern "C" __global__ void tpserve_racecheck(int* x) {
  __shared__ int places[64];
  places[threadIdx.x] = threadIdx.x;
  x[threadIdx.x % 32] = places[63 - threadIdx.x];
}
extern "C" __global__ void tpserve_synccheck(int* x) {
  if (threadIdx.x < 40) __syncthreads();
  x[threadIdx.x % 32] = 1;
}
extern "C" __global__ void tpserve_initcheck(int* x) { x[threadIdx.x % 32] += 1; }
"""
RIGHT = r"""
extern "C" __global__ void tpserve_arrive(int* x) {
  __shared__ int places[32];
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0) asm volatile("bar.sync 2, 64;" ::: "memory");
      places[threadIdx.x] = threadIdx.x;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      sum += places[63 - threadIdx.x];
      if (round < 3) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
  if (threadIdx.x >= 32) x[threadIdx.x - 32] = sum;
}

__device__ void wait(unsigned barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}

extern "C" __global__ void tpserve_copies(int* x) {
  __shared__ alignas(128) int slot[32];
  __shared__ unsigned long long barriers[2];
  const auto address = [](void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); };
  const unsigned full = address(barriers), empty = address(barriers + 1);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(empty) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) {
      if (round > 0) wait(empty, (round - 1) % 2);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;" ::"r"(full) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(
                       address(slot)), "l"(x), "r"(full) : "memory");
    } else if (threadIdx.x >= 32) {
      wait(full, round % 2);
      sum += slot[threadIdx.x - 32];
      __syncwarp();
      if (threadIdx.x == 32) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty) : "memory");
    }
  }
  if (threadIdx.x >= 32) x[threadIdx.x - 32] = sum;
}
"""


def run_alone(name: str) -> None:
    """Run one of the kernels above."""
    import cupy

    cupy.cuda.set_allocator(None)
    kernel = cupy.RawModule(code=PLANTED + RIGHT, options=("-std=c++17",)).get_function(f"tpserve_{name}")
    kernel((1,), (64,), (cupy.empty(32, cupy.int32),))
    cupy.cuda.runtime.deviceSynchronize()


def main() -> int:
    """Return pytest's exit code, or that of what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    parser.add_argument("--every", type=int, default=1, metavar="N")
    parser.add_argument("--alone", metavar="KERNEL", help=argparse.SUPPRESS)
    args, pytest_args = parser.parse_known_args()
    if args.alone:
        run_alone(args.alone)
        return 0
    if args.every < 1:
        parser.error(f"--every {args.every}: give 1 for all tests, or more")
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit")
    watch = ["compute-sanitizer", "--tool", args.tool, "--target-processes", "all", "--error-exitcode", str(FOUND)]
    watch += [] if args.tool == "initcheck" else ["--kernel-name", "kns=tpserve"]
    watch.append(sys.executable)

    def watched(name: str) -> subprocess.CompletedProcess[str]:
        command = [*watch, __file__, args.tool, "--alone", name]
        return subprocess.run(command, capture_output=True, text=True, timeout=ALONE_TIMEOUT_S)

    planted = watched(args.tool)
    if planted.returncode != FOUND:
        print(f"{args.tool} does not see a fault that is planted:\n{planted.stdout}{planted.stderr}", file=sys.stderr)
        return 1
    print(f"{args.tool} sees a fault that is planted", flush=True)
    for name in ("arrive", "copies") if args.tool == "racecheck" else ():
        print(
            f"{args.tool} {'objects' if watched(name).returncode == FOUND else 'does not object'} to {name}", flush=True
        )
    os.environ[SANITIZED_VARIABLE] = str(args.every)
    return subprocess.run([*watch, "-m", "pytest", *pytest_args]).returncode


if __name__ == "__main__":
    sys.exit(main())
