"""What the user sees: results on standard output, bars and remarks on standard error.

On a terminal work shows as a bar that goes away when it is done; elsewhere as a plain line now and then. With `--json` standard output
has one JSON document and nothing else. Of several processes only the first speaks.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

SOON, EVERY = 2.0, 10.0  # seconds until the first plain line of a task, and between two
WIDE = 160  # columns where nobody looks: a file or a pipe should not cut the names


class Step(Protocol):
    """Told how far a task is: done, out of how many (0: not known), and what is being worked on."""

    def __call__(self, done: int, total: int, now: str = "") -> None: ...


def rank_from_environment() -> int:
    """Which of the processes that `torchrun` started this is; 0 without it."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@dataclass
class Screen:
    """One per command. `quiet` leaves results and errors alone and drops the rest."""

    json: bool = False
    quiet: bool = False
    silent: bool = field(default_factory=lambda: rank_from_environment() > 0)

    def __post_init__(self) -> None:
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def show(self, *parts: RenderableType) -> None:
        """Results for people; not shown with --json."""
        if not (self.json or self.silent):
            for part in parts:
                self.out.print(part)

    def show_json(self, result: Any) -> None:
        """The result for programs, with --json."""
        if self.json and not self.silent:
            sys.stdout.write(json.dumps(_finite(result), indent=1, default=str) + "\n")

    def say(self, text: str, style: str = "") -> None:
        """A remark."""
        if not (self.quiet or self.silent):
            self.err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str) -> Iterator[Step]:
        """A piece of work that may take a while."""
        started = time.perf_counter()
        if self.quiet or self.silent:
            yield _nothing
            return
        if not self.err.is_terminal:
            yield _Lines(title, self)
            return
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[now]}"),
            console=self.err,
            transient=True,
            speed_estimate_period=600,  # blocks of a large model take longer than rich's half minute
        )
        with bar:
            number = bar.add_task(title, total=None, now="")

            def step(done: int, total: int, now: str = "") -> None:
                bar.update(number, completed=done, total=total or None, now=now)

            yield step
        if (spent := time.perf_counter() - started) > SOON:
            self.say(f"{title}: {spent:.1f} s", style="dim")


class _Lines:
    """Plain lines for logs: none for a short task, one every ten seconds for a long one."""

    def __init__(self, title: str, screen: Screen) -> None:
        self.title, self.screen = title, screen
        self.started = time.perf_counter()
        self.next = self.started + SOON

    def __call__(self, done: int, total: int, now: str = "") -> None:
        clock = time.perf_counter()
        if clock < self.next:
            return
        self.next = clock + EVERY
        left = f", about {(clock - self.started) / done * (total - done):.0f} s left" if done and total else ""
        count = f"{done} of {total}" if total else f"{done}"
        self.screen.say(f"{self.title}: {count}{f' ({now})' if now else ''}{left}")


def table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """An empty table in the house's looks: the first `left` columns are words, the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return made


def _console(stderr: bool) -> Console:
    # bound now: bars go on while a library is kept from writing to sys.stderr
    stream = sys.stderr if stderr else sys.stdout
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=WIDE)
    return console


def _nothing(done: int, total: int, now: str = "") -> None:
    pass


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become null, so that every parser can read the result."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
