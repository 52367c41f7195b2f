"""A sweep over windows with transformers' Trainer: which window learns this text and forgets least of another?

python examples/sweep_trainer.py --out sweep-out      (or: ipca sweep examples/sweep_trainer.py -o sweep-out)
"""

from functools import partial

import torch
from tiny import options, tiny_data, tiny_model
from transformers import Trainer, TrainingArguments

from ipca.analysis import kl_to_base
from ipca.lab import sweep
from ipca.model import AdapterSettings


def train(steps, model, groups, seed):
    """The sweep gives the parameter groups with the rates it tries; the Trainer takes an optimizer over them."""
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        seed=seed,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    Trainer(model, arguments, train_dataset=tiny_data(), optimizers=(optimizer, None)).train()


@torch.no_grad()
def evaluate(model):
    """Larger is better: the log-likelihood of text, and minus how far the model went from the base elsewhere."""
    model.eval()
    text = torch.stack([row["input_ids"] for row in tiny_data()[:16]])
    other = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(0))
    return {
        "target": -model(input_ids=text, labels=text).loss.item(),
        "retained": -kl_to_base(model, tiny_model(), [{"input_ids": other}]),
    }


def task(steps=20):
    """What `ipca sweep` looks for in this file."""
    labels = {"target": "log-likelihood of the text (nats a token)", "retained": "−KL to the base (nats a token)"}
    return sweep.Task(tiny_model, partial(train, steps), evaluate, AdapterSettings(rank=8), labels=labels)


def main(steps, out):
    """A small grid; `ipca sweep --help` shows the rest."""
    rows = sweep.run(
        task(steps), out, early=2, windows=(0, 0.5, 1), lrs=(1e-3,), seeds=2, methods=("lora",), comparisons=("same",)
    )
    print(sweep.verdict(out))
    for row in rows:
        print(f"{row['method']} {row['comparison'] or ''} {row['seed']}: {row['target']:.6f} {row['retained']:.6f}")


if __name__ == "__main__":
    main(**options(__doc__))
