"""A verb, run in this process."""

from __future__ import annotations

import pytest

from rankwise.cli.main import main


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """The verb in this process; (status, out, err)."""
    code = 0
    try:
        main(list(args))
    except SystemExit as leave:
        code = int(leave.code or 0)
    got = capsys.readouterr()
    return code, got.out, got.err
