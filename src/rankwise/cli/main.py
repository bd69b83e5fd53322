"""``rankwise VERB``: every verb in one place; a user's mistake is one line and exit status 2."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from rankwise.cli import common
from rankwise.cli.spelling import as_options
from rankwise.errors import RankwiseError

app = typer.Typer(
    name="rankwise",
    help="Train, mix, merge, compress and compare low-rank adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)


def _verbs() -> None:
    if app.registered_commands:  # a second call in one process
        return
    from rankwise.cli import adapters, compare, convert, demo, generate, info, merge, plan, serve, sweep, train

    for module in (plan, train, sweep, generate, serve, compare, merge, convert, adapters, info, demo):
        module.add(app)


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (something broke) or 2 (the user's input)."""
    common.quiet()
    _verbs()
    try:
        status = app(args=argv, standalone_mode=False)  # an Exit inside comes back as its number
    except RankwiseError as error:
        common.err.print(f"[bold red]rankwise:[/] {escape(as_options(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except typer.Abort:
        common.err.print("rankwise: stopped.")
        sys.exit(130)
    except KeyboardInterrupt:
        common.err.print("rankwise: stopped; what was saved stays.")
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            common.err.print(f"[bold red]rankwise:[/] {escape(error.format_message())}", highlight=False, soft_wrap=True)
            sys.exit(2)
        raise
    if isinstance(status, int) and status:
        sys.exit(status)


if __name__ == "__main__":
    main()
