"""`regrow run --on up`: sends a run to the workers of `regrow up` (or of `PREFECT_API_URL`) and follows it to its end.

The run goes on when whoever sent it stops watching. Workers elsewhere know nothing of this machine's folders and
cores: of the runtime they are told what was set, and their own environment says the rest.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from rich.console import Console
from rich.markup import escape

from flows.local import EXIT_GATE, Selection
from flows.run import Run
from flows.server import QUIET, Api, require_usable
from flows.up import home_of, running
from stages.errors import UserError

EXIT_SUSPENDED = 75

LOOK_SECONDS = 1.0
"""Between two looks at the run."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run_there(run: Run, selection: Selection, console: Console) -> int:
    """Send the run and follow it; return the exit code. Raises UserError when there is nowhere to send it, and
    when the server cannot be used."""
    ours = running(home_of(None))
    url = os.environ.get("PREFECT_API_URL") or ours
    if not url:
        raise UserError("--on up: nothing is up here; start it with `regrow up`, or set PREFECT_API_URL")
    os.environ |= {**QUIET, "PREFECT_API_URL": url}
    require_usable(url)
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    here = url == ours or urlsplit(url).hostname in LOOPBACK
    told = order(run, selection, here=here)
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name("finetune/recipe")
        except ObjectNotFound:
            raise UserError(f"{url} has no deployment finetune/recipe; register it with `regrow up`") from None
        if told["parameters"]["run"]:
            (run if here else replace(run, to="")).record("started")  # elsewhere a path means another folder
        sent = client.create_flow_run_from_deployment(deployment.id, **told)
        page = Api(url, None).page(sent.id)
        console.print(f"[dim]sent to {escape(page)}[/]", soft_wrap=True)
        return _follow(client, sent.id, page, console)


def order(run: Run, selection: Selection, *, here: bool) -> dict[str, Any]:
    """What the server is asked for; `here`: whether its workers are on this machine."""
    runtime = run.runtime.model_dump(mode="json", exclude_unset=True)
    if here:
        runtime |= {"store": run.runtime.store}
    parameters = {
        "recipe": run.loaded.recipe.model_dump(mode="json", exclude_unset=True),
        "select": list(selection.selectors),
        "exclude": list(selection.exclude),
        "force": list(selection.force),
        "strict": selection.strict,
        "runtime": runtime or None,
        # The run's record is in the store that was named; into a store of their own workers write one of their own.
        "run": run.id if "store" in runtime else "",
    }
    return {"parameters": parameters, "job_variables": {"working_dir": str(Path.cwd())} if here else None}


def _follow(client, flow_run: UUID, page: str, console: Console) -> int:  # type: ignore[no-untyped-def]
    from prefect.client.schemas import filters

    told: dict[str, str] = {}
    of_run = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[flow_run]))
    while True:
        state = client.read_flow_run(flow_run).state
        for task in client.read_task_runs(flow_run_filter=of_run):
            if task.state and task.state.is_final() and told.get(task.name) != task.state.name:
                told[task.name] = task.state.name
                console.print(
                    f"{task.state.name.lower():<10} {escape(task.state.message or task.name)}", soft_wrap=True
                )
        if state.is_paused():
            console.print(f"waits      for a person, who decides there: {escape(page)}", soft_wrap=True)
            return 0
        if state.is_final():
            words = state.message or ""
            console.print(f"{state.name.lower():<10} {escape(words)}", soft_wrap=True)
            codes = {"GateFailed": EXIT_GATE, "Suspended": EXIT_SUSPENDED}
            return codes.get(state.name, 0 if state.is_completed() else 1)
        time.sleep(LOOK_SECONDS)
