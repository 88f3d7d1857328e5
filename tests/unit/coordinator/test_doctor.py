"""`tpserve doctor` on hosts that lack something: each check fails where it must, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from scripts import ROOT
from text_models import write_byte_tokenizer
from tpserve.coordinator.doctor import model as doctor_model
from tpserve.coordinator.doctor.__main__ import examine
from tpserve.coordinator.doctor.findings import Finding, Wanted
from tpserve.coordinator.doctor.gpus import check_gpus, check_nccl
from tpserve.coordinator.doctor.model import check_model, check_texts
from tpserve.coordinator.doctor.network import check_network
from tpserve.coordinator.doctor.nvml import Gpu, Gpus, NvmlError, read_gpus
from tpserve.coordinator.doctor.software import check_libraries

GIB = 1 << 30


def doctor(*flags: str | Path, prefix: Sequence[str] = (), **environ: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Run the command itself; return its exit code and what it found by check."""
    path = os.pathsep.join([str(ROOT / "deploy/python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tpserve.cli", "doctor", "--json", "--port", "0", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environ},
    )
    assert not done.stderr, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["healthy"] == (done.returncode == 0)
    return done.returncode, {finding["check"]: finding for finding in report["checks"]}


@pytest.fixture(scope="module")
def with_mounts() -> Callable[[str], tuple[str, ...]]:
    """Return how to run a command where file systems were mounted that nobody else sees."""
    unshare = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--mount")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode != 0:
        pytest.skip("no mount namespaces here: disks cannot be made small")
    return lambda script: (*unshare, "sh", "-c", f'{script} && exec "$@"', "sh")


def test_this_host_and_the_lines_of_a_terminal(tmp_path: Path) -> None:
    code, found = doctor("--device", "cpu", TPSERVE_HOME=str(tmp_path))
    assert {check for check, finding in found.items() if finding["status"] == "fail"} == set()
    assert code == 0
    assert {"python", "libraries", "cpus", "shm", "nofile", "nproc", "port", "cache", "temp"} <= set(found)
    assert all(bool(finding["remedy"]) == (finding["status"] != "ok") for finding in found.values())
    text = subprocess.run(
        [sys.executable, "-m", "tpserve.cli", "doctor", "--port", "0", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT / "deploy/python")},
    ).stdout.splitlines()
    assert len([line for line in text if line.startswith(("ok ", "warn "))]) == len(found)
    assert text[-1].endswith("0 fail")


def test_a_busy_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, found = doctor("--port", str(port))
    assert code == 1
    assert found["port"]["status"] == "fail"
    assert found["port"]["found"] == f"127.0.0.1:{port}: Address already in use"
    assert doctor("--port", "70000")[1]["port"]["status"] == "fail"


