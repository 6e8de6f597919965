"""Shows a run in Prefect's dashboard: the stages' lines as logs, their progress, and one page a question.

    with get_client(sync_client=True) as client, following(Dashboard(client).follower()):
        ...

Pages are artifacts with fixed keys (see `flows.pages`): plan, data-report, packing, progress, loss-curve, completions,
scores and model-card; of other stages a table of what came out (`flows.facts`), under the stage's name. A cached
stage's pages are shown too: whoever opens a run wants its scores, whichever run made them.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run

from flows.execute import Follower
from flows.facts import TITLES
from flows.history import events_of
from flows.pages import PAGES, facts_page, history_page, loss_page, plan_page, trimmed
from flows.plan import Plan
from flows.run import Run
from stages.build import Built
from stages.child import Event
from stages.errors import UserError
from stages.identity import Json
from stages.production import production
from stages.store import BadBlob, Store

PATIENCE_SECONDS = 8.0
"""A stage that is done sooner shows no progress."""

PROGRESS_SECONDS = 2.0
"""Between two updates of the progress, at first; later a hundredth of the time so far. Each one is kept as an event."""

CURVE_SECONDS = 10.0
"""The same for the loss curve, which is larger; later a twentieth of the time so far."""

MOST_LINE = 10_000
"""Characters of one log line."""


@dataclass
class _Stage:
    """What is on show of the stage that runs now. Its callbacks may come from any thread."""

    name: str
    logger: "logging.Logger | logging.LoggerAdapter[Any]"
    task_run: UUID | None
    started: float = field(default_factory=time.monotonic)
    progress: UUID | None = None
    progressed: float = 0.0
    curve: UUID | None = None
    drawn: float = 0.0
    rows: list[dict[str, Json]] = field(default_factory=list)


@dataclass
class Dashboard:
    """Follows one run. The dashboard only watches: when the API, or the store for a page, cannot be reached, the run
    goes on without the page."""

    client: SyncPrefectClient
    stage: _Stage | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def follower(self) -> Follower:
        """The callbacks to follow a run with; `started` must be called inside the stage's task."""
        return Follower(self._started, self._event, self._line, self._note, self._finished)

    def show_plan(self, plan: Plan) -> None:
        """Show the plan; called inside the flow."""
        with self._forgiving(get_run_logger()):
            self._create("plan", "What will run, and why", plan_page(plan), None)

    def show_history(self, run: Run) -> None:
        """Show what the runs of this recipe's name came to; called inside the flow."""
        self.show_history_of(run.store, run.name)

    def show_history_of(self, store: Store, name: str) -> None:
        """Show a name's history, on a page whose key is the name's own."""
        with self._forgiving(get_run_logger()):
            standing = production(store, name)
            page = history_page(name, events_of(store, name), standing.now if standing else None)
            self._create(f"{name}-history", f"{name}: runs and production", page, None)

    def _started(self, run: Run, stage: str) -> None:
        self.stage = _Stage(stage, get_run_logger(), UUID(task_run.id) if task_run.id else None)

    def _line(self, run: Run, stage: str, line: str) -> None:
        assert self.stage is not None
        shown = line.rpartition("\r")[2].rstrip()  # a bar that draws over itself: its last state
        if shown:
            self.stage.logger.info(shown[:MOST_LINE])

    def _note(self, run: Run, stage: str, message: str) -> None:
        assert self.stage is not None
        self.stage.logger.warning(message)

    def _event(self, run: Run, stage: str, event: Event) -> None:
        assert self.stage is not None
        if event["event"] != "tell":
            return
        with self.lock, self._forgiving(self.stage.logger):
            self._show_progress(self.stage, event)
            if stage == "train" and "loss" in event["metrics"]:
                self._draw_curve(self.stage, {"step": event["done"], **event["metrics"]})

    def _show_progress(self, stage: _Stage, event: Event) -> None:
        now, total = time.monotonic(), event["total"]
        pause = max(PROGRESS_SECONDS, (now - stage.started) / 100)
        if not total or now < max(stage.started + PATIENCE_SECONDS, stage.progressed + pause):
            return
        percent = round(100.0 * min(event["done"] / total, 1.0), 1)
        told = f"{stage.name}: {event['done']:,.0f} of {total:,.0f} {event['unit']}".rstrip()
        if stage.progress is None:
            stage.progress = self._create("progress", told, percent, stage.task_run)
        else:
            self.client.update_artifact(stage.progress, ArtifactUpdate(data=percent, description=told))
        stage.progressed = now

    def _draw_curve(self, stage: _Stage, row: dict[str, Json]) -> None:
        stage.rows.append(row)
        now = time.monotonic()
        if now - max(stage.started, stage.drawn) < max(CURVE_SECONDS, (now - stage.started) / 20):
            return
        markdown = loss_page(stage.rows)
        if stage.curve is None:
            stage.curve = self._create("loss-curve", "Loss over steps, so far", markdown, stage.task_run)
        else:
            self.client.update_artifact(stage.curve, ArtifactUpdate(data=markdown))
        stage.drawn = now

    def _finished(self, run: Run, stage: str, built: Built) -> None:
        assert self.stage is not None
        with self.lock, self._forgiving(self.stage.logger):
            if self.stage.progress:
                done = ArtifactUpdate(data=100.0, description=f"{stage}: done")
                self.client.update_artifact(self.stage.progress, done)
            if stage in TITLES:
                self._create(stage, TITLES[stage], facts_page(built.artifact.facts), self.stage.task_run)
            for page in PAGES.get(stage, ()):
                tree = built.artifact.tree.select(*page.files)
                if not tree.files:  # completions, of a training that writes none
                    continue
                if sum(file.size for file in tree.files) > page.most:
                    self.stage.logger.info(
                        f"no {page.key} page: {', '.join(page.files)} is too large to be read for it"
                    )
                    continue
                if run.store.missing(tree):
                    self.stage.logger.info(f"no {page.key} page: {', '.join(page.files)} is not in the store any more")
                    continue
                markdown = page.markdown(run.store.view(tree))
                if page.key == "loss-curve" and self.stage.curve:
                    update = ArtifactUpdate(data=trimmed(markdown), description=page.title)
                    self.client.update_artifact(self.stage.curve, update)
                else:
                    self._create(page.key, page.title, markdown, self.stage.task_run)

    def _create(self, key: str, title: str, data: str | float, task: UUID | None) -> UUID:
        kind = "markdown" if isinstance(data, str) else "progress"
        shown = trimmed(data) if isinstance(data, str) else data
        flow = UUID(flow_run.id) if flow_run.id else None
        artifact = ArtifactCreate(key=key, type=kind, description=title, data=shown, task_run_id=task, flow_run_id=flow)
        return self.client.create_artifact(artifact).id

    @contextmanager
    def _forgiving(self, logger: "logging.Logger | logging.LoggerAdapter[Any]") -> Iterator[None]:
        """A page that cannot be shown is a line in the log, not the end of a run."""
        try:
            yield
        except (httpx.HTTPError, BadBlob, UserError, OSError) as error:  # of the API, the store, the cache
            logger.warning(f"a page of the dashboard could not be shown: {error}")
