"""A whole model: what is decided, by which measurements, what is said about it, and what is never touched."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import layerwise as lw
from layerwise.errors import ConfigError, ModelError, SelectionError
from layerwise.runtime import (
    CsrLinear,
    Form,
    GatherLinear,
    Int8Linear,
    LayerSpeed,
    NarrowConv2d,
    NarrowLinear,
    choosing,
    judging,
)
from layerwise.runtime.timing import Timed
from models import MODELS, CifarResNet, small_llama
from quantized import quantized


@pytest.fixture
def say(monkeypatch):
    """Set what the races say: form -> ratio; others are half as fast as dense. `whole`: ratios of whole passes, one for each try."""

    def set_up(ratios, whole=(2.0,)):
        left = list(whole)

        def layer(runs, **more):
            for run in runs.values():
                run()
            found = {name: ratios.get(name, 0.5) if name != "dense" else 1.0 for name in runs}
            return {name: Timed(1 / ratio, (ratio,) * 9) for name, ratio in found.items()}

        def model(runs, **more):
            ratio = left.pop(0) if len(left) > 1 else left[0]
            for run in runs.values():
                run()
            return {"dense": Timed(1.0, (1.0,) * 9), "fast": Timed(1 / ratio, (ratio,) * 9)}

        monkeypatch.setattr(choosing, "race", layer)
        monkeypatch.setattr(judging, "race", model)

    return set_up


def sparse(module, density=0.2, seed=0):
    """Set most weights of a module's linears to zero, in no particular place."""
    draw = torch.Generator().manual_seed(seed)
    for one in module.modules():
        if isinstance(one, nn.Linear | Conv1D):
            one.weight.data *= (torch.rand(one.weight.shape, generator=draw) < density).to(one.weight)
    return module


def llama(**more):
    model = small_llama(hidden_size=32, intermediate_size=48, **more)
    sparse(model.model.layers)
    return model


def test_a_language_model(say):
    say({"csr": 3.0})
    model, ids = llama(), torch.arange(3, 15)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast, report = lw.fastest(model, batch=2)
    forms = {name: type(module) for name, module in fast.named_modules() if isinstance(module, Form)}
    assert len(forms) == 14
    assert set(forms.values()) == {CsrLinear}
    assert report.forms == {"csr": 14, "dense": 1}
    assert {layer.rows for layer in report.layers} == {2}
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(
            fast.generate(ids, max_new_tokens=5, do_sample=False),
            model.generate(ids, max_new_tokens=5, do_sample=False),
        )
    # the dense model is what it was; what stays dense is one tensor with it; the state is that of the dense model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert fast.lm_head.weight is model.lm_head.weight
    state = fast.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_what_is_said_of_each_layer(say):
    say({"csr": 3.0, "gather": 2.0})
    _, report = lw.fastest(llama(), length=4)
    layer = report.layers[0]
    assert layer.name == "model.layers.0.self_attn.q_proj"
    assert (layer.form, layer.ratio, layer.dense_ms, layer.rows) == ("csr", 3.0, 1.0, 4)
    assert layer.tried["csr"] == 3.0
    assert layer.why.startswith("f")
    assert layer.error < 1e-5
    assert layer.bytes != layer.dense_bytes
    assert layer.refused["2:4"] == "not 2:4"
    assert layer.refused["int8"] == "it rounds its inputs, and that was not asked for"
    head = report.layers[-1]
    assert (head.form, head.why, head.ratio, head.dense_ms) == ("dense", "no zeros", None, None)
    text = str(report)
    assert text.splitlines()[0].split()[:4] == ["layer", "shape", "zeros", "form"]
    assert "14 × csr, 1 × dense; a whole pass takes 0.50 ms instead of 1.00: 2.00 times as fast" in text
    assert "device cpu, dtype float32, threads" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["forms"] == {"csr": 14, "dense": 1}
    assert plain["layers"][0]["tried"]["csr"] == 3.0
    assert plain["ratio"] == 2.0
    assert report.bytes[1] < report.bytes[0]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.04])
