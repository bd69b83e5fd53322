"""Keys: every route fails closed, lists are kept, nothing of a key is ever shown."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rankwise.errors import OptionError
from rankwise.serve.http.app import ROUTES
from rankwise.serve.http.auth import Access, Keys, is_loopback
from tests.serve.http.live import Live, serving

ROOT, ALICE, SCRAPE = "root-key-0123456789", "alice-key-0123456789", "scrape-key-0123456789"
GOOD = {"model": "base", "prompt": "a", "max_tokens": 1}
HTTP = httpx.Client(timeout=30)


def write(path: Path, entries: Any) -> Path:
    path.write_text(json.dumps({"keys": entries}))
    return path


@pytest.fixture(scope="module")
def keyed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    file = write(
        tmp_path_factory.mktemp("keys") / "keys.json",
        [
            {"name": "root", "sha256": hashlib.sha256(ROOT.encode()).hexdigest(), "admin": True},
            {"name": "alice", "key": ALICE, "adapters": ["ad*"], "base": False},
            {"name": "scrape", "key": SCRAPE, "adapters": [], "base": False, "metrics": True},
        ],
    )
    with serving(folders["ada"].parent, keys=Keys.read(file)) as server:
        yield server


def call(live: Live, key: str | None, path: str, body: Any = None, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method = "GET" if body is None else "POST"
    return HTTP.request(method, live.url + path, headers=headers | more.pop("headers", {}), json=body, **more)


def test_every_route_has_a_policy_and_fails_closed(keyed: Live) -> None:
    served = {(m, r.path) for r in keyed.app.routes for m in r.methods - {"HEAD"}}
    assert served == {(m, p) for m, p, _, _ in ROUTES}
    for method, path, _, access in ROUTES:
        url = keyed.url + path.replace("{name:path}", "base")
        tries = (
            {}, {"headers": {"Authorization": "Bearer wrong-key-0123456789"}}, {"headers": {"Authorization": ALICE}}, {"params": {"api_key": ROOT}},
            {"headers": {"Authorization": f"Basic {ROOT}"}}, {"headers": {"Authorization": "Bearer \u00e9".encode("latin-1")}}, {"headers": {"X-Api-Key": ROOT}},
        )  # fmt: skip
        for given in tries:
            r = HTTP.request(method, url, content=b"{}" if method == "POST" else None, **given)
            assert r.status_code == 401 if access is not Access.OPEN else r.status_code in (200, 503), (path, given, r.text)
        if access is Access.ADMIN:
            assert HTTP.request(method, url, headers={"Authorization": f"Bearer {ALICE}"}, json={}).status_code == 403
    assert {p for _, p, _, a in ROUTES if a is Access.OPEN} == {"/health", "/ready", "/version"}
    assert call(keyed, ALICE, "/metrics").status_code == 403
    assert call(keyed, SCRAPE, "/metrics").status_code == call(keyed, ROOT, "/metrics").status_code == 200


def test_access_lists(keyed: Live) -> None:
    assert call(keyed, ALICE, "/v1/completions", GOOD | {"model": "ada"}).status_code == 200
    for body in (GOOD, GOOD | {"model": "bob"}, GOOD | {"adapters": [{"name": "ada"}, {"name": "bob"}]}):
        r = call(keyed, ALICE, "/v1/completions", body)
        assert (r.status_code, r.json()["error"]["code"]) == (404, "model_not_found")
    hidden = call(keyed, ALICE, "/v1/completions", GOOD | {"model": "bob"}).json()
    absent = call(keyed, ALICE, "/v1/completions", GOOD | {"model": "eve"}).json()
    assert hidden["error"]["message"].replace("bob", "eve") == absent["error"]["message"], "what is hidden looks absent"
    assert [m["id"] for m in call(keyed, ALICE, "/v1/models").json()["data"]] == ["ada"]
    assert [m["id"] for m in call(keyed, ALICE, "/v1/adapters").json()["data"]] == ["ada"]
    assert call(keyed, ALICE, "/v1/models").json()["data"][0]["root"] == "ada", "no path of the server"
    assert {m["id"] for m in call(keyed, ROOT, "/v1/models").json()["data"]} >= {"base", "ada", "bob"}


def test_the_tenant_is_the_keys_name(keyed: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = keyed.engine.submit
    monkeypatch.setattr(keyed.engine, "submit", lambda r, f: (seen.append(r), plain(r, f))[1])
    call(keyed, ALICE, "/v1/completions", GOOD | {"model": "ada", "cache_salt": "s", "user": "someone"})
    assert [(r.tenant, r.salt, r.adapter) for r in seen] == [("alice", "s", keyed.cache.resolve("ada").digest)]


def test_no_key_in_any_log_or_answer(keyed: Live, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    text = ""
    for key in (ROOT, ALICE, "wrong-key-0123456789"):
        for path, body in (("/v1/models", None), ("/v1/completions", {}), ("/v1/load_lora_adapter", {}), ("/nothing", None)):
            text += call(keyed, key, path, body, params={"api_key": key}).text
    out, err = capfd.readouterr()
    own = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("rankwise", "uvicorn")))
    assert not re.search("key-0123456789", text + out + err + own)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "keys"), ([{"name": "a"}], "either"), ([{"name": "a", "key": "short"}], "keys.0.key"), ([{"name": "a b", "key": ALICE}], "name"),
        ([{"name": "a", "key": ALICE, "adaptors": []}], "adaptors"), ([{"name": "a", "key": ALICE}, {"name": "a", "key": ROOT}], "same name"),
        ([{"name": "a", "key": ALICE}, {"name": "b", "key": ALICE}], "same key"), ([{"name": "a", "key": ALICE, "sha256": "0" * 64}], "either"),
    ],
)  # fmt: skip
def test_a_wrong_key_file_is_one_sentence_without_the_key(tmp_path: Path, entries: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        Keys.read(write(tmp_path / "k.json", entries))
    assert ALICE not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_keys_only_this_machine_and_no_web_page(live: Live) -> None:
    models = live.url + "/v1/models"
    assert HTTP.get(models).status_code == 200
    assert HTTP.get(models, headers={"Origin": "http://localhost:3000"}).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        assert HTTP.get(models, headers=headers).status_code == 403, headers
    ours = ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "::ffff:127.0.0.1")
    assert all(is_loopback(h) for h in ours)
    assert not any(is_loopback(h) for h in ("10.0.0.1", "0.0.0.0", "localhost.evil.example", "", "::"))
