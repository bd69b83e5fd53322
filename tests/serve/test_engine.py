"""The engine's own promises: limits, cancels at every phase, samples that share a prompt, seeds, faults that stay with their requests."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.batch import Role, Span, make_plan
from rankwise.serve.engine.engine import collect, run_until_idle
from rankwise.serve.engine.step_time import Coefficients
from rankwise.serve.policies.fcfs import Fcfs
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.types import Event, Finished, Outcome, Overloaded, Request, Sampling, Token
from tests.serve.rig import base_model, check_greedy, configure, folder, server

PROMPT = (5, 9, 11, 40, 3, 8, 22, 17, 30)


@pytest.fixture
def made() -> Any:
    """A server of its own size, with the options that most tests want, whole again after each."""
    made = server(4, 30, 8, "bags", False, "fcfs")
    configure(made, max_running=4, step_tokens=16)
    yield made
    made.engine.observer = None
    run_until_idle(made.engine)
    assert made.engine.queue.index.available() == made.engine.queue.total_blocks
    assert not any(s.use.pins for s in made.table.slots.values()) and not made.engine._ids


def put(made: Server, request: Request) -> list[Event]:
    events: list[Event] = []
    made.engine.submit(request, events.append)
    return events


def answer(made: Server, request: Request) -> tuple[list[int], Finished | None]:
    events = put(made, request)
    run_until_idle(made.engine)
    return collect(events)


def test_what_can_never_fit_is_refused_with_its_numbers(made: Server) -> None:
    with pytest.raises(OptionError, match=r"9 tokens and max_tokens is 200: 209 together, but a request may have 120"):
        put(made, Request("r", PROMPT, Sampling(max_tokens=200)))


def test_an_id_in_use_is_refused_and_free_again_afterwards(made: Server) -> None:
    first = put(made, Request("r", PROMPT))
    with pytest.raises(OptionError, match="'r' is being served"):
        put(made, Request("r", PROMPT))
    run_until_idle(made.engine)
    assert collect(first)[1] is not None
    assert answer(made, Request("r", PROMPT))[0] == collect(first)[0]


def test_a_look_counts_what_no_step_has_seen_and_the_pages_in_use(made: Server) -> None:
    put(made, Request("r", PROMPT, Sampling(max_tokens=2), made.cache.resolve("nine").digest))
    assert (made.engine.stats().running, made.engine.stats().waiting) == (0, 1)
    while not made.engine.stats().running:
        made.engine.step()
    s = made.engine.stats()
    assert s.waiting == 0 and s.lora_pages_total == 8 and s.lora_pages_used >= 2
    run_until_idle(made.engine)
    assert (made.engine.stats().running, made.engine.stats().waiting) == (0, 0)


def test_a_full_queue_turns_requests_away(made: Server) -> None:
    configure(made, max_waiting=1, max_running=1)
    put(made, Request("a", PROMPT))
    put(made, Request("b", PROMPT))
    with pytest.raises(Overloaded) as refused:
        put(made, Request("c", PROMPT))
    assert refused.value.status == 429 and refused.value.retry_after > 0


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("adapter", [None, "dora"])
def test_a_cancel_at_any_phase_frees_everything_and_disturbs_nobody(made: Server, after: int, adapter: str | None) -> None:
    digest = made.cache.resolve(adapter).digest if adapter else None
    mate = put(made, Request("mate", PROMPT[::-1], Sampling(max_tokens=6), made.cache.resolve("eight").digest))
    gone = put(made, Request("gone", PROMPT * 3, Sampling(max_tokens=6), digest))
    for _ in range(after):
        made.engine.step()
    made.engine.cancel("gone")
    made.engine.cancel("nobody")
    run_until_idle(made.engine)
    done = collect(gone)[1]
    assert done is not None and done.outcome in (Outcome.CANCELLED, Outcome.LENGTH)
    check_greedy(Request("mate", PROMPT[::-1]), collect(mate)[0], (("eight", 1.0),))


def test_samples_of_one_prompt_share_its_blocks(made: Server) -> None:
    """``n`` samples: the first computes the prompt, the others find it; each draws by its own seed."""
    prompt = (*PROMPT, 1, 2, 60, 7)
    events = [
        put(made, Request(f"s{i}", prompt, Sampling(max_tokens=5, temperature=1.0, seed=i), group="g", salt="n")) for i in range(3)
    ]
    run_until_idle(made.engine)
    done = [collect(e) for e in events]
    assert [d[1].reused for d in done if d[1]] == [0, 12, 12]
    alone = [answer(made, Request(f"a{i}", prompt, Sampling(max_tokens=5, temperature=1.0, seed=i), salt="n"))[0] for i in range(3)]
    assert [d[0] for d in done] == alone and len({tuple(a) for a in alone}) > 1


def test_stop_ids_end_a_request_and_are_its_last_token(made: Server) -> None:
    ids, _ = answer(made, Request("r", PROMPT, Sampling(max_tokens=8)))
    stopped, done = answer(made, Request("s", PROMPT, Sampling(max_tokens=8, stop_ids=(ids[2],))))
    assert stopped == ids[: ids.index(ids[2]) + 1] and done is not None and done.outcome is Outcome.STOP


def test_log_probabilities_are_the_models(made: Server) -> None:
    events = put(made, Request("r", PROMPT, Sampling(max_tokens=1, logprobs=3)))
    run_until_idle(made.engine)
    token = events[0]
    assert isinstance(token, Token)
    from tests.serve.rig import merged

    with torch.inference_mode():
        want = merged(())(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert token.logprob == pytest.approx(float(want[token.id]), abs=1e-4)
    assert [i for i, _ in token.top] == want.topk(3).indices.tolist()


def test_an_adapter_that_cannot_be_read_ends_its_request_alone(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = made.cache.resolve("nine").digest
    mate = put(made, Request("mate", PROMPT, Sampling(max_tokens=3)))
    lost = put(made, Request("lost", PROMPT, Sampling(max_tokens=3), "0" * 64))
    run_until_idle(made.engine)
    done = collect(lost)[1]
    assert done is not None and done.outcome is Outcome.REJECTED and "digest" in done.message
    assert len(collect(mate)[0]) == 3 and digest


def test_an_adapter_that_no_slot_can_hold_ends_its_request_alone() -> None:
    small = server(4, 30, 1, "bags", False, "fcfs")
    lost = put(small, Request("lost", PROMPT, Sampling(max_tokens=3), small.cache.resolve("nine").digest))
    mate = put(small, Request("mate", PROMPT, Sampling(max_tokens=3), small.cache.resolve("eight").digest))
    run_until_idle(small.engine)
    done = collect(lost)[1]
    assert done is not None and done.outcome is Outcome.REJECTED and "needs 2 pages" in done.message
    check_greedy(Request("mate", PROMPT), collect(mate)[0], (("eight", 1.0),))


def test_an_adapter_that_is_still_being_read_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where its request has waited so long that what becomes free is kept for it."""
    made = server(4, 30, 8, "bags", False, "default")
    configure(made, max_running=4, step_tokens=16)
    policy, fetched = Fcfs(max_wait=0.0), made.engine.adapters.fetch
    reading: Future[Any] = Future()
    monkeypatch.setattr(made.engine, "policy", policy)
    monkeypatch.setattr(made.engine.queue, "policy", policy)
    monkeypatch.setattr(made.engine.adapters, "fetch", lambda digest: (fetched(digest), reading)[1])
    digest = made.cache.resolve("eight").digest
    late = put(made, Request("late", PROMPT, Sampling(max_tokens=3), digest))
    mate = put(made, Request("mate", PROMPT, Sampling(max_tokens=3)))
    for _ in range(8):
        made.engine.step()
    assert len(collect(mate)[0]) == 3 and not late and policy.blocking is False
    reading.set_result(fetched(digest).result())
    made.cache.release(digest)
    run_until_idle(made.engine)
    check_greedy(Request("late", PROMPT), collect(late)[0], (("eight", 1.0),))