def test_a_form_within_noise_is_not_taken(say, ratio):
    say({"csr": ratio})
    fast, report = lw.fastest(llama())
    assert report.forms == {"dense": 15}
    assert report.ratio is report.ms is report.dense_ms is None  # no speed-up is stated that was not measured
    assert report.layers[0].ratio == 1
    assert ("within noise" in report.layers[0].why) == (ratio >= 1)
    assert not any(isinstance(module, Form) for module in fast.modules())
    assert "No layer has a form" in report.summary()


def test_the_whole_has_the_last_word(say):
    say({"csr": 1.2}, whole=(0.97,))
    model = llama()
    fast, report = lw.fastest(model)
    assert report.forms == {"dense": 15}
    assert "a whole pass is 0.97 times as fast" in report.why
    assert report.ratio is None
    assert report.layers[0].why == "csr is 1.20 times as fast alone; with it the whole was not faster"
    assert report.layers[0].bytes == report.layers[0].dense_bytes
    assert type(fast.model.layers[0].mlp.up_proj) is nn.Linear
    assert fast.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


def test_then_the_strong_ones_alone_are_tried(say, monkeypatch):
    say({"csr": 1.2, "narrow": 2.0}, whole=(0.9, 1.5))
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[:40] = 0
    fast, report = lw.fastest(model)
    assert report.forms == {"narrow": 1, "dense": 14}
    assert report.ratio == 1.5
    assert type(fast.model.layers[1].mlp.up_proj) is NarrowLinear
    assert "1.20 times as fast alone" in report.layers[0].why


def test_outputs_that_differ_leave_the_model_dense(say, monkeypatch):
    say({"csr": 3.0})
    monkeypatch.setattr(judging, "relative_error", lambda got, exact: 0.5)
    _, report = lw.fastest(llama())
    assert report.forms == {"dense": 15}
    assert report.why == "All dense: with these forms the model's outputs differ by 0.5."


def test_a_form_that_is_wrong_or_cannot_run_is_refused(say, monkeypatch):
    say({"csr": 3.0, "gather": 2.0})
    right = CsrLinear.product
    monkeypatch.setattr(CsrLinear, "product", lambda self, x: 1.01 * right(self, x))

    def no_kernel(self, x):
        raise NotImplementedError("no kernel\nfor that")

    monkeypatch.setattr(GatherLinear, "product", no_kernel)
    net = nn.Sequential(sparse(nn.Linear(32, 32, bias=False)))
    net[0].weight.data[:16] = 0
    _, report = lw.fastest(net, torch.randn(3, 32))
    refused = report.layers[0].refused
    assert refused["csr"] == "its outputs differ by 0.01, more than 1e-05"
    assert refused["gather"] == "cannot run here (NotImplementedError: no kernel)"
    assert report.layers[0].form == "dense"
    assert set(report.layers[0].tried) == {"narrow", "bsr"}


def test_int8_only_when_asked_for_and_never_in_the_head(say):
    say({"int8": 4.0})
    model = llama()
    assert "int8" not in lw.fastest(model)[1].forms
    fast, report = lw.fastest(model, rounding=True)
    assert report.forms == {"int8": 14, "dense": 1}
    assert 0 < report.error < 0.1
    assert report.why == "Outputs are near the dense ones, not equal (int8)."
    assert isinstance(fast.model.layers[0].mlp.up_proj, Int8Linear)
    # a model without a zero, too
    assert lw.fastest(small_llama(), rounding=True)[1].forms == {"int8": 14, "dense": 1}


