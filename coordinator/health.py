"""What the three probes of an orchestrator mean, by the state that the step heartbeat gives.

state          /health/startup   /health/ready   /health/live
starting       503 until it was ready once       200
ready          200               200             200    busy or idle: steps advance, or there are none to run
stalled        200               503             200    work waits and no step ends; the deadline of a step acts on it
rebuilding     200               503             200    a rank was lost; requests wait for their replay
draining       200               503             200
dead           503               503             503    nothing here brings it back: restart the process
"""

from __future__ import annotations

from typing import Literal

Probe = Literal["startup", "ready", "live"]
PROBES: tuple[Probe, ...] = ("startup", "ready", "live")


def passes(probe: Probe, status: str, *, was_ready: bool) -> bool:
    """Return whether a probe passes.

    Parameters
    ----------
    status
        The engine's state in lower case; a gateway also knows `disconnected` and `unresponsive`.
    was_ready
        Whether the engine has ever been ready.
    """
    if status == "dead":
        return False
    if probe == "startup":
        return was_ready or status == "ready"
    return status == "ready" if probe == "ready" else True
