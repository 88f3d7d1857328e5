"""A gateway's child processes (the compiler of grammars) start whatever gRPC's threads do at that moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server import REPOSITORY, environment

NUM_CHILDREN = 60
"""Of which nine died, by the handlers that gRPC runs when a process forks."""

SCRIPT = """
import asyncio, sys
from asyncio.subprocess import PIPE
import uvloop
from server import free_port
from tpserve.coordinator.gateway.config import GatewayConfig
from tpserve.coordinator.gateway.service import Service
from unit.gateway.scripted_engine import ScriptedEngine, seeded_script

async def main():
    address = f"127.0.0.1:{free_port()}"
    service = Service.load(GatewayConfig(address, sys.argv[1], ("tiny",)))
    server, _ = await ScriptedEngine(seeded_script(400), 400).start(address)
    service.start()
    await service.engine.wait_connected(20)

    async def ask():
        while True:
            await service.engine.metrics()

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    for _ in range(int(sys.argv[2])):
        child = await asyncio.create_subprocess_exec(sys.executable, "-S", "-E", "-c", "print(1)", stdout=PIPE)
        print(await child.wait())
    for task in asking:
        task.cancel()
    await service.close()
    await server.stop(None)

uvloop.run(main())
"""


def test_no_child_dies_of_grpc(model_dir: Path) -> None:
    changed = environment("children")
    changed["PYTHONPATH"] += f":{REPOSITORY / 'tests'}"
    command = [sys.executable, "-c", SCRIPT, str(model_dir), str(NUM_CHILDREN)]
    done = subprocess.run(command, env=changed, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"] * NUM_CHILDREN, done.stderr[-2000:]
