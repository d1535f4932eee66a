"""Adapters: outputs unchanged at first, zeros unchanged for ever, files that never load as something else."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from layerwise.engine import compress
from layerwise.errors import ConfigError, ModelError
from layerwise.io import load, save
from layerwise.plan import Plan, Prune, Quantize
from layerwise.recover import (
    ADAPTERS,
    Masks,
    Recovery,
    add_adapter,
    fine_tune,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from layerwise.solvers import Magnitude, RoundToNearest
from layerwise.structure import structure_of
from models import MODELS, inputs_for, small_llama
from tiny import tiny_llama

peft = pytest.importorskip("peft")


def pruned(name="llama", sparsity=0.5, dtype=torch.float32):
    model = MODELS[name]().eval().to(dtype)
    structure = structure_of(model)
    plan = Plan(layers={one.name: Prune(sparsity=round(sparsity * one.size) / one.size) for one in structure})
    compress(model, plan, solver=Magnitude())
    return model


def batches(model, name="llama", count=4):
    return [inputs_for(name, model, seed=seed) for seed in range(count)]


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits


def trained(model, steps=4, lr=1e-2, kind="hira"):
    data = batches(model, count=steps)
    wanted = [one for one in model.parameters() if one.requires_grad]
    return fine_tune(model, data, torch.optim.AdamW(wanted, lr=lr))


def zeros_of(model):
    return {name: parameter.detach() == 0 for name, parameter in model.named_parameters() if parameter.ndim > 1}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "t5", "vit"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_starts_as_the_model_trains_and_merges_with_the_same_zeros(kind, name):
    model = pruned(name)
    batch = inputs_for(name, model, seed=0)
    before, zeros = logits(model, batch), zeros_of(model)
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    add_adapter(model, kind, rank=2)
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-6)
    only = [key for key, one in model.named_parameters() if one.requires_grad]
    assert only
    assert all("hira_" in key or "lora_" in key or "shira_" in key for key in only)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-2)
    shown = [inputs_for(name, model, seed=seed) for seed in range(3)]
    fine_tune(model, shown, optimizer, loss=lambda one, rows: one(**rows).logits.float().square().mean())
    tuned = logits(model, batch)
    assert not torch.equal(tuned, before)
    merge_adapter(model)
    torch.testing.assert_close(logits(model, batch), tuned, rtol=1e-4, atol=1e-5)
    assert {key for key, _ in model.named_parameters()} == weights.keys()
    assert all(torch.equal(zeros[key], found) for key, found in zeros_of(model).items())
    assert all(one.requires_grad for one in model.parameters())
    assert not hasattr(model, "layerwise_adapter")


def test_plain_lora_fills_zeros():
    """The negative control."""
    model = pruned()
    config = peft.LoraConfig(r=2, target_modules=[one.name for one in structure_of(model)])
    peft.inject_adapter_in_model(config, model)
    trained(model)
    layer = model.model.layers[0].self_attn.q_proj
    layer.merge()
    assert int((layer.get_base_layer().weight == 0).sum()) == 0


def test_masked_lora_worked_by_hand():
    """LoSA's numbers: entry (3, 2) is kept and merges to exactly 0; the stored mask still knows that it is kept."""
    from layerwise.recover.masked_lora import MaskedLoraLinear

    base = nn.Linear(2, 4, bias=False)
    base.weight.data = torch.tensor([[1.0, 0], [0, 2], [3, -1], [0, 0]])
    layer = MaskedLoraLinear(base, "default", peft.LoraConfig(r=2, lora_alpha=4), r=2, lora_alpha=4)
    layer.lora_A["default"].weight.data = torch.tensor([[0.1, 0.2], [-0.1, 0.3]])
    layer.lora_B["default"].weight.data = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]])
    expected = torch.tensor([[1.2, 0], [0, 2.6], [3, 0], [0, 0]])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ expected.T)
    layer.merge()
    torch.testing.assert_close(base.weight.data, expected)
    assert float(base.weight[2, 1]) == 0
    layer.unmerge()
    torch.testing.assert_close(base.weight.data, torch.tensor([[1.0, 0], [0, 2], [3, -1], [0, 0]]))


