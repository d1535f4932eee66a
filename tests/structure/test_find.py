"""`structure_of` on every architecture the project names: what its blocks are, and what each of their layers is.

The expectations are written by hand from the models' own code; every model has two blocks in each stack.
"""

import inspect

import pytest
import torch
from torch import nn

from layerwise.structure import as_matrices, from_matrices, module_of, parameter_of, structure_of
from layerwise.structure.roles import role_in_block
from models import MODELS, inputs_for


def _layers(text: str) -> list[tuple[str, str, int, int, int]]:
    """ "name role rows columns [xmatrices]" separated by commas."""
    rows = (line.split() for line in text.split(","))
    return [(name, role, int(more[0][1:]) if more else 1, int(r), int(c)) for name, role, r, c, *more in rows]


def attention(
    prefix: str = "self_attn.", names: str = "q_proj k_proj v_proj o_proj", kv: int = 32, wide: int = 32
) -> str:
    q, k, v, o = names.split()
    return f"{prefix}{q} q {wide} 32, {prefix}{k} k {kv} 32, {prefix}{v} v {kv} 32, {prefix}{o} o 32 {wide}"


def kqv(prefix: str = "self_attn.", role: str = "") -> str:
    return ", ".join(
        f"{prefix}{name} {role}{name[0]} 32 32" for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    ).replace(f" {role}o ", f" {role}o ")


GATED = "mlp.gate_proj gate 64 32, mlp.up_proj up 64 32, mlp.down_proj down 32 64"
FCS = "fc1 fc1 64 32, fc2 fc2 32 64"
MLP = "mlp.fc1 fc1 64 32, mlp.fc2 fc2 32 64"
LLAMA = f"{attention(kv=16)}, {GATED}"
T5_SELF = attention("layer.0.SelfAttention.", "q k v o")
T5_CROSS = ", ".join(f"layer.1.EncDecAttention.{name} cross_{name} 32 32" for name in "qkvo")
T5_GATED = "layer.{0}.DenseReluDense.wi_0 gate 64 32, layer.{0}.DenseReluDense.wi_1 up 64 32, layer.{0}.DenseReluDense.wo down 32 64"
T5_PLAIN = "layer.{0}.DenseReluDense.wi fc1 64 32, layer.{0}.DenseReluDense.wo fc2 32 64"
NEOX_MLP = "mlp.dense_h_to_4h fc1 {0} 32, mlp.dense_4h_to_h fc2 32 {0}"
BERT_ATTENTION = "query {1}q 32 32, {0}key {1}k 32 32, {0}value {1}v 32 32"
DIFFUSION_FF = "{0}.net.0.proj {1}fc1 128 32, {0}.net.2 {1}fc2 32 128"
JOINT_ADDED = [f"attn.add_{name}_proj context_{name} 32 32" for name in "qkv"]
JOINT_QKV = "attn.to_q q 32 32, attn.to_k k 32 32, attn.to_v v 32 32"
JOINT_NORMS = "norm1.linear modulation 192 32, norm1_context.linear modulation 192 32"
JOINT_FF = f"{DIFFUSION_FF.format('ff', '')}, {DIFFUSION_FF.format('ff_context', 'context_')}"
BASIC = "conv1 conv {0} {1}, conv2 conv {0} {2}"

