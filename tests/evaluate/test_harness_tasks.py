"""Tasks of lm-evaluation-harness: found, refused in one line, and their groups."""

import json
import random

import pytest

from harness_kit import EXAMPLE, QUESTIONS, ROWS, arc_rows, as_dict, byte_tokenizer, few_tasks, sharp
from layerwise.errors import ConfigError, DataError
from layerwise.evaluate import find_tasks, harness

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    few_tasks(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def test_by_file_by_name_and_by_definition():
    state = random.getstate()
    found = find_tasks([str(QUESTIONS), as_dict("same")])
    assert list(found.single) == ["stdlib_modules", "same"]
    assert list(find_tasks(["stdlib_modules"], include_path=EXAMPLE).single) == ["stdlib_modules"]
    assert random.getstate() == state


def test_unknown_names_files_and_folders():
    with pytest.raises(ConfigError, match=r"^arc_eazy: no such lm-eval task\. Did you mean arc_easy\?$"):
        find_tasks(["arc_eazy"])
    with pytest.raises(ConfigError, match=r"^stdlib_module: .* Did you mean stdlib_modules\?$"):
        find_tasks(["stdlib_module"], include_path=EXAMPLE)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such task file"):
        find_tasks(["nowhere.yaml"])
    with pytest.raises(ConfigError, match="no such folder"):
        find_tasks(["stdlib_modules"], include_path=EXAMPLE / "nothing")
    with pytest.raises(ConfigError, match="give a list"):
        find_tasks([])
    with pytest.raises(ConfigError, match="give a list"):
        find_tasks(str(QUESTIONS))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("task: [unclosed", "ParserError"),
        ("- a list", "Expected YAML dict"),
        ("dataset_path: json", "Unknown config shape"),
        ("task: t\ncustom_dataset: !function nowhere.load", "Cannot import module"),
        ("task: t\nno_such_field: 1", "no_such_field"),
    ],
)
def test_a_file_that_is_no_task(tmp_path, words, reason):
    file = tmp_path / "t.yaml"
    file.write_text(words)
    with pytest.raises(ConfigError, match=reason) as caught:
        find_tasks([file])
    assert str(caught.value).startswith(f"{file}: not a task that lm-eval can use")
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_had():
    absent = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
    for task in (as_dict("t", **absent), "arc_easy"):  # no such file; a hub that cannot be reached
        with pytest.raises(DataError, match="data cannot be had"):
            find_tasks([task])


def test_the_same_task_by_itself_and_in_a_group(tmp_path):
    group = {"group": "g", "task": [{"task": "arc_easy", **arc_rows(tmp_path)}]}
    with pytest.raises(ConfigError, match="Name each task once"):
        find_tasks([as_dict("arc_easy"), group])


def test_shots_come_from_the_task_or_are_none():
    pool = {"train": ROWS[:10], "test": ROWS[10:12]}
    made = {"custom_dataset": lambda **_: datasets_of(pool), "training_split": "train"}
    shots = lambda found: found.single["t"].get_config("num_fewshot")  # noqa: E731
    assert shots(find_tasks([as_dict("t", **made)])) == 0
    assert shots(find_tasks([as_dict("t", num_fewshot=3, **made)])) == 3
    assert shots(find_tasks([as_dict("t", num_fewshot=3, **made)], shots=0)) == 0
    with pytest.raises(ConfigError, match=r"says num_fewshot: 0, so shots=2 cannot be had"):
        find_tasks([as_dict("t", num_fewshot=0, **made)], shots=2)
    with pytest.raises(ConfigError, match="shots=-1"):
        find_tasks([as_dict("t", **made)], shots=-1)
    # the same examples in the prompts as lm-eval's own entrance draws
    got = harness(sharp(), byte_tokenizer(), find_tasks([as_dict("t", **made)], shots=2), length=256)
    assert got.shots == {"t": 2}
    assert got.log_likelihoods["t"] == simply(as_dict("t", **made), num_fewshot=2)


@pytest.mark.parametrize(
    ("splits", "remark"),
    [
        (("test",), True),
        (("validation",), True),
        (("train", "test"), False),
        (("validation", "test"), False),
    ],
)
def test_examples_out_of_the_questions_themselves_are_remarked_on(splits, remark):
    words = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    made = {"custom_dataset": lambda **_: datasets_of(dict.fromkeys(splits, ROWS[:4])), "test_split": None}
    task = as_dict("t", **{**made, **{words[one]: one for one in splits}})
    assert find_tasks([task]).notes == ()
    notes = find_tasks([task], shots=1).notes
    assert bool(notes) == remark
    assert all("t: it has no split for examples" in note for note in notes)


def test_a_group_inherits_prompts_and_its_parts_count(tmp_path):
    """Groups that override a task of the harness keep its prompts."""
    arc = arc_rows(tmp_path)
    group = {"group": "g", "task": [{"task": "arc_easy", **arc}, {"task": "arc_challenge", **arc}]}
    got = harness(sharp(), byte_tokenizer(), [group, as_dict("own")], length=256, batch=8, limit=8)
    assert list(got.results) == ["arc_easy", "arc_challenge", "own"]  # the group has no figure of its own
    assert got.log_likelihoods["arc_easy"] == got.log_likelihoods["arc_challenge"] == got.log_likelihoods["own"]
    acc = got.results["own"]["acc"]
    assert (got.mean["acc"].value, got.mean["acc"].stderr) == pytest.approx((acc.value, acc.stderr / 3**0.5))


def test_a_group_with_a_figure_of_its_own_counts_once(tmp_path):
    """The mean of its parts by their sizes, its error pooled, as the harness does."""
    parts = [
        {"task": "arc_easy", **arc_rows(tmp_path)},
        {"task": "arc_challenge", **arc_rows(tmp_path, ROWS[:8])},
    ]
    settings = {"group": "both", "task": parts, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "both.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()))
    got = harness(sharp(), byte_tokenizer(), [tmp_path / "both.yaml", as_dict("own")], length=256, batch=8)
    large, small, both = (got.results[name]["acc"] for name in ("arc_easy", "arc_challenge", "both"))
    assert got.items == {"arc_easy": 40, "arc_challenge": 8, "own": 40}
    assert 0 < small.value < 1
    assert both.value == pytest.approx((40 * large.value + 8 * small.value) / 48)
    pooled = (39 * 40 * large.stderr**2 + 7 * 8 * small.stderr**2) / 46 / 48
    assert both.stderr == pytest.approx(pooled**0.5)
    assert got.mean["acc"].value == pytest.approx((both.value + large.value) / 2)
    assert set(got.mean) == {"acc"}  # the group has no acc_norm


@pytest.mark.parametrize("mark", ["UNSAFE_CODE", "MULTIMODAL"])
def test_tasks_that_are_not_offered(monkeypatch, mark):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, mark, True, raising=False)
    with pytest.raises(ConfigError, match="not offered here"):
        find_tasks([QUESTIONS])


def simply(task, **settings):
    """Log-likelihoods by `lm_eval.simple_evaluate`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=sharp(), tokenizer=byte_tokenizer(), batch_size=1, max_length=256)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(wrapped, tasks=[task], task_manager=manager, bootstrap_iters=0, **settings)
    return tuple(tuple(score for score, _ in one["filtered_resps"]) for one in found["samples"]["t"])


def datasets_of(splits):
    import datasets

    return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}


@pytest.mark.slow  # indexes all tasks of the harness
def test_the_whole_index(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"Did you mean hellaswag\?"):
        find_tasks(["hellasvag"])
