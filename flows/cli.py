"""The command line: `regrow run RECIPE [SELECT]`, `plan`, `inspect`, `show`, `schema`, `gc`, `verify`; `flows.operate`,
`flows.talk`.

Importing this module pulls in neither torch nor Prefect; only `run` starts Prefect, and only when something runs.
"""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from flows import operate, screen, talk
from flows.execute import Follower, StageFailed, following
from flows.graph import select
from flows.options import AsJson, RuntimeFile, StoreUrl, console, runtime_of
from flows.plan import make_plan, require_writable
from flows.recipe import load
from flows.run import Run, start
from stages.child import ON_SIGTERM, Suspended
from stages.errors import UserError
from stages.runtime import store_of
from stages.store import BadBlob

EXIT_FAILED, EXIT_USER, EXIT_WOULD_RUN, EXIT_GATE = 1, 2, 3, 4
EXIT_SUSPENDED, EXIT_INTERRUPTED = 75, 130

EXIT_CODES = (
    "Exit codes: 0 done or nothing to do · 1 a stage failed · 2 bad input · 3 `plan --check`: something would run · "
    "4 the quality gate was not passed · 75 suspended, continue with the same command · 130 interrupted."
)

app = typer.Typer(
    name="regrow",
    help="Fine-tuning as a pipeline whose every stage grows back.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(operate.app)
app.add_typer(talk.app)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Selectors = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SELECT]...", help="Stages: train, train+ (and below), +evaluate (and above), 1+train."),
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="Stages to leave out; the same grammar.")]
Force = Annotated[list[str] | None, typer.Option("--force", help="Stages to make again although they are cached.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key.")]
Strict = Annotated[bool, typer.Option("--strict", help="Make again what other code or library versions made.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let the recipe bring Python of its own: it runs with your rights.")
]


@app.command()
def run(
    recipe: RecipePath,
    selectors: Selectors = None,
    exclude: Exclude = None,
    force: Force = None,
    settings: Settings = None,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    strict: Strict = False,
    allow_code: AllowCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    on: Annotated[
        Literal["here", "up"], typer.Option("--on", help="In this process, or on the worker of `regrow up`.")
    ] = "here",
    as_json: AsJson = False,
) -> None:
    """Run a recipe: make what is not there yet, in a Prefect flow."""
    from flows.local import Selection, finish, run_plan

    if on == "up" and as_json and not dry_run:
        raise UserError("--json tells of a run in this process, and --on up sends it elsewhere: leave one of them out")
    this = _start(recipe, settings, store, runtime, allow_code)
    plan = make_plan(this, selectors or (), exclude or (), force or (), strict)
    if not as_json:
        screen.show_plan(console, plan)
    elif dry_run:
        print(screen.plan_json(plan))
    if dry_run:
        return
    require_writable(this, plan)
    selection = Selection(selectors or (), exclude or (), force or (), strict)
    if on == "up":
        from flows.remote import run_there

        raise typer.Exit(run_there(this, selection, console))
    quiet = Console(quiet=True) if as_json else console
    again, made = [stage for stage in select(force) if stage in plan.to_run] if force else [], set[str]()
    try:
        with _suspended_on_sigterm(), following(Follower(finished=lambda run, stage, built: made.add(stage))):
            dashboard = run_plan(this, selection, quiet) if plan.to_run else ""
    except KeyboardInterrupt:
        raise _going_on(typer.Abort(), again, made) from None  # of the other, typer keeps nothing but the exit code
    except (UserError, StageFailed, Suspended) as error:
        raise _going_on(error, again, made) from error.__cause__
    raise typer.Exit(finish(this, selection, dashboard, console, as_json))