# model -> stack -> layers of its first block
EXPECTED: dict[str, dict[str, str]] = {
    "llama": {"model.layers": LLAMA},
    "mistral": {"model.layers": LLAMA},
    "qwen2": {"model.layers": LLAMA},
    "qwen3": {"model.layers": f"{attention(kv=32, wide=64)}, {GATED}"},
    "qwen3_moe": {
        "model.layers": f"{attention(kv=16)}, mlp.experts.gate_up_proj gate_up 48 32 x4, mlp.experts.down_proj down 32 24 x4"
    },
    "mixtral": {
        "model.layers": f"{attention(kv=16)}, mlp.experts.gate_up_proj gate_up 128 32 x4, mlp.experts.down_proj down 32 64 x4"
    },
    "gemma3": {"model.layers": LLAMA},
    "phi3": {
        "model.layers": "self_attn.o_proj o 32 32, self_attn.qkv_proj qkv 64 32, mlp.gate_up_proj gate_up 128 32, mlp.down_proj down 32 64"
    },
    "gpt2": {"transformer.h": "attn.c_attn qkv 96 32, attn.c_proj o 32 32, mlp.c_fc fc1 128 32, mlp.c_proj fc2 32 128"},
    "gpt_neox": {
        "gpt_neox.layers": f"attention.query_key_value qkv 96 32, attention.dense o 32 32, {NEOX_MLP.format(64)}"
    },
    "opt": {"model.decoder.layers": f"{kqv()}, {FCS}"},
    "falcon": {
        "transformer.h": f"self_attention.query_key_value qkv 48 32, self_attention.dense o 32 32, {NEOX_MLP.format(128)}"
    },
    "bloom": {
        "transformer.h": f"self_attention.query_key_value qkv 96 32, self_attention.dense o 32 32, {NEOX_MLP.format(128)}"
    },
    "gpt_oss": {
        "model.layers": f"{attention(kv=16)}, mlp.experts.gate_up_proj gate_up 128 32 x4, mlp.experts.down_proj down 32 64 x4"
    },
    "llama4": {
        "model.layers": f"{attention(kv=16)}, feed_forward.experts.gate_up_proj gate_up 96 32 x4,"
        "feed_forward.experts.down_proj down 32 48 x4, feed_forward.shared_expert.gate_proj gate 48 32,"
        "feed_forward.shared_expert.up_proj up 48 32, feed_forward.shared_expert.down_proj down 32 48"
    },
    "t5": {
        "encoder.block": f"{T5_SELF}, {T5_PLAIN.format(1)}",
        "decoder.block": f"{T5_SELF}, {T5_CROSS}, {T5_PLAIN.format(2)}",
    },
    "t5_gated": {
        "encoder.block": f"{T5_SELF}, {T5_GATED.format(1)}",
        "decoder.block": f"{T5_SELF}, {T5_CROSS}, {T5_GATED.format(2)}",
    },
    "bert": {
        "bert.encoder.layer": f"attention.self.{BERT_ATTENTION.format('attention.self.', '')}, attention.output.dense o 32 32,"
        "intermediate.dense fc1 64 32, output.dense fc2 32 64"
    },
    "vit": {"vit.layers": f"{attention('attention.')}, {MLP}"},
    "deit": {"deit.layers": f"{attention('attention.')}, {MLP}"},
    "convnext": {
        "convnext.encoder.stages.0.layers": "dwconv conv 1 49 x16, pwconv1 fc1 64 16, pwconv2 fc2 16 64",
        "convnext.encoder.stages.1.layers": "dwconv conv 1 49 x32, pwconv1 fc1 128 32, pwconv2 fc2 32 128",
    },
    "swin": {
        "swin.encoder.layers.0.blocks": "attention.q_proj q 16 16, attention.k_proj k 16 16, attention.v_proj v 16 16,"
        "attention.o_proj o 16 16, mlp.fc1 fc1 64 16, mlp.fc2 fc2 16 64",
        "swin.encoder.layers.1.blocks": f"{attention('attention.')}, mlp.fc1 fc1 128 32, mlp.fc2 fc2 32 128",
    },
    "clip": {"text_model.encoder.layers": f"{kqv()}, {MLP}", "vision_model.encoder.layers": f"{kqv()}, {MLP}"},
    "llava": {"model.vision_tower.encoder.layers": f"{kqv()}, {MLP}", "model.language_model.layers": LLAMA},
    "blip2": {
        "vision_model.encoder.layers": f"self_attn.qkv qkv 96 32, self_attn.projection o 32 32, {MLP}",
        "qformer.encoder.layer": f"attention.attention.{BERT_ATTENTION.format('attention.attention.', '')},"
        "attention.output.dense o 32 32,"
        f"crossattention.attention.{BERT_ATTENTION.format('crossattention.attention.', 'cross_')},"
        "crossattention.output.dense cross_o 32 32, intermediate_query.dense fc1 64 32, output_query.dense fc2 32 64",
        "language_model.model.decoder.layers": f"{kqv()}, {FCS}",
    },
    "whisper": {
        "model.encoder.layers": f"{kqv()}, {FCS}",
        "model.decoder.layers": f"{kqv()}, {kqv('encoder_attn.', 'cross_')}, {FCS}",
    },
    "dit": {
        "transformer_blocks": "norm1.emb.timestep_embedder.linear_1 modulation 32 256,"
        "norm1.emb.timestep_embedder.linear_2 modulation 32 32, norm1.linear modulation 192 32,"
        "attn1.to_q q 32 32, attn1.to_k k 32 32, attn1.to_v v 32 32, attn1.to_out.0 o 32 32,"
        f"{DIFFUSION_FF.format('ff', '')}"
    },
    "sd3": {
        "transformer_blocks": f"{JOINT_NORMS}, {JOINT_QKV}, {JOINT_ADDED[1]}, {JOINT_ADDED[2]}, {JOINT_ADDED[0]},"
        f"attn.to_out.0 o 32 32, attn.to_add_out context_o 32 32, {JOINT_FF}"
    },
    "flux": {
        "transformer_blocks": f"{JOINT_NORMS}, {JOINT_QKV}, attn.to_out.0 o 32 32, {', '.join(JOINT_ADDED)},"
        f"attn.to_add_out context_o 32 32, {JOINT_FF}",
        "single_transformer_blocks": f"norm.linear modulation 96 32, proj_mlp fc1 128 32, proj_out fc2 32 160, {JOINT_QKV}",
    },
    "cifar_resnet": {
        "layer1": BASIC.format(8, 72, 72),
        "layer2": f"{BASIC.format(16, 72, 144)}, shortcut.0 shortcut 16 8",
        "layer3": f"{BASIC.format(32, 144, 288)}, shortcut.0 shortcut 32 16",
    },
    "timm_vit": {"blocks": f"attn.qkv qkv 96 32, attn.proj o 32 32, {MLP}"},
}

