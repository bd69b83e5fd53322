"""Preference training through TRL: the reference model is the same weights under the empty view, not a second copy.

python examples/trl_dpo.py [--steps 20] [--out trl-dpo]
"""

from __future__ import annotations

import argparse

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trl-dpo")
    a = parser.parse_args()
    model, tokenizer = assets.load_base()
    pairs, _ = tasks.preference_task()
    result = rw.train(
        model, tokenizer, pairs[:64], {"r": 8}, output_dir=a.out, stage="dpo", max_length=96, max_steps=a.steps, learning_rate=1e-3
    )
    print({k: result.metrics["last"][k] for k in ("loss", "rewards/accuracies", "rewards/margins")})


if __name__ == "__main__":
    main()
