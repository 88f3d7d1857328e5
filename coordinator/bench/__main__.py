"""`bench-tp`: which tensor-parallel degree to use, by measuring like the talks do.

Starts `tpserve serve` at each degree, or measures any running OpenAI endpoint, and writes text, JSON, CSV and a chart.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

import uvloop
from rich.console import Console

from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.options import add_arguments, parse
from tpserve.coordinator.bench.session import Session


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench-tp", description="Measure time per output token and throughput by tensor-parallel degree and load."
    )
    add_arguments(parser)
    return run(parser.parse_args(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Measure what parsed arguments ask for; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        session = Session(parse(args), Console())
    except BenchError as error:
        sys.stderr.write(f"bench-tp: error: {error}\n")
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(session.measure_all())


if __name__ == "__main__":
    sys.exit(main())
