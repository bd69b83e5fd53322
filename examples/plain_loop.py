"""Anybody's own loop: attach, train with a Session, compare with the base, save.

python examples/plain_loop.py [--steps 20] [--out plain-loop-adapter]
"""

from __future__ import annotations

import argparse

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.train.compare import windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="plain-loop-adapter")
    a = parser.parse_args()
    model, tokenizer = assets.load_base()
    train, test = tasks.domains()["email"]
    batches = windows(tokenizer, train, length=128, batch=8)
    adapter = rw.attach(model, rw.Recipe(form="dora", r=8, alpha=16))
    session = rw.Session(model, adapter, lr=3e-3, total_steps=a.steps, schedule="cosine", warmup=0.1)
    model.train()
    for n in range(a.steps):
        batch = batches[n % len(batches)]
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
        print(f"step {session.t}: loss {out.loss.item():.3f}")
    model.eval()
    after = assets.bits_per_byte(model, tokenizer, [test[0][:8000]])
    with rw.view(model, {}):
        before = assets.bits_per_byte(model, tokenizer, [test[0][:8000]])
    print(f"bits per byte {before:.3f} → {after:.3f}; saved to {adapter.save(a.out)}")


if __name__ == "__main__":
    main()