@app.command("plan")
def plan_command(
    recipe: RecipePath,
    selectors: Selectors = None,
    exclude: Exclude = None,
    force: Force = None,
    settings: Settings = None,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    strict: Strict = False,
    allow_code: AllowCode = False,
    why: Annotated[bool, typer.Option("--why", help="Also say what made each cached artifact.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 when anything would run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what would run, and why."""
    this = _start(recipe, settings, store, runtime, allow_code)
    plan = make_plan(this, selectors or (), exclude or (), force or (), strict)
    if as_json:
        print(screen.plan_json(plan))
    else:
        screen.show_plan(console, plan, why)
    if check and plan.to_run:
        raise typer.Exit(EXIT_WOULD_RUN)


@app.command()
def show(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A run's id, a recipe's name (its last run), or the first digits of an artifact's key "
            "(STAGE/DIGITS narrows it)."
        ),
    ] = None,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a run or an artifact: facts, inputs, files, lineage. Without a name: the latest runs."""
    from flows.show import show_what

    show_what(store_of(runtime_of(store, runtime)), what, console, as_json)


@app.command()
def inspect(
    recipe: RecipePath,
    settings: Settings = None,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what became of the data, and some rows with what trains in them in colour."""
    from flows.inspect import inspect as show_data

    given = [("--set", setting) for setting in settings or ()]
    given += [(name, str(value)) for name, value in (("--store", store), ("--runtime", runtime)) if value]
    flags = [word for pair in given for word in pair] + ["--allow-code"] * allow_code
    show_data(_start(recipe, settings, store, runtime, allow_code), recipe, console, as_json, flags)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    from flows.schema import text

    print(text())


@app.command()
def gc(
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Really delete; without it only the report is shown.")
    ] = False,
    days: Annotated[float, typer.Option("--days", min=0, help="Runs younger than this keep what they used.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Find (and with --delete remove) artifacts that nothing names any more."""
    from flows.show import show_gc

    show_gc(store_of(runtime_of(store, runtime)), delete, days, console, as_json)


@app.command()
def verify(
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every blob and check its digest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that the store holds what its manifests say."""
    from flows.show import show_verify

    raise typer.Exit(show_verify(store_of(runtime_of(store, runtime)), deep, console, as_json))


@contextmanager
def _suspended_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into Suspended where no flow runs that does so: while its server starts, say."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows tidies up
        raise KeyboardInterrupt  # which no library takes for an error of its own

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if stopped:
            raise Suspended(ON_SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _going_on(error: Exception, again: list[str], made: set[str]) -> Exception:
    """The error that ended a run, noted with the command that goes on: the command itself, as what is done stays done;
    of the stages that it makes `again`, those that are `made` are not forced once more."""
    words = sys.argv[1:]
    if made.intersection(again):
        left = [stage for stage in again if stage not in made]
        words = [*_without_force(words), *(word for stage in left for word in ("--force", stage))]
    error.add_note(f"continue with: regrow {shlex.join(words)}")
    return error


def _without_force(words: list[str]) -> list[str]:
    """The command's words without `--force STAGE` and `--force=STAGE`."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if "--force" not in (before, word) and not word.startswith("--force=")
    ]


def _start(
    recipe: Path,
    settings: list[str] | None,
    store: str | None,
    runtime_file: Path | None,
    allow_code: bool = False,
) -> Run:
    loaded = load(recipe, settings or ())
    runtime = runtime_of(store, runtime_file, allow_code)
    return start(loaded, runtime, store_of(runtime))


def main() -> None:
    """The `regrow` command: errors become one clear line and an exit code."""
    code = 0
    try:
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == EXIT_INTERRUPTED:  # typer has caught the Ctrl-C, and says nothing
            _complain("interrupted", code)
    except typer.Exit as error:
        code = error.exit_code
    except typer.TyperException as error:
        code = _complain(f"{error.format_message()} See `regrow --help`.", EXIT_USER)
    except (KeyboardInterrupt, typer.Abort) as error:
        code = _complain("interrupted", EXIT_INTERRUPTED, error)
    except UserError as error:
        code = _complain(error, EXIT_USER, error)
    except Suspended as error:
        code = _complain(error, EXIT_SUSPENDED, error)
    except BadBlob as error:  # met outside a stage, which would have mended it
        mend = "`regrow verify` says whose it is, and `regrow run RECIPE --force STAGE` makes that again"
        code = _complain(f"the store is damaged: {error}; {mend}", EXIT_FAILED, error)
    except (StageFailed, OSError) as error:  # OSError: a full disk is said by the system better than by us
        code = _complain(error, EXIT_FAILED, error)
    sys.exit(code)


def _complain(told: object, code: int, error: BaseException | None = None) -> int:
    """Say it on stderr, with what the error was noted to go on with; return the exit code."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    stderr.print(f"[red]error:[/] {escape(str(told))}")
    for note in getattr(error, "__notes__", ()):
        stderr.print(escape(note))
    return code


if __name__ == "__main__":
    main()
