"""TRL's SFTTrainer on an adapter of ours: ``bridge`` adds the Session's events and adapter-only checkpoints.

python examples/trl_sft.py
"""

from __future__ import annotations

import datasets
import trl

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.train.trainer import bridge


def main() -> None:
    model, tokenizer = assets.load_base()
    adapter = rw.attach(model, {"preset": "adalora", "r": 6, "budget": {"name": "adalora", "target_r": 4, "every": 2}})
    args = trl.SFTConfig(
        output_dir="trl-sft",
        max_steps=20,
        per_device_train_batch_size=4,
        max_length=96,
        report_to="none",
        learning_rate=3e-3,
        bf16=False,
    )
    data = datasets.Dataset.from_list(tasks.docstring_task()[0][:200])
    trainer = bridge(trl.SFTTrainer)(model=model, adapter=adapter, args=args, processing_class=tokenizer, train_dataset=data)
    trainer.train()
    adapter.save("trl-sft/adapter")


if __name__ == "__main__":
    main()
