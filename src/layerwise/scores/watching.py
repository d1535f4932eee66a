"""How far a score is. It tells whoever listens; only the command line knows about a screen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Step = Callable[[int, int, str], None]
"""Told how many are done, out of how many, and what is being worked on."""

_listener: ContextVar[Step | None] = ContextVar("layerwise_listener", default=None)


@contextmanager
def watched(step: Step) -> Iterator[None]:
    """Within, every score that takes its time tells `step` how far it is, however deep it is called."""
    token = _listener.set(step)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def part(number: int, parts: int) -> Iterator[None]:
    """Within, what is told is part `number`, from 0, of so many equal ones of a longer piece of work."""
    step = _listener.get()
    if step is None:
        yield
        return
    with watched(lambda done, total, now: step(number * total + done, parts * total, now)):
        yield


def tell(done: int, total: int, now: str = "") -> None:
    """For scores: say how far this one is. Nothing happens where nobody listens."""
    step = _listener.get()
    if step is not None:
        step(done, total, now)
