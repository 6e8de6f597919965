"""The commands of those who run regrow every day: `promote`, `rollback`, `history`, `up`, `down`, `status`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.options import AsJson, RuntimeFile, StoreUrl, console, runtime_of
from stages.production import Move, production
from stages.runtime import store_of
from stages.store import Store

Name = Annotated[str, typer.Argument(help="The recipe's name.")]

app = typer.Typer()


@app.command()
def promote(
    name: Name,
    what: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|KEY]", help="A run, or a key of its merge or publish; else the newest."),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Although the gate was not passed, or compared with another.")
    ] = False,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    as_json: AsJson = False,
) -> None:
    """Let NAME/production name a run's model, and deliver it where its recipe says."""
    from flows.promotion import promote as moved

    settings = runtime_of(store, runtime)
    where = store_of(settings)
    _show(where, name, moved(where, settings, name, what, anyway), as_json)


@app.command()
def rollback(name: Name, store: StoreUrl = None, runtime: RuntimeFile = None, as_json: AsJson = False) -> None:
    """Let NAME/production name the model that stood there before."""
    from flows.promotion import rollback as moved

    settings = runtime_of(store, runtime)
    where = store_of(settings)
    _show(where, name, moved(where, settings, name), as_json)


@app.command()
def history(name: Name, store: StoreUrl = None, runtime: RuntimeFile = None, as_json: AsJson = False) -> None:
    """Show which models stood in production, why, and what the other runs came to."""
    from flows.history import show_history

    show_history(store_of(runtime_of(store, runtime)), name, console, as_json)


def _show(store: Store, name: str, move: Move, as_json: bool) -> None:
    from flows.delivering import places_of

    if as_json:
        console.print_json(json.dumps(asdict(move)))
        return
    console.print(f"{name}/production now names {move.model['key'][:8]} of run {move.run} ({move.what})")
    standing = production(store, name)
    for to in dict.fromkeys(place.to for place in places_of(store, name, standing) if place.to) if standing else ():
        console.print(f"model      {escape(to)}", soft_wrap=True)


Home = Annotated[Path | None, typer.Option("--home", help="The folder with the server's database, logs and settings.")]


@app.command()
def up(
    home: Home = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="The dashboard's port; 4200 at first.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="The name or IPv4 address; 127.0.0.1 at first.")] = None,
    database: Annotated[
        str | None, typer.Option("--database", envvar="REGROW_DATABASE", help="A PostgreSQL URL instead of SQLite.")
    ] = None,
) -> None:
    """Bring up a server, a worker for the CPU and one a GPU, and register every deployment. What is not said is as it
    was last time."""
    from flows.up import home_of
    from flows.up import up as bring_up

    folder = home_of(home)
    settings = bring_up(folder, port, host, database)
    console.print(f"dashboard  {settings.api.removesuffix('/api')}")
    console.print(f"state      {folder}", soft_wrap=True)
    console.print("workers    " + ", ".join(part for part in settings.parts if part != "server"))
    console.print("stop with  regrow down")


@app.command()
def down(home: Home = None) -> None:
    """End the server and the workers. Runs in progress save their state and stop."""
    from flows.up import down as bring_down
    from flows.up import home_of

    console.print("down" if bring_down(home_of(home)) else "nothing was up")


@app.command()
def status(home: Home = None, as_json: AsJson = False) -> None:
    """Show which parts of `regrow up` run. Exit code 1 when one does not."""
    from flows.keeper import healthy, read
    from flows.up import home_of
    from flows.up import status as look

    folder = home_of(home)
    parts, state = look(folder), read(folder)
    answers = state is not None and healthy(state.settings)
    if as_json:
        told = {name: {"pid": found.pid if found else None, "bytes": held} for name, found, held in parts}
        console.print_json(json.dumps({"home": str(folder), "answers": answers, "parts": told}))
    elif not parts:
        console.print("nothing was ever up here; `regrow up` starts it")
    else:
        for name, found, held in parts:
            shown = f"[green]up[/]    pid {found.pid:<8} {held / 2**20:,.0f} MiB" if found else "[red]down[/]"
            console.print(f"{name:<14} {shown}")
        assert state is not None
        console.print(
            f"{'dashboard':<14} {state.settings.api.removesuffix('/api')}" + ("" if answers else " (no answer)")
        )
    if not answers or not all(found for _, found, _ in parts):
        raise typer.Exit(1)