# what the second block of a stack has that the first has not (+), or lacks (-), as suffixes
DIFFERENT_SECOND = {
    "blip2 qformer.encoder.layer": {
        f"-crossattention.{n}" for n in ("attention.query", "attention.key", "attention.value", "output.dense")
    },
    "sd3 transformer_blocks": {
        "-attn.to_add_out",
        "-ff_context.net.0.proj",
        "-ff_context.net.2",
    },  # its last ends the text
    "cifar_resnet layer2": {"-shortcut.0"},
    "cifar_resnet layer3": {"-shortcut.0"},
}

ROUTERS = {"qwen3_moe": "mlp.gate", "mixtral": "mlp.gate", "gpt_oss": "mlp.router", "llama4": "feed_forward.router"}
HEADS = {
    "lm_head": "llama mistral qwen3 qwen3_moe mixtral phi3 gpt_oss llama4 t5_gated llava",
    "classifier": "vit deit convnext swin",
    "fc": "cifar_resnet",
    "head": "timm_vit",
}


def test_every_model_is_expected():
    assert EXPECTED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_stacks_blocks_layers_roles_and_sizes(name):
    structure = structure_of(MODELS[name]())

    assert [stack.name for stack in structure.stacks] == list(EXPECTED[name])
    for stack in structure.stacks:
        assert [block.name for block in stack.blocks] == [f"{stack.name}.0", f"{stack.name}.1"]
        assert [(block.stack, block.index) for block in stack.blocks] == [(stack.name, 0), (stack.name, 1)]
        first, second = stack.blocks
        found = [
            (layer.name.removeprefix(f"{first.name}."), layer.role, layer.matrices, layer.rows, layer.columns)
            for layer in first.layers
        ]
        assert found == _layers(EXPECTED[name][stack.name])
        suffixes = [{layer.name.removeprefix(f"{block.name}.") for layer in block.layers} for block in (first, second)]
        expected = DIFFERENT_SECOND.get(f"{name} {stack.name}", set())
        assert {f"-{s}" for s in suffixes[0] - suffixes[1]} | {f"+{s}" for s in suffixes[1] - suffixes[0]} == expected
    assert structure.outside == ()
    assert all(layer.size == layer.matrices * layer.rows * layer.columns for layer in structure)


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_called_once_and_every_layer_sees_its_input(name):
    model = MODELS[name]()
    structure = structure_of(model)
    calls = dict.fromkeys((block.name for block in structure.blocks), 0)
    seen = set()
    for block in structure.blocks:
        model.get_submodule(block.name).register_forward_hook(
            lambda *_, name=block.name: calls.__setitem__(name, calls[name] + 1)
        )
    for layer in structure:
        module_of(model, layer).register_forward_pre_hook(lambda *_, name=layer.name: seen.add(name))

    output = _forward(model, inputs_for(name, model))

    assert output.isfinite().all()
    assert set(calls.values()) == {1}
    assert seen == {layer.name for layer in structure}


