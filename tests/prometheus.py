"""A real Prometheus of this machine's, which scrapes what a test says and answers queries."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from server import free_port, until

BINARY = shutil.which("prometheus")
NEEDS = "prometheus is not installed: apt-get install prometheus"


class Prometheus:
    """Where it listens."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=20, trust_env=False)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now; fail if it is an error."""
        reply = self._http.get("/api/v1/query", params={"query": expression})
        body = reply.json()
        assert body["status"] == "success", f"{expression}: {body}"
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule with its health."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()


@contextmanager
def running_prometheus(
    folder: Path, scrape_configs: Sequence[dict[str, Any]], rules: Path | None = None
) -> Iterator[Prometheus]:
    """Run it with a scrape each second."""
    assert BINARY is not None, NEEDS
    port = free_port()
    config: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": list(scrape_configs),
    }
    if rules is not None:
        fast = folder / "rules.yaml"
        fast.write_text(rules.read_text().replace("interval: 15s", "interval: 1s"))
        config["rule_files"] = [str(fast)]
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = [f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [BINARY, *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(prometheus.ready, within_s=30, what="prometheus is ready")
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(20)