def test_spp_is_a_hira_of_one_entry_a_row():
    """SPP's worked matrix: W * (1 + s B A), B[i, i q // R] = c_i."""
    weight = torch.tensor([[1.0, 0], [0, 2], [3, -1], [0, 0]])
    a, c = torch.tensor([[0.1, 0.2], [-0.1, 0.3]]), (1.0, 2.0, 0.5, 1.0)
    base = nn.Linear(2, 4, bias=False)
    base.weight.data = weight.clone()
    holder = nn.Sequential(base)
    peft.inject_adapter_in_model(peft.HiraConfig(r=2, target_modules=["0"]), holder)
    b = torch.zeros(4, 2)
    for row, value in enumerate(c):
        b[row, row * 2 // 4] = 2 * value  # s = 2
    holder[0].hira_A["default"].data, holder[0].hira_B["default"].data = a, b
    holder[0].merge()
    torch.testing.assert_close(base.weight.data, torch.tensor([[1.2, 0], [0, 3.6], [2.7, -1.3], [0, 0]]))


def test_shira_trains_kept_entries_as_many_as_a_low_rank_would():
    model = pruned()
    add_adapter(model, "shira", rank=3)
    for name in model.layerwise_adapter.layers:
        module = model.get_submodule(name)
        rows, columns = module.shira_indices["default"].long()
        weight = module.get_base_layer().weight
        assert len(rows) == 3 * sum(weight.shape) == len({*zip(rows.tolist(), columns.tolist(), strict=True)})
        assert (weight[rows, columns] != 0).all()


def test_a_rank_that_the_kept_entries_do_not_hold_is_refused():
    model = pruned(sparsity=0.9)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match="give rank"):
        add_adapter(model, "shira", rank=8)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_half_precision_merges_in_float32(kind):
    model = pruned(dtype=torch.bfloat16)
    zeros, batch = zeros_of(model), batches(model)[0]
    add_adapter(model, kind, rank=2)
    trained(model)
    tuned = logits(model, batch)
    merge_adapter(model)
    assert all(one.dtype == torch.bfloat16 for one in model.parameters())
    assert all(bool((found | ~zeros[key]).all()) for key, found in zeros_of(model).items())
    torch.testing.assert_close(logits(model, batch).float(), tuned.float(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_saved_and_loaded_it_gives_the_same_outputs(kind, tmp_path):
    model = pruned()
    base = copy.deepcopy(model)
    other = copy.deepcopy(model)
    batch = batches(model)[0]
    add_adapter(model, kind, rank=2, seed=7)
    trained(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(model, batch))
    for changed in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        wrong = copy.deepcopy(other)
        with torch.no_grad():
            wrong.get_parameter(changed).view(-1)[0] += 1
        with pytest.raises(ModelError, match="trained on other weights"):
            load_adapter(wrong, tmp_path / "adapter")
    with pytest.raises(ModelError, match="which this model has not"):
        load_adapter(MODELS["gpt_neox"](), tmp_path / "adapter")


def test_peft_reads_its_own_kinds_and_refuses_masked_lora(tmp_path):
    for kind in ADAPTERS:
        model = pruned()
        base, batch = copy.deepcopy(model), batches(model)[0]
        add_adapter(model, kind, rank=2)
        trained(model)
        save_adapter(model, tmp_path / kind)
        if kind == "masked-lora":
            with pytest.raises(Exception):  # noqa: B017, PT011  (whatever PEFT says: never other outputs)
                peft.PeftModel.from_pretrained(base, str(tmp_path / kind))
        else:
            loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / kind))
            torch.testing.assert_close(logits(loaded, batch), logits(model, batch))


def test_damaged_folders_are_refused(tmp_path):
    model = pruned()
    base = copy.deepcopy(model)
    add_adapter(model, "hira", rank=2)
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(base, tmp_path / "a")
    with pytest.raises(ModelError, match="no adapter that layerwise wrote"):
        load_adapter(base, tmp_path / "nowhere")


