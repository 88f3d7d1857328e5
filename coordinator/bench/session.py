"""One run from begin to end: every configuration, every load; what is measured is written at once."""

from __future__ import annotations

import asyncio
import datetime
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from rich.console import Console

from tpserve.coordinator.bench import environment
from tpserve.coordinator.bench.advice import advice
from tpserve.coordinator.bench.chart import draw, has_matplotlib
from tpserve.coordinator.bench.client import Client, Load, api_root, trusting
from tpserve.coordinator.bench.definitions import measure
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.options import Options, comparable
from tpserve.coordinator.bench.report import text_block, write_csv
from tpserve.coordinator.bench.results import Configuration, Point, Run, request_rows
from tpserve.coordinator.bench.server import running, serve_command
from tpserve.coordinator.bench.speculation import read_drafts
from tpserve.coordinator.bench.view import View
from tpserve.coordinator.draft_counts import Drafts

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_PROBE = 2**33
"""Number of the request that finds out what an endpoint can do."""

T = TypeVar("T")


class _Interrupted(Exception):
    """Ctrl-C, while nothing was being measured."""


class Session:
    """Measures what the options say.

    Parameters
    ----------
    options
        Checked.
    console
        Where figures and progress are shown.
    clock, transport
        Of the client.

    Raises
    ------
    BenchError
        If the folder has results that these options do not go with.
    """

    def __init__(
        self,
        options: Options,
        console: Console,
        *,
        clock: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._options = options
        self._console = console
        self._clock = clock
        self._transport = transport
        self._stop = asyncio.Event()
        self._failed = False
        self._json = options.output_dir / "results.json"
        self._run = self._begin_run()

    async def measure_all(self) -> int:
        """Measure, write, and advise; return the exit code.

        The code is 0 if everything asked for was measured without a failed request, 130 after Ctrl-C, else 1.
        """
        options = self._options
        todo = [
            (configuration, loads)
            for configuration in options.configurations
            if (loads := [load for load in options.loads() if not self._run.has(configuration, *load[:2])])
        ]
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._interrupt)
        try:
            with View(self._console, sum(len(loads) for _, loads in todo), self._run.points) as view:
                if options.chart and not has_matplotlib():
                    view.say("No chart without matplotlib: pip install 'tpserve[bench]', then --resume", "yellow")
                for configuration, loads in todo:
                    await self._measure_configuration(configuration, loads, view)
                    if self._stop.is_set():
                        break
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)
        self._finish()
        return INTERRUPTED if self._stop.is_set() else int(self._failed)

    def _interrupt(self) -> None:
        self._stop.set()
        # A second Ctrl-C does not wait for a server that takes its time to end.
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    def _begin_run(self) -> Run:
        options = self._options
        if self._json.exists():
            if not options.resume:
                raise BenchError(f"{self._json} is there: add --resume, or choose another --output-dir")
            run = Run.load(self._json)
            before, now = comparable(dict(run.arguments)), comparable(options.arguments)
            other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if other:
                raise BenchError(
                    f"{self._json} was measured with another --{other[0].replace('_', '-')}: "
                    f"{before.get(other[0])}, not {now.get(other[0])}"
                )
            return run
        options.output_dir.mkdir(parents=True, exist_ok=True)
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Run(started_at, environment.commit(), environment.device(), environment.versions(), options.arguments)

    async def _measure_configuration(
        self, configuration: Configuration, loads: Sequence[tuple[int | None, float | None, Load]], view: View
    ) -> None:
        """Measure all loads of one configuration; what keeps it from that is told, and the others go on."""
        try:
            async with self._endpoint(configuration, view) as url:
                await self._measure_loads(configuration, url, loads, view)
        except BenchError as error:
            self._failed = True
            view.say(f"{configuration.label}: {error}", "red")
        except _Interrupted:
            view.say("Interrupted.", "yellow")

    @asynccontextmanager
    async def _endpoint(self, configuration: Configuration, view: View) -> AsyncIterator[str]:
        """Yield the address of what is measured, started if need be."""
        if configuration.base_url is not None:
            yield configuration.base_url
            return
        options = self._options
        assert options.model is not None
        command = serve_command(
            options.model,
            configuration,
            max_num_seqs=max(options.concurrencies) if options.is_closed_loop else None,
            prefix_cache=options.prefix_cache,
        )
        name = "".join(c if c.isalnum() or c in "=._-" else "_" for c in configuration.label)
        view.wait_for(f"{configuration.label}: starting the server")
        server = running(command, options.output_dir / f"server-{name}.log", start_timeout_s=options.start_timeout_s)
        url = await self._unless_stopped(server.__aenter__())
        try:
            yield url
        finally:
            view.wait_for(f"{configuration.label}: stopping the server")
            await server.__aexit__(None, None, None)

    async def _measure_loads(
        self,
        configuration: Configuration,
        url: str,
        loads: Sequence[tuple[int | None, float | None, Load]],
        view: View,
    ) -> None:
        options = self._options
        if configuration.base_url is not None and options.model is not None:
            model = options.model
        else:
            model = await self._unless_stopped(first_model(url, options.api_key, options.ca_certs))
        client = Client(
            url,
            model,
            api=options.api,
            api_key=options.api_key,
            ignore_eos=options.ignore_eos,
            counts_by_chunk=options.counts_by_chunk,
            timeout_s=options.timeout_s,
            clock=self._clock,
            transport=self._transport,
            ca_certs=options.ca_certs,
        )
        async with client:
            view.wait_for(f"{configuration.label}: first request")
            await self._unless_stopped(client.probe(options.workload.item(_PROBE, 0)))
            for concurrency, rate, load in loads:
                name = f"{configuration.label}, {concurrency or rate or 'trace'}"
                view.wait_for(f"{name}: warming up")
                before = await self._drafts(url)
                await self._unless_stopped(client.warm_up(options.workload, load))
                view.begin(name, load.num_requests)
                sent = await client.run(options.workload, load, stop=self._stop, on_change=view.records_changed)
                metrics = measure(sent.records, sent.window, options.slo)
                if metrics.num_succeeded or metrics.num_unfinished or metrics.num_failed:
                    rows = request_rows(sent.records)
                    after = await self._drafts(url)
                    drafts = after.since(before) if before is not None and after is not None else None
                    self._keep(Point(configuration, concurrency, rate, metrics, sent.complete, rows, drafts), view)
                if self._stop.is_set():
                    raise _Interrupted
                if not metrics.num_succeeded and sent.complete:
                    raise BenchError(f"no request succeeded: {next(iter(metrics.errors), 'none was sent')}")

    async def _drafts(self, url: str) -> Drafts | None:
        return await read_drafts(url, self._options.api_key, self._transport, trusting(self._options.ca_certs))

    def _keep(self, point: Point, view: View) -> None:
        self._run.add(point)
        self._run.save(self._json)
        write_csv(self._run.points, self._options.output_dir / "results.csv")
        self._failed |= bool(point.metrics.num_failed)
        view.point_done(point)

    def _finish(self) -> None:
        """Write the text, the chart and the advice of all points, those of earlier runs included."""
        run, folder = self._run, self._options.output_dir
        if not run.points:
            return
        lines = advice(run.points)
        (folder / "report.txt").write_text("\n\n".join([*map(text_block, run.points), "\n".join(lines)]) + "\n")
        written: list[Path] = [self._json, folder / "results.csv", folder / "report.txt"]
        charts = [folder / "chart.png", folder / "chart.svg"]
        if self._options.chart and has_matplotlib() and draw(run.points, self._title(), charts):
            written += charts
        for line in (*lines, f"Written: {', '.join(map(str, written))}"):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _title(self) -> str:
        options = self._options
        model = Path(options.model).name if options.model else "the endpoint's model"
        return f"{model}, {options.workload.name}, {self._run.device}"

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for something that Ctrl-C cuts short."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise _Interrupted
            return task.result()
        finally:
            stopped.cancel()


async def first_model(url: str, api_key: str | None, ca_certs: Path | None = None) -> str:
    """Return the first model that an endpoint serves.

    Raises
    ------
    BenchError
        If it does not say.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    verify = trusting(ca_certs)
    try:
        async with httpx.AsyncClient(trust_env=False, verify=verify, timeout=30, headers=headers) as http:
            reply = await http.get(f"{api_root(url)}/models")
            reply.raise_for_status()
            name: str = reply.json()["data"][0]["id"]
            return name
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{url} does not say which model it serves: {type(error).__name__}: {error}") from None