@pytest.mark.parametrize("name", MODELS)
def test_views_round_trip_and_multiply_the_input(name):
    """y = W x + b with the matrix view of every linear, Conv1D and convolution of the first block of each stack."""
    model = MODELS[name]()
    structure = structure_of(model)
    layers = [layer for stack in structure.stacks for layer in stack.blocks[0].layers]
    checked: list[str] = []

    def check(layer, module, inputs, output):
        weight = parameter_of(model, layer)
        matrices = as_matrices(weight, layer)
        x = inputs[0]
        if layer.kind == "conv":
            windows = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            windows = windows.reshape(len(x), layer.matrices, layer.columns, -1)
            got = torch.einsum("grc,ngcl->ngrl", matrices, windows).reshape(output.shape)
            bias = module.bias[:, None, None] if module.bias is not None else 0
        else:
            got, bias = x @ matrices[0].T, module.bias if module.bias is not None else 0
        torch.testing.assert_close(got + bias, output, rtol=1e-4, atol=1e-5)
        checked.append(layer.name)

    for layer in layers:
        if layer.kind != "experts":
            module_of(model, layer).register_forward_hook(lambda m, i, o, layer=layer: check(layer, m, i, o))
    _forward(model, inputs_for(name, model, batch=1))

    # a set: DiT runs the embedder of its first block once more before its output
    assert set(checked) == {layer.name for layer in layers if layer.kind != "experts"}
    for layer in layers:
        weight = parameter_of(model, layer)
        matrices = as_matrices(weight, layer)
        assert matrices.shape == (layer.matrices, layer.rows, layer.columns)
        assert torch.equal(from_matrices(matrices, layer), weight)


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_are_seen_as_outputs_by_inputs(name):
    """An input whose column is zero in every expert changes nothing; an output whose row is zero stays the same for all inputs."""
    model = MODELS[name]()
    first = structure_of(model).blocks[0]
    up, down = [layer for layer in first.layers if layer.kind == "experts"]
    experts = module_of(model, up)
    assert experts is module_of(model, down)
    given = []
    experts.register_forward_hook(lambda _, inputs, output: given.append(inputs))
    _forward(model, inputs_for(name, model))
    hidden, *routing = given[0]
    other = hidden.clone()
    other[..., 5] += 1.0
    assert not torch.allclose(experts(hidden, *routing), experts(other, *routing), rtol=0, atol=1e-7)

    with torch.no_grad():
        for layer, edit in ((up, (slice(None), slice(None), 5)), (down, (slice(None), 7))):
            matrices = as_matrices(parameter_of(model, layer), layer).clone()
            matrices[edit] = 0
            parameter_of(model, layer).copy_(from_matrices(matrices, layer))
        before, after = experts(hidden, *routing), experts(other, *routing)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert (before[..., 7] == 0).all()
    assert (before[..., 8] != 0).any()


