"""Four LoRA adapters of one domain, trained with different learning rates and seeds: is their soup better than the best of them?

python -m examples.soup [--steps 30] [--domain prose]

Selection text (which decides), training text and test text (which is reported) are different documents.  Lower is better:
bits a byte.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.assets.measure import bits_per_byte
from rankwise.delta import AdapterState
from rankwise.merge import Evaluator, merge_states, read_state
from rankwise.merge.methods.soups import LearnedSoup, uniform
from rankwise.train.compare import run_recipe, windows

#: (learning rate, seed) of each fine-tune; the seed also draws the order of the data
RUNS = ((1e-2, 0), (1e-2, 1), (1e-2, 2), (2e-2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--domain", default="prose")
    parser.add_argument("--chars", type=int, default=8_000, help="characters of selection and of test text")
    a = parser.parse_args()
    model, tokenizer = assets.load_base()
    train, test = tasks.domains()[a.domain]
    held: list[str] = []
    while sum(map(len, held)) < 2 * a.chars:  # the last documents select, and nothing trains on them
        held.append(train.pop())
    texts = {"selection": "\n".join(held)[: a.chars], "test": "\n".join(test)[: a.chars]}
    scores = {n: (lambda m, t=t: bits_per_byte(m, tokenizer, [t])) for n, t in texts.items()}
    evaluator = Evaluator(model, scores, batches=windows(tokenizer, held, 128, 4)[:8])

    states: dict[str, AdapterState] = {}
    with tempfile.TemporaryDirectory() as folder:
        for lr, seed in RUNS:
            name = f"lr {lr:g}, seed {seed}"
            run_recipe(
                model, rw.Recipe(form="lora", r=8, alpha=16, seed=seed), windows(tokenizer, train, 128, 8, seed),
                lambda m: 0.0, name=f"run{seed}", steps=a.steps, lr=lr, before=0.0, keep=Path(folder) / str(seed),
            )  # fmt: skip
            states[name] = read_state(model, Path(folder) / str(seed))
            print(f"trained {name}", flush=True)

    sources = list(states.values())
    best = min(states, key=lambda n: evaluator.score(states[n]))
    learnt = LearnedSoup(epochs=2)
    soups = {
        "uniform soup": uniform(sources),
        "greedy soup": merge_states(sources, None, "greedy_soup", evaluator=evaluator),
        "learned soup": merge_states(sources, None, learnt, evaluator=evaluator),
    }
    print(f"\n{'':22} selection    test   weights")
    for name, state in {"base": AdapterState({}), **states, **soups}.items():
        weights = " ".join(f"{w:.2f}" for w in state.meta["weights"]) if name in soups else "best single" if name == best else ""
        print(f"{name:22} {evaluator.score(state):9.4f} {evaluator.score(state, 'test'):7.4f}   {weights}")


if __name__ == "__main__":
    main()