def test_codes_are_multiplied_as_codes(say):
    say({"int4 weights": 2.0, "int8 weights": 1.5})
    model = small_llama(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2).bfloat16()
    codes = quantized(model, lambda name, index: (8, None, True) if "down" in name else (4, 32, True))
    fast, report = lw.fastest(model, codes=codes, length=4)
    assert report.forms == {"int4 weights": 12, "int8 weights": 2, "dense": 1}
    assert report.error < 5e-2
    assert report.bytes[1] < 0.5 * report.bytes[0]
    with torch.no_grad():
        ids = torch.arange(3, 9)[None]
        exact = model(ids).logits.float()
        assert (fast(ids).logits.float() - exact).norm() / exact.norm() < 5e-2


def test_conv1d_and_convolutions(say):
    say({"csr": 2.0, "narrow": 3.0})
    gpt = sparse(MODELS["gpt2"]())
    fast, report = lw.fastest(gpt)
    assert {layer.form for layer in report.layers if layer.kind == "conv1d"} == {"csr", "narrow"}
    state = gpt.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())
    net = CifarResNet()
    net.layer1[0].conv1.weight.data[:3] = 0
    net.layer1[0].conv2.weight.data[:, :3] = 0
    fast, report = lw.fastest(net, torch.randn(2, 3, 32, 32))
    assert report.forms["narrow"] == 2
    assert isinstance(fast.layer1[0].conv1, NarrowConv2d)
    assert report.layers[1].rows == 2
    assert "no channel is all zero" in report.layers[0].refused["narrow"]


def test_two_of_four_on_a_cpu_is_dense_or_csr_with_the_same_logits():
    model = small_llama(hidden_size=32, intermediate_size=48)
    lw.compress(model, lw.methods.Uniform(sparsity=0.5, pattern="2:4").plan(model), solver=lw.solvers.Magnitude())
    fast, report = lw.fastest(model, seconds=0.005)
    refusals = {layer.refused["2:4"] for layer in report.layers[:-1]}
    assert refusals == {"2:4 has kernels on CUDA only, and none on cpu"}
    assert "2:4" not in report.forms
    with torch.no_grad():
        ids = torch.arange(3, 19)[None]
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_large_blocks_are_really_faster():
    """No stand-in here: 5 % of blocks of 32 of a matrix that no cache holds."""
    kept = (torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) < 0.05).repeat_interleave(32, 0)
    net = nn.Sequential(nn.Linear(1536, 1536))
    net[0].weight.data *= kept.repeat_interleave(32, 1)
    _, report = lw.fastest(net, torch.randn(32, 1536))
    assert report.layers[0].form in ("gather", "csr", "bsr")
    assert report.layers[0].ratio > 1.05
    assert report.ratio > 1


class Odd(nn.Module):
    """A shared linear, one that is never called, one with a hook, one of another class, and a weight used by hand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.never = nn.Linear(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.own = type("Own", (nn.Linear,), {})(8, 8)
        self.by_hand = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.own(self.hooked(self.again(self.first(x)))), self.by_hand.weight)


def test_layers_that_cannot_be_replaced_say_why(say):
    say({"csr": 2.0})
    net = sparse(Odd())
    fast, report = lw.fastest(net, torch.randn(2, 8))
    why = {layer.name: (layer.form, layer.why) for layer in report.layers}
    assert why["first"][0] == "csr"
    assert fast.again is fast.first
    assert why["never"] == why["by_hand"] == ("dense", "the pass did not call it")
    assert why["hooked"] == ("dense", "it has hooks, which would be lost")
    assert why["own"] == ("dense", "modules of class Own are not replaced")
    x = torch.randn(3, 8)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)


def test_a_forward_that_was_set_by_hand_is_kept(say):
    """As accelerate's add_hook_to_module leaves a module."""
    say({"csr": 2.0})
    net = sparse(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    own = net[0].forward
    net[0].forward = lambda x: own(x) + 1
    fast, report = lw.fastest(net, torch.randn(2, 8))
    assert (report.layers[0].form, report.layers[0].why) == (
        "dense",
        "its forward was set by hand, which would be lost",
    )
    assert report.layers[1].form == "csr"
    x = torch.randn(3, 8)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
    """A layer as it is, then one under autocast."""

    def __init__(self):
        super().__init__()
        self.plain, self.cast = sparse(nn.Linear(32, 32)), sparse(nn.Linear(32, 32))

    def forward(self, x):
        x = self.plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.cast(self.cast(x)).float()


def test_a_layer_under_autocast_stays_dense(say):
    say({"csr": 2.0})
    net, x = Mixed(), torch.randn(3, 32)
    fast, report = lw.fastest(net, x)
    assert [layer.form for layer in report.layers] == ["csr", "dense"]
    assert report.layers[1].why == "it runs under autocast, and forms compute in float32: cast the model instead"
    torch.testing.assert_close(fast(x), net(x), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        _, report = lw.fastest(net, x)
    assert report.forms == {"dense": 2}


def test_a_layer_whose_inputs_have_another_dtype_stays_dense(say, monkeypatch):
    say({"csr": 2.0})
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x.to(self.weight.dtype), self.weight, self.bias))
    _, report = lw.fastest(sparse(nn.Linear(32, 32)), torch.randn(2, 32).bfloat16())
    assert report.layers[0].why == "its inputs are bfloat16, its weight is float32"


