"""What tests of the real server call left behind is the server's own, and nobody else's."""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server import Footprint, environment

_LISTENER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listener(mark: str) -> Iterator[int]:
    """Run a process with this mark that listens on the port given."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(mark)
    )
    with process:
        assert process.stdin
        assert process.stdout
        yield int(process.stdout.readline())
        process.stdin.close()


def test_a_port_that_somebody_else_took_since_is_not_left_behind() -> None:
    footprint = Footprint(uuid.uuid4().hex)
    with listener(footprint.mark) as port:
        footprint.look()
        assert port in footprint.sockets.values()
    with socket.create_server(("127.0.0.1", port)):
        assert footprint.remains() == []


def test_a_socket_that_another_process_was_given_is_left_behind() -> None:
    footprint = Footprint(uuid.uuid4().hex)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, number = server.getsockname()[1], server.fileno()
        waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        with subprocess.Popen(
            waiting, stdin=subprocess.PIPE, env=environment(footprint.mark), pass_fds=[number]
        ) as process:
            footprint.look()
            assert process.stdin
            process.stdin.close()
        assert footprint.remains() == [f"port {port}"]
        with pytest.raises(AssertionError, match=f"port {port}"):
            footprint.assert_gone(within_s=0.1)
    footprint.assert_gone(within_s=1)