def test_masks_that_are_given_hold_where_a_kept_weight_is_zero(tmp_path):
    model = pruned()
    name = "model.layers.0.mlp.up_proj"
    keep = {f"{name}.weight": model.get_submodule(name).weight.detach() != 0}
    row, column = keep[f"{name}.weight"].nonzero()[0].tolist()
    with torch.no_grad():
        model.get_submodule(name).weight[row, column] = 0  # as training may leave it
    base = copy.deepcopy(model)
    add_adapter(model, "masked-lora", rank=2, keep=keep)
    trained(model)
    save_adapter(model, tmp_path / "a")
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(again.get_submodule(name).keep, keep[f"{name}.weight"])
    merge_adapter(again)
    assert float(again.get_submodule(name).weight[row, column]) != 0


def test_shira_merges_into_kept_weights_that_are_zero():
    """An entry that the mask keeps may be zero in the base; what is trained there is in the merged weight."""
    model = pruned()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    keep = {name: weight.detach() != 0}
    with torch.no_grad():
        weight.zero_()
    add_adapter(model, "shira", rank=2, keep=keep)
    with torch.no_grad():
        model.get_submodule(name).shira_weight["default"].fill_(0.5)
    batch = batches(model)[0]
    tuned = logits(model, batch)
    merge_adapter(model)
    torch.testing.assert_close(logits(model, batch), tuned, rtol=1e-4, atol=1e-5)
    merged = model.get_submodule(name).weight.detach()
    assert int((merged != 0).sum()) == 2 * sum(merged.shape)
    assert not merged[~keep[name]].any()


def test_settings_that_do_not_fit_the_files_are_damage_and_leave_the_model_alone(tmp_path):
    model = pruned()
    base, batch = copy.deepcopy(model), batches(model)[0]
    names = [name for name, _ in base.named_parameters()]
    add_adapter(model, "hira", rank=2)
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "layerwise_adapter.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "rank": 3}))
    before = logits(base, batch)
    with pytest.raises(ModelError, match=r"damaged: .* in the files"):
        load_adapter(base, tmp_path / "a")
    assert [name for name, one in base.named_parameters() if one.requires_grad] == names
    assert torch.equal(logits(base, batch), before)
    file.write_text(json.dumps(facts))
    load_adapter(base, tmp_path / "a")


