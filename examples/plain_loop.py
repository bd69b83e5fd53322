"""Anybody's own loop: attach, train with a Session, compare with the base, save.

python examples/plain_loop.py
"""

from __future__ import annotations

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.train.compare import windows


def main(steps: int = 20) -> None:
    model, tokenizer = assets.load_base()
    train, test = tasks.domains()["email"]
    batches = windows(tokenizer, train, length=128, batch=8)
    adapter = rw.attach(model, rw.Recipe(form="dora", r=8, alpha=16))
    session = rw.Session(model, adapter, lr=3e-3, total_steps=steps, schedule="cosine", warmup=0.1)
    model.train()
    for n in range(steps):
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
    print(f"bits per byte {before:.3f} → {after:.3f}; saved to {adapter.save('plain-loop-adapter')}")


if __name__ == "__main__":
    main()
