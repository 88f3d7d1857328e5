"""A router that cannot work says why before it listens."""

from __future__ import annotations

import argparse

import pytest

from tpserve.coordinator.router.__main__ import add_arguments, config_of, main
from tpserve.coordinator.router.choice import Policy
from tpserve.coordinator.router.config import RouterConfig, parse_backend


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def test_flags_become_the_configuration() -> None:
    flags = ("--backend", "http://a:1/", "--backend", "http://[::1]:2", "--policy", "least-loaded", "--max-queued", "7")
    config = config_of(arguments(*flags, "--max-inflight-per-backend", "3", "--router-token", "x"))
    assert config.backends == ("http://a:1", "http://[::1]:2")
    assert (config.policy, config.max_queued, config.max_in_flight_per_backend) == (Policy.LEAST_LOADED, 7, 3)
    assert parse_backend("http://[::1]:2") == ("::1", 2)
    assert parse_backend("http://host") == ("host", 80)


def test_defaults_of_flags_are_those_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPSERVE_ROUTER_TOKEN", raising=False)
    assert config_of(arguments("--backend", "http://a:1")) == RouterConfig(("http://a:1",))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--backend"),
        (("--backend", "a:1"), "must be http://host:port"),
        (("--backend", "https://a:1"), "put TLS before the router"),
        (("--backend", "http://a:1/v1"), "must be http://host:port"),
        (("--backend", "http://a:99999"), "must be http://host:port"),
        (("--backend", "http://a:1", "--backend", "http://a:1"), "twice"),
        (("--backend", "http://a:1", "--port", "70000"), "port is 70000"),
        (("--backend", "http://a:1", "--max-queued", "-1"), "max_queued is -1: it must be 0 or more"),
        (("--backend", "http://a:1", "--max-inflight-per-backend", "0"), "max_in_flight_per_backend is 0"),
        (("--backend", "http://a:1", "--queue-timeout", "nan"), "queue_timeout_s is nan"),
        (("--backend", "http://a:1", "--router-token", ""), "router_token is empty"),
        (("--backend", "http://a:1", "--host", "192.0.2.77"), "cannot listen on 192.0.2.77"),
    ],
)
def test_what_cannot_be(flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(*flags)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tpserve router: error: " in last
    assert says in last
