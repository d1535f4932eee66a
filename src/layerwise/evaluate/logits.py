"""Next-token losses of a causal language model, and of two side by side: the sums behind every number of this room.

Cross-entropy and divergence are computed in float32 whatever the model's dtype: a loss in bfloat16 alone is off by about
0.5 %. Rows are upcast a few at a time, so that the logits of a long window never exist a second time in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, DataError, ModelError, ScoreError
from ..tasks.batches import Batch, Batches, call
from ..tasks.divergence import kl_rows

Convention = Literal["standard", "wanda", "all"]
Progress = Callable[[int, int], None]  # batches done, batches in all

CHUNK = 2**23  # logits upcast at once: 32 MB in float32


@dataclass
class Sums:
    """Over all scored tokens. nll and kl in nats; `dense_nll`, `kl` and `agree` stay 0 without a second model."""

    windows: int = 0
    tokens: int = 0
    nll: float = 0.0
    dense_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0


def token_sums(
    model: nn.Module,
    batches: Batches,
    *,
    against: nn.Module | None = None,
    convention: Convention = "standard",
    progress: Progress | None = None,
    cached: Callable[[Batch], Tensor] | None = None,
) -> Sums:
    """One forward of each model per batch. Every window's tokens 2..L are predicted from those before them.

    cached: gives the logits of `model` instead, through a KV cache.

    "standard" and "wanda" drop windows shorter than the others; "all" counts them, token by token. "wanda" also asks for windows
    of the model's whole context. Raises ModelError, DataError, ScoreError (logits that are not numbers).
    """
    length = _window_length(model, batches, convention)
    sums = Sums()
    for done, batch in enumerate(batches, start=1):
        ids = batch["input_ids"]
        if ids.shape[1] == length or convention == "all":
            own = logits_of(model, batch) if cached is None else cached(batch)
            _add(sums, own, None if against is None else logits_of(against, batch), ids)
            if sums.nll != sums.nll or sums.kl != sums.kl:
                raise ScoreError(
                    f"the logits are not finite numbers in batch {done} of {len(batches)}. Check the weights for NaN."
                )
        if progress is not None:
            progress(done, len(batches))
    return sums


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """(batch, length, vocabulary) logits of a causal language model, in its own dtype. Raises ModelError for other models."""
    output = call(model, batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != batch["input_ids"].shape:
        raise ModelError(
            f"{type(model).__name__} gives no logits for every token: perplexity needs a causal language model."
        )
    return logits


def dtype_of(model: nn.Module) -> str:
    """The dtypes of the floating parameters, "bfloat16" or "bfloat16+float32"."""
    found = {
        str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters() if parameter.is_floating_point()
    }
    return "+".join(sorted(found)) or "none"


def context_of(model: nn.Module) -> int | None:
    """The longest input the configuration promises (`max_position_embeddings` or a synonym), or None where it says nothing."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def _window_length(model: nn.Module, batches: Batches, convention: Convention) -> int:
    if not batches or any("input_ids" not in batch for batch in batches):
        raise DataError("perplexity needs batches of token ids (`input_ids`). Make them with `held_out`.")
    if convention not in ("standard", "wanda", "all"):
        raise ConfigError(f'convention={convention!r}: write "standard", "wanda" or "all".')
    length = max(batch["input_ids"].shape[1] for batch in batches)
    if convention == "wanda" and length != (context := context_of(model)):
        raise ConfigError(
            f"convention wanda means windows of the model's whole context: max_position_embeddings = {context}, the windows "
            f"have {length}. Cut the text with length={context}, or use the convention standard."
        )
    return length


def _add(sums: Sums, logits: Tensor, dense: Tensor | None, ids: Tensor) -> None:
    windows, length = ids.shape
    if dense is not None and dense.shape != logits.shape:
        raise ModelError(
            f"the two models give logits for {logits.shape[-1]} and {dense.shape[-1]} tokens: not the same vocabulary."
        )
    targets = ids[:, 1:].to(logits.device)
    step = max(1, CHUNK // logits.shape[-1])
    for window in range(windows):
        for start in range(0, length - 1, step):
            rows = slice(start, min(start + step, length - 1))
            log_q = F.log_softmax(logits[window, rows].float(), dim=-1)
            wanted = targets[window, rows, None]
            sums.nll -= log_q.gather(-1, wanted).cpu().double().sum().item()
            if dense is not None:
                _compare(sums, log_q, dense[window, rows].to(log_q.device).float(), wanted)
    sums.windows += windows
    sums.tokens += windows * (length - 1)


def _compare(sums: Sums, log_q: Tensor, dense: Tensor, wanted: Tensor) -> None:
    """log_q, dense: (rows, vocabulary) log-probabilities of the compressed model, logits of the dense one.

    The numbers of the rows are summed on the CPU, in float64, which MPS does not have.
    """
    log_p = F.log_softmax(dense, dim=-1)
    sums.dense_nll -= log_p.gather(-1, wanted).cpu().double().sum().item()
    sums.kl += kl_rows(log_p, log_q).cpu().double().sum().item()
    sums.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