@pytest.mark.parametrize("form", ["narrow", "csr", "bsr", "gather"])
def test_a_fast_model_runs_under_autocast(say, form):
    say({form: 2.0})
    model, ids = llama(), torch.arange(3, 15)[None]
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[16:] = 0
    fast, report = lw.fastest(model)
    assert report.forms.get(form)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, dense = fast(ids).logits, model(ids).logits
        assert got.dtype == dense.dtype
        torch.testing.assert_close(got, dense, rtol=0.1, atol=0.02)
        assert fast.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_a_pass_that_fails_with_the_forms_leaves_the_model_dense(say):
    say({"csr": 2.0})

    class Looks(nn.Sequential):
        def forward(self, x):
            if not isinstance(self[0], nn.Linear):
                raise TypeError("a linear, please")
            return self[0](x)

    fast, report = lw.fastest(Looks(sparse(nn.Linear(32, 32))), torch.randn(2, 32))
    assert report.forms == {"dense": 1}
    assert report.why == "All dense: with these forms the model does not run (TypeError: a linear, please)."
    assert type(fast[0]) is nn.Linear


def test_a_layer_that_does_not_run_by_itself_stays_dense(say, monkeypatch):
    say({"csr": 2.0})
    net, shown, own = nn.Sequential(sparse(nn.Linear(32, 32))), torch.randn(2, 32), nn.Linear.forward

    def fussy(self, x):
        if not torch.equal(x, shown):
            raise RuntimeError("not these\nnumbers")
        return own(self, x)

    monkeypatch.setattr(nn.Linear, "forward", fussy)
    _, report = lw.fastest(net, shown)
    assert report.layers[0].why == "it does not run by itself (RuntimeError: not these)"


def test_a_tied_head_may_be_tied_again(say):
    say({"csr": 2.0})
    model, ids = llama(tie_word_embeddings=True), torch.arange(3, 15)[None]
    model.model.embed_tokens.weight.data[::2] = 0
    fast, _ = lw.fastest(model)
    assert isinstance(fast.lm_head, CsrLinear)
    before = fast(ids).logits
    fast.tie_weights()
    assert isinstance(fast.lm_head, CsrLinear)
    assert torch.equal(fast(ids).logits, before)
    fast.model.embed_tokens.weight = nn.Parameter(2 * fast.model.embed_tokens.weight.detach())
    with pytest.raises(ModelError, match="CsrLinear was made for another weight"):
        fast.tie_weights()


def test_a_weight_that_a_model_looks_at(say):
    say({"csr": 2.0})
    net = sparse(Odd())
    net.by_hand = net.first  # called, and its weight used by hand too
    fast, _ = lw.fastest(net, torch.randn(2, 8))
    x = torch.randn(3, 8)
    assert isinstance(fast.by_hand, CsrLinear)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-6)


