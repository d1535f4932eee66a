"""The walk under the command line: a bar from its events, a work folder that outlives a kill, and what is said afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LayerwiseError, SaveError
from .screen import Screen, Step

if TYPE_CHECKING:
    from ..engine import Event, Work
    from ..passes import Waiting

MOST_NOTES = 8  # of one kind; --json has all


class Stopped(LayerwiseError):
    """Interrupted by the user; the message says how to go on."""

    exit_code = 130


def bar_of(step: Step, screen: Screen, work: "Work") -> Callable[["Event"], None]:
    """What turns the walk's events into a bar: blocks done, and the block at work. Says what memory calibration will take, and when an
    earlier run is gone on with."""
    from ..engine import BlockFinished, BlockStarted, PassesWaiting

    before = work.count
    said = False

    def show(event: "Event") -> None:
        nonlocal said
        if isinstance(event, BlockStarted):
            step(event.index, event.total, event.block)
        elif isinstance(event, PassesWaiting):
            screen.say(waiting_line(event.waiting), style="dim" if event.waiting.fits else "yellow")
        elif isinstance(event, BlockFinished):
            step(event.index + 1, event.total, event.block)
            if event.resumed and not said:
                said = True
                screen.say(f"Going on from {work.folder}: {before} of {event.total} blocks finished before.")

    return show


def waiting_line(waiting: "Waiting") -> str:
    """What waiting activations will take and what there is, in one line; where it is too much, what to do."""
    from ..io.whole import readable_size

    longest = "" if waiting.longest is None else f" (longest sample {waiting.longest} tokens)"
    where = f"in {waiting.place}" if waiting.files or waiting.place != "cpu" else "in memory"
    line = f"Waiting activations: about {readable_size(waiting.bytes)} {where}{longest}"
    if waiting.available is None:
        return f"{line}."
    line += f", {readable_size(waiting.available)} free"
    if waiting.fits:
        return f"{line}."
    shorter = "--samples" if waiting.longest is None else "--samples or --length"
    elsewhere = "another folder for --spill" if waiting.files else "let them wait in files (--spill FOLDER)"
    return f"{line}: it may not fit. Give smaller {shorter}, or {elsewhere}."


@contextmanager
def work_folder(folder: Path) -> Iterator["Work"]:
    """Ours alone for the whole job, saving included; keeps finished blocks where going on makes sense, and removes the folder where it
    does not.

    Kept: after an interrupt, a full disk, an unexpected error. Removed: after success, and after an error of ours, which the same
    command would only meet again. Raises ConfigError, nothing touched, if another run has it.
    """
    from ..engine import Work

    with Work(folder) as work:
        before = work.count
        try:
            yield work
        except KeyboardInterrupt as error:
            kept = work.count
            if not kept:
                work.clear()
            go_on = f"Blocks finished in {folder}: {kept}. Run the same command again to go on."
            how = go_on if kept else "Nothing was written."
            raise Stopped(f"stopped. {how}") from error
        except BaseException as error:
            hopeless = isinstance(error, LayerwiseError) and not isinstance(error, SaveError) and not before
            if hopeless or not work.count:
                work.clear()
            raise
        work.clear()


def show_notes(notes: tuple[str, ...], screen: Screen) -> None:
    """What a method or a solver wants the user to know; long lists are cut."""
    for note in notes[:MOST_NOTES]:
        screen.say(f"note: {note}", style="yellow")
    if len(notes) > MOST_NOTES:
        screen.say(f"note: … and {len(notes) - MOST_NOTES} more (--json lists all)", style="yellow")
