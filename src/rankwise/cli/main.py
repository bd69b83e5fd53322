"""``rankwise VERB``: every verb in one place; a user's mistake is one line and exit status 2."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from rankwise.cli import common
from rankwise.cli.spelling import flags_of, spelled
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


def told(error: RankwiseError, argv: list[str]) -> str:
    """The error's sentence, its options as they are typed after the verb of this call."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    flags = flags_of(verbs[argv[0]]) if argv and argv[0] in verbs else {}
    return error.told(lambda option: spelled(option, flags))


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (something broke) or 2 (the user's input)."""
    common.quiet()
    _verbs()
    try:
        status = app(args=argv, standalone_mode=False)  # an Exit inside comes back as its number
    except RankwiseError as error:
        common.err.print(
            f"[bold red]rankwise:[/] {escape(told(error, sys.argv[1:] if argv is None else argv))}", highlight=False, soft_wrap=True
        )
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
