"""A sweep over windows with transformers' Trainer: learning one text against forgetting the predictions on another.

python examples/sweep_trainer.py --out sweep-out      (or: ipca sweep examples/sweep_trainer.py -o sweep-out)
"""

from functools import partial
from tempfile import TemporaryDirectory

import torch
from tiny import options, tiny_data, tiny_model
from transformers import Trainer, TrainingArguments

from ipca.analysis import kl_to_base
from ipca.lab import sweep
from ipca.model import AdapterSettings


def train(steps, model, groups, seed):
    """Train with an optimizer over the sweep's parameter groups, which hold the learning rates."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    with TemporaryDirectory() as folder:  # which the Trainer makes, though nothing is saved
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            seed=seed,
            per_device_train_batch_size=4,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(model, arguments, train_dataset=tiny_data(), optimizers=(optimizer, None)).train()


@torch.no_grad()
def evaluate(model):
    """Larger is better: the log-likelihood of the text, and minus the divergence from the base on other inputs."""
    model.eval()
    text = torch.stack([row["input_ids"] for row in tiny_data()[:16]])
    other = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(0))
    return {
        "target": -model(input_ids=text, labels=text).loss.item(),
        "retained": -kl_to_base(model, tiny_model(), [{"input_ids": other}]),
    }


def task(steps=20):
    """The task; ``ipca sweep`` calls this function."""
    labels = {"target": "log-likelihood of the text (nats a token)", "retained": "−KL to the base (nats a token)"}
    return sweep.Task(tiny_model, partial(train, steps), evaluate, AdapterSettings(rank=8), labels=labels)


def main(steps, out):
    """Run a small grid; see ``ipca sweep --help`` for all options."""
    grid = {"windows": (0.0, 0.5, 1.0), "lrs": (1e-3,), "seeds": 2, "methods": ("lora",), "comparisons": ("same",)}
    rows = sweep.run(task(steps), out, early=2, **grid)
    print(sweep.verdict(out))
    for row in rows:
        print(f"{row['method']} {row['comparison'] or ''} {row['seed']}: {row['target']:.6f} {row['retained']:.6f}")


if __name__ == "__main__":
    main(**options(__doc__))
