import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise.errors import StatisticsError, WalkError
from layerwise.passes import PausedPasses, collect_dense
from layerwise.passes.rows import input_rows
from layerwise.structure import as_matrices, module_of, parameter_of, structure_of
from layerwise.tasks.batches import Batches, call
from models import MODELS, inputs_for


def plain(output):
    return [leaf for leaf in tree_leaves(dict(output) if hasattr(output, "items") else output) if torch.is_tensor(leaf)]


def batches_for(name, model, count=3):
    return Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(count)), {})


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_that_changes_nothing_gives_the_plain_forward_bit_for_bit(name):
    model = MODELS[name]().eval()
    data = batches_for(name, model)
    with torch.no_grad():
        expected = [plain(call(model, batch)) for batch in data]
    outputs = {}

    def forward(model, batch):
        outputs[id(batch)] = call(model, batch)

    blocks = [block.name for block in structure_of(model).blocks]
    visited = []
    with PausedPasses(model, blocks, data, forward) as passes:
        for block, standing in passes:
            visited.append(block)
            assert len(standing) == len(data)
            for one in standing:
                first = one.run(fresh=True)
                second = one.run(fresh=one.wrote)  # a block runs twice: statistics, then output
                assert all(
                    torch.equal(a, b) for a, b in zip(tree_leaves(first), tree_leaves(second)) if torch.is_tensor(a)
                )
                one.go_on(second)
    assert sorted(visited) == sorted(blocks)
    for batch, wanted in zip(data, expected):
        got = plain(outputs[id(batch)])
        assert len(got) == len(wanted) > 0
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    with torch.no_grad():  # the model is as it was
        assert all(torch.equal(a, b) for a, b in zip(plain(call(model, data[0])), expected[0], strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_those_of_a_naive_reference(name):
    model = MODELS[name]().eval()
    data = batches_for(name, model)
    structure = structure_of(model)
    naive, handles = {}, []
    for layer in structure.layers:
        if layer.kind == "experts":
            continue
        module = module_of(model, layer)

        def keep(module, args, kwargs, layer=layer):
            naive.setdefault(layer.name, []).append(input_rows(module, layer, (args or [*kwargs.values()])[0]).double())

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for batch in data:
            call(model, batch)
    for handle in handles:
        handle.remove()
    found = {}
    for _, statistics in collect_dense(model, structure, data, "gram"):
        found |= statistics
    assert set(found) == {layer.name for layer in structure.layers if layer.block}
    for layer in structure.layers:
        if layer.kind == "experts" or (name == "dit" and "blocks.0.norm1.emb" in layer.name):
            continue  # DiT calls the embedder of its first block once more after the last; only the block's call counts
        rows = torch.cat(naive[layer.name], dim=1)
        for index, one in enumerate(found[layer.name]):
            assert one.tokens == rows.shape[1]
            gram = rows[index].T @ rows[index]
            assert torch.allclose(one.gram.double(), gram, rtol=1e-4, atol=1e-5 * gram.diagonal().max().item())
    squares = {}
    for _, statistics in collect_dense(model, structure, data, "squares"):
        squares |= statistics
    for name_, statistics in squares.items():
        for one, with_gram in zip(statistics, found[name_], strict=True):
            assert (one is None) == (with_gram is None)
            assert one is None or torch.allclose(one.squares, with_gram.squares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_see_the_tokens_routed_to_them(name):
    """The oracle recomputes a module's experts by hand from what its router chose."""
    model = MODELS[name]().eval()
    data = batches_for(name, model, 2)
    structure = structure_of(model)
    layers = [layer for layer in structure.blocks[0].layers if layer.kind == "experts"]
    module = module_of(model, layers[0])
    seen = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()]), with_kwargs=True
    )
    with torch.no_grad():
        for batch in data:
            call(model, batch)
    handle.remove()
    _, statistics = next(iter(collect_dense(model, structure, data, "gram")))
    first = next(layer for layer in layers if "gate_up" in layer.name)
    routed = 0
    for expert in range(first.matrices):
        rows = []
        for hidden, index, *_ in seen:
            rows.append(hidden[(index == expert).any(dim=-1)])
        rows = torch.cat(rows)
        got = statistics[first.name][expert]
        routed += len(rows)
        if not len(rows):
            assert got is None
            continue
        assert got.tokens == len(rows)
        assert torch.allclose(got.gram, rows.T @ rows, rtol=1e-4, atol=1e-6)
    assert routed > 0
    down = next(layer for layer in layers if "down" in layer.name)
    assert [s and s.tokens for s in statistics[down.name]] == [s and s.tokens for s in statistics[first.name]]


@pytest.mark.parametrize("name", MODELS)
def test_no_block_is_handed_a_cache(name):
    model = MODELS[name]().eval()
    handed = []
    for block in structure_of(model).blocks:
        model.get_submodule(block.name).register_forward_pre_hook(
            lambda _, args, kwargs: handed.extend([*args, *kwargs.values()]), with_kwargs=True
        )
    with torch.no_grad():
        call(model, inputs_for(name, model))
    assert handed
    assert not [one for one in handed if "Cache" in type(one).__name__]


