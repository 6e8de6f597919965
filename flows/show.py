"""`regrow show`, `gc` and `verify`: what the store holds, as tables or JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.graph import ORDER, select
from flows.screen import headline
from stages.errors import UserError
from stages.gc import collect, verify
from stages.identity import Json
from stages.store import Artifact, Store

LATEST_RUNS = 15
SHOWN_FILES = 12


def show_what(store: Store, what: str | None, console: Console, as_json: bool) -> None:
    """Show the latest runs, one run, or one artifact. Raises UserError when nothing is called so."""
    if what is None:
        _show_runs(store, console, as_json)
    elif record := run_named(store, what):
        _show_run(store, record, console, as_json)
    else:
        _show_artifact(store, artifact_named(store, what), console, as_json)


def _show_runs(store: Store, console: Console, as_json: bool) -> None:
    records = [record for _, record in islice(store.runs(), LATEST_RUNS)]
    if as_json:
        console.print_json(json.dumps([{k: r[k] for k in ("run", "recipe", "status", "written")} for r in records]))
        return
    if not records:
        console.print(f"no runs yet in {store.url}")
        return
    table = _table("recipe", "status", "written (UTC)", "made")
    table.add_column("run", no_wrap=True)
    for record in records:
        made = sum(a["made"] for a in record["stages"].values())
        cells = (record["recipe"], record["status"], record["written"][:16].replace("T", " "))
        table.add_row(*cells, f"{made} of {len(record['stages'])}", record["run"])
    console.print(table)


def run_named(store: Store, what: str) -> dict[str, Json] | None:
    """The record of a run, by its id or as `NAME` for the last run of a recipe."""
    try:
        ref = store.read_ref(f"{what}/last")
        return store.read_run(ref.document["run"] if ref else what)
    except UserError:  # not a name a run can have
        return None


def _show_run(store: Store, record: Mapping[str, Any], console: Console, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(record))
        return
    console.print(f"run {record['run']} of {record['recipe']}: {record['status']} on {record['written']}")
    if reason := record.get("reason"):
        console.print(escape(reason))
    table = _table("stage", "", "key", "digest", "what came out")
    for stage in (s for s in ORDER if s in record["stages"]):
        entry = record["stages"][stage]
        found = store.recall(stage, entry["key"], entry["digest"])
        told = headline(stage, found.facts) if found else "no longer in the store"
        table.add_row(stage, "made" if entry["made"] else "cached", entry["key"][:12], entry["digest"][:12], told)
    console.print(table)


def artifact_named(store: Store, prefix: str) -> Artifact:
    """The one artifact whose key starts so; `stage/prefix` narrows it."""
    stage, _, digits = prefix.rpartition("/")
    if len(digits) < 4 or not all(c in "0123456789abcdef" for c in digits):
        raise UserError(f"{prefix}: no run is called so, and a key is at least 4 hexadecimal digits; see `regrow show`")
    found = [(s, key) for s, key, _ in store.manifests() if key.startswith(digits) and (not stage or s == stage)]
    if len(found) != 1:
        told = "no artifact's key starts so" if not found else f"{len(found)} keys start so; give more digits"
        raise UserError(f"{prefix}: {told}")
    artifact = store.find(*found[0])
    if artifact is None:
        raise UserError(
            f"{prefix}: its manifest is damaged and was moved to quarantine/; its stage grows back when run"
        )
    return artifact


def _lineage(store: Store, artifact: Artifact) -> dict[str, dict[str, str]]:
    """The artifacts that one comes from, by stage: those above it in the run that made it. Empty when that run's record
    is gone, and for a part of an artifact."""
    run = artifact.provenance.get("run")
    stages = (store.read_run(run) or {}).get("stages", {}) if run else {}
    if stages.get(artifact.stage, {}).get("key") != artifact.key:
        return {}
    above = [stage for stage in select([f"+{artifact.stage}"]) if stage != artifact.stage and stage in stages]
    return {stage: {name: stages[stage][name] for name in ("key", "digest")} for stage in above}


def _show_artifact(store: Store, artifact: Artifact, console: Console, as_json: bool) -> None:
    lineage = _lineage(store, artifact)
    if as_json:
        console.print_json(
            json.dumps(
                {
                    "stage": artifact.stage,
                    "key": artifact.key,
                    "digest": artifact.digest,
                    "action": artifact.action,
                    "facts": artifact.facts,
                    "provenance": artifact.provenance,
                    "lineage": lineage,
                    "parts": artifact.parts,
                    "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in artifact.tree.files],
                }
            )
        )
        return
    console.print(f"{artifact.stage} {artifact.key}\ndigest {artifact.digest}")
    for title, values in (
        ("facts", artifact.facts),
        ("config", artifact.action["config"]),
        ("inputs", {n: d[:12] for n, d in artifact.action["inputs"].items()}),
        ("made by", artifact.provenance),
    ):
        table = _table(title, "")
        for name, value in values.items():
            table.add_row(name, escape(value if isinstance(value, str) else json.dumps(value)))
        if values:
            console.print(table)
    if lineage:
        table = _table("comes from", "key", "digest")
        for stage, named in lineage.items():
            table.add_row(stage, named["key"][:12], named["digest"][:12])
        console.print(table)
    table = _table("file", "bytes", "sha256")
    for file in artifact.tree.files[:SHOWN_FILES]:
        table.add_row(escape(file.path), f"{file.size:,}", file.sha256[:12])
    console.print(table)
    if (more := len(artifact.tree.files) - SHOWN_FILES) > 0:
        console.print(f"and {more:,} files more (all with --json)")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show_gc(store: Store, delete: bool, days: float, console: Console, as_json: bool) -> None:
    """Collect garbage, or only say what would go."""
    report = collect(store, delete=delete, run_days=days)
    if as_json:
        console.print_json(json.dumps(asdict(report)))
        return
    table = _table("stage", "kept", "bytes", "goes", "bytes")
    for stage in sorted({*report.kept, *report.swept}):
        kept, swept = report.kept.get(stage), report.swept.get(stage)
        cells = [f"{t.count:,}" if t else "0" for t in (kept, swept)]
        sizes = [f"{t.size:,}" if t else "0" for t in (kept, swept)]
        table.add_row(stage, cells[0], sizes[0], cells[1], sizes[1])
    console.print(table)
    word = "deleted" if delete else "would go"
    for folder, tally in report.freed.items():
        if tally.count:
            console.print(f"{folder}: {tally.count:,} {word} ({tally.size:,} bytes)")
    for ref in report.dangling:
        console.print(f"[yellow]ref {escape(ref)} names nothing that this store holds[/]")
    if not delete:
        console.print("nothing was deleted: this was a dry run, add --delete")


def show_verify(store: Store, deep: bool, console: Console, as_json: bool) -> int:
    """Check the store; return the exit code: 0, or 1 when something cannot be read back."""
    report = verify(store, deep=deep)
    if as_json:
        console.print_json(json.dumps({**asdict(report), "problems": [p._asdict() for p in report.problems]}))
    else:
        how = "digests checked" if deep else "sizes checked; --deep reads every byte"
        console.print(
            f"{report.artifacts:,} artifacts, {report.blobs.count:,} blobs, {report.blobs.size:,} bytes ({how})"
        )
        for problem in report.problems:
            console.print(f"[red]✗[/] {escape(problem.artifact)} {escape(problem.path)}: {escape(problem.reason)}")
        if report.problems:
            console.print("what is damaged grows back when it is next read")
    return 1 if report.problems else 0
