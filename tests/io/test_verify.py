"""The check of a saved folder: what it compares, and that each kind of failure is found and said."""

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from layerwise.errors import SaveError
from layerwise.io import reload, save
from layerwise.io.places import Loader, loader_of
from layerwise.io.verify import _compare_outputs, _reference, verify
from models import small_llama

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def in_this_process(monkeypatch) -> None:
    """The child's work without the child: its own cost is start-up, and one test in test_save.py pays it."""

    def run(command, **options):
        import json

        reload.reload(json.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_equal(model, folder, monkeypatch):
    in_this_process(monkeypatch)
    verified = verify(model, folder, loader_of(folder))
    assert (verified.tensors, verified.outputs, verified.difference) == (len(model.state_dict()), ("logits",), 0)


def test_given_inputs_are_used(model, folder, monkeypatch):
    in_this_process(monkeypatch)
    seen = []
    monkeypatch.setattr(reload, "outputs", lambda m, inputs: seen.append(inputs) or {"logits": torch.ones(1)})
    verify(model, folder, loader_of(folder), inputs={"input_ids": torch.tensor([[7, 8]])})
    assert [i["input_ids"].tolist() for i in seen] == [[[7, 8]]] * 2


def test_every_module_keeps_its_mode(model):
    model.train()
    model.model.norm.eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    _reference(model, None)
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_one_changed_weight_is_named(model, folder, monkeypatch):
    in_this_process(monkeypatch)
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1e-7
    with pytest.raises(
        SaveError,
        match=r'1 of \d+ tensors load back different from the model, first "model.layers.0.mlp.down_proj.weight"',
    ):
        verify(other, folder, loader_of(folder))


def test_what_the_stock_class_cannot_hold_is_found_and_nothing_is_left(model, tmp_path, monkeypatch):
    """A bias where the architecture has none (bias compensation does this): the stock loader would drop it in silence."""
    in_this_process(monkeypatch)
    other = LlamaForCausalLM(model.config).eval()
    other.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(16))
    with pytest.raises(SaveError, match=r'first "model.layers.0.mlp.down_proj.bias", which is missing') as error:
        save(other, tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'out'}: ")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_share_memory(model, folder, monkeypatch):
    """As the fixed inputs of an encoder-decoder do, and as a batch of views may."""
    in_this_process(monkeypatch)
    tokens = torch.arange(20).reshape(2, 10)
    inputs = {"input_ids": tokens[:1, :5], "attention_mask": tokens[:1, 1:6]}
    assert verify(model, folder, loader_of(folder), inputs=inputs).difference == 0


def test_a_process_that_fails_says_its_last_line(model, folder):
    with pytest.raises(SaveError, match=r"in a fresh process failed \(AttributeError.*AutoModelForNothing"):
        verify(model, folder, Loader("transformers", "AutoModelForNothing"))


def test_a_process_that_is_killed_or_hangs(model, folder, monkeypatch):
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(SaveError, match="killed by signal 9; it may need more memory"):
        verify(model, folder, loader_of(folder))

    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(SaveError, match="took more than 5 seconds"):
        verify(model, folder, loader_of(folder), seconds=5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_outputs_may_differ_by_rounding_only(dtype, limit):
    own = torch.tensor([-8.0, 4.0, float("-inf")], dtype=dtype)
    assert _compare_outputs({"logits": own}, {"logits": own}, "f") == 0
    within, beyond = own.clone(), own.clone()
    within[1] += 8 * limit / 2
    beyond[1] += 8 * limit * 2
    assert 0 < _compare_outputs({"logits": own}, {"logits": within}, "f") <= 8 * limit
    with pytest.raises(SaveError, match='"logits" of the model loaded back differs by'):
        _compare_outputs({"logits": own}, {"logits": beyond}, "f")


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), "own .* has NaN"),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), "differs by nan"),
        (torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, 2.0]), "differs"),
        (torch.ones(2), torch.ones(3), "of shape"),
    ],
)
def test_outputs_that_are_not_numbers_or_have_another_shape(own, other, says):
    with pytest.raises(SaveError, match=says):
        _compare_outputs({"logits": own}, {"logits": other}, "f")


WHISPER = WhisperConfig(
    vocab_size=64,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    num_mel_bins=8,
    max_source_positions=20,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


@pytest.mark.parametrize(
    ("build", "config", "names"),
    [
        (ViTForImageClassification, ViTConfig(**TINY, image_size=8, patch_size=4), {"pixel_values"}),
        (WhisperForConditionalGeneration, WHISPER, {"input_features", "decoder_input_ids"}),
    ],
    ids=["vit", "whisper"],
)
def test_fixed_inputs_suit_the_modality(build, config, names):
    model = build(config).train()
    inputs, expected = _reference(model, None)
    assert set(inputs) == names
    assert "logits" in expected
    assert model.training


def test_a_model_that_no_fixed_input_suits_is_compared_by_its_weights():
    assert _reference(nn.Linear(2, 2), None) == (None, {})


def test_the_child_imports_nothing_of_layerwise(model, folder):
    imports = [
        line for line in Path(reload.__file__).read_text().splitlines() if line.strip().startswith(("import ", "from "))
    ]
    assert len(imports) > 5
    assert not [line for line in imports if "layerwise" in line or "from ." in line]
