"""Llama-like decoders with widths of each layer as one GGUF file, for llama.cpp: its architecture `deci` takes them.

`deci` was made for DeciLM and Nemotron, whose layers differ: channels and heads are numbers for each block. What its graph computes is
a Llama (RMSNorm, rotary positions, SiLU-gated MLP, no norm of queries and keys), so a model that does anything else is refused. Rotary
positions turn neighbouring entries there, halves of a head in transformers: rows of q and k move.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MissingExtra, ModelError, OutputError, SaveError
from ..files import output_file
from ..passes import check_whole
from .gguf_tokenizer import tokenizer_facts
from .places import REMOTE_PREFIX

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
Number = Literal["F16", "F32"]


@dataclass(frozen=True)
class SavedGGUF:
    """A file that was written and read back: bytes of the file, tensors in it, and the widths of its blocks."""

    file: Path
    bytes: int
    tensors: int
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    tokenizer: bool

    def lines(self) -> list[str]:
        """What is there, and what loads it."""
        words = "with its tokenizer" if self.tokenizer else "without a tokenizer: give token ids"
        return [
            f"{self.file.name}: {self.bytes:,} bytes, {self.tensors} tensors, {words}.",
            "GGUF, architecture deci: llama.cpp and what is built on it. Read back and compared tensor by tensor; llama.cpp was not run.",
        ]


def save_gguf(
    model: nn.Module,
    file: str | Path,
    *,
    tokenizer: Any = None,
    pre: str | None = None,
    dtype: Number = "F16",
    force: bool = False,
) -> SavedGGUF:
    """Write `model` to one GGUF file of architecture `deci`, read it back and compare every tensor and width; then it appears.

    tokenizer: a transformers tokenizer, or a folder with tokenizer.json; None leaves it out (llama.cpp then takes token ids alone).
    pre: llama.cpp's name of the pre-tokenizer, where it cannot be told from tokenizer.json. dtype: of the matrices; norms and biases
    are F32.
    Raises MissingExtra without `gguf`, ModelError for a model that `deci` does not compute, ConfigError for a tokenizer that GGUF cannot
    say, OutputError for a file that exists (without force) or cannot be written, SaveError if it reads back different.
    """
    if dtype not in get_args(Number):
        raise ConfigError(f'save_gguf: dtype="{dtype}": give {" or ".join(get_args(Number))}.')
    gguf = _library()
    check_whole(model, "writing GGUF")
    _check(model)
    path = Path(file).expanduser()
    if path.exists() and not force:
        raise OutputError(f'output "{file}" exists already. Give another name, or replace it: force=True (--force).')
    config: Any = model.config
    facts = tokenizer_facts(gguf, tokenizer, pre, config.vocab_size) if tokenizer is not None else None
    with output_file(path) as partial:
        writer = gguf.GGUFWriter(partial, "deci")
        _metadata(writer, model, path.stem, dtype, gguf)
        if facts is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            facts.write(writer)
        _tensors(writer, model, dtype)
        writer.close()
        count = _compare(gguf.GGUFReader(partial), model, dtype, path)
        size = partial.stat().st_size
    channels, heads, kv_heads = widths(model)
    return SavedGGUF(path, size, count, tuple(channels), tuple(heads), tuple(kv_heads), facts is not None)


def widths(model: nn.Module) -> tuple[list[int], list[int], list[int]]:
    """Channels, query heads and key/value heads of each block."""
    channels, heads, kv_heads = [], [], []
    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        channels.append(mlp.down_proj.in_features)
        heads.append(attention.q_proj.out_features // attention.head_dim)
        kv_heads.append(attention.k_proj.out_features // attention.head_dim)
    return channels, heads, kv_heads


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name in GGUF -> tensor in the order that llama.cpp computes with, one after the other."""
    decoder: Any = model.model
    yield "token_embd.weight", decoder.embed_tokens.weight
    for index, block in enumerate(_blocks(model)):
        attention, mlp = block.self_attn, block.mlp
        yield f"blk.{index}.attn_norm.weight", block.input_layernorm.weight
        yield f"blk.{index}.ffn_norm.weight", block.post_attention_layernorm.weight
        for name, linear in (
            ("attn_q", attention.q_proj), ("attn_k", attention.k_proj), ("attn_v", attention.v_proj),
            ("attn_output", attention.o_proj), ("ffn_gate", mlp.gate_proj), ("ffn_up", mlp.up_proj),
            ("ffn_down", mlp.down_proj),
        ):  # fmt: skip
            for own, tensor in linear.named_parameters():
                if (
                    own == "bias" and not tensor.any()
                ):  # llama.cpp needs no bias, and takes one of queries not at every width
                    continue
                turned = _neighbours(tensor, attention.head_dim) if name in ("attn_q", "attn_k") else tensor
                yield f"blk.{index}.{name}.{own}", turned
    yield "output_norm.weight", decoder.norm.weight
    head: Any = model.lm_head
    if head.weight is not decoder.embed_tokens.weight:
        yield "output.weight", head.weight
    if (factors := _rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors


def _neighbours(tensor: Tensor, size: int) -> Tensor:
    """Entries i and i + size/2 of each head, which turn together, side by side."""
    order = torch.arange(tensor.shape[0], device=tensor.device).view(-1, 2, size // 2).transpose(1, 2).flatten()
    return tensor[order]


def _rope_factors(model: nn.Module) -> Tensor | None:
    """(head_dim / 2,): what each frequency is divided by, of Llama 3; None where they are plain."""
    config: Any = model.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    decoder: Any = model.model
    size = _blocks(model)[0].self_attn.head_dim
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: Tensor = plain / decoder.rotary_emb.inv_freq.float().cpu()
    return factors


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingExtra("a GGUF file needs gguf: pip install 'layerwise[gguf]'.") from error
    return gguf


def _blocks(model: nn.Module) -> Any:
    decoder: Any = model.model
    return decoder.layers


def _check(model: nn.Module) -> None:
    """Raise ModelError, with the first reason, for a model that llama.cpp's `deci` does not compute."""
    name = type(model).__name__.removeprefix(REMOTE_PREFIX)
    if name not in FAMILIES:
        raise ModelError(f"{name}: GGUF's deci is a Llama; there is a writer for {', '.join(FAMILIES)}.")
    config: Any = model.config
    rope = config.rope_parameters
    kind, sizes = rope.get("rope_type", "default"), {block.self_attn.head_dim for block in _blocks(model)}
    window = getattr(config, "sliding_window", None) if "sliding_attention" in _attentions(config) else None
    linears = [part for part in _blocks(model).modules() if hasattr(part, "in_features")]
    reason = None
    if config.hidden_act != "silu":
        reason = f"its activation is {config.hidden_act}, not silu"
    elif kind not in ("default", "linear", "llama3"):
        reason = f'its rotary positions are scaled by "{kind}"; default, linear and llama3 can be said'
    elif rope.get("partial_rotary_factor", 1.0) != 1.0 or len(sizes) != 1:
        reason = "its rotary positions turn a part of each head"
    elif window is not None and window < config.max_position_embeddings:
        reason = f"its attention sees a window of {window} tokens"
    elif any(type(part) is not nn.Linear for part in linears):
        reason = "some of its linears are of another class (factors or adapters): multiply out or merge first"
    elif wide := _odd_bias(model):
        reason = (
            f'"{wide}" has a bias, and llama.cpp reads biases of queries as wide as the model alone ({config.hidden_size}):'
            " keep all heads"
        )
    if reason:
        raise ModelError(f"{name}: {reason}. It cannot be written as GGUF deci.")


def _attentions(config: Any) -> set[str]:
    """Kinds of attention in the blocks; a config without a list of them has its window everywhere."""
    return {*(getattr(config, "layer_types", None) or ["sliding_attention"])}


def _odd_bias(model: nn.Module) -> str | None:
    for index, block in enumerate(_blocks(model)):
        q = block.self_attn.q_proj
        if q.bias is not None and q.bias.any() and q.out_features != q.in_features:
            return f"model.layers.{index}.self_attn.q_proj"
    return None


def _metadata(writer: Any, model: nn.Module, name: str, dtype: Number, gguf: Any) -> None:
    config: Any = model.config
    channels, heads, kv_heads = widths(model)
    size, rope = _blocks(model)[0].self_attn.head_dim, config.rope_parameters
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "F16" else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(channels))
    writer.add_feed_forward_length(channels)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _tensors(writer: Any, model: nn.Module, dtype: Number) -> None:
    """Header first, then one tensor at a time: no second copy of the model is held."""
    for name, tensor in tensors_of(model):
        array = _stored(name, tensor, dtype)
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors_of(model):
        writer.write_tensor_data(_stored(name, tensor, dtype))


def _stored(name: str, tensor: Tensor, dtype: Number) -> Any:
    """The numbers of the file. llama.cpp wants vectors in F32."""
    wanted = torch.float16 if dtype == "F16" and tensor.ndim > 1 else torch.float32
    found = tensor.detach().cpu().to(wanted).contiguous()
    if not found.isfinite().all():
        raise ModelError(f'"{name}" has numbers that are not finite as {str(wanted).removeprefix("torch.")}. Give F32.')
    return found.numpy()


def _compare(reader: Any, model: nn.Module, dtype: Number, path: Path) -> int:
    """Everything that was written, read from the file; how many tensors."""
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = []
    for name, tensor in tensors_of(model):
        names.append(name)
        wanted = _stored(name, tensor, dtype)
        if name not in found or found[name].data.shape != wanted.shape or not (found[name].data == wanted).all():
            raise SaveError(f'{path}: "{name}" reads back different from the model. The disk may be failing.')
    fields = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    told = [reader.get_field(f"deci.{one}").contents() for one in fields]
    if told != [*widths(model)] or {*names} != found.keys():
        raise SaveError(f"{path}: its widths read back different from the model. The disk may be failing.")
    return len(names)
