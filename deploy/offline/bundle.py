"""Make one archive with which a GPU host without a registry can serve: wheels, runtime libraries, compiled models.

    python deploy/offline/bundle.py --python 3.12 --library ~/.cache/tpserve/lib/HASH --output tpserve-offline.tar.xz

On the host: unpack it and run `./install.sh FOLDER`. What only compiling needs (TVM's compiler, nvcc) stays out, and
so do the parts of Ray that a worker group never loads. Give `--without NAME` for what the host has already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("coordinator", "worker", "proto", "collectives")
"""Folders of the package that serve; `compile` is needed where models are compiled."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
NOT_SERVING = {
    "tvm/": (
        "tvm/3rdparty/*",
        "tvm/include/*",
        "tvm/src/*",
        "tvm/web/*",
        "tvm/lib/libtvm_compiler.so",
    ),
    "tvm_ffi/": ("tvm_ffi/include/*", "tvm_ffi/3rdparty/*", "tvm_ffi/src/*"),
    "ray/": (
        "ray/jars/*",
        "ray/rllib/*",
        "ray/cpp/*",
        "ray/tune/*",
        "ray/train/*",
        "ray/data/*",
        "ray/serve/*",
        "ray/llm/*",
        "ray/air/*",
        "ray/dashboard/client/*",
        "ray/thirdparty_files/*.map",
        "ray/core/src/ray/*.jar",
    ),
    "numpy/": ("numpy/*/tests/*", "numpy/tests/*"),
}
"""Paths that are left out of a package, by its first folder."""


def main() -> int:
    """Make the archive; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the host, as MAJOR.MINOR")
    parser.add_argument("--library", type=Path, action="append", default=[], help="artifact folder; may be repeated")
    parser.add_argument("--with-compiler", action="store_true", help="also `tpserve compile`, for hosts that compile")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="packages that the host has")
    parser.add_argument("--output", type=Path, default=Path("tpserve-offline.tar.xz"))
    args = parser.parse_args()
    wheels_dir = ROOT / ".cache" / "offline" / args.python
    wheels_dir.mkdir(parents=True, exist_ok=True)
    names = requirements(args.without)
    wheels = download(names, args.python, wheels_dir)
    with tempfile.TemporaryDirectory(dir=wheels_dir) as scratch:
        tree = Path(scratch) / "tpserve-offline"
        site = tree / "site"
        for wheel in wheels:
            unpack(wheel, site, keep_all=args.with_compiler)
        add_package(site, with_compiler=args.with_compiler)
        for library in args.library:
            shutil.copytree(library, tree / "libraries" / library.name)
        shutil.copy(Path(__file__).parent / "install.sh", tree / "install.sh")
        facts = {"python": args.python, "packages": names, "without": args.without, "files": hashes(tree)}
        (tree / "BUNDLE.json").write_text(json.dumps(facts, indent=1) + "\n")
        size = write_archive(tree, args.output)
    print(f"{args.output}: {size / 2**20:.1f} MiB, {len(wheels)} wheels, {len(args.library)} libraries")
    return 0


def requirements(without: Sequence[str]) -> list[str]:
    """Return what serving on GPUs needs, with what those need, at the versions of the lock file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, found, version = line.partition("==")
        if found:
            lock[canonical(name)] = version
    wanted, seen = [*project["dependencies"], *project["optional-dependencies"]["cuda"]], set()
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"]
    command += ["-c", str(ROOT / "requirements.lock"), *wanted]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    for package in json.loads(report.stdout)["install"]:
        seen.add((canonical(package["metadata"]["name"]), package["metadata"]["version"]))
    # As everywhere: alone, without the PyTorch that it asks for.
    for requirement in project["optional-dependencies"]["structured"]:
        name, _, version = requirement.partition("==")
        seen.add((canonical(name), version))
    left_out = {canonical(name) for name in without}
    return sorted(f"{name}=={lock.get(name, version)}" for name, version in seen if name not in left_out)


def download(names: Sequence[str], python: str, folder: Path) -> list[Path]:
    """Return a wheel of each requirement for the host's Python, from the registry or from earlier."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    found = []
    for requirement in names:
        name, _, version = requirement.partition("==")
        if not (have := wheel_of(folder, name, version)):
            subprocess.run([*command, requirement], check=True)
            have = wheel_of(folder, name, version)
        if have is None:
            raise SystemExit(f"no wheel of {requirement} for Python {python} was found")
        found.append(have)
    return found


def wheel_of(folder: Path, name: str, version: str) -> Path | None:
    """Return the downloaded wheel of a package."""
    for wheel in folder.glob("*.whl"):
        stem = wheel.name.split("-")
        if canonical(stem[0]) == canonical(name) and stem[1] == version:
            return wheel
    return None


def canonical(name: str) -> str:
    """Return a package's name as registries compare it."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


def unpack(wheel: Path, site: Path, *, keep_all: bool) -> None:
    """Unpack a wheel without what serving never loads."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            top = entry.filename.partition("/")[0] + "/"
            patterns = () if keep_all and top.startswith("tvm") else NOT_SERVING.get(top, ())
            if any(fnmatch(entry.filename, pattern) for pattern in patterns):
                continue
            path = Path(archive.extract(entry, site))
            mode = entry.external_attr >> 16
            if mode & 0o111 and path.is_file():
                path.chmod(0o755)
    for data in site.glob("*.data"):  # scripts and files that an installer would put elsewhere
        for part in ("purelib", "platlib"):
            if (data / part).is_dir():
                shutil.copytree(data / part, site, dirs_exist_ok=True)
        if (data / "scripts").is_dir():
            shutil.copytree(data / "scripts", site / "bin", dirs_exist_ok=True)
        shutil.rmtree(data)


def add_package(site: Path, *, with_compiler: bool) -> None:
    """Copy this project into the tree."""
    package = ROOT / "deploy" / "python" / "tpserve"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    target = site / "tpserve"
    target.mkdir(parents=True)
    for path in package.iterdir():
        if path.is_file():
            shutil.copy(path, target / path.name)
    for name in [*SOURCES, *(["compile"] if with_compiler else [])]:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)


def hashes(tree: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the bundle's own top and of the libraries."""
    files = [path for path in (tree / "libraries").rglob("*") if path.is_file()]
    files += [path for path in (tree / "site" / "tpserve").rglob("*") if path.is_file()]
    return {str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def write_archive(tree: Path, output: Path) -> int:
    """Write a reproducible .tar.xz; return its size in bytes."""

    def members() -> Iterator[tuple[Path, str]]:
        for path in sorted(tree.rglob("*")):
            yield path, str(path.relative_to(tree.parent))

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        return member

    # Ray's programs repeat one another over tens of megabytes.
    filters: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 128 << 20}]
    with lzma.open(output, "wb", filters=filters) as compressed, tarfile.open(fileobj=compressed, mode="w") as archive:
        for path, name in members():
            archive.add(path, name, recursive=False, filter=plain)
    return output.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
