"""The model and its draft, fetched and compiled by a process of its own before a server starts."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tpserve.coordinator.children import AlreadyTold, ServeError, log_lines
from tpserve.coordinator.process import end_with_parent
from tpserve.coordinator.speculation import SpeculationChoice, check_draft, check_draft_tokens, draft_step_tokens
from tpserve.proto.manifest import Manifest

_POLL_S = 0.1


class ModelBuild:
    """Runs the compiler as the flags of `tpserve serve` say.

    Parameters
    ----------
    folders
        Takes temporary folders that must live as long as the server; whoever has it removes them.
    is_stopping
        Whether the server is to end; a compiler that runs is then ended too.

    Raises
    ------
    ServeError
        By each of the methods, if the compiler is ended or stopped, and as `AlreadyTold` if it fails.
    """

    def __init__(self, args: argparse.Namespace, folders: list[Path], is_stopping: Callable[[], bool]) -> None:
        self._args = args
        self._folders = folders
        self._is_stopping = is_stopping

    @property
    def needs_tokenizer(self) -> bool:
        """Whether texts are read by the model's own tokenizer: by a gateway, or by the process that this ends with."""
        return not self._args.no_gateway or self._args.parent_pid is not None

    def inspect_draft(self, speculation: SpeculationChoice, model: str) -> SpeculationChoice:
        """Return what is to be done with a draft, which may be an EAGLE-3 head; fetched now if it must be."""
        found = self._run("inspect", model, [])
        if found["method"] == "eagle3":
            speculation = speculation.of_head(self._args.tp, self._args.draft_tp)
        return replace(speculation, draft_model=found["model_dir"])  # so that nothing is fetched or converted twice

    def model(self, max_num_seqs: int, device: str, num_draft_tokens: int, head: str | None) -> dict[str, str]:
        """Return the folders of the model and its library, compiled now if it must be.

        Parameters
        ----------
        head
            The EAGLE-3 head that is to read its hidden rows, if there is one.
        """
        args = self._args
        if args.model_lib is not None:
            model_dir = Path(args.model).expanduser()
            if not (model_dir / "config.json").is_file():
                raise ServeError(f"--model-lib: {model_dir} has no config.json; give a Hugging Face folder as MODEL")
            return {"model_dir": str(model_dir.resolve()), "artifact_dir": str(args.model_lib.expanduser().resolve())}
        flags = ["--tp", str(args.tp), "--quantization", args.quantization, "--max-num-seqs", str(max_num_seqs)]
        flags += ["--max-num-draft-tokens", str(num_draft_tokens), "--kv-cache-dtype", args.kv_cache_dtype]
        if args.max_model_len is not None:
            flags += ["--max-model-len", str(args.max_model_len)]
        if head is not None:
            flags += ["--draft-model", head]
        if self.needs_tokenizer:
            flags.append("--require-tokenizer")
        return self._compile(args.model, device, args.max_num_batched_tokens, flags)

    def draft(
        self, speculation: SpeculationChoice, folders: dict[str, str], target: Manifest, device: str
    ) -> tuple[dict[str, str], Manifest]:
        """Return the folders and the manifest of the draft's library, compiled now if it must be."""
        assert speculation.draft_model is not None
        flags = ["--tp", str(speculation.draft_tp), "--max-num-seqs", str(target.max_num_seqs)]
        flags += ["--max-model-len", str(target.max_model_len), "--cut-model-len"]
        if speculation.method == "eagle3":  # it takes the model's embedding as that is stored, and is not fp8 itself
            quantization = "q0bf16" if target.quantization == "fp8" else target.quantization
            flags += ["--target-model", folders["model_dir"], "--quantization", quantization]
        else:
            check_draft_tokens(Path(folders["model_dir"]), Path(speculation.draft_model))
        num_tokens = draft_step_tokens(self._args.max_num_batched_tokens, target.max_num_seqs, on_gpu=device == "cuda")
        draft_folders = self._compile(speculation.draft_model, device, num_tokens, flags)
        draft = Manifest.load(Path(draft_folders["artifact_dir"]))
        check_draft(target, draft)
        return draft_folders, draft

    def _compile(self, model: str, device: str, num_tokens: int, flags: list[str]) -> dict[str, str]:
        """Return the folders of a model and its library, compiled by the flags."""
        args = self._args
        flags = ["--device", device, *flags, "--kernels", args.kernels, "--load-format", args.load_format]
        return self._run("compile", model, [*flags, "--max-num-batched-tokens", str(num_tokens)])

    def _run(self, command_name: str, model: str, flags: list[str]) -> dict[str, str]:
        """Run a command of the compiler as a process of its own, so that this one never loads it; return its answer."""
        args = self._args
        command = [sys.executable, "-m", "tpserve.compile", command_name, model, *flags]
        command += ["--jit-policy", args.jit_policy, "--download-cache-policy", args.download_cache_policy]
        environ = dict(os.environ)
        if "OFF" in (args.jit_policy, args.download_cache_policy):
            # What is not kept in the cache is built in a temporary folder, which is needed for as long as this runs.
            self._folders.append(Path(tempfile.mkdtemp(prefix="tpserve-build-")))
            environ["TMPDIR"] = str(self._folders[-1])
        pid = os.getpid()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if args.log_format == "json" else None,
            text=True,
            env=environ,
            start_new_session=True,  # as in `spawn_child`; and its own compilers end with it
            preexec_fn=lambda: end_with_parent(pid),
        ) as process:
            if process.stderr is not None:
                threading.Thread(target=log_lines, args=(process.stderr,), daemon=True).start()
            while process.poll() is None:
                if self._is_stopping():
                    os.killpg(process.pid, signal.SIGTERM)
                    raise ServeError("stopped while the model was prepared")
                time.sleep(_POLL_S)
            assert process.stdout is not None
            output = process.stdout.read()
        if process.returncode < 0:
            raise ServeError(f"the compiler was ended by {signal.Signals(-process.returncode).name}")
        if process.returncode != 0:
            raise AlreadyTold("the model could not be prepared")
        folders: dict[str, str] = json.loads(output)
        return folders
