"""Run by `torchrun` from test_matrix.py: the stock Trainer in two processes, masks held, a teacher; each process saves its end."""

import sys

import torch
import transformers
from safetensors.torch import save_file

from layerwise.recover import Masks
from matrix import arguments_of, distillation, job, sparse


def main() -> None:
    torch.set_num_threads(1)
    folder, kind = sys.argv[1:]
    model, keep = sparse()
    masks = Masks(model, keep)
    arguments = arguments_of(folder, per_device_train_batch_size=2, ddp_find_unused_parameters=False)
    trainer = job(model, masks, arguments, distillation() if kind == "teacher" else None)
    trainer.train()
    tensors = {name: one.detach().clone().contiguous() for name, one in model.named_parameters()}
    save_file({**tensors, "leaked": torch.tensor(masks.leaked())}, f"{folder}/{arguments.process_index}.safetensors")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
