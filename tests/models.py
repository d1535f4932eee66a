"""Tiny random instances of many architectures, and inputs for one forward pass of each. Shared by the tests of all rooms.

Weights and inputs are the same in every run; building a model leaves the global random state as it was.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 96
TOKENS = 12
IMAGE = 16  # pixels a side; patches of 4 give 16 of them
TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **TEXT,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**ENCODER, "image_size": IMAGE, "patch_size": 4}


class BasicBlock(nn.Module):
    """The residual block of He et al. 2016 for CIFAR; a convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of two basic blocks: ResNet-14."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.fc = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class TimmAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class TimmBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TimmAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(dim, 2 * dim)
        self.mlp.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class TimmViT(nn.Module):
    """The layout of timm's VisionTransformer: blocks in a Sequential, q, k and v in one linear."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, (IMAGE // 4) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(TimmBlock(dim, 4) for _ in range(2)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


def _transformers(model: str, config: str, **settings: object) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def _clip() -> nn.Module:
    import transformers as t

    text = {**TEXT, **ENCODER, "max_position_embeddings": 64}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))


def _llava() -> nn.Module:
    import transformers as t

    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**DECODER), image_token_id=3
    )
    return t.LlavaForConditionalGeneration(config)


def _blip2() -> nn.Module:
    import transformers as t

    former = {**TEXT, **ENCODER, "encoder_hidden_size": 32, "cross_attention_frequency": 2}
    config = t.Blip2Config(
        vision_config=VISION,
        qformer_config=former,
        text_config=t.OPTConfig(**_OPT).to_dict(),
        num_query_tokens=4,
        image_token_index=3,
    )
    return t.Blip2ForConditionalGeneration(config)


def _diffusers(model: str, **settings: object) -> nn.Module:
    import diffusers

    return getattr(diffusers, model)(**settings)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def small_llama(seed: int = 0, **settings: object) -> nn.Module:
    """A Llama of a few thousand weights, where the architecture does not matter. settings: over those of SMALL."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _transformers("LlamaForCausalLM", "LlamaConfig", **(SMALL | settings)).eval()


_OPT = {
    **TEXT,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}
_MOE = {**DECODER, "num_experts_per_tok": 2}
_T5 = {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_WHISPER = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
}
_STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "patch_size": 2, "image_size": IMAGE}
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 2, "image_size": IMAGE}
_LLAMA4 = {
    **DECODER,
    "intermediate_size": 48,
    "intermediate_size_mlp": 64,
    "num_local_experts": 4,
    "head_dim": 8,
    "num_experts_per_tok": 1,
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 4, 8),
}
_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 4,
}

