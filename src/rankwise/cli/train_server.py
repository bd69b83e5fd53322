"""``rankwise train --server URL``: hand the data and the recipe to a running server, and follow the job to its end."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from rankwise.cli.common import emit_json, err, out
from rankwise.errors import DataError, OptionError, TrainingError

#: seconds between two looks at a job
PAUSE = 0.3
ENDED = ("succeeded", "failed", "cancelled")


class Client:
    """One server's fine-tuning routes.

    Args:
        url: of the server, with or without ``/v1``; ``key``: an administrator's, where it asks for one.
    """

    def __init__(self, url: str, key: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise OptionError(f"--server {url!r} is no address of a server; give one like http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON.  Raises OptionError with the server's own words, or where none answers."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise OptionError(f"The server refuses it ({error.code}): {_told(error)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise OptionError(f"No rankwise server answers at {self.url}: {reason}.") from None

    def base(self) -> str:
        """The base's name."""
        models = self.call("GET", "/models").get("data", [])
        found = next((m["id"] for m in models if m.get("parent") is None), None)
        if found is None:
            raise OptionError(f"{self.url} names no base that your key may use; give --model.")
        return str(found)

    def follow(self, id: str) -> Iterator[dict[str, Any]]:
        """The job's events as they come, until it has ended."""
        seen = 0
        while True:
            status = self.call("GET", f"/fine_tuning/jobs/{id}")["status"]
            for event in self.call("GET", f"/fine_tuning/jobs/{id}/events?since={seen}")["data"]:
                seen += 1
                yield event
            if status in ENDED:
                return
            time.sleep(PAUSE)


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)


def refuse(given: Mapping[str, Any]) -> None:
    """Raise OptionError for an option that a server's job has no use for (``given``: option → value, falsy where not given)."""
    idle = next((option for option, value in given.items() if value), None)
    if idle is not None:
        raise OptionError(f"{idle} means nothing with --server, whose job keeps nothing here; leave it out.")


def train_on_server(
    url: str,
    data: str,
    name: str,
    recipe: Mapping[str, Any],
    *,
    model: str | None,
    stage: str,
    format: str,
    split: str | None,
    as_json: bool,
    fields: Mapping[str, Any],
) -> None:
    """Submit, show the progress, and say under which name the adapter is served.

    Args:
        url: of the server; ``model``: its base's name, None: asked of it.
        data, stage, format, split: as of ``rankwise train``.
        name: under which the adapter is served.
        recipe, fields: of the job; fields that are None are left to the server.
        as_json: print the finished job as JSON and no progress.

    Raises:
        OptionError, DataError: no server, or one that refuses; data of another kind.
        TrainingError: the job failed, or was cancelled.
    """
    client = Client(url, os.environ.get("RANKWISE_API_KEY"))
    body = {
        "model": model or client.base(),
        "suffix": name,
        "training_data": _records(data, stage, format, split),
        "recipe": dict(recipe),
        **{k: v for k, v in fields.items() if v is not None},
    }
    job = client.call("POST", "/fine_tuning/jobs", body)
    try:
        _show(client, job, as_json)
    except KeyboardInterrupt:
        err.print(f"The job {job['id']} goes on at the server.", highlight=False)
        raise
    done = client.call("GET", f"/fine_tuning/jobs/{job['id']}")
    if done["status"] != "succeeded":
        why = (done.get("error") or {}).get("message") or f"it was {done['status']}"
        raise TrainingError(f"The job {job['id']} did not succeed: {why}")
    if as_json:
        emit_json(done)
        return
    out.print(f"\nserved as {name} (version {done['version']}) at {client.url}", highlight=False)


def _records(data: str, stage: str, format: str, split: str | None) -> list[dict[str, Any]]:
    from rankwise.train.data.readers import read

    if stage not in ("pt", "sft"):
        raise OptionError(f"--stage is pt or sft with --server; it is {stage!r}.")
    records = read(data, format, split)
    if stage == "pt" and records[0].kind != "text":
        raise DataError(f"--stage pt learns whole texts, but {data} holds {records[0].kind} records; use --stage sft.")
    return [dict(r.fields) for r in records]


def _show(client: Client, job: Mapping[str, Any], silent: bool) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=err, disable=silent) as bars:
        task = bars.add_task("", total=job["total_steps"], shown="queued")
        for event in client.follow(job["id"]):
            told = event.get("data") or {}
            if "loss" in told:
                bars.update(task, completed=told["step"], shown=f"loss {told['loss']:.4f}")
            elif event["level"] == "info":
                bars.update(task, shown=event["message"])
