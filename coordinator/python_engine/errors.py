"""What the Python engine raises besides the API's own refusals (`gateway.errors.ApiError`).

EngineError        the engine cannot be started or reached, or has ended
RequestAborted     `abort` ended a request before its answer was whole
"""


class EngineError(RuntimeError):
    """The engine cannot be started or reached, or has ended; the message says why."""


class RequestAborted(RuntimeError):
    """The request was aborted by its id before its answer was whole."""
