"""The command `tpserve`: one entry for every part, each imported only when asked for."""

from __future__ import annotations

import argparse
import importlib.util
import sys

_COMMANDS = {
    "serve": "serve a model over the OpenAI API",
    "router": "one door before several servers: choice by prefix and load, streams that survive their server",
    "chat": "chat with a model in the terminal",
    "compile": "build the library of a model for one TP degree",
    "convert": "write the Hugging Face form of a GGUF file",
    "doctor": "check this host: GPUs, shared memory, limits, ports, disks, versions, and what to do",
    "bench": "measure time per output token and throughput by TP degree and load; the same as bench-tp",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="tpserve", description="Tensor-parallel LLM serving.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    serve = commands.add_parser("serve", help=_COMMANDS["serve"])
    router = commands.add_parser("router", help=_COMMANDS["router"])
    if args[:1] == ["router"]:
        from tpserve.coordinator.router.__main__ import add_arguments as add_router_arguments
        from tpserve.coordinator.router.__main__ import main as router_main

        add_router_arguments(router)
        return router_main(parser.parse_args(args))
    if args[:1] in (["compile"], ["convert"]):
        if importlib.util.find_spec("tpserve.compile") is None:
            remedy = "make the bundle with --with-compiler, or compile elsewhere and give serve --model-lib"
            print(
                f"tpserve {args[0]}: error: this installation only serves, the compiler is not in it: {remedy}",
                file=sys.stderr,
            )
            return 1
        from tpserve.compile.__main__ import main as compile_main

        return compile_main(args)
    if args[:1] == ["bench"]:
        from tpserve.coordinator.bench.__main__ import main as bench_main

        return bench_main(args[1:])
    if args[:1] == ["chat"]:
        from tpserve.coordinator.chat_cli.__main__ import main as chat_main

        return chat_main(args[1:])
    if args[:1] == ["doctor"]:
        from tpserve.coordinator.doctor.__main__ import main as doctor_main

        return doctor_main(args[1:])
    for name in ("chat", "compile", "convert", "doctor", "bench"):
        commands.add_parser(name, help=_COMMANDS[name])
    from tpserve.coordinator.serve import main as serve_main
    from tpserve.coordinator.serve_arguments import add_arguments

    add_arguments(serve)
    return serve_main(parser.parse_args(args, argparse.Namespace(argv=args)))


if __name__ == "__main__":
    sys.exit(main())
