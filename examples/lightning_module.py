"""Lightning: an adapted model in a LightningModule, trained, checkpointed and resumed.

python examples/lightning_module.py --out adapter
"""

import tempfile
from pathlib import Path

import lightning
import torch
from tiny import options, tiny_data, tiny_model
from torch.utils.data import DataLoader

import ipca


class Adapted(lightning.LightningModule):
    """A causal language model with a trainable window."""

    def __init__(self):
        super().__init__()
        self.model = ipca.apply_pc(tiny_model(), rank=8, window="middle", progress=False)
        self.losses = []

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(ipca.adapter_parameters(self.model), lr=2e-3, weight_decay=0.0)


def fit(module, batches, steps, resume=None):
    """Train up to step ``steps``, starting from the checkpoint ``resume`` if given."""
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, batches, ckpt_path=resume)
    return trainer


def main(steps, out):
    """Train, save a checkpoint and the adapter, and resume from the checkpoint in a new module."""
    batches = DataLoader(tiny_data(), batch_size=4)
    module = Adapted()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        fit(module, batches, steps).save_checkpoint(path)
        first, module.losses = module.losses, []
        fit(module, batches, 2 * steps, path)

        again = Adapted()
        fit(again, batches, 2 * steps, path)
    ipca.save_adapter(module.model, out)  # the model, not the LightningModule
    print(f"loss: {first[0]:.3f} -> {module.losses[-1]:.3f}")
    print("resumed with the same losses:", again.losses == module.losses)
    x = tiny_data()[0]["input_ids"][None]
    print("loaded:", torch.equal(ipca.load_adapter(tiny_model(), out)(x).logits, module.model.eval()(x).logits))


if __name__ == "__main__":
    main(**options(__doc__))
