"""The commands that show what a model says: `chat`, `serve`, and what it said while it trained: `rollouts`."""

from typing import Annotated, Literal

import typer
from rich.markup import escape

from flows.options import AsJson, RuntimeFile, StoreUrl, console, runtime_of
from stages.errors import UserError
from stages.runtime import store_of

What = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A recipe's name (what is in production), a recipe file, a run, or a model's folder."
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe file.")
]

app = typer.Typer()


@app.command()
def chat(
    what: What,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this and end. So does what is piped in.")] = None,
    beside_base: Annotated[
        bool, typer.Option("--beside-base", help="Ask the model before training too, and show both side by side.")
    ] = False,
    system: Annotated[str, typer.Option("--system", help="A system prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token every time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws, with a temperature.")] = 0,
    settings: Settings = None,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model, through the chat template that it was trained with."""
    from flows import chat as talking
    from flows.models import choose

    question = prompt if prompt is not None else talking.piped()
    if question == "":
        raise UserError("nothing was asked: --prompt or what was piped in is empty")
    if as_json and question is None:
        raise UserError("--json: give --prompt, or pipe the question in")
    place = runtime_of(store, runtime)
    artifacts = store_of(place)
    chosen = choose(what, settings or (), artifacts, place)
    base = chosen.base_folder(artifacts) if beside_base else None
    sampling = talking.Sampling(max_new_tokens, temperature, seed)
    partners = talking.load(chosen.folder(artifacts), base, place.device, sampling, system)
    if question is not None:
        talking.ask_once(partners, question, console, as_json)
    else:
        talking.converse(partners, f"{chosen.name}: {chosen.what}", console)


@app.command()
def serve(
    what: What,
    host: Annotated[
        str, typer.Option("--host", help="The address it listens on. It asks for no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port it listens on.")] = 8000,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"],
        typer.Option("--engine", help="Which server; auto takes vLLM where it is installed."),
    ] = "auto",
    settings: Settings = None,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
) -> None:
    """Serve a model with OpenAI's API, by `transformers serve` or vLLM."""
    from flows.models import choose
    from flows.serve import become, endpoint, prepare

    place = runtime_of(store, runtime)
    artifacts = store_of(place)
    chosen = choose(what, settings or (), artifacts, place)
    served = prepare(
        chosen.folder(artifacts), chosen.name, engine, host, port, place.device, place.cache.absolute() / "serving"
    )
    console.print(f"model     {chosen.name} ({chosen.what})", soft_wrap=True)
    console.print(f"endpoint  {escape(endpoint(host, port))}", soft_wrap=True)
    if host not in ("127.0.0.1", "::1", "localhost"):
        console.print("[yellow]it asks for no password: whoever reaches this address can use it[/]")
    console.file.flush()
    become(served, artifacts.cache)


@app.command()
def rollouts(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_KEY", help="A run's id, a recipe's name (its last run), or a training's first digits."
        ),
    ],
    step: Annotated[int | None, typer.Option("--step", min=1, help="Only those of this step.")] = None,
    worst: Annotated[bool, typer.Option("--worst", help="Begin with those that were worth least.")] = False,
    store: StoreUrl = None,
    runtime: RuntimeFile = None,
    as_json: AsJson = False,
) -> None:
    """Page through what a model wrote while it trained, with each completion's rewards. --json gives a line each."""
    from flows.rollouts import show_rollouts

    show_rollouts(store_of(runtime_of(store, runtime)), what, step, worst, console, as_json)
