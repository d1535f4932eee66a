"""The peer's side of `peers_pruning.py` and `peers_gptq.py`: llm-compressor in its own environment, nothing of layerwise.

Its default pipeline ("sequential") runs every block twice per batch, once for statistics and once with the new weights, as layerwise
does. `ignore` must be a pattern: the plain name "lm_head" does not match there, and the head would be pruned too. Logs and bars are
off, so that they cost the peer nothing.
"""

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "LLM_COMPRESSOR_LOG_DISABLED": "true"}

import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from measuring import Job, run

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


class Peer:
    """The tokenizer is read with the model, so that reading it is not timed as compression."""

    def load(self, folder: Path) -> nn.Module:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def compress(self, model: nn.Module, batches: list[Tensor], job: Job) -> dict[str, Any]:
        if job.bits:
            bits, group = job.bits
            scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
            groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
            modifier = GPTQModifier(config_groups=groups, ignore=["re:.*lm_head"], dampening_frac=0.01)
        else:
            modifier = MODIFIERS[job.solver](
                sparsity=job.sparsity, mask_structure=job.pattern or "0:0", ignore=["re:.*lm_head"]
            )
        # batch_size None: every item is a batch already, and they come in order
        loader = DataLoader([{"input_ids": ids} for ids in batches], batch_size=None)
        oneshot(
            model=model,
            processor=self.tokenizer,
            recipe=[modifier],
            dataset=loader,
            num_calibration_samples=sum(len(ids) for ids in batches),
            max_seq_length=batches[0].shape[1],
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
        return {}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logger.remove()
    peer = Peer()
    run(
        peer.load, peer.compress, {name: importlib.metadata.version(name) for name in ("llmcompressor", "transformers")}
    )
