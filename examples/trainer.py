"""transformers: Trainer with a PCConfig; train, checkpoint, resume, and save an adapter that stock PEFT loads.

python examples/trainer.py --out adapter
"""

import tempfile
from pathlib import Path

import peft
import torch
from tiny import options, tiny_data, tiny_model
from transformers import Trainer, TrainingArguments

import ipca
from ipca.peft import PCConfig


def build(folder, steps):
    """A Trainer for ``2 · steps`` steps with a checkpoint halfway."""
    config = PCConfig(r=8, window="middle", target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2 * steps,
        save_steps=steps,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=tiny_data())


def losses(trainer):
    """The loss of every step; those before a checkpoint are read from the checkpoint."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(steps, out):
    """Train, resume from the checkpoint in a new model, save, and load with PEFT and with ipca."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, steps)
        trainer.train()
        again = build(folder, steps)
        again.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{steps}"))
    first, second = losses(trainer), losses(again)
    print(f"loss: {first[0]:.3f} -> {first[-1]:.3f}")
    print("resumed with the same losses:", second == first)
    pairs = zip(trainer.model.parameters(), again.model.parameters(), strict=True)
    print("resumed to the same weights:", all(torch.equal(one, other) for one, other in pairs))

    trainer.model.save_pretrained(out)
    ipca.write_model_card(out, data="Source code.", metrics={"last loss": first[-1]}, overwrite=True)
    x = tiny_data()[0]["input_ids"][None]
    with torch.no_grad():
        trained = trainer.model.eval()(x).logits
        stock = peft.PeftModel.from_pretrained(tiny_model(), out)(x).logits
        ours = ipca.load_adapter(tiny_model(), out).eval()(x).logits
    print(f"stock PEFT differs by {(stock - trained).abs().max():.0e}, ipca by {(ours - trained).abs().max():.0e}")


if __name__ == "__main__":
    main(**options(__doc__))
