"""`tpserve chat MODEL`: the command."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tpserve.coordinator.chat_cli.backends import EngineBackend, ServerBackend
from tpserve.coordinator.chat_cli.conversation import Backend, Conversation, SettingError
from tpserve.coordinator.chat_cli.terminal import PipeReader, PromptReader, converse
from tpserve.coordinator.engine_door import DOOR_FIELDS, add_door_arguments
from tpserve.coordinator.gateway.errors import ApiError
from tpserve.coordinator.python_engine.engine import MLCEngine
from tpserve.coordinator.python_engine.errors import EngineError
from tpserve.coordinator.python_engine.launcher import options_of_flags


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command itself; the engine's come from `tpserve serve`."""
    made = argparse.ArgumentParser(
        prog="tpserve chat",
        description="Chat with a model in the terminal.",
        epilog="Any flag of `tpserve serve` that concerns the engine may be given too: --tp 2, --device cpu, ...",
        allow_abbrev=False,
    )
    made.add_argument("model", nargs="?", help="Hugging Face folder, GGUF file, HF://org/name, or a server's model")
    made.add_argument("--base-url", help="talk to this server instead of starting an engine")
    made.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="for --base-url")
    made.add_argument("--ssl-ca-certs", type=Path, metavar="PEM", help="authorities for --base-url, besides the usual")
    made.add_argument("--engine", metavar="HOST:PORT", help="talk to this running engine instead of starting one")
    add_door_arguments(made)
    made.add_argument("--system", help="system prompt")
    made.add_argument("--set", dest="settings", default="", help="settings to begin with, as for /set")
    made.add_argument("--log-file", type=Path, help="keep the engine's log here")
    return made


def main(argv: list[str] | None = None) -> int:
    """Chat until the user leaves; return the exit code, 1 if a message of a pipe got no answer."""
    args, engine_flags = parser().parse_known_args(argv)
    backend: Backend | None = None
    try:
        backend, model = _open(args, engine_flags)
        conversation = Conversation(backend, model=model, system=args.system)
        conversation.set(args.settings)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            sys.stdout.write("Type a message, or /help.\n")
        all_answered = converse(conversation, PromptReader() if is_terminal else PipeReader(), sys.stdout)
    except (ApiError, EngineError, SettingError, TypeError, ValueError) as error:
        sys.stderr.write(f"tpserve chat: error: {error}\n")
        return 1
    except KeyboardInterrupt:  # while it starts
        return 130
    finally:
        if backend is not None:
            backend.close()
    return 0 if is_terminal or all_answered else 1


def _open(args: argparse.Namespace, engine_flags: list[str]) -> tuple[Backend, str | None]:
    """Return who answers, and the model's name to ask for."""
    if args.ssl_ca_certs is not None and args.base_url is None:
        raise ValueError("--ssl-ca-certs is for --base-url: an engine is met by --engine-ssl-ca-certs")
    door_options = {name: value for name in DOOR_FIELDS if (value := getattr(args, name)) is not None}
    if args.base_url is not None or args.engine is not None:
        if engine_flags:
            raise ValueError(f"{engine_flags[0]} is for an engine that is started here, not for a running one")
    if args.base_url is not None:
        server = ServerBackend(args.base_url, args.api_key, args.ssl_ca_certs)
        return server, args.model or server.default_model()
    if args.engine is not None:
        return EngineBackend(MLCEngine(args.model, address=args.engine, start_timeout_s=30.0, **door_options)), None
    if args.model is None:
        raise ValueError("give the MODEL to chat with, or --base-url of a running server")
    options = options_of_flags(args.model, engine_flags) | door_options
    log_file: Path = args.log_file or Path(tempfile.mkdtemp(prefix="tpserve-chat-")) / "engine.log"
    if sys.stdin.isatty():
        sys.stdout.write(f"Starting {args.model} (log: {log_file}) ...\n")
        sys.stdout.flush()
    # A log that was not asked for is kept only if the engine cannot start, as it says why.
    unwanted = None if args.log_file is not None else log_file.parent
    return EngineBackend(MLCEngine(args.model, log_file=log_file, **options), unwanted), None


if __name__ == "__main__":
    sys.exit(main())