def test_a_policy_sees_what_prompts_will_cost(made: Server) -> None:
    answer(made, Request("r", PROMPT, Sampling(max_tokens=3)))
    made.engine.pace.model.coefficients = Coefficients(0.1, 0.002, 0.002)
    state = made.engine.queue._state(())
    assert state.chunk == 12 and state.seconds_per_prompt_token == pytest.approx(0.002)
    assert state.seconds(30) == pytest.approx(3 * state.step_seconds + 0.06)


def test_a_fault_in_a_step_ends_its_requests_and_the_next_are_served(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    events = put(made, Request("r", PROMPT))
    run = type(made.runner).run

    def broken(*_: Any) -> Any:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(type(made.runner), "run", broken)
    made.engine.step()
    done = collect(events)[1]
    assert done is not None and done.outcome is Outcome.ERROR
    assert not made.engine.stats().healthy and "a kernel failed" in made.engine.stats().error
    monkeypatch.setattr(type(made.runner), "run", run)
    assert len(answer(made, Request("again", PROMPT, Sampling(max_tokens=2)))[0]) == 2
    assert made.engine.stats().healthy


def test_logits_that_are_not_finite_end_their_own_request_only(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run = type(made.runner).run

    def poisoned(self: Any, plan: Any, slots: Any) -> Any:
        logits = run(self, plan, slots).clone()
        at = 0
        for s in plan.spans:
            if s.request == "ill":
                logits[at : at + s.samples] = torch.nan
            at += s.samples
        return logits

    monkeypatch.setattr(type(made.runner), "run", poisoned)
    ill, well = put(made, Request("ill", PROMPT)), put(made, Request("well", PROMPT, Sampling(max_tokens=4)))
    run_until_idle(made.engine)
    assert collect(ill)[1].outcome is Outcome.ERROR and "not finite" in collect(ill)[1].message  # type: ignore[union-attr]
    check_greedy(Request("well", PROMPT), collect(well)[0], ())


def test_a_listener_that_fails_does_not_end_the_others(made: Server) -> None:
    def bad(_: Event) -> None:
        raise ValueError("listener")

    made.engine.submit(Request("bad", PROMPT, Sampling(max_tokens=2)), bad)
    good = put(made, Request("good", PROMPT, Sampling(max_tokens=2)))
    run_until_idle(made.engine)
    assert len(collect(good)[0]) == 2 and made.engine.counters["listener_faults"] == 3
    answer(made, Request("after", PROMPT, Sampling(max_tokens=1)))


def test_a_mix_of_a_whole_head_and_a_gain_on_it_is_their_sum() -> None:
    """Every change sees the base's own output, not what another change of the mix has made of it."""
    from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
    from tests.serve.rig import base_model

    one = server(4, 30, 8, "reference", False, "fcfs")
    path, vocabulary = one.runner.head_path, base_model().config.vocab_size
    g = torch.Generator().manual_seed(5)
    head, gain = torch.randn(vocabulary, 32, generator=g), torch.randn(vocabulary, generator=g)
    served = LoadedAdapter(
        AdapterMetadata("mixed", "mixed", "", "mix", 0, 0, 0), {}, {path: (lambda x, y: y * gain,)}, {f"{path}.weight": head}
    )
    plan = make_plan([Span("r", PROMPT, 0, (0, 1, 2), 7, Role.PREFILL, 1)], one.runner.page)
    got = one.runner.run(plan, {7: SimpleNamespace(pages=(), served=served)})[0]
    model = base_model()
    with torch.inference_mode():
        x = model.model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0, -1]
        want = x @ head.T + (x @ model.lm_head.weight.T) * gain
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_sampled_ends_its_own_request(made: Server) -> None:
    ill = put(made, Request("ill", PROMPT, Sampling(max_tokens=4, logit_bias={10**6: 1.0})))
    well = put(made, Request("well", PROMPT, Sampling(max_tokens=4)))
    run_until_idle(made.engine)
    done = collect(ill)[1]
    assert done is not None and done.outcome is Outcome.ERROR and "No token could be drawn" in done.message
    assert len(collect(well)[0]) == 4
    check_greedy(Request("well", PROMPT), collect(well)[0], ())


def test_what_cannot_be_queued_ends_alone_and_a_failing_command_nobody(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    link = made.engine.queue.first_link
    monkeypatch.setattr(made.engine.queue, "first_link", lambda r: 1 / 0 if r.id == "ill" else link(r))
    well, ill = put(made, Request("well", PROMPT, Sampling(max_tokens=3))), put(made, Request("ill", PROMPT))
    made.engine.call(lambda: 1 / 0)
    run_until_idle(made.engine)
    assert collect(ill)[1].outcome is Outcome.ERROR and "ill" not in made.engine._ids  # type: ignore[union-attr]
    assert len(collect(well)[0]) == 3


def test_full_pages_leave_the_prefixes_alone_and_short_memory_the_adapters() -> None:
    """With a budget each, what is short of one sort gains nothing from giving up the other."""
    small = server(4, 12, 1, "bags", True, "fcfs")
    a, b = (small.cache.resolve(n).digest for n in ("one", "eight"))
    for digest in (a, b):  # in host memory, so that which of the two enters first is not a matter of reading
        small.engine.adapters.fetch(digest).result()
        small.engine.adapters.release(digest)
    answer(small, Request("before", PROMPT, Sampling(max_tokens=2)))
    idle = len(small.engine.queue.index.idle)
    assert idle
    put(small, Request("holds", PROMPT, Sampling(max_tokens=6), a))
    put(small, Request("waits", PROMPT, Sampling(max_tokens=2), b))
    for _ in range(4):
        small.engine.step()
    assert "waits" in small.engine.queue.waiting and len(small.engine.queue.index.idle) == idle
    run_until_idle(small.engine)
    assert small.table.find(b) is not None
    put(small, Request("long", PROMPT * 4, Sampling(max_tokens=8)))
    put(small, Request("too", PROMPT * 4, Sampling(max_tokens=8)))
    small.engine.step()
    assert "too" in small.engine.queue.waiting and small.table.find(b) is not None
    run_until_idle(small.engine)


def test_guesses_that_come_true_save_steps_and_change_nothing(made: Server) -> None:
    prompt = (7, 7, 7, 7, 7, 7)
    plain, _ = answer(made, Request("p", prompt, Sampling(max_tokens=20)))
    before = made.engine.steps
    answer(made, Request("q", prompt, Sampling(max_tokens=20)))
    without = made.engine.steps - before
    configure(made, speculate=4, max_running=4, step_tokens=16)
    before = made.engine.steps
    guessed, _ = answer(made, Request("r", prompt, Sampling(max_tokens=20)))
    assert guessed == plain
    assert made.engine.steps - before < without


def test_a_thread_serves_what_other_threads_send(made: Server) -> None:
    made.engine.start()
    ended, ids = threading.Event(), {}

    def listen(e: Event) -> None:
        if isinstance(e, Finished):
            ids[e.request] = e.outcome
            if len(ids) == 8:
                ended.set()

    threads = [
        threading.Thread(target=made.engine.submit, args=(Request(f"t{i}", PROMPT, Sampling(max_tokens=3)), listen))
        for i in range(8)
    ]
    for t in threads:
        t.start()
    assert ended.wait(60) and set(ids.values()) == {Outcome.LENGTH}
    made.engine.stop()
    with pytest.raises(Overloaded, match="going down"):
        put(made, Request("late", PROMPT))
    made.engine._draining = False
    made.engine._stopping.clear()


def test_an_adapter_that_is_being_read_holds_nobody_up(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read the others get a token in every step; it enters when it is there, and answers as it should."""
    digest, warm = (made.cache.resolve(n).digest for n in ("xs", "eight"))
    made.cache.fetch(warm).result(60)
    made.cache._host.kept.pop(digest, None)
    read, fetch = threading.Event(), made.cache.source.fetch

    def slow(manifest: Any) -> Any:
        assert read.wait(60)
        return fetch(manifest)

    monkeypatch.setattr(made.cache.source, "fetch", slow)
    mate = put(made, Request("mate", PROMPT, Sampling(max_tokens=9), warm))
    made.engine.step()
    cold = put(made, Request("cold", PROMPT, Sampling(max_tokens=4), digest))
    for n in range(2, 8):
        made.engine.step()
        assert len(collect(mate)[0]) == n and not cold
    read.set()
    made.engine.queue.waiting["cold"].fetched.result(60)  # type: ignore[union-attr]
    before = len(collect(mate)[0])
    made.engine.step()
    assert len(collect(mate)[0]) == before + 1 and len(collect(cold)[0]) == 1
    run_until_idle(made.engine)
    check_greedy(Request("cold", PROMPT), collect(cold)[0], (("xs", 1.0),))


def test_a_chunk_that_is_not_finite_is_never_shared(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk in the middle of a prompt has no logits of its own; what it left in the cache is judged by those that follow."""
    prompt, run = PROMPT[1:] * 3, type(made.runner).run

    def poisoned(self: Any, plan: Any, slots: Any) -> Any:
        logits = run(self, plan, slots)
        for s, first in zip(plan.spans, plan.cu_q, strict=False):
            if s.request == "ill" and not s.samples:
                with torch.inference_mode():
                    for _, V in self.store.layers.values():
                        V[plan.kv_slots[first : first + len(s.tokens)]] = torch.nan
        return logits

    monkeypatch.setattr(type(made.runner), "run", poisoned)
    done = answer(made, Request("ill", prompt, Sampling(max_tokens=2)))[1]
    assert done is not None and done.outcome is Outcome.ERROR and "not finite" in done.message
    ids, done = answer(made, Request("well", prompt, Sampling(max_tokens=4)))
    assert done is not None and done.outcome is Outcome.LENGTH and done.reused == 0
    check_greedy(Request("well", prompt), ids, ())
    assert answer(made, Request("again", prompt, Sampling(max_tokens=4)))[1].reused == 20  # type: ignore[union-attr]


def test_what_was_put_back_takes_nothing_in_the_same_step(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, left = made.pool.allocate, [None]
    monkeypatch.setattr(made.pool, "allocate", lambda *a: left.pop() if left else allocate(*a))
    old, young = (put(made, Request(n, PROMPT[4 * i :], Sampling(max_tokens=3))) for i, n in enumerate(("old", "young")))
    made.engine.step()
    assert not left and list(made.engine.queue.running) == ["old"]
    assert made.engine.queue.waiting["young"].blocks == []
    run_until_idle(made.engine)
    for i, (name, events) in enumerate((("old", old), ("young", young))):
        check_greedy(Request(name, PROMPT[4 * i :]), collect(events)[0], ())


def test_a_request_that_comes_while_the_engine_stops_is_refused_or_ended(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether requests are taken and the queue: whoever was let in is told how it ended."""
    do, stopping = made.engine._do, threading.Thread(target=made.engine.stop)

    def late(command: Any) -> None:
        stopping.start()
        stopping.join(0.3)
        do(command)

    monkeypatch.setattr(made.engine, "_do", late)
    events = put(made, Request("r", PROMPT))
    stopping.join(10)
    assert [e.outcome for e in events if isinstance(e, Finished)] == [Outcome.CANCELLED]
    made.engine._draining = False
    made.engine._stopping.clear()


def test_faults_of_training_beside_end_no_request_and_lasting_ones_the_training(
    made: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        calls = 0

        def ready(self) -> bool:
            self.calls += 1
            if self.calls in (2, 4, 5, 6):  # one alone, then three in a row
                raise OSError("no space left")
            return False

        def run(self, tokens: int, seconds: float | None = None) -> int:
            return 0

    stream = Broken()
    monkeypatch.setattr(made.engine, "stream", stream)
    faults = made.engine.counters["faults"]
    ids, done = answer(made, Request("r", PROMPT, Sampling(max_tokens=9, ignore_eos=True)))
    assert done is not None and done.outcome is Outcome.LENGTH
    check_greedy(Request("r", PROMPT), ids, ())
    assert made.engine.stream is None and stream.calls == 6 and made.engine.counters["faults"] == faults + 4


def test_training_fills_what_a_limit_leaves_and_yields_where_there_is_none(made: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step held to a limit keeps a newcomer no longer than that; without one, or with nobody to serve, it is let by."""
    now = [0.0]

    class Asked:
        def __init__(self) -> None:
            self.calls: list[tuple[int, float | None]] = []

        def ready(self) -> bool:
            return True

        def run(self, tokens: int, seconds: float | None = None) -> int:
            self.calls.append((tokens, seconds))
            now[0] += tokens * 1e-3
            return tokens

    def one(slo: float | None) -> list[tuple[int, float | None]]:
        stream = Asked()
        with monkeypatch.context() as m:
            m.setattr(made.engine, "stream", stream)
            m.setattr(made.engine.pace, "slo", slo)
            answer(made, Request("r", PROMPT, Sampling(max_tokens=4, ignore_eos=True)))
            made.engine.step()  # nobody is left
        return stream.calls

    monkeypatch.setattr(made.engine, "clock", lambda: now[0])
    monkeypatch.setattr(made.engine.pace, "train_second", 1e-3)
    beside, alone = made.engine.pace.train_tokens, made.engine.options.idle_train_tokens
    assert one(None) == [(beside, None)] * 4 + [(alone, None)]
    assert one(1.0) == [(1000, 1.0)] * 4 + [(alone, None)], "more than a window's worth"


def test_a_policy_that_only_the_simulator_can_follow_is_refused() -> None:
    for policy in ("merge_mode", {"name": "chain", "rules": ["fcfs", "merge_mode"]}):
        with pytest.raises(OptionError, match="is for the simulator: it wants the engine to merge an adapter"):
            build_server(
                base_model(),
                lambda adapter_loader: FolderSource(folder(), adapter_loader),
                sizes=Sizes(64, 4, 2),
                op="reference",
                policy=policy,
            )
