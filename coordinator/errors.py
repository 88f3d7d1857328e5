"""Errors of the coordinator outside the scheduler.

CoordinatorError
├── RankLost       a rank of the TP group died, failed or missed its deadline
└── ClusterError   the TP group cannot be started
"""


class CoordinatorError(RuntimeError):
    """The coordinator cannot do what was asked."""


class RankLost(CoordinatorError):
    """A rank is gone; its whole group is rebuilt.

    Parameters
    ----------
    node
        Where it was, if that is another node than the coordinator's.
    name
        What it is called in messages and metrics; empty: by its number.
    """

    def __init__(self, rank: int, cause: str, node: str = "", name: str = "") -> None:
        self.name = name or str(rank)
        super().__init__(f"rank {self.name}{f' on {node}' if node else ''}: {cause}")
        self.rank = rank
        self.cause = cause


class ClusterError(CoordinatorError):
    """The TP group cannot be started; the message names the rank and the cause."""
