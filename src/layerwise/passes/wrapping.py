"""Taking over a model for a while: eval mode, other `forward`s, and errors of its own code as ours. Everything can be undone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import LayerwiseError, WalkError

Undo = Callable[[], None]


def set_eval(model: nn.Module) -> Undo:
    """Eval mode; what it returns gives every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()

    def undo() -> None:
        for module in training:
            module.training = True

    return undo


def replace_forward(module: nn.Module, new: Callable[..., Any]) -> Undo:
    """The module's `forward` is `new`; its hooks stay. What it returns puts the old one back."""
    original, had = module.forward, "forward" in vars(module)
    module.forward = new

    def undo() -> None:
        if had:
            module.forward = original
        else:
            del module.forward

    return undo


def not_reached(block: str) -> WalkError:
    """For a block that has layers and never ran."""
    return WalkError(f'no calibration batch reaches block "{block}"; exclude its layers or give data that does.')


def cannot_run(error: Exception, batch: int, block: str | None) -> WalkError:
    """An error of the model's own code as one line with the batch, and the block if it was in one."""
    where = f' in "{block}"' if block else ""
    reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
    return WalkError(
        f"the model cannot run on batch {batch}{where}: {type(error).__name__}: {reason}. Check that the data is what"
        " the model takes."
    )


@contextmanager
def running(batch: int) -> Iterator[None]:
    """Around the model's own code: what it raises, of whatever class, is a WalkError with the batch; our own errors pass."""
    try:
        yield
    except LayerwiseError:
        raise
    except Exception as error:
        raise cannot_run(error, batch, None) from error
