"""Fine-tune a language model a few blocks at a time: those with more outliers more often, the stock transformers Trainer doing the rest.

    python examples/train_few_blocks.py demo your-text.txt

Needs layerwise[train]. The plan says how likely each block is drawn (OwLore, arXiv:2405.18380); print it, save it, edit it. The five lines
marked with a star are what it takes in a script of your own.
"""

import sys
import tempfile

from transformers import AutoTokenizer, Trainer, TrainingArguments

import layerwise as lw
from layerwise.io import model_folder
from layerwise.recover import LowRankAdam


def main(
    model_name: str = "demo", text: str = "python-docs", steps: int = 60, length: int = 128, lr: float = 2e-3
) -> tuple[float, float]:
    """Returns the perplexity on held-out text before and after."""
    model = lw.load(model_name).float()  # a bfloat16 weight ignores small steps
    tokenizer = AutoTokenizer.from_pretrained(model_folder(model_name))
    data = lw.text(text, tokenizer, samples=8 * steps, length=length)
    rows = [{"input_ids": one["input_ids"][0], "labels": one["input_ids"][0]} for one in data]
    calibration = lw.Batches(data.batches[:16], {**data.protocol, "samples": 16})
    judged = lw.held_out(text, tokenizer, length=length, tokens=4096)
    before = lw.evaluate(model, judged).perplexity

    method = lw.methods.OwLore(blocks=2, period=10, rank=32, outlier_factor=5.0)
    plan = method.plan(
        model, calibration
    )  # * or lw.Plan.load("train.yaml"), written by `layerwise plan MODEL --method owlore`
    sampling = method.sampling(model, plan)  # *
    optimizer = LowRankAdam(sampling.groups(lr))  # * before anything is frozen: it knows every block
    for name, entry in plan.layers.items():
        print(f"{name}: {entry.train.probability:.1%}" if entry.train else name)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, max_grad_norm=1.0, lr_scheduler_type="linear", warmup_steps=5,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            optimizers=(optimizer, None),  # *
            callbacks=[sampling.callback()],  # *
        )
        trainer.train()
    after = lw.evaluate(model.eval(), judged).perplexity
    print(f"perplexity on held-out text: {before:.2f}, after {steps} steps {after:.2f}")
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:3])
