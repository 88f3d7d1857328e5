"""The model and its draft, fetched, looked at and compiled by processes of their own before a server starts."""

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
from tpserve.coordinator.engine_choice import EngineChoice
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
    def _needs_tokenizer(self) -> bool:
        """Whether texts are read by the model's own tokenizer: by a gateway, or by the process that this ends with."""
        return not self._args.no_gateway or self._args.parent_pid is not None

    def look(self, choice: EngineChoice) -> tuple[EngineChoice, dict[str, str]]:
        """Fetch the model and its draft, and see that they can be served; compile nothing.

        Returns
        -------
        tuple[EngineChoice, dict[str, str]]
            The choice with the draft as it was found, and the model's folder, with that of its library if it is there.

        Raises
        ------
        ClusterError
            If the draft does not fit the model or the flags.
        ManifestError
            If --model-lib is not for what the flags say.
        """
        speculation = choice.speculation
        if speculation is not None and speculation.draft_model is not None:
            speculation = self._inspect_draft(speculation, speculation.draft_model)
        if speculation is not None and choice.on_gpu:
            speculation.require_gpus(self._args.tp)
        choice = replace(choice, speculation=speculation)
        if choice.library is None:
            folders = self._compile_model(choice, self._args.model, ["--dry-run"])
        else:
            folders = self._given()
            self._require(choice.library, choice)
        model_dir = Path(folders["model_dir"])
        if self._needs_tokenizer:
            _require_texts(model_dir)
        if speculation is not None and speculation.method == "draft":
            assert speculation.draft_model is not None
            check_draft_tokens(model_dir, Path(speculation.draft_model))
        return choice, folders

    def model(self, choice: EngineChoice, folders: dict[str, str]) -> tuple[dict[str, str], Manifest]:
        """Return the folders of the model and its library, compiled now if it must be, and the library's manifest.

        Parameters
        ----------
        choice, folders
            As `look` gave them.

        Raises
        ------
        ManifestError
            If the library is damaged, or not for what the flags say.
        """
        if choice.library is not None:
            return folders, choice.library
        if "artifact_dir" not in folders:
            folders = self._compile_model(choice, folders["model_dir"], [])
        manifest = Manifest.load(Path(folders["artifact_dir"]))
        self._require(manifest, choice)
        return folders, manifest

    def _inspect_draft(self, speculation: SpeculationChoice, model: str) -> SpeculationChoice:
        """Return what is to be done with a draft, which may be an EAGLE-3 head; fetched now if it must be."""
        found = self._run("inspect", model, [])
        if found["method"] == "eagle3":
            speculation = speculation.of_head(self._args.tp, self._args.draft_tp)
        return replace(speculation, draft_model=found["model_dir"])  # so that nothing is fetched or converted twice

    def _given(self) -> dict[str, str]:
        """Return the folders of a model whose library is --model-lib."""
        model_dir = Path(self._args.model).expanduser()
        if not (model_dir / "config.json").is_file():
            raise ServeError(f"--model-lib: {model_dir} has no config.json; give a Hugging Face folder as MODEL")
        return {"model_dir": str(model_dir.resolve()), "artifact_dir": str(self._args.model_lib.expanduser().resolve())}

    def _require(self, library: Manifest, choice: EngineChoice) -> None:
        """Raise ManifestError for a library that is not for what the flags say."""
        args, num_seqs, num_tokens = self._args, choice.max_num_seqs, choice.max_num_batched_tokens
        library.require(tp_size=args.tp, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
        if args.kv_cache_dtype != "auto":
            library.require_kv_dtype("bfloat16" if args.kv_cache_dtype == "bfloat16" else "float8_e4m3fn")

    def _compile_model(self, choice: EngineChoice, model: str, flags: list[str]) -> dict[str, str]:
        args, speculation = self._args, choice.speculation
        flags = ["--tp", str(args.tp), "--quantization", args.quantization, *flags]
        flags += ["--max-num-seqs", str(choice.max_num_seqs), "--kv-cache-dtype", args.kv_cache_dtype]
        if speculation is not None:
            flags += ["--max-num-draft-tokens", str(speculation.max_num_draft_tokens)]
        if args.max_model_len is not None:
            flags += ["--max-model-len", str(args.max_model_len)]
        if speculation is not None and speculation.method == "eagle3":  # whose head is to read the model's hidden rows
            assert speculation.draft_model is not None
            flags += ["--draft-model", speculation.draft_model]
        if self._needs_tokenizer:
            flags.append("--require-tokenizer")
        return self._compile(model, choice.device, choice.max_num_batched_tokens, flags)

    def draft(
        self, choice: EngineChoice, folders: dict[str, str], target: Manifest
    ) -> tuple[dict[str, str], Manifest] | tuple[None, None]:
        """Return the folders and the manifest of the draft's library, compiled now if it must be; None without a draft.

        Parameters
        ----------
        choice, folders
            As `look` and `model` gave them.
        target
            Of the model's library.
        """
        speculation = choice.speculation
        if speculation is None or speculation.draft_model is None:
            return None, None
        flags = ["--tp", str(speculation.draft_tp), "--max-num-seqs", str(target.max_num_seqs)]
        flags += ["--max-model-len", str(target.max_model_len), "--cut-model-len"]
        if speculation.method == "eagle3":  # it takes the model's embedding as that is stored, and is not fp8 itself
            quantization = "q0bf16" if target.quantization == "fp8" else target.quantization
            flags += ["--target-model", folders["model_dir"], "--quantization", quantization]
        num_tokens = draft_step_tokens(choice.max_num_batched_tokens, target.max_num_seqs, on_gpu=choice.on_gpu)
        draft_folders = self._compile(speculation.draft_model, choice.device, num_tokens, flags)
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


def _require_texts(model_dir: Path) -> None:
    """Raise ServeError for a model whose gateways would only find out when the engine has been started."""
    # Imported here: an engine whose texts are read elsewhere needs neither Jinja nor the tokenizers' library.
    from tpserve.coordinator.gateway.model import check_texts
    from tpserve.coordinator.gateway.tokenizer import ModelFilesError

    try:
        check_texts(model_dir)  # whether the tokenizer can be loaded is seen by the compiler, before it builds
    except ModelFilesError as error:
        raise ServeError(str(error)) from None
