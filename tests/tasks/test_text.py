import gzip
import json
import logging
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerwise.errors import ConfigError, DataError, MissingExtra
from layerwise.tasks import check_vocabulary, continued, held_out, text
from layerwise.tasks.batches import Batches
from layerwise.tasks.python_docs import HELD_OUT, python_docs
from layerwise.tasks.text import _stream_windows, tokenizer_hash


def byte_tokenizer(eos=True, bos=True):
    """One token per byte (id = place in the sorted alphabet), then BOS 256 and EOS 257; context of 16 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {name: f"<{name}>" for name, wanted in (("eos_token", eos), ("bos_token", bos)) if wanted}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def alphabet_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(33 + index % 90) for index in range(1000)), encoding="utf-8")
    return path


def rows(batches: Batches) -> torch.Tensor:
    return torch.cat([one["input_ids"] for one in batches])


def test_text_draws_windows_of_the_file(alphabet_file, tokenizer):
    batches = text(alphabet_file, tokenizer, samples=10, length=50, batch=4)
    assert [tuple(one["input_ids"].shape) for one in batches] == [(4, 50), (4, 50), (2, 50)]
    assert all(one["input_ids"].dtype == torch.int64 for one in batches)
    whole = alphabet_file.read_text()
    assert all(tokenizer.decode(row) in whole for row in rows(batches))


def test_text_is_the_same_under_a_seed_and_for_any_batch(alphabet_file, tokenizer):
    one = text(alphabet_file, tokenizer, samples=6, length=20)
    assert text(alphabet_file, tokenizer, samples=6, length=20).hash == one.hash
    assert torch.equal(rows(text(alphabet_file, tokenizer, samples=6, length=20, batch=4)), rows(one))
    assert text(alphabet_file, tokenizer, samples=6, length=20, seed=1).hash != one.hash


def test_text_leaves_global_seeds_alone(alphabet_file, tokenizer):
    torch.manual_seed(5), random.seed(5)
    state, python = torch.get_rng_state(), random.getstate()
    text(alphabet_file, tokenizer, samples=2, length=20)
    text(alphabet_file, tokenizer, samples=2, length=20, rule="documents")
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 8), length=st.integers(2, 9), slack=st.integers(0, 20), seed=st.integers(0, 99))
def test_windows_never_overlap_and_stay_inside(samples, length, slack, seed):
    stream = torch.arange(samples * length + slack)
    windows = list(_stream_windows(stream, samples, length, seed, "x"))
    assert len(windows) == samples
    assert all(torch.equal(window, torch.arange(length) + window[0]) for window in windows)
    assert len(torch.cat(windows).unique()) == samples * length


def test_every_placement_of_two_windows_is_equally_likely():
    # 6 tokens, 2 windows of 2: the starts (0,2) (0,3) (0,4) (1,3) (1,4) (2,4), in either order
    counts: dict[tuple[int, int], int] = {}
    for seed in range(1200):
        first, second = (int(window[0]) for window in _stream_windows(torch.arange(6), 2, 2, seed, "x"))
        counts[first, second] = counts.get((first, second), 0) + 1
    assert len(counts) == 12
    assert all(60 < count < 145 for count in counts.values())  # 100 expected, 9.6 standard deviation


def test_all_tokens_are_used_when_they_are_just_enough(alphabet_file, tokenizer):
    got = rows(text(alphabet_file, tokenizer, samples=10, length=100))
    whole = rows(held_out(alphabet_file, tokenizer, length=100))
    assert torch.equal(got[got[:, 0].argsort()], whole[whole[:, 0].argsort()])


def test_protocol_says_what_was_drawn(alphabet_file, tokenizer):
    batches = text(alphabet_file, tokenizer, samples=3, length=20, seed=7)
    protocol = dict(batches.protocol)
    expected = {
        "source": str(alphabet_file),
        "rule": "stream",
        "join": "none",
        "samples": 3,
        "length": 20,
        "tokens": 60,
    }
    assert expected.items() <= protocol.items()
    assert protocol["seed"] == 7
    assert protocol["source_tokens"] == 1000
    assert protocol["bos"] == "as the tokenizer adds"
    assert protocol["tokenizer"] == tokenizer_hash(tokenizer)
    assert protocol["first_ids"] == " ".join(str(int(one)) for one in rows(batches)[0, :10])
    json.dumps(protocol)


def test_tokenizer_hash_follows_the_tokenizer_not_its_last_call(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer("abc abc", truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(byte_tokenizer(bos=False)) != before


def test_bos_stands_in_front_of_every_window(alphabet_file, tokenizer):
    for batches in (
        text(alphabet_file, tokenizer, samples=3, length=20, bos=True),
        held_out(alphabet_file, tokenizer, length=20, bos=True),
    ):
        ids = rows(batches)
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert (ids[:, 1:] != tokenizer.bos_token_id).all()
        assert batches.protocol["bos"] == "every window"
    assert len(ids) == 1000 // 19


def test_bos_needs_a_token(alphabet_file):
    with pytest.raises(ConfigError, match="no BOS token"):
        text(alphabet_file, byte_tokenizer(bos=False), samples=2, length=20, bos=True)


def test_documents_are_joined_by_eos(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "ab"}\n\n{"text": " "}\n{"text": "cde", "id": "7"}\n')
    batches = held_out(path, tokenizer, length=7)
    assert tokenizer.decode(rows(batches)[0]) == "ab<eos_token>cde<eos_token>"
    assert batches.protocol["join"] == "EOS 257"
    assert batches.protocol["bos"] == "none"


def test_documents_without_eos_or_with_join_are_one_text(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in ("", "ab", "", "cd")))
    for one, options in ((byte_tokenizer(eos=False), {}), (tokenizer, {"join": "\n\n"})):
        batches = held_out(path, one, length=10, **options)
        assert tokenizer.decode(rows(batches)[0]) == "\n\nab\n\n\n\ncd"  # blank rows count, as for WikiText-2
        assert batches.protocol["join"] == '"\\n\\n"'


def test_raw_lines_are_not_the_joined_rows(tmp_path, tokenizer):
    """WikiText-2 rows keep their newline and blank rows stay: three ways to read six lines are three different texts."""
    lines = [" \n", " = T = \n", " \n", " a . \n", " b . \n", " \n"]
    kept = ["" if not line.strip() else line for line in lines]
    assert [kept[0], kept[2], kept[5]] == ["", "", ""]
    readings = {
        "kept": kept,
        "stripped": "".join(lines).splitlines(),
        "dropped": [line for line in lines if line.strip()],
    }
    decoded = {}
    for name, texts in readings.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": one}) for one in texts))
        total = len("\n\n".join(texts))
        decoded[name] = tokenizer.decode(rows(held_out(path, tokenizer, length=total, join="\n\n"))[0])
        assert decoded[name] == "\n\n".join(texts)
    assert len(set(decoded.values())) == 3


def test_calibration_documents_are_shuffled_and_enough(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": chr(33 + index % 90) * 50}) for index in range(1000)))
    batches = text(path, tokenizer, samples=4, length=100)
    assert 800 <= batches.protocol["source_tokens"] < 800 + 64 * 51  # twice what is needed, to the next chunk
    assert batches.hash == text(path, tokenizer, samples=4, length=100).hash
    assert batches.hash != text(path, tokenizer, samples=4, length=100, seed=1).hash


def test_rule_documents_draws_as_the_papers_code(tmp_path, tokenizer):
    texts = ["x" * 5, "".join(chr(33 + i) for i in range(60)), "y" * 10, "".join(chr(40 + i) for i in range(40))]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in texts))
    got = rows(text(path, tokenizer, samples=8, length=10, rule="documents", seed=3))
    random.seed(3)  # get_c4 of the Wanda repository
    for row in got:
        while True:
            i = random.randint(0, len(texts) - 1)  # noqa: S311
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            if ids.shape[1] > 10:
                break
        i = random.randint(0, ids.shape[1] - 10 - 1)  # noqa: S311
        assert torch.equal(row, ids[0, i : i + 10])


def test_rule_documents_says_when_none_is_long_enough(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "abcdef"}')
    with pytest.raises(DataError, match=r"no document is longer than 6 tokens \(the longest has 6\).*length <= 5"):
        text(path, tokenizer, samples=2, length=6, rule="documents")


def test_held_out_is_the_text_in_order(alphabet_file, tokenizer):
    batches = held_out(alphabet_file, tokenizer, length=64, batch=4)
    assert tokenizer.decode(rows(batches).flatten()) == alphabet_file.read_text()[: 15 * 64]
    assert batches.protocol["samples"] == 15
    assert batches.protocol["tokens"] == 960
    first = held_out(alphabet_file, tokenizer, length=64, tokens=200)
    assert torch.equal(rows(first), rows(batches)[:3])


def test_held_out_tail_is_a_batch_of_its_own(alphabet_file, tokenizer):
    batches = held_out(alphabet_file, tokenizer, length=64, batch=4, tail=True)
    assert [tuple(one["input_ids"].shape) for one in batches] == [(4, 64), (4, 64), (4, 64), (3, 64), (1, 40)]
    assert batches.protocol["tokens"] == 1000
    assert (
        len(held_out(alphabet_file, tokenizer, length=333, tail=True)) == 3
    )  # a last window of one token predicts nothing


def test_line_ends_and_byte_order_mark(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert tokenizer.decode(rows(held_out(path, tokenizer, length=6))[0]) == "a\r\nb\r\n"


def test_no_warning_about_long_sequences(alphabet_file, tokenizer, caplog):
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        held_out(alphabet_file, byte_tokenizer(), length=64)
    finally:
        logger.propagate = before
    assert "longer than" not in caplog.text


def test_parquet_and_gzip_agree_with_jsonl(tmp_path, tokenizer):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = ["first document", "second one"]
    lines = "\n".join(json.dumps({"content": one, "id": 1}) for one in texts)
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"content": texts, "id": [1, 2]}), tmp_path / "d.parquet")
    got = [held_out(tmp_path / name, tokenizer, length=8).hash for name in ("d.jsonl", "d.json.gz", "d.parquet")]
    assert got[0] == got[1] == got[2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"abc\xff\xfe", r"not UTF-8 text \(byte 0xff at position 3\)"),
        (
            "a.txt",
            b"x" * 99,
            "99 tokens cannot give 4 samples of 50 .200 tokens.. Use at most 1 samples of this length, or length <= 24",
        ),
        ("a.txt", b"x" * 7, "7 tokens cannot give 4 samples of 50 .200 tokens.. Use a longer text"),
        ("a.jsonl", b'{"text": "a"}\nnot json', "line 2 is not JSON"),
        ("a.jsonl", b'["a"]', "line 1 is not an object"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', r"no field `text`, and several fields hold strings \(a, b\)"),
        ("a.jsonl", b'{"a": 1}', "no field `text`, and no field holds a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "line 2 has no text in field `text`"),
        ("a.jsonl", b"", "holds no text"),
        ("a.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-20] + bytes(12), "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}', r"line 2 holds half a character \(\\ud83d\)"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b"}", "line 1 cannot be read as JSON: Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, "line 1 cannot be read as JSON"),
    ],
)
def test_unusable_files(tmp_path, tokenizer, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        text(tmp_path / name, tokenizer, samples=4, length=50)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_paths_that_are_no_files(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such data file"):
        text(tmp_path / "nothing.txt", tokenizer)
    with pytest.raises(DataError, match="is a folder"):
        text(tmp_path, tokenizer)


def test_held_out_shorter_than_a_window(alphabet_file, tokenizer):
    with pytest.raises(DataError, match=r"1000 tokens are less than one window of 1024\. Use length <= 1000"):
        held_out(alphabet_file, tokenizer, length=1024)


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"length": 1}, {"length": 2, "bos": True}, {"batch": 0}, {"rule": "x"}]
)
def test_settings_out_of_range(alphabet_file, tokenizer, options):
    with pytest.raises(ConfigError):
        text(alphabet_file, tokenizer, **{"samples": 2, "length": 20, **options})


def test_check_vocabulary(alphabet_file, tokenizer):
    batches = text(alphabet_file, tokenizer, samples=2, length=20, bos=True)
    check_vocabulary(batches, 257)
    with pytest.raises(DataError, match="token id 256 is outside the model's vocabulary of 256"):
        check_vocabulary(batches, 256)


def test_hub_without_connection_is_one_line(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"hub:some/name: cannot be read .ConnectionError: Couldn't reach the hub.*local file"
    ) as caught:
        text("hub:some/name", tokenizer)
    assert "\n" not in str(caught.value)


def test_hub_names_config_and_split(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return iter([{"text": "some text"}, {"text": "more text"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    batches = held_out("hub:me/data:plain:validation", tokenizer, length=8)
    text("hub:me/data", tokenizer, samples=1, length=8)
    assert asked == [
        (("me/data", "plain"), {"split": "validation", "streaming": True}),
        (("me/data", None), {"split": "train", "streaming": True}),
    ]
    assert batches.protocol["split"] == "validation"


def test_hub_without_datasets_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'layerwise\[data\]'"):
        text("hub:some/name", tokenizer)


def test_python_docs_splits_share_no_document(tokenizer):
    calibration, evaluation = python_docs("calibration"), python_docs("held-out")
    names = {name for name, _ in calibration} & {name for name, _ in evaluation}
    assert not names
    assert {name.split("/")[0].removesuffix(".py") for name, _ in evaluation} == HELD_OUT
    batches = held_out("python-docs", tokenizer, length=64, tokens=256)
    assert batches.protocol["split"] == "held-out"
    assert tokenizer.decode(rows(batches).flatten()) == evaluation[0][1].encode()[:256].decode()
    sample = text("python-docs", tokenizer, samples=4, length=64)
    assert sample.protocol["split"] == "calibration"
    sources = "".join(one for _, one in calibration)
    assert all(part in sources for row in rows(sample) for part in tokenizer.decode(row).split("<eos_token>"))


def test_a_window_for_an_encoder_decoder_is_read_and_written():
    ids = torch.arange(10).reshape(2, 5)
    halves = continued(Batches(({"input_ids": ids},), {"source": "x"}))
    assert halves[0]["input_ids"].tolist() == [[0, 1], [5, 6]]
    assert halves[0]["labels"].tolist() == [[2, 3, 4], [7, 8, 9]]
    assert halves.protocol["source"] == "x"
