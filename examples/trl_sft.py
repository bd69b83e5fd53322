"""TRL's SFTTrainer on an adapter of ours: ``bridge`` adds the Session's events and adapter-only checkpoints.

python examples/trl_sft.py [--steps 20] [--out trl-sft]
"""

from __future__ import annotations

import argparse

import datasets
import trl

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.train.trainer import bridge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trl-sft")
    a = parser.parse_args()
    model, tokenizer = assets.load_base()
    adapter = rw.attach(model, {"preset": "adalora", "r": 6, "budget": {"name": "adalora", "target_r": 4, "every": 2}})
    args = trl.SFTConfig(
        output_dir=a.out,
        max_steps=a.steps,
        per_device_train_batch_size=4,
        max_length=96,
        report_to="none",
        learning_rate=3e-3,
        bf16=False,
    )
    data = datasets.Dataset.from_list(tasks.docstring_task()[0][:200])
    trainer = bridge(trl.SFTTrainer)(model=model, adapter=adapter, args=args, processing_class=tokenizer, train_dataset=data)
    trainer.train()
    print("saved to", adapter.save(f"{a.out}/adapter"))


if __name__ == "__main__":
    main()
