"""Progress bars of long phases, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show a bar for as long as the context lasts; give the function that moves it."""
    # Imported here: what is taken from the cache must not pay for it.
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
