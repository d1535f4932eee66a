"""GGUF of architecture deci: every tensor and number read back, and by llama.cpp's graph the file gives what the model gives."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from layerwise.errors import ConfigError, MissingExtra, ModelError, OutputError, SaveError
from layerwise.io import gguf_deci, load, load_tokenizer, model_folder, save_gguf
from layerwise.io.gguf_tokenizer import _LLAMA3
from layerwise.methods import FLAP
from layerwise.shrink import apply, cut_hidden, drop_blocks, shrink
from layerwise.structure import coupled_groups
from layerwise.tasks.batches import Batches
from models import DECODER, MODELS, inputs_for, small_llama
from shrinking import drawn

gguf = pytest.importorskip("gguf")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SETTINGS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    "mlp_bias": {"mlp_bias": True},
    "hidden": {},
}


def with_biases(model):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


def narrowed(name):
    """Heads and channels cut by layer and a block dropped; Qwen 2, whose queries have biases, keeps its heads."""
    if name == "qwen2":
        model = with_biases(MODELS["qwen2"]())
        shrink(model, drawn(coupled_groups(model), 0, kinds=("channels",)))
        return model
    if name == "mistral":
        config = transformers.MistralConfig(**DECODER, head_dim=8, sliding_window=None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = with_biases(transformers.MistralForCausalLM(config))
        shrink(model, {"model.layers.1.mlp": [5, 9], "model.layers.0.self_attn": [1]})
        return model
    model = with_biases(small_llama(**{**DECODER, "num_hidden_layers": 3, **SETTINGS[name]}))
    shrink(model, {"model.layers.0.mlp": range(8, 50), "model.layers.2.self_attn": [1], "model.layers.2.mlp": [3]})
    drop_blocks(model, ["model.layers.1"])
    if name == "hidden":
        cut_hidden(model, range(0, 32, 2))
    return model


def as_llama_cpp(reader, ids):
    """Logits of the file, by the graph of `deci` in llama.cpp: rotary pairs are neighbours, frequencies divided by rope_freqs."""
    number = lambda name: reader.get_field(f"deci.{name}").contents()  # noqa: E731
    weight = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}

    def norm(x, name):
        return (
            x / (x.square().mean(-1, keepdim=True) + number("attention.layer_norm_rms_epsilon")).sqrt() * weight[name]
        )

    def linear(x, name):
        y = x @ weight[f"{name}.weight"].T
        return y + weight[f"{name}.bias"] if f"{name}.bias" in weight else y

    size = number("attention.key_length")
    assert size == number("attention.value_length") == number("rope.dimension_count")
    angle = torch.arange(len(ids)).double()[:, None] / number("rope.freq_base") ** (
        torch.arange(0, size, 2).double() / size
    )
    if reader.get_field("deci.rope.scaling.type") is not None:
        assert number("rope.scaling.type") == "linear"
        angle = angle / number("rope.scaling.factor")
    angle = angle / weight.get("rope_freqs.weight", torch.ones(size // 2))

    def turned(x):  # (heads, tokens, size)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    def split(x, heads):
        return x.view(len(ids), heads, size).transpose(0, 1)

    x = weight["token_embd.weight"][ids]
    for index in range(number("block_count")):
        heads, kv_heads = number("attention.head_count")[index], number("attention.head_count_kv")[index]
        block = f"blk.{index}"
        y = norm(x, f"{block}.attn_norm.weight")
        q = turned(split(linear(y, f"{block}.attn_q"), heads))
        k = turned(split(linear(y, f"{block}.attn_k"), kv_heads)).repeat_interleave(heads // kv_heads, 0)
        v = split(linear(y, f"{block}.attn_v"), kv_heads).repeat_interleave(heads // kv_heads, 0)
        scores = q @ k.transpose(1, 2) / size**0.5 + torch.full((len(ids), len(ids)), -torch.inf).double().triu(1)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{block}.attn_output")
        y = norm(x, f"{block}.ffn_norm.weight")
        inner = torch.nn.functional.silu(linear(y, f"{block}.ffn_gate")) * linear(y, f"{block}.ffn_up")
        assert inner.shape[1] == number("feed_forward_length")[index]
        x = x + linear(inner, f"{block}.ffn_down")
    head = "output.weight" if "output.weight" in weight else "token_embd.weight"
    return norm(x, "output_norm.weight") @ weight[head].T


@pytest.mark.parametrize("name", [*SETTINGS, "qwen2", "mistral"])
def test_the_graph_of_llama_cpp_gives_what_the_model_gives(name, tmp_path):
    model = narrowed(name)
    saved = save_gguf(model, tmp_path / "out.gguf", dtype="F32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    ids = torch.randint(4, 90, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.double()(input_ids=ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(as_llama_cpp(reader, ids), wanted, rtol=1e-5, atol=1e-5)
    assert saved.tensors == len(reader.tensors) == len([*gguf_deci.tensors_of(model)])
    assert len({*saved.channels}) == 2


def test_zero_biases_beside_those_that_flap_gives_are_not_written(tmp_path):
    model = MODELS["llama"]()
    data = Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(2)), {})
    apply(model, FLAP(parameters=0.7).plan(model, data), data)
    assert any(heads < 4 for heads in gguf_deci.widths(model)[1])
    save_gguf(model, tmp_path / "out.gguf", dtype="F32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    biases = {tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")}
    assert biases
    assert all("attn_output" in name or "ffn_down" in name for name in biases)
    ids = torch.randint(4, 90, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.double()(input_ids=ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(as_llama_cpp(reader, ids), wanted, rtol=1e-5, atol=1e-5)


def test_every_tensor_and_number(tmp_path):
    model = narrowed("llama")
    saved = save_gguf(model, tmp_path / "tiny.gguf", dtype="F32")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    told = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert told == {
        "general.architecture": "deci", "general.name": "tiny", "general.file_type": 0, "deci.vocab_size": 96,
        "deci.context_length": 64, "deci.embedding_length": 32, "deci.block_count": 2, "deci.feed_forward_length": [42, 1],
        "deci.attention.head_count": [4, 2], "deci.attention.head_count_kv": [2, 1], "deci.attention.key_length": 8,
        "deci.attention.value_length": 8, "deci.rope.dimension_count": 8, "deci.rope.freq_base": 10000.0,
        "deci.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    assert (saved.channels, saved.heads, saved.kv_heads) == ((42, 1), (4, 2), (2, 1))
    own = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    layers = model.model.layers
    plain = {"token_embd": model.model.embed_tokens, "output_norm": model.model.norm, "output": model.lm_head}
    for index, layer in enumerate(layers):
        plain |= {
            f"blk.{index}.{name}": layer.get_submodule(path)
            for name, path in {
                "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_v": "self_attn.v_proj",
                "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
            }.items()
        }  # fmt: skip
    for name, module in plain.items():
        assert torch.equal(own.pop(f"{name}.weight"), module.weight), name
    # what is left are the rows of q and k: 0 4 1 5 2 6 3 7 of each head of eight
    order = [head + row for head in range(0, 32, 8) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
    for index, layer in enumerate(layers):
        for name in "qk":
            weight = layer.get_submodule(f"self_attn.{name}_proj").weight
            assert torch.equal(own.pop(f"blk.{index}.attn_{name}.weight"), weight[order[: len(weight)]])
    assert own == {}


def test_f16_holds_matrices_and_norms_stay_f32(tmp_path):
    model = narrowed("llama").bfloat16()
    save_gguf(model, tmp_path / "out.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16"}
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight.* not finite as float16. Give F32"):
        save_gguf(model, tmp_path / "large.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    save_gguf(model, tmp_path / "large.gguf", dtype="F32")


def test_the_demo_with_its_tokenizer(tmp_path):
    model = load("demo")
    shrink(model, {"model.layers.3.mlp": range(64)})
    saved = save_gguf(model, tmp_path / "demo.gguf", tokenizer=model_folder("demo"))
    assert saved.tokenizer
    assert "with its tokenizer" in saved.lines()[0]
    told = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "demo.gguf").fields.items()}
    written = json.loads((model_folder("demo") / "tokenizer.json").read_text())
    tokens = told["tokenizer.ggml.tokens"]
    assert {text: tokens[index] for text, index in written["model"]["vocab"].items()} == {
        text: text for text in written["model"]["vocab"]
    }
    assert len(tokens) == len(told["tokenizer.ggml.token_type"]) == model.config.vocab_size
    assert told["tokenizer.ggml.merges"][0] == " ".join(written["model"]["merges"][0])
    assert len(told["tokenizer.ggml.merges"]) == len(written["model"]["merges"])
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert told["tokenizer.ggml.token_type"][:2] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert told["tokenizer.ggml.eos_token_id"] == 0
    save_gguf(model, tmp_path / "demo.gguf", tokenizer=load_tokenizer("demo"), force=True)
    again = gguf.GGUFReader(tmp_path / "demo.gguf")
    assert again.get_field("tokenizer.ggml.tokens").contents() == tokens


def bpe(tmp_path, steps, **more):
    """A folder with a BPE of a few tokens that splits text by these steps."""
    table = {f"t{index}": index for index in range(10)} | {"<0x41>": 10, "<unk>": 11}
    tokenizer = Tokenizer(models.BPE(table, [], **more))
    if steps:
        tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["added"])
    special = {"eos_token": "<end>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
RAW = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([LEVEL], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), LEVEL], "smollm"),
        ([split(_LLAMA3), RAW], "llama-bpe"),
        ([split(_LLAMA3.replace("{1,3}", "")), RAW], "qwen2"),
    ],
)
def test_how_text_is_split_is_told_from_the_tokenizer(steps, name, tmp_path):
    save_gguf(narrowed("llama"), tmp_path / "out.gguf", tokenizer=bpe(tmp_path, steps))
    told = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert told["tokenizer.ggml.pre"] == name
    assert told["tokenizer.ggml.tokens"][9:15] == ["t9", "<0x41>", "<unk>", "<end>", "added", "[PAD14]"]
    kinds = gguf.TokenType
    assert told["tokenizer.ggml.token_type"][9:15] == [
        kinds.NORMAL, kinds.NORMAL, kinds.NORMAL, kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED,
    ]  # fmt: skip
    assert told["tokenizer.ggml.eos_token_id"] == 12


def test_bytes_to_fall_back_on(tmp_path):
    folder = bpe(tmp_path, [], **{"byte_fallback": True, "unk_token": "<unk>"})
    save_gguf(narrowed("llama"), tmp_path / "out.gguf", tokenizer=folder)
    told = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert told["tokenizer.ggml.model"] == "llama"
    kinds = gguf.TokenType
    assert told["tokenizer.ggml.token_type"][9:12] == [kinds.NORMAL, kinds.BYTE, kinds.UNKNOWN]
    assert told["tokenizer.ggml.scores"][:3] == [0, -1, -2]


def test_tokenizers_that_it_cannot_say(tmp_path):
    model = narrowed("llama")
    odd = bpe(tmp_path, [pre_tokenizers.Whitespace(), LEVEL])
    with pytest.raises(ConfigError, match=r'Whitespace, ByteLevel\) is none of the ways .* pre="..."'):
        save_gguf(model, tmp_path / "out.gguf", tokenizer=odd)
    save_gguf(model, tmp_path / "out.gguf", tokenizer=odd, pre="falcon")
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.ggml.pre").contents() == "falcon"
    with pytest.raises(ConfigError, match=r"no tokenizer.json in it.*Leave the tokenizer out"):
        save_gguf(model, tmp_path / "other.gguf", tokenizer=tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0}, **{"unk_token": "a"}))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ConfigError, match="WordLevel is not written; BPE is"):
        save_gguf(model, tmp_path / "other.gguf", tokenizer=fast)
    with pytest.raises(ConfigError, match="its token 4095 has no row among the 96"):
        save_gguf(model, tmp_path / "other.gguf", tokenizer=model_folder("demo"))
    assert not (tmp_path / "other.gguf").exists()


def test_models_that_it_does_not_compute(tmp_path):
    out = tmp_path / "out.gguf"
    for model, words in (
        (MODELS["qwen3"](), "Qwen3ForCausalLM: GGUF's deci is a Llama; there is a writer for LlamaForCausalLM"),
        (MODELS["mistral"](), "its attention sees a window of 4 tokens"),
        (small_llama(hidden_act="gelu"), "its activation is gelu, not silu"),
        (small_llama(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), 'scaled by "yarn"'),
    ):
        with pytest.raises(ModelError, match=words):
            save_gguf(model, out)
    model = with_biases(MODELS["qwen2"]())
    shrink(model, {"model.layers.1.self_attn": [0]})
    with pytest.raises(
        ModelError, match=r'"model.layers.1.self_attn.q_proj" has a bias, and llama.cpp reads .*\(32\): keep all heads'
    ):
        save_gguf(model, out)
    assert not out.exists()


def test_bad_requests(tmp_path, monkeypatch):
    model = narrowed("llama")
    with pytest.raises(ConfigError, match='dtype="Q4_0": give F16 or F32'):
        save_gguf(model, tmp_path / "out.gguf", dtype="Q4_0")
    save_gguf(model, tmp_path / "out.gguf")
    with pytest.raises(OutputError, match="exists already"):
        save_gguf(model, tmp_path / "out.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'layerwise\[gguf\]'"):
        save_gguf(model, tmp_path / "other.gguf")


def test_a_file_that_reads_back_different_does_not_appear(tmp_path, monkeypatch):
    model = narrowed("llama")
    write = gguf_deci._tensors

    def spoilt(writer, model, dtype):
        write(writer, model, dtype)
        model.model.layers[0].mlp.up_proj.weight.data.add_(1)

    monkeypatch.setattr(gguf_deci, "_tensors", spoilt)
    with pytest.raises(SaveError, match=r"blk.0.ffn_up.weight.* reads back different"):
        save_gguf(model, tmp_path / "out.gguf")
    assert [*tmp_path.iterdir()] == []