def test_layers_with_one_input_share_one_statistic():
    model = MODELS["llama"]().eval()
    _, statistics = next(iter(collect_dense(model, structure_of(model), batches_for("llama", model), "gram")))
    by_role = {name.rsplit(".", 1)[1]: entry for name, entry in statistics.items()}
    assert by_role["q_proj"] is by_role["k_proj"] is by_role["v_proj"]
    assert by_role["gate_proj"] is by_role["up_proj"]
    assert len({id(entry) for entry in statistics.values()}) == 4


def test_padding_is_not_counted():
    model = MODELS["llama"]().eval()
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    data = Batches(({"input_ids": ids, "attention_mask": mask},), {})
    _, statistics = next(iter(collect_dense(model, structure_of(model), data)))
    assert {one[0].tokens for one in statistics.values()} == {13}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_padding_that_is_routed_to_experts_is_not_counted(name, left):
    model = MODELS[name]().eval()
    structure = structure_of(model)
    rows = [torch.randint(4, 90, (1, size), generator=torch.Generator().manual_seed(size)) for size in (8, 5)]
    padded = torch.zeros(2, 8, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        place = slice(8 - row.shape[1], None) if left else slice(row.shape[1])
        padded[index, place], mask[index, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = Batches(({"input_ids": padded, "attention_mask": mask, "position_ids": positions},), {})
    apart = Batches(tuple({"input_ids": row} for row in rows), {})
    experts = 0
    for (block, a), (_, b) in zip(
        collect_dense(model, structure, together, "gram"), collect_dense(model, structure, apart, "gram"), strict=True
    ):
        for layer in block.layers:
            for found, wanted in zip(a[layer.name], b[layer.name], strict=True):
                assert (found is None) == (wanted is None), layer.name
                if found is not None:
                    assert found.tokens == wanted.tokens, layer.name
                    assert torch.allclose(found.gram, wanted.gram, rtol=1e-3, atol=1e-5), layer.name
                    experts += layer.kind == "experts"
    assert experts > 0


class TwiceModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.blocks[0](self.blocks[1](self.blocks[0](x)))


def test_a_block_called_twice_is_an_error_that_says_so():
    model = TwiceModel()
    with (
        pytest.raises(WalkError, match="called twice"),
        PausedPasses(model, ["blocks.0", "blocks.1"], [{"x": torch.ones(1, 4)}]) as p,
    ):
        for _, standing in p:
            for one in standing:
                one.go_on(one.run())
    assert not any("forward" in vars(module) for module in model.modules())


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        x += 1
        return self.lin(x)


def test_a_block_that_writes_into_its_input_is_noticed():
    model = nn.Module()
    model.blocks = nn.ModuleList([InPlace()])
    model.forward = lambda x: model.blocks[0](x * 1)
    x = torch.ones(1, 4)
    with PausedPasses(model, ["blocks.0"], [{"x": x}]) as passes:
        for _, (one,) in passes:
            first = one.run(fresh=True)
            assert one.wrote
            assert torch.equal(one.run(fresh=True), first)
            one.go_on(first)


def test_nan_in_activations_names_the_layer():
    model = MODELS["llama"]().eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match=r'layer "model.layers.1.self_attn.q_proj": \d+ of its 32 inputs'):
        for _ in collect_dense(model, structure_of(model), batches_for("llama", model)):
            pass


def test_training_mode_and_gradients_are_given_back():
    model = MODELS["llama"]().train()
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    for _ in collect_dense(model, structure_of(model), batches_for("llama", model)):
        assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == before


def test_statistics_do_not_depend_on_how_tokens_are_batched():
    model = MODELS["llama"]().eval()
    ids = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(0))
    one = Batches(({"input_ids": ids},), {})
    four = Batches(tuple({"input_ids": row[None]} for row in ids), {})
    structure = structure_of(model)
    for (_, a), (_, b) in zip(collect_dense(model, structure, one), collect_dense(model, structure, four), strict=True):
        for name in a:
            assert torch.allclose(a[name][0].squares, b[name][0].squares, rtol=1e-5)


def test_the_weights_are_untouched():
    model = MODELS["mixtral"]().eval()
    before = copy.deepcopy(model.state_dict())
    for _ in collect_dense(model, structure_of(model), batches_for("mixtral", model), "gram"):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer = structure_of(model).layers[0]
    assert as_matrices(parameter_of(model, layer), layer).shape == (layer.matrices, layer.rows, layer.columns)


def test_a_batch_that_the_model_does_not_take_is_one_line():
    model = MODELS["t5"]().eval()
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}  # nothing for the decoder
    with pytest.raises(WalkError, match="the model cannot run on batch 0: ValueError: You must specify"):
        for _ in collect_dense(model, structure_of(model), Batches((batch,), {})):
            pass