def test_a_model_with_an_adapter_is_not_saved_as_one_without(tmp_path):
    model = pruned()
    add_adapter(model, "hira", rank=2)
    with pytest.raises(ModelError, match="merge it first"):
        save(model, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_what_transformers_loaded_quantized_is_sent_to_our_own_loader(tmp_path):
    pytest.importorskip("compressed_tensors")
    tiny_llama(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype="float32")
    plan = Plan(layers={one.name: Quantize(bits=4, group=None) for one in structure_of(model)})
    result = compress(model, plan, solver=RoundToNearest())
    save(model, tmp_path / "q", plan=plan, codes=result.codes, dense=tmp_path / "dense", verify=False)
    ours = add_adapter(load(tmp_path / "q"), "hira", rank=2)
    save_adapter(ours, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    for wrong in (lambda: add_adapter(theirs, "hira", rank=2), lambda: load_adapter(theirs, tmp_path / "adapter")):
        with pytest.raises(ModelError, match=r"layerwise\.load"):
            wrong()


def test_recovery_trains_the_adapter_alone_and_resumes(tmp_path):
    results = []
    for stop in (False, True):
        model = pruned()
        add_adapter(model, "masked-lora", rank=2)
        frozen = {key: one.detach().clone() for key, one in model.named_parameters() if not one.requires_grad}
        data = batches(model, count=6)
        settings, work = Recovery(steps=6, lr=1e-2, looks=3, patience=9), tmp_path / f"{stop}"
        if stop:
            with pytest.raises(KeyboardInterrupt):
                settings.train(model, data, data[:2], work=work, progress=_interrupt_at(4))
            model = pruned()
            add_adapter(model, "masked-lora", rank=2)
        found = settings.train(model, data, data[:2], work=work)
        assert found.after < found.before
        assert all(torch.equal(frozen[key], dict(model.named_parameters())[key]) for key in frozen)
        results.append({key: one.detach() for key, one in model.named_parameters() if one.requires_grad})
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def _interrupt_at(step):
    def progress(moment):
        if moment.step == step:
            raise KeyboardInterrupt

    return progress


def test_quantized_bases_take_adapters_only(tmp_path):
    tiny_llama(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype="float32")
    plan = Plan(layers={one.name: Quantize(bits=4, group=None) for one in structure_of(model)})
    result = compress(model, plan, solver=RoundToNearest())
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(64, (2, 16), generator=draw)} for _ in range(4)]
    with pytest.raises(ModelError, match="is quantized: training would take it off its grid"):
        Recovery(steps=2).train(model, data, data[:1], work=tmp_path / "work")
    save(model, tmp_path / "q", plan=plan, codes=result.codes, dense=tmp_path / "dense", verify=False)
    loaded = load(tmp_path / "q")
    with pytest.raises(ModelError, match="is quantized"):
        Recovery(steps=2).train(loaded.float(), data, data[:1], work=tmp_path / "work")
    add_adapter(loaded, "hira", rank=2)
    found = Recovery(steps=4, lr=1e-2).train(loaded, data, data[:1], work=tmp_path / "work2")
    assert found.after < found.before
    for one in loaded.parameters():
        one.requires_grad_(True)
    for refused in (
        lambda: Recovery(steps=1).train(loaded, data, data[:1], work=tmp_path / "work3"),
        lambda: Masks(loaded, {"model.norm.weight": torch.ones(32, dtype=torch.bool)}),
    ):
        with pytest.raises(ModelError, match="is quantized"):
            refused()
    with pytest.raises(ModelError, match="Keep the adapter apart"):
        merge_adapter(loaded)
    save_adapter(loaded, tmp_path / "adapter")
    again = load_adapter(load(tmp_path / "q").float(), tmp_path / "adapter")
    assert torch.equal(logits(again, data[0]), logits(loaded, data[0]))


def test_bad_requests_are_refused():
    model = pruned()
    for wrong, said in (
        ({"kind": "lora"}, "give hira, shira or masked-lora"),
        ({"kind": "hira", "rank": 0}, "rank=0"),
        ({"kind": "hira", "alpha": 4.0}, "of masked-lora alone"),
        ({"kind": "shira", "dropout": 0.1}, "shira takes none"),
        ({"kind": "hira", "keep": {"model.nothing": torch.ones(2, 2, dtype=torch.bool)}}, "no linear in a block"),
        (
            {"kind": "hira", "keep": {"model.layers.0.mlp.up_proj": torch.ones(2, 2, dtype=torch.bool)}},
            "give torch.bool",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            add_adapter(model, **wrong)
    with pytest.raises(ModelError, match="no plain linears"):
        add_adapter(MODELS["gpt2"](), "hira")
    with pytest.raises(ModelError, match="has no adapter"):
        merge_adapter(model)
    add_adapter(model, "hira", rank=2)
    with pytest.raises(ModelError, match="has an adapter already"):
        add_adapter(model, "hira", rank=2)


def test_the_start_is_of_the_seed_and_global_streams_are_left_alone():
    torch.manual_seed(3)
    state, starts = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model = small_llama()
        add_adapter(model, "hira", rank=2, seed=seed)
        starts.append(model.model.layers[0].self_attn.q_proj.hira_A["default"].detach())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_facts_are_plain(tmp_path):
    model = pruned()
    add_adapter(model, "masked-lora", rank=2)
    save_adapter(model, tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "layerwise_adapter.json").read_text())
    assert (facts["kind"], facts["rank"], facts["alpha"]) == ("masked-lora", 2, 4.0)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LAYERWISE_MASKED_LORA"
