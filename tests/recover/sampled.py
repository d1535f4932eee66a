"""Run by `torchrun` from test_sampling.py: a tiny Llama in DistributedDataParallel, blocks in turn; each process saves its end."""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from layerwise.recover import LayerSampling, LowRank, LowRankAdam
from models import small_llama


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)  # no draw may come from here
    model = small_llama(num_hidden_layers=4)
    sampling = LayerSampling(model, blocks=1, period=1, low_rank=LowRank(4), seed=2)
    optimizer = LowRankAdam(sampling.groups(1e-2))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # before anything is frozen
    sampling.watch(optimizer)
    history = []
    for step in range(5):
        sampling.at(step)
        history.append(int(sampling.active[0].rpartition(".")[2]))
        ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(2 * step + rank))
        cross_entropy(wrapped(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {name: one.detach().clone().contiguous() for name, one in model.named_parameters()}
    save_file({**tensors, "history": torch.tensor(history)}, f"{sys.argv[1]}/{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
