"""What a step leaves to training, learnt from what earlier pieces took."""

from __future__ import annotations

from rankwise.serve.engine.pacing import Pace


def test_a_job_that_is_dearer_than_the_last_is_believed_in_a_few_steps_and_a_busy_moment_is_not() -> None:
    pace = Pace(256, slo=0.05, train_second=2e-4)
    for _ in range(4):
        tokens = pace.training_tokens(0.01)
        pace.trained(tokens, tokens * 2e-3)
    assert pace.training_tokens(0.01) * 2e-3 < 2 * 0.04
    pace = Pace(256, slo=0.05, train_second=2e-4)
    pace.trained(100, 100 * 3.8e-4)
    assert pace.train_second is not None and pace.train_second < 2.2e-4