_hf = _transformers
_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(_hf, "LlamaForCausalLM", "LlamaConfig", **DECODER),
    "mistral": partial(_hf, "MistralForCausalLM", "MistralConfig", **DECODER, head_dim=8, sliding_window=4),
    "qwen2": partial(_hf, "Qwen2ForCausalLM", "Qwen2Config", **DECODER, tie_word_embeddings=True),
    "qwen3": partial(_hf, "Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=16),
    "qwen3_moe": partial(
        _hf, "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE, head_dim=8, num_experts=4, moe_intermediate_size=24
    ),
    "mixtral": partial(_hf, "MixtralForCausalLM", "MixtralConfig", **_MOE, num_local_experts=4),
    "gemma3": partial(
        _hf,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **DECODER,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": partial(_hf, "Phi3ForCausalLM", "Phi3Config", **DECODER),
    "gpt2": partial(_hf, "GPT2LMHeadModel", "GPT2Config", **TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": partial(_hf, "GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT, **ENCODER, max_position_embeddings=64),
    "opt": partial(_hf, "OPTForCausalLM", "OPTConfig", **_OPT),
    "falcon": partial(
        _hf, "FalconForCausalLM", "FalconConfig", **TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "bloom": partial(_hf, "BloomForCausalLM", "BloomConfig", **TEXT, hidden_size=32, n_layer=2, n_head=4),
    "gpt_oss": partial(_hf, "GptOssForCausalLM", "GptOssConfig", **_MOE, num_local_experts=4, head_dim=8),
    "llama4": partial(_hf, "Llama4ForCausalLM", "Llama4TextConfig", **_LLAMA4),
    "t5": partial(_hf, "T5ForConditionalGeneration", "T5Config", **_T5),
    "t5_gated": partial(
        _hf,
        "T5ForConditionalGeneration",
        "T5Config",
        **_T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "bert": partial(_hf, "BertForMaskedLM", "BertConfig", **TEXT, **ENCODER, max_position_embeddings=64),
    "vit": partial(_hf, "ViTForImageClassification", "ViTConfig", **VISION),
    "deit": partial(_hf, "DeiTForImageClassification", "DeiTConfig", **VISION),
    "convnext": partial(_hf, "ConvNextForImageClassification", "ConvNextConfig", **_STAGES),
    "swin": partial(_hf, "SwinForImageClassification", "SwinConfig", **_SWIN),
    "clip": _clip,
    "llava": _llava,
    "blip2": _blip2,
    "whisper": partial(_hf, "WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
    "dit": partial(_diffusers, "DiTTransformer2DModel", **_DIT),
    "sd3": partial(_diffusers, "SD3Transformer2DModel", **_SD3),
    "flux": partial(_diffusers, "FluxTransformer2DModel", **_FLUX),
    "cifar_resnet": CifarResNet,
    "timm_vit": TimmViT,
}


def _build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _BUILDERS[name]().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {name: partial(_build, name) for name in _BUILDERS}
IMAGES = ("vit", "deit", "convnext", "swin", "cifar_resnet", "timm_vit")


def inputs_for(name: str, model: nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass of `MODELS[name]()`; other seeds give other inputs. Switches no cache off."""
    generator = torch.Generator().manual_seed(seed)
    noise = partial(torch.randn, generator=generator)

    def ids(tokens: int = TOKENS) -> Tensor:
        return torch.randint(4, VOCAB, (batch, tokens), generator=generator)

    def labels() -> Tensor:
        return torch.randint(10, (batch,), generator=generator)

    if name in IMAGES:
        return {"pixel_values": noise(batch, 3, IMAGE, IMAGE)}
    if name in ("t5", "t5_gated"):
        return {"input_ids": ids(), "decoder_input_ids": ids(7)}
    if name == "clip":
        return {"input_ids": ids(), "pixel_values": noise(batch, 3, IMAGE, IMAGE)}
    if name in ("llava", "blip2"):  # image tokens first: one for each patch, one for each query of the Q-Former
        image = torch.full((batch, (IMAGE // 4) ** 2 if name == "llava" else 4), 3)
        return {"input_ids": torch.cat([image, ids()], 1), "pixel_values": noise(batch, 3, IMAGE, IMAGE)}
    if name == "whisper":  # two frames for each of the 16 source positions
        return {"input_features": noise(batch, 8, 32), "decoder_input_ids": ids(7)}
    if name == "dit":
        return {"hidden_states": noise(batch, 4, 8, 8), "timestep": labels(), "class_labels": labels()}
    if name == "sd3":
        return {
            "hidden_states": noise(batch, 4, 8, 8),
            "encoder_hidden_states": noise(batch, 5, 24),
            "pooled_projections": noise(batch, 20),
            "timestep": labels(),
        }
    if name == "flux":
        return {
            "hidden_states": noise(batch, 16, 4),
            "encoder_hidden_states": noise(batch, 5, 24),
            "pooled_projections": noise(batch, 20),
            "timestep": labels() / 10,
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(5, 3),
        }
    return {"input_ids": ids()}


def draws(*_: object) -> None:
    """A forward hook: as a model whose own code draws, in evaluation mode too."""
    torch.rand(1)
