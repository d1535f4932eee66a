"""Figures of lm-evaluation-harness with their standard errors, and differences between two models on the same documents.

Closed forms only, by the delta method where the figure is not a mean. The harness gives none for the perplexities of whole documents and
draws 100,000 bootstrap samples for others.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = dict[str, dict[str, "Figure"]]  # task -> metric -> figure


@dataclass(frozen=True)
class Figure:
    """A number and its standard error over documents; None where there is no closed form, or one document alone."""

    value: float
    stderr: float | None = None

    def __float__(self) -> float:
        return self.value


def metrics_of(values: Mapping[str, Any]) -> dict[str, Figure]:
    """{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...} -> {"acc": Figure}; a filter other than none stays in the name."""
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{kind}")
            found[_named(metric, kind)] = Figure(float(value), float(error) if isinstance(error, int | float) else None)
    return found


def with_errors(values: dict[str, Any], entries: Mapping[str, Sequence[Any]], task: Any) -> dict[str, Any]:
    """lm-eval's figures of one task with standard errors filled in. entries: "metric,filter" -> what each document gave."""
    aggregates = task.aggregation()
    errors = {}
    for key, given in entries.items():
        metric, _, kind = key.partition(",")
        errors[f"{metric}_stderr,{kind}"] = standard_error(aggregates.get(metric), given)
    return {**values, **{key: "N/A" if error is None else error for key, error in errors.items()}}


def standard_error(aggregate: Any, entries: Sequence[Any]) -> float | None:
    """Of what lm-eval's `aggregate` makes of one entry per document: a number, or a pair (log-likelihood, words or bytes).

    mean: deviation / sqrt(n), as the harness. perplexity: exp(-mean). weighted_perplexity, bits_per_byte: of the ratio of two sums.
    """
    from lm_eval.api import metrics

    if len(entries) < 2:
        return None
    if aggregate is metrics.mean:
        return _of_mean(entries)
    if aggregate is metrics.perplexity:
        return float(metrics.perplexity(entries)) * _of_mean(entries)
    if aggregate is metrics.weighted_perplexity:
        return float(metrics.weighted_perplexity(entries)) * _of_ratio(entries)
    if aggregate is metrics.bits_per_byte:
        return _of_ratio(entries) / math.log(2)
    return None


def entries_of(samples: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """lm-eval's record per document and filter -> "metric,filter" -> one entry per document."""
    found: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return found


def scores_of(entries: Mapping[str, Sequence[Any]], task: Any) -> dict[str, tuple[float, ...]]:
    """The entries of metrics that are means over documents: what a paired test needs."""
    from lm_eval.api import metrics

    aggregates = task.aggregation()
    means = [key for key in entries if aggregates.get(key.partition(",")[0]) is metrics.mean]
    return {_named(*key.split(",", 1)): tuple(map(float, entries[key])) for key in means}


def likelihoods_of(samples: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, ...], ...]:
    """Per document, the log-likelihood in nats of each choice, or of the whole text; empty for generated answers."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    rows = []
    for sample in first:
        given = [one[0] if isinstance(one, tuple | list) else one for one in sample["filtered_resps"]]
        rows.append(tuple(float(one) for one in given if isinstance(one, int | float)))
    return tuple(rows) if any(rows) else ()


def hash_of(samples: Iterable[Mapping[str, Any]]) -> str:
    """First 16 hex digits of sha256 over documents, prompts and targets, in order: figures compare where these agree."""
    words = [(sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]) for sample in samples]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def paired(scores: Sequence[float], others: Sequence[float]) -> Figure:
    """Mean of scores - others over the same documents, with the standard error of the differences."""
    differences = [one - other for one, other in zip(scores, others, strict=True)]
    return Figure(sum(differences) / len(differences), _of_mean(differences) if len(differences) > 1 else None)


def unweighted(rows: Iterable[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Mean over tasks of every metric that all have. The errors of tasks are independent: sqrt(sum of squares) / tasks."""
    rows = list(rows)
    shared = [metric for metric in (rows[0] if rows else ()) if all(metric in row for row in rows)]
    means = {}
    for metric in shared:
        errors = [row[metric].stderr for row in rows]
        known = [error for error in errors if error is not None]
        spread = math.hypot(*known) / len(rows) if len(known) == len(rows) else None
        means[metric] = Figure(sum(row[metric].value for row in rows) / len(rows), spread)
    return means


def _named(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _of_mean(entries: Sequence[Any]) -> float:
    mean = sum(map(float, entries)) / len(entries)
    return math.sqrt(sum((entry - mean) ** 2 for entry in entries) / (len(entries) - 1) / len(entries))


def _of_ratio(entries: Sequence[tuple[float, float]]) -> float:
    """Of sum(a) / sum(b): the residuals a - ratio * b have mean 0, their deviation is the error of the sum of a."""
    total = sum(weight for _, weight in entries)
    ratio = sum(value for value, _ in entries) / total
    residuals = sum((value - ratio * weight) ** 2 for value, weight in entries)
    return math.sqrt(residuals * len(entries) / (len(entries) - 1)) / total
