"""Errors of one rank; each ends the rank and is told to the coordinator.

WorkerError
├── LibraryError    the artifact cannot be used on this host or with this configuration
├── ReceptionError  the model or the library cannot be kept on this node
├── WeightsError    the checkpoint does not fill the library's parameters
└── PlanError       a step plan contradicts what the worker holds: a bug of the coordinator
"""


class WorkerError(RuntimeError):
    """The rank cannot go on."""


class LibraryError(WorkerError):
    """The artifact cannot be used here."""


class ReceptionError(WorkerError):
    """What the coordinator's node sends cannot be kept here."""


class WeightsError(WorkerError):
    """A weight is missing from the checkpoint or has another shape."""


class PlanError(WorkerError):
    """A step plan contradicts the state of the batch."""
