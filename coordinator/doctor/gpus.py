"""Checks of GPUs, their driver, and what ranks on them exchange activations by."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tpserve.coordinator.doctor.findings import Finding, Wanted
from tpserve.coordinator.doctor.nvml import Gpus, NvmlError, read_gpus
from tpserve.proto.nvcc import find_nvcc

_MIN_CUDA = (13, 0)
"""Of CuPy's wheels and of what `tpserve compile` makes."""
_TUNED = (9, 0)
_BUSY_SHARE = 0.05
"""Of a GPU's memory; the driver itself holds less."""
_MIN_NCCL = (2, 18)


def check_gpus(wanted: Wanted, read: Callable[[], Gpus | None] = read_gpus) -> Iterator[Finding]:
    """GPUs, driver, compute capability, peer access, NCCL and CuPy; none of them matters for ranks on the CPU."""
    if wanted.device == "cpu":
        return
    try:
        found = read()
    except NvmlError as error:
        yield Finding(
            "gpu",
            "fail",
            f"NVIDIA's driver fails ({error})",
            "see that nvidia-smi works; reload or reinstall the driver",
        )
        return
    if found is None or not found.gpus:
        what = "no NVIDIA driver" if found is None else f"driver {found.driver}, no GPU"
        if wanted.device == "cuda":
            remedy = "install the driver; give a container its GPUs (--gpus all, nvidia.com/gpu); or take --device cpu"
            yield Finding("gpu", "fail", what, remedy)
        else:
            yield Finding("gpu", "ok", f"{what}: ranks compute on the CPU (target llvm)")
        return
    names = ", ".join(f"{gpu.name} ({gpu.total_bytes >> 30} GiB)" for gpu in found.gpus)
    enough = len(found.gpus) >= wanted.num_ranks
    remedy = "" if enough else f"{wanted.fewer}, or give this host or container {wanted.num_ranks} GPUs"
    needed = "" if enough else f"; {wanted.flags} takes {wanted.num_ranks}"
    yield Finding("gpu", "ok" if enough else "fail", f"{len(found.gpus)}: {names}{needed}", remedy)
    yield from _check_driver(found)
    yield from _check_capability(found)
    yield from _check_used(found, wanted.num_ranks)
    if wanted.num_ranks > 1:
        yield _check_peers(found, wanted)
    yield from _check_libraries(max(wanted.tp_size, wanted.num_draft_ranks))


def _check_driver(found: Gpus) -> Iterator[Finding]:
    versions = f"{found.driver}, runs CUDA {found.cuda[0]}.{found.cuda[1]}"
    if found.cuda >= _MIN_CUDA:
        yield Finding("gpu-driver", "ok", versions)
    else:
        needed = f"{_MIN_CUDA[0]}.{_MIN_CUDA[1]}"
        yield Finding("gpu-driver", "fail", versions, f"install a driver for CUDA {needed} or newer (580 or newer)")


def _check_capability(found: Gpus) -> Iterator[Finding]:
    capabilities = sorted({gpu.capability for gpu in found.gpus})
    text = ", ".join(f"sm_{major}{minor}" for major, minor in capabilities)
    if capabilities == [_TUNED]:
        yield Finding("gpu-capability", "ok", text)
    elif len(capabilities) > 1:
        yield Finding("gpu-capability", "warn", text, "ranks of one group need GPUs of one kind: hide the others")
    else:
        yield Finding("gpu-capability", "warn", text, "kernels are tuned for sm_90 (Hopper): expect less speed here")


def _check_used(found: Gpus, num_ranks: int) -> Iterator[Finding]:
    busy = [gpu for gpu in found.gpus[:num_ranks] if gpu.used_bytes > _BUSY_SHARE * gpu.total_bytes]
    if not busy:
        yield Finding("gpu-memory", "ok", "free")
    else:
        used = ", ".join(
            f"GPU {gpu.index} has {gpu.used_bytes >> 20} of {gpu.total_bytes >> 20} MiB in use" for gpu in busy
        )
        yield Finding("gpu-memory", "warn", used, "end what holds it (nvidia-smi names it), or expect fewer KV pages")


def _check_peers(found: Gpus, wanted: Wanted) -> Finding:
    apart = [pair for pair in found.unreachable if max(pair) < wanted.num_ranks]
    if not apart:
        return Finding("gpu-peers", "ok", f"GPUs 0 to {wanted.num_ranks - 1} reach each other's memory")
    pairs = ", ".join(f"{a}-{b}" for a, b in apart)
    if wanted.num_draft_ranks:
        return Finding(
            "gpu-peers",
            "fail",
            f"no peer access: {pairs}; a model and a draft with GPUs of its own exchange tokens by it",
            "give --draft-placement colocated, or GPUs that reach each other (`nvidia-smi topo -p2p rw`)",
        )
    return Finding(
        "gpu-peers",
        "warn",
        f"no peer access: {pairs}",
        "collectives go by NCCL, which is slower; see `nvidia-smi topo -p2p rw`, switch ACS and IOMMU off for these "
        "slots, and give a container all the GPUs of the group",
    )


def _check_libraries(group_size: int) -> Iterator[Finding]:
    if importlib.util.find_spec("cupy") is None:
        yield Finding("cupy", "fail", "not installed", "pip install 'tpserve[cuda]'")
        return
    yield Finding("cupy", "ok", "installed")
    if find_nvcc() is None:
        yield Finding(
            "nvcc",
            "warn",
            "not found",
            "libraries cannot be compiled here: give --model-lib, or install CUDA 13's nvcc, or pip install "
            "'tpserve[nvcc]'",
        )
    if group_size > 1:
        yield check_nccl()


def check_nccl(names: tuple[str, ...] | None = None) -> Finding:
    """See that NCCL can be loaded, and its version."""
    if names is None:
        wheels = sorted(str(path) for folder in sys.path for path in Path(folder).glob("nvidia/nccl/lib/libnccl.so.2"))
        names = (*wheels, "libnccl.so.2")
    reason = ""
    for name in names:
        try:
            version = ctypes.c_int()
            code = ctypes.CDLL(name).ncclGetVersion(ctypes.byref(version))
        except (OSError, AttributeError) as error:
            reason = str(error)
            continue
        major, minor = version.value // 10000, version.value % 10000 // 100
        text = f"{major}.{minor}.{version.value % 100}"
        if code == 0 and (major, minor) >= _MIN_NCCL:
            return Finding("nccl", "ok", text)
        return Finding("nccl", "fail", text, f"install NCCL {_MIN_NCCL[0]}.{_MIN_NCCL[1]} or newer")
    return Finding("nccl", "fail", f"cannot be loaded ({reason})", "pip install nvidia-nccl-cu13")