def test_a_lone_linear_and_a_model_that_is_fast_already(say):
    say({"csr": 2.0})
    fast, report = lw.fastest(sparse(nn.Linear(16, 16)), torch.randn(2, 16))
    assert isinstance(fast, CsrLinear)
    assert report.layers[0].name == "weight"
    say({"csr": 2.0})
    twice, report = lw.fastest(lw.fastest(llama())[0])
    assert report.forms == {"dense": 1}
    assert isinstance(twice.model.layers[0].mlp.up_proj, CsrLinear)


def test_excluded_layers_stay(say):
    say({"csr": 2.0})
    _, report = lw.fastest(llama(), exclude=["*.mlp.*"])
    assert report.forms == {"csr": 8, "dense": 7}
    assert [layer.why for layer in report.layers if ".mlp." in layer.name] == ["excluded"] * 6


def test_half_precision_and_odd_shapes_and_zeros(say):
    say({"csr": 2.0, "gather": 1.5, "narrow": 3.0})
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        net = nn.Sequential(sparse(nn.Linear(13, 7)), nn.ReLU(), nn.Linear(7, 5)).to(dtype)
        net[2].weight.data.zero_()
        x = torch.randn(3, 13, dtype=dtype)
        fast, report = lw.fastest(net, x)
        assert [layer.form for layer in report.layers][1] == "narrow"
        assert report.layers[0].form in ("csr", "narrow")
        assert fast(x).dtype == dtype
        torch.testing.assert_close(fast(x), net(x), rtol=2e-2, atol=1e-2)


def test_modes_and_random_state_are_left_alone(say):
    say({"csr": 2.0})
    model = llama().train()
    state = torch.get_rng_state()
    fast, _ = lw.fastest(model)
    assert model.training
    assert not fast.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress(say):
    say({"csr": 2.0})
    told = []
    lw.fastest(llama(), progress=lambda done, total, now: told.append((done, total, now)))
    assert told[0] == (0, 15, "model.layers.0.self_attn.q_proj")
    assert told[-1] == (15, 15, "the whole model")


def test_refusals(say):
    say({})
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        lw.fastest(model)
    with pytest.raises(ModelError, match="not in memory"):
        lw.fastest(small_llama().to("meta"))
    with pytest.raises(ModelError, match="what Sequential takes is not known"):
        lw.fastest(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="no parameters"):
        lw.fastest(nn.ReLU(), torch.ones(1))
    with pytest.raises(SelectionError, match=r'exclude "\*\.mpl\.\*" matches no layer'):
        lw.fastest(llama(), exclude=["*.mpl.*"])
    for wrong in ({"batch": 0}, {"length": 0}, {"seconds": 0.0}, {"margin": -0.1}):
        with pytest.raises(ConfigError, match="sizes from 1"):
            lw.fastest(llama(), **wrong)


def test_a_record_without_times_says_so():
    record = LayerSpeed("a", "linear", (2, 3), 1.0, "100.0% kept", "dense", "no zeros", None, 24, 24)
    from layerwise.runtime.report import cells

    assert cells(record) == ["a", "2 × 3", "100.0% kept", "dense", "–", "–", "–", "no zeros"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_on_cuda():
    model = small_llama(hidden_size=256, intermediate_size=512).to("cuda", torch.bfloat16)
    lw.compress(model, lw.methods.Uniform(sparsity=0.5, pattern="2:4").plan(model), solver=lw.solvers.Magnitude())
    fast, report = lw.fastest(model, batch=4, length=16, seconds=0.02)
    assert "2:4" in report.layers[0].tried, report.layers[0].refused
    ids = torch.arange(3, 19, device="cuda")[None]
    with torch.no_grad():
        exact = model(ids).logits.float()
        assert (fast(ids).logits.float() - exact).norm() / exact.norm() < 0.1
