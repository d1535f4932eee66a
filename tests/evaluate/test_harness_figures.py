"""Standard errors and conversions of lm-evaluation-harness's figures."""

import math
import random
import statistics

import pytest

from layerwise.evaluate.accuracy import choose
from layerwise.evaluate.harness_figures import Figure, metrics_of, paired, standard_error, unweighted

metrics = pytest.importorskip("lm_eval.api.metrics")


def test_conversion_worked_by_hand():
    # a log-likelihood of -1200 over 300 words of 1500 bytes
    assert metrics.weighted_perplexity([(-1200, 300)]) == pytest.approx(54.5982, abs=1e-4)
    assert metrics.weighted_perplexity([(-1200, 1500)]) == pytest.approx(2.225541, abs=1e-6)
    assert metrics.bits_per_byte([(-1200, 1500)]) == pytest.approx(1.154156, abs=1e-6)


def test_rolling_windows_predict_every_token_once():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(list(range(10)), prefix_token=99, max_seq_len=4, context_len=1)
    assert [make_disjoint_window(one) for one in windows] == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]


def test_acc_and_acc_norm_choose_differently(tmp_path):
    from layerwise.evaluate import find_tasks

    assert choose([-6.0, -7.0], ["no", "yes it is"]) == (0, 1)  # per character -3.0 and -0.7778
    (tmp_path / "rows.jsonl").write_text('{"q": "?", "choices": ["no", "yes it is"], "answer": 1}\n')
    task = {
        "task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (made,) = find_tasks([task]).single.values()
    got = made.process_results(made.eval_docs[0], [(-6.0, False), (-7.0, False)])
    assert (got["acc"], got["acc_norm"]) == (0.0, 1.0)


def test_standard_error_of_a_mean_is_the_harness_one():
    scores = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert standard_error(metrics.mean, scores) == pytest.approx(metrics.mean_stderr(scores))
    assert standard_error(metrics.mean, scores) == pytest.approx(math.sqrt(0.3 / 5))
    assert standard_error(metrics.mean, scores[:1]) is None
    assert standard_error(metrics.median, scores) is None


@pytest.mark.parametrize("name", ["perplexity", "weighted_perplexity", "bits_per_byte"])
def test_standard_errors_agree_with_the_bootstrap(name):
    draw = random.Random(0)  # noqa: S311
    sizes = [draw.randint(50, 150) for _ in range(400)]
    pairs = [(-size * draw.uniform(1.5, 2.5), size) for size in sizes]
    entries = [value / size for value, size in pairs] if name == "perplexity" else pairs
    aggregate = getattr(metrics, name)
    again = [aggregate(draw.choices(entries, k=len(entries))) for _ in range(500)]
    assert standard_error(aggregate, entries) == pytest.approx(statistics.stdev(again), rel=0.1)


def test_standard_error_of_a_ratio_worked_by_hand():
    # 2 documents, log-likelihoods -1 and -5 over 1 and 3 words: ratio -1.5, residuals 0.5 and -0.5
    expected = math.sqrt((0.25 + 0.25) * 2) / 4
    assert standard_error(metrics.weighted_perplexity, [(-1, 1), (-5, 3)]) == pytest.approx(math.exp(1.5) * expected)
    assert standard_error(metrics.bits_per_byte, [(-1, 1), (-5, 3)]) == pytest.approx(expected / math.log(2))


def test_paired_differences_worked_by_hand():
    # differences 1, 0, 0, -1, 1: mean 0.2, variance 0.7
    got = paired([1, 0, 1, 0, 1], [0, 0, 1, 1, 0])
    assert got.value == pytest.approx(0.2)
    assert got.stderr == pytest.approx(math.sqrt(0.7 / 5))
    assert paired([1, 0], [1, 0]) == Figure(0.0, 0.0)


def test_mean_over_tasks():
    rows = [{"acc": Figure(0.5, 0.3), "acc_norm": Figure(0.1)}, {"acc": Figure(0.7, 0.4)}]
    assert unweighted(rows) == {"acc": Figure(pytest.approx(0.6), pytest.approx(0.25))}
    assert unweighted([{"f1": Figure(0.5)}, {"f1": Figure(0.7, 0.1)}]) == {"f1": Figure(pytest.approx(0.6), None)}
    assert unweighted([]) == {}


def test_names_of_metrics():
    values = {
        "alias": "t",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 1,
        "em_stderr,strict": "N/A",
    }
    assert metrics_of(values) == {"acc": Figure(0.5, 0.1), "em,strict": Figure(1.0, None)}