def test_small_shared_memory(with_mounts: Callable[[str], tuple[str, ...]]) -> None:
    """As in a container, whose /dev/shm has 64 MiB if nothing is said."""
    prefix = with_mounts("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    code, found = doctor("--device", "cpu", "--tp", "2", prefix=prefix)
    assert code == 1
    assert found["shm"]["status"] == "fail"
    assert found["shm"]["found"] == "/dev/shm has 64 MiB free, 84 MiB are needed"
    assert "--shm-size=149m" in found["shm"]["remedy"]
    prefix = with_mounts("mount -t tmpfs -o size=149m tmpfs /dev/shm")
    assert doctor("--device", "cpu", "--tp", "2", prefix=prefix)[1]["shm"]["status"] == "ok"


def test_small_disks(tmp_path: Path, with_mounts: Callable[[str], tuple[str, ...]]) -> None:
    mounts = f'mount -t tmpfs -o size=8m tmpfs "{tmp_path}"'
    code, found = doctor(prefix=with_mounts(mounts), TPSERVE_HOME=str(tmp_path / "not/made/yet"))
    assert code == 1
    assert found["cache"]["status"] == "fail"
    assert "has 8 MiB free" in found["cache"]["found"]
    read_only = f'mount -t tmpfs -o ro tmpfs "{tmp_path}"'
    code, found = doctor(prefix=with_mounts(read_only), TPSERVE_HOME=str(tmp_path))
    assert code == 1
    assert found["cache"]["found"] == f"{tmp_path} cannot be written to"


def test_low_limits() -> None:
    code, found = doctor(prefix=("bash", "-c", 'ulimit -n 300 && ulimit -u 200 && exec "$@"', "sh"))
    assert code == 1
    assert (found["nofile"]["status"], found["nofile"]["found"]) == ("fail", "300 open files")
    assert "ulimit -n" in found["nofile"]["remedy"]
    assert (found["nproc"]["status"], found["nproc"]["found"]) == ("fail", "200 processes and threads")
    assert doctor(prefix=("bash", "-c", 'ulimit -n 2000 && exec "$@"', "sh"))[1]["nofile"]["status"] == "warn"


def test_fewer_cpus_than_ranks() -> None:
    one = str(min(os.sched_getaffinity(0)))
    found = doctor("--tp", "2", prefix=("taskset", "-c", one))[1]
    assert found["cpus"]["status"] == "warn"
    assert found["cpus"]["found"].startswith("1 of ")


def test_a_host_without_gpu_that_needs_one() -> None:
    if read_gpus() is not None:
        pytest.skip("there is a GPU here")
    code, found = doctor("--device", "cuda")
    assert code == 1
    assert (found["gpu"]["status"], found["gpu"]["found"]) == ("fail", "no NVIDIA driver")
    assert found["memlock"]["check"] == "memlock"
    assert doctor("--device", "auto")[1]["gpu"]["status"] == "ok"


def test_a_cluster_that_is_not_there() -> None:
    code, found = doctor("--ray-address", "127.0.0.1:1")
    assert code == 1
    assert "Connection refused" in found["ray"]["found"]


@pytest.mark.parametrize("value", [None, "0", "1", "true"])
def test_who_can_read_what_goes_between_nodes(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_USE_TLS", value)
    assert list(check_network(Wanted())) == [], "on one host nothing leaves loopback"
    (ray,) = check_network(Wanted(device="cpu", tp_size=2, ray_address="10.0.0.1:6379"))
    assert (ray.check, ray.status) == ("ray-tls", "ok" if value in ("1", "true") else "warn")
    assert ("RAY_USE_TLS=1" in ray.remedy) == (ray.status == "warn")
    _, nccl = check_network(Wanted(device="cuda", tp_size=2, ray_address="10.0.0.1:6379"))
    assert (nccl.check, nccl.status) == ("nccl-network", "warn")
    assert "network of their own" in nccl.remedy


def test_versions_that_differ(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# tested\nnumpy==0.1\nray==2.60.0\nunrelated==3\n")

    def check(*required: str) -> Finding:
        (finding,) = check_libraries([Requirement(line) for line in required], lock)
        return finding

    assert check("ray==2.60.0").status == "ok"
    assert check("numpy>=2").status == "warn"
    assert check("numpy>=2").found.endswith(", tested 0.1")
    other = check("ray==1.0", "no-such-package>=1")
    assert other.status == "fail"
    assert other.found == "no-such-package is missing; ray is 2.60.0, ==1.0 is needed"


# ---- GPUs, of which there may be none here: what the driver says is given


def gpus(
    count: int = 2,
    *,
    capability: tuple[int, int] = (9, 0),
    cuda: tuple[int, int] = (13, 0),
    used: int = 0,
    unreachable: tuple[tuple[int, int], ...] = (),
) -> Gpus:
    made = tuple(Gpu(index, "H100", capability, 80 * GIB, used) for index in range(count))
    return Gpus("580.1", cuda, made, unreachable)


def of(found: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in found}


@pytest.mark.parametrize(
    ("host", "tp_size", "check", "status"),
    [
        (gpus(), 2, "gpu", "ok"),
        (gpus(), 4, "gpu", "fail"),
        (gpus(0), 1, "gpu", "fail"),
        (gpus(), 2, "gpu-driver", "ok"),
        (gpus(cuda=(12, 9)), 2, "gpu-driver", "fail"),
        (gpus(), 2, "gpu-capability", "ok"),
        (gpus(capability=(8, 0)), 2, "gpu-capability", "warn"),
        (gpus(used=GIB), 2, "gpu-memory", "ok"),
        (gpus(used=70 * GIB), 2, "gpu-memory", "warn"),
        (gpus(), 2, "gpu-peers", "ok"),
        (gpus(4, unreachable=((2, 3),)), 2, "gpu-peers", "ok"),
        (gpus(4, unreachable=((2, 3),)), 4, "gpu-peers", "warn"),
    ],
)
def test_what_the_driver_says_is_judged(host: Gpus, tp_size: int, check: str, status: str) -> None:
    wanted = Wanted(device="cuda", tp_size=tp_size)
    assert of(check_gpus(wanted, lambda: host))[check] == status


def test_a_driver_that_fails_is_told() -> None:
    def read() -> Gpus | None:
        raise NvmlError("nvmlInit_v2: Driver/library version mismatch")

    (finding,) = check_gpus(Wanted(), read)
    assert finding.status == "fail"
    assert "Driver/library version mismatch" in finding.found


NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInit_v2() { return %(init)d; }
int nvmlShutdown() { return 0; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "?"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13010; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.95.05", size); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(index + 1ul); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) { strncpy(text, "NVIDIA H100", size); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
  memory->total = 80ull << 30; memory->used = (unsigned long)handle << 30; memory->free = memory->total - memory->used;
  return 0;
}
int nvmlDeviceGetP2PStatus(void *a, void *b, int kind, int *status) {
  *status = (unsigned long)b == 3 && kind == 1 ? 4 : 0; return 0;
}
int ncclGetVersion(int *version) { *version = %(nccl)d; return 0; }
"""


def library(folder: Path, *, init: int = 0, nccl: int = 22703) -> str:
    """Compile a driver's library with NVML's interface, and NCCL's."""
    source, target = folder / f"nvml{init}{nccl}.c", folder / f"libnvml{init}{nccl}.so"
    source.write_text(NVML % {"init": init, "nccl": nccl})
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", target, source], check=True)
    return str(target)


def test_the_driver_is_read_by_its_own_interface(tmp_path: Path) -> None:
    found = read_gpus(library(tmp_path))
    assert found is not None
    assert (found.driver, found.cuda) == ("580.95.05", (13, 1))
    assert [(gpu.name, gpu.capability, gpu.used_bytes) for gpu in found.gpus] == [
        ("NVIDIA H100", (9, 0), (index + 1) * GIB) for index in range(3)
    ]
    assert found.unreachable == ((0, 2), (1, 2)), "writing is forbidden, reading is not"
    assert read_gpus(str(tmp_path / "none.so")) is None
    with pytest.raises(NvmlError, match="nvmlInit_v2: Driver/library version mismatch"):
        read_gpus(library(tmp_path, init=18))


def test_nccl_is_loaded(tmp_path: Path) -> None:
    good, old = library(tmp_path), library(tmp_path, nccl=21003)
    assert check_nccl((str(tmp_path / "none.so"), good)) == Finding("nccl", "ok", "2.27.3")
    assert check_nccl((old,)).found == "2.10.3"
    assert check_nccl((old,)).status == "fail"
    missing = check_nccl((str(tmp_path / "none.so"),))
    assert missing.status == "fail"
    assert "cannot be loaded" in missing.found


# ---- the model


def model(folder: Path, weights: int, max_position_embeddings: int = 1024) -> Path:
    folder.mkdir()
    config = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "max_position_embeddings": max_position_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights)  # takes no room
    return folder


@pytest.mark.parametrize(
    ("weights", "length", "tp_size", "status"),
    [
        (8 * GIB, 1024, 1, "ok"),
        (10 * GIB, 1024, 1, "fail"),
        (10 * GIB, 1024, 2, "ok"),
        (8 * GIB, 32768, 1, "warn"),  # 2 GiB of KV cache
        (8 * GIB, 32768, 2, "ok"),
    ],
)
def test_memory_for_a_model(tmp_path: Path, weights: int, length: int, tp_size: int, status: str) -> None:
    wanted = Wanted(device="cuda", tp_size=tp_size, model=str(model(tmp_path / "m", weights, length)))
    (finding,) = check_model(wanted, lambda _: 10 * GIB)
    assert finding.status == status, finding
    assert f"about {weights // tp_size >> 20} MiB of weights" in finding.found


def test_ranks_of_a_draft_take_memory_of_the_same_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_model, "available_host_bytes", lambda: 20 * GIB)
    folder = str(model(tmp_path / "m", 8 * GIB))
    for num_draft_ranks, status in ((0, "ok"), (1, "ok"), (2, "fail")):
        (finding,) = check_model(Wanted(device="cpu", model=folder, num_draft_ranks=num_draft_ranks))
        assert finding.status == status, finding


@pytest.mark.parametrize(
    ("name", "content", "status", "found", "remedy"),
    [
        ("README.md", "", "ok", "a tokenizer, no chat template: it answers completions only; stop tokens: ", ""),
        ("generation_config.json", '{"eos_token_id": [2, 5]}', "ok", "stop tokens: 2, 5", ""),
        ("chat_template.jinja", "{{ messages }}", "ok", "a tokenizer, a chat template", ""),
        ("chat_template.jinja", "{% if %}", "fail", "the chat template does not compile", "write another template to"),
        ("generation_config.json", '{"min_p": 2}', "fail", "min_p is 2", "it must lie in [0, 1]"),
        ("tokenizer.json", "{", "fail", "tokenizer.json cannot be loaded", "fetch it again"),
    ],
)
def test_texts_of_a_model(tmp_path: Path, name: str, content: str, status: str, found: str, remedy: str) -> None:
    folder = model(tmp_path / "m", 1024)
    write_byte_tokenizer(folder)
    (folder / name).write_text(content)
    (finding,) = check_texts(Wanted(model=str(folder)))
    assert (finding.check, finding.status) == ("texts", status), finding
    assert found in finding.found
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (status != "ok")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1024)
    (finding,) = check_texts(Wanted(model=str(folder)))
    assert (finding.status, finding.found) == ("fail", f"{folder / 'tokenizer.json'} is missing")
    assert finding.remedy == "put the model's tokenizer beside its config.json"
    assert not list(check_texts(Wanted())), "no model, no texts"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    code, found = doctor(tmp_path / "nothing")
    assert code == 1
    assert found["model"]["found"] == f"{tmp_path / 'nothing'} is no model folder and no file"
    code, found = doctor("--model-lib", tmp_path)
    assert code == 1
    assert "manifest.json is missing" in found["model"]["found"]


def test_a_check_that_breaks_stops_no_other() -> None:
    def check_broken(wanted: Wanted) -> Iterator[Finding]:
        raise PermissionError("/sys is not for you")

    found = examine(Wanted(), [check_broken, lambda wanted: iter([Finding("next", "ok", "fine")])])
    assert [(finding.check, finding.status) for finding in found] == [("broken", "fail"), ("next", "ok")]
