"""A tiny sparse Llama, its data and its stock Trainer: the same in this process and in those that `torchrun` starts."""

import torch
import transformers
from torch.utils.data import Dataset

from layerwise.recover import Distillation, masks_of
from layerwise.recover.stock import LossTrainer
from layerwise.structure import structure_of
from models import small_llama

STEPS, ROWS = 3, 4  # rows of a step, over all processes and accumulated batches


class Ids(Dataset):
    """In the order in which they are shown: row `index` is the same wherever it is asked for."""

    def __len__(self):
        return STEPS * ROWS

    def __getitem__(self, index):
        ids = torch.randint(4, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


class InOrder(LossTrainer):
    """Rows come as they lie: which process sees which is then known."""

    def _get_train_sampler(self, *more):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def sparse():
    model = small_llama(dtype=torch.float32)
    with torch.no_grad():
        for layer in structure_of(model):
            weight = model.get_submodule(layer.name).weight
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(layer.name))) < 0.5] = 0
    return model, masks_of(model)


def distillation():
    return Distillation(small_llama(1, dtype=torch.float32), rows=7)


def arguments_of(folder, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, lr_scheduler_type="constant",
        logging_steps=1, **more,
    )  # fmt: skip


def job(model, masks, arguments, loss=None):
    return InOrder(loss=loss, model=model, args=arguments, train_dataset=Ids(), callbacks=[masks.callback()])
