"""TRL: SFTTrainer with a PCConfig on a chat data set, with loss on the answers only.

python examples/sft.py --out adapter
"""

import peft
import torch
from datasets import Dataset
from tiny import options, tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from ipca.peft import PCConfig

QUESTIONS = [(f"What is {a} plus {b}?", f"{a + b}.") for a in range(10) for b in range(10)]


def data():
    """Conversations of one question and one answer, in TRL's format."""
    rows = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in QUESTIONS
    ]
    return Dataset.from_list(rows)


def main(steps, out):
    """Train on the conversations, save, and load with stock PEFT."""
    arguments = SFTConfig(
        output_dir=out,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        max_length=64,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    config = PCConfig(r=8, window="middle", target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        tiny_model(), args=arguments, train_dataset=data(), processing_class=tiny_tokenizer(), peft_config=config
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

    trainer.save_model(out)
    ids = torch.tensor([tiny_tokenizer()(QUESTIONS[7][0])["input_ids"]])
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
        stock = peft.PeftModel.from_pretrained(tiny_model(), out).eval()(ids).logits
    print("stock PEFT loads it:", torch.allclose(stock, trained, atol=1e-5))


if __name__ == "__main__":
    main(**options(__doc__))