@pytest.mark.parametrize(("name", "router"), ROUTERS.items())
def test_routers_are_left_out_with_a_reason_and_can_be_asked_for(name, router):
    model = MODELS[name]()
    left_out = structure_of(model).left_out
    assert [layer.name for layer, _ in left_out] == [f"model.layers.{block}.{router}" for block in (0, 1)]
    assert all("router" in reason and layer.role == "router" for layer, reason in left_out)

    asked = structure_of(model, include=[f"*.{router}"])
    assert [(layer.name, layer.rows, layer.columns) for layer in asked] == [
        (f"model.layers.{block}.{router}", 4, 32) for block in (0, 1)
    ]
    assert asked.blocks[0].layers[0].kind == "linear"


@pytest.mark.parametrize(("head", "name"), [(head, name) for head, names in HEADS.items() for name in names.split()])
def test_heads_are_found_outside(head, name):
    (layer,) = structure_of(MODELS[name](), include=[head]).outside
    assert (layer.name, layer.role, layer.block) == (head, "head", None)


@pytest.mark.parametrize(
    ("name", "pattern", "roles"),
    [
        ("vit", "*projection", {"vit.embeddings.patch_embeddings.projection": "stem"}),
        ("cifar_resnet", "conv1", {"conv1": "stem"}),
        ("opt", "*embed*", {"model.decoder.embed_tokens": "embedding"}),
        ("opt", "*positions", {"model.decoder.embed_positions": "position"}),
        ("gpt2", "*.w?e", {"transformer.wte": "embedding"}),
        ("gpt2", "*.wpe", {"transformer.wpe": "position"}),
        ("clip", "*_projection", {"visual_projection": "projection", "text_projection": "projection"}),
        ("timm_vit", "pos_embed", {"pos_embed": "position"}),
        ("llama", "model.norm", {"model.norm": "norm"}),
    ],
)
def test_what_lies_outside_can_be_asked_for(name, pattern, roles):
    structure = structure_of(MODELS[name](), include=[pattern])
    assert {layer.name: layer.role for layer in structure.outside} == roles
    assert list(structure) == list(structure.outside)


def test_position_tables_inside_blocks_are_left_out():
    left_out = structure_of(MODELS["t5"]()).left_out
    assert [(layer.name, layer.role, reason) for layer, reason in left_out] == [
        (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias", "position", "position table")
        for side in ("encoder", "decoder")
    ]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("layers.0.router.classifier", "router"),  # Switch Transformers, NLLB-MoE
        ("layers.0.attention.wo", "o"),  # the names of Meta's own Llama
        ("layers.0.feed_forward.w2", "down"),
        ("layers.0.mlp.gate", "gate"),  # no experts beside it
        ("layers.0.multi_head_attention.dense", "o"),
        ("layers.0.ffn.0", "fc1"),
        ("layers.0.ffn.3", "fc2"),
        ("layers.0.mlp.out_proj", "fc2"),
        ("layers.0.attn.q_proj.base_layer", "q"),  # wrapped by an adapter
        ("layers.0.cross_attention.v_proj", "cross_v"),
        ("layers.0.adaLN_modulation.1", "modulation"),
        ("layers.0.mixer.dt_proj", "dt_proj"),  # in no table: its own name
        ("layers.0.1", "linear"),
    ],
)
def test_roles_by_name(path, role):
    modules = {".".join(path.split(".")[:depth]): nn.Module() for depth in range(path.count(".") + 1)}
    assert role_in_block(path, "linear", {**modules, path: nn.Linear(2, 2)}, "layers.0") == role


def test_building_and_looking_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    structure_of(MODELS["flux"]())
    assert torch.equal(torch.get_rng_state(), before)


def test_structure_is_the_same_on_the_meta_device_and_in_bfloat16():
    from transformers import LlamaConfig, LlamaForCausalLM

    real = structure_of(MODELS["llama"]())
    with torch.device("meta"):
        meta = LlamaForCausalLM(LlamaConfig(**MODELS["llama"]().config.to_diff_dict()))
    assert structure_of(meta) == real
    assert structure_of(MODELS["llama"]().bfloat16()) == real


def _forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "use_cache": False}
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]
