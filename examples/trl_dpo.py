"""Preference training through TRL: the reference model is the same weights under the empty view, not a second copy.

python examples/trl_dpo.py
"""

from __future__ import annotations

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks


def main() -> None:
    model, tokenizer = assets.load_base()
    pairs, _ = tasks.preference_task()
    result = rw.train(
        model, tokenizer, pairs[:64], {"r": 8}, output_dir="trl-dpo", stage="dpo", max_length=96, max_steps=20, learning_rate=1e-3
    )
    print({k: result.metrics["last"][k] for k in ("loss", "rewards/accuracies", "rewards/margins")})


if __name__ == "__main__":
    main()
