"""The work of pack: the plan of all rows, and the data report.

Apart from `stages.pack`, so that `regrow plan` loads neither Arrow nor NumPy.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from packing.plan import Plan
from stages import accounts, data_report, plan_files, selection
from stages.contamination import find_contamination
from stages.equal_sides import equal_sides
from stages.marks import ROLES
from stages.near_duplicates import near_duplicates, read_verdicts
from stages.pack import PackConfig
from stages.plan_files import Documents
from stages.samples import samples
from stages.selection import CONTAMINATED, EQUAL_SIDES, KEPT, LIMITED, NEAR_DUPLICATE, REASONS, UNSAMPLED, Taken
from stages.stage import Facts, UserError, Work
from stages.steps import judged
from stages.tables import Numbers, read_table
from stages.tokenized import Files, Flags, Rows, Shard, by_shard, find_shards, read_rows
from stages.tokenizer_files import backend


def plan(config: PackConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Plan all rows. Raises UserError when there is nothing to train on, or at an overlong row if it is an error."""
    files = _files(config, inputs, work)
    shards = find_shards(files.spans)
    wrapped = config.documents == "wrapped"
    limit = None if wrapped else config.sequence_length
    rows = read_rows(files.spans, shards, config.train_on, limit, work.tell)
    if len(rows) == 0:
        raise UserError(_no_rows(shards))
    live = np.array([config.of(shard.source).weight > 0 or shard.split == "heldout" for shard in shards])
    if wrapped:
        _refuse_all_but_raw_text(rows, shards, live)
    if config.overlong == "error":
        _refuse_overlong(rows, shards, live, config.sequence_length)
    if config.max_documents and config.max_documents < rows.sequences:
        raise UserError(f"pack.max_documents is {config.max_documents}: a row here is {rows.sequences} documents")
    taken = _take(config, files, rows, shards)
    chosen = np.repeat(np.arange(len(rows)), taken.copies)
    if len(chosen) == 0:
        raise UserError(_nothing_left(taken, config))
    labels = _labels(files, shards, rows, chosen)
    if len(labels) == 1:
        raise UserError(_all_alike(shards[0].kind, next(iter(labels)), len(np.unique(chosen))))

    settings = config.model_dump(include={"sequence_length", "global_batch", "max_documents", "seed"})
    tokens_of_shard = np.bincount(
        rows.shard[chosen], weights=rows.used[chosen].sum(axis=1), minlength=len(shards)
    ).astype(np.int64)
    window = selection.windows(shards, tokens_of_shard, config.window, config.seed)
    settings |= {"shards": len(shards), "wrapped": wrapped}
    documents, plan = plan_files.write(output, "", rows, chosen, windows=window[rows.shard[chosen]], **settings)
    holding = np.flatnonzero(taken.heldout & taken.kept)
    aside, heldout_plan = plan_files.write(output, "heldout_", rows, holding, **settings)
    plan_files.write_heldout_tokens(output, files, shards, rows, aside)
    trained = np.bincount(documents.row, documents.trained, len(rows)).astype(np.int64)
    read = [int(number) if tokens else None for number, tokens in zip(window, tokens_of_shard, strict=True)]
    description = _describe(config, shards, rows, documents, plan, aside, heldout_plan, read)
    (output / "plan.json").write_text(json.dumps(description, indent=1) + "\n")
    tokenizer = backend(inputs["tokenizer"], work.runtime.cache / "tokenizers")
    report = data_report.compile_report(
        description,
        accounts.sources(shards, rows, taken, trained),
        rows.length.sum(axis=1),
        samples(files, tokenizer, shards, rows, taken, config.seed),
        too_short=taken.too_short,
    )
    data_report.write(report, output)
    return {
        **{name: report[name] for name in ("rows", "documents", "tokens", "trained_tokens", "bins", "steps")},
        "fill": round(description["fill"], 4),
        "dropped": report["dropped"],
        "truncated": description["truncated"],
        "heldout_rows": len(holding),
        **({"warnings": report["warnings"]} if report["warnings"] else {}),
        **({"labels": labels} if labels else {}),
    }


def _files(config: PackConfig, inputs: Mapping[str, Path], work: Work) -> Files:
    """The shards' files. Without windows all tokens fit on the disk, and what was read once stays for training."""
    kept: set[str] = set()

    def show(now: Collection[str], then: Collection[str]) -> None:
        kept.update(() if config.window else now)
        work.show("tokens", {*kept, *now}, then)

    return Files(inputs["spans"], inputs["tokens"], show, config.window)


def _take(config: PackConfig, files: Files, rows: Rows, shards: Sequence[Shard]) -> Taken:
    own = [config.of(shard.source) for shard in shards]
    weights, limits = [s.weight for s in own], [s.limit for s in own]
    heldout = selection.held_out(rows, shards, [config.heldout_share(shard.source) for shard in shards])
    turns = selection.precedence(weights, limits)[rows.shard]
    reasons = selection.drop_reasons(
        rows,
        heldout,
        None if config.documents == "wrapped" or config.overlong == "truncate" else config.sequence_length,
        turns if config.deduplicate else None,
        must_train=shards[0].kind != "prompt",
    )
    reasons[equal_sides(files, shards, rows, reasons == KEPT)] = EQUAL_SIDES
    like: dict[int, tuple[int, float]] = {}
    if config.near_duplicates is not None:
        kept = reasons == KEPT
        others = np.flatnonzero(kept & ~heldout)
        # Held-out rows that are dropped come after those that measure, of which they take none away.
        first = [np.flatnonzero(kept & heldout), np.flatnonzero(~kept & heldout)]
        order = np.concatenate([*first, others[np.argsort(turns[others], kind="stable")]])
        # What is held out must not be asked at all, whatever its label.
        verdicts = np.where(heldout, 0, read_verdicts(files, shards, rows))
        found = near_duplicates(files, shards, rows, order, config.near_duplicates, verdicts)
        like = {row: other for row, other in found.items() if kept[row]}
        reasons[list(like)] = NEAR_DUPLICATE
    too_short = 0
    kept = reasons == KEPT
    if config.decontaminate and heldout.any():
        # Of all that is held out: evaluate's tasks also ask what is too long for a sequence, or has no answer.
        held = find_contamination(files, shards, rows, heldout, kept & ~heldout, config.decontaminate)
        like, too_short = {**like, **held.rows}, int(kept[held.too_short].sum())
        reasons[list(held.rows)] = CONTAMINATED
    training = (reasons == KEPT) & ~heldout
    sources = [shard.source for shard in shards]
    reasons[selection.beyond_limit(rows, training, sources, limits, config.seed)] = LIMITED
    training &= reasons == KEPT
    copies = np.where(training, selection.copies(rows, weights, config.seed), 0)
    reasons[training & (copies == 0)] = UNSAMPLED
    return Taken(heldout, reasons, copies, like, too_short)


def _labels(files: Files, shards: Sequence[Shard], rows: Rows, chosen: Numbers) -> dict[str, int]:
    """How often each label trains, where answers or their steps have labels."""
    found: Counter[str] = Counter()
    labelled = shards[0].kind in ("unpaired_preference", "stepwise")
    shards = shards if labelled else ()
    places = by_shard(rows.shard[chosen], len(shards))
    for shard, some in zip(files.in_turn(shards), places, strict=True):
        table = read_table(files.tokens / shard.path / "tokens.arrow")
        own = chosen[some]
        cut = (rows.used[own] < rows.length[own]).any(axis=1) & (shard.kind == "stepwise")
        for each in pc.value_counts(table["extra"].take(rows.place[own[~cut]])).to_pylist():
            extra = json.loads(each["values"])
            for label in extra.get("labels", [extra.get("label")]):
                found[json.dumps(label)] += each["counts"]
        for row in own[cut].tolist():  # of which some steps may be gone
            spans = [[s["end"], s["turn"], s["kind"]] for s in table["spans"][int(rows.place[row])].as_py()]
            extra = json.loads(table["extra"][int(rows.place[row])].as_py()) | {"spans": spans}
            found.update(json.dumps(label) for _, label in judged(extra, int(rows.used[row, 0])))
    return dict(sorted(found.items()))


def _all_alike(kind: str, label: str, rows: int) -> str:
    """Why labels of which all say the same are refused, and how to mend it."""
    other = "false" if label == "true" else "true"
    told = f"{rows} rows that train are labelled {label}: there is nothing to tell apart. Add some labelled {other}"
    return f"all steps of the {told}" if kind == "stepwise" else f"all {told}, or train on these with objective: sft"


def _no_rows(shards: Sequence[Shard]) -> str:
    dropped, first = Counter[str](), dict[str, str]()
    for shard in shards:
        dropped.update(shard.counts["dropped"])
        first = {reason: places[0] for reason, places in shard.places.items()} | first
    if not dropped:
        return "there are no rows to pack: every source is empty"
    told = [
        f"{count:,} {reason}" + (f" (the first: {first[reason]})" if reason in first else "")
        for reason, count in dropped.most_common()
    ]
    return f"there are no rows to pack: of {dropped.total():,}, convert dropped {', '.join(told)}"


def _refuse_all_but_raw_text(rows: Rows, shards: Sequence[Shard], live: Flags) -> None:
    """A cut anywhere leaves raw text what it is; of a chat, an answer would lose its question. `live` [shards] says
    whose sources are not switched off."""
    for number in np.flatnonzero(live).tolist():
        shard = shards[number]
        talks = [role for role, said in zip(ROLES, rows.said[number], strict=True) if said and role not in ("", "text")]
        if shard.kind != "conversation":
            held = f"rows of kind {shard.kind}"
        elif talks:
            held = f"chats (turns of {' and '.join(talks)})"
        elif rows.masked[number]:
            held = f"text that does not train ({rows.masked[number]:,} tokens)"
        else:
            continue
        raise UserError(
            f"pack.documents: wrapped is for raw text, all of which trains, and {shard.source} holds {held} "
            f"({shard.path}). Set it to isolated, take the source out, or read it with convert.sources."
            f"{shard.source}: {{format: completion, fields: {{text: COLUMN}}}}"
        )


def _refuse_overlong(rows: Rows, shards: Sequence[Shard], live: Flags, limit: int) -> None:
    lengths = np.where(live[rows.shard], rows.length.sum(axis=1), 0)
    overlong = np.flatnonzero(lengths > limit)
    if len(overlong) == 0:
        return
    first = overlong[0]
    raise UserError(
        f"{shards[rows.shard[first]].place(rows.number[first])}: {lengths[first]} tokens do not fit into "
        f"pack.sequence_length {limit} ({len(overlong)} such rows, the longest with {lengths.max()}). Raise it, or set "
        "pack.overlong to drop or truncate"
    )


def _nothing_left(taken: Taken, config: PackConfig) -> str:
    """Why no row trains, and how to mend it."""
    counts = {reason: int((taken.reasons == code).sum()) for code, reason in enumerate(REASONS, 1)}
    told = [f"{count} {reason}" for reason, count in counts.items() if count]
    if kept_aside := int((taken.kept & taken.heldout).sum()):
        told.append(f"{kept_aside} held out")
    cut = f", or raise pack.sequence_length ({config.sequence_length}), at which answers are cut off"
    mends = {
        "overlong": f"raise pack.sequence_length ({config.sequence_length}) or set pack.overlong: truncate",
        "nothing to train on": f"look at pack.train_on ({_roles(config.train_on)}) and at the rows' own train flags"
        + (cut if config.overlong == "truncate" else ""),
        "identical sides": "raise pack.sequence_length, or look at what the chat template leaves of the answers",
        "in held-out": "give other rows to the sources with split: heldout",
        "not sampled": "raise the weights in pack.sources",
        "contaminated": "give the held-out rows questions of their own, or set pack.decontaminate: 0",
    }
    most = max(counts, key=lambda reason: counts[reason])
    mend = mends.get(most, "") if counts[most] else ""
    mend = mend or "give a source without split: heldout, or lower pack.heldout_fraction"
    return f"no row is left to train on: of {len(taken.reasons)}, {', '.join(told)}. To mend it, {mend}"


def _roles(train_on: str | Sequence[str]) -> str:
    return train_on if isinstance(train_on, str) else ", ".join(train_on)


def _describe(
    config: PackConfig,
    shards: Sequence[Shard],
    rows: Rows,
    documents: Documents,
    plan: Plan,
    aside: Documents,
    heldout_plan: Plan,
    windows: Sequence[int | None],
) -> dict[str, Any]:
    """What stands in `plan.json`."""
    tokens = int(documents.length.sum())
    cut = (rows.length != rows.used).any(axis=1)
    return {
        "kind": shards[0].kind,
        **({"wrapped": True} if config.documents == "wrapped" else {}),
        "sequence_length": config.sequence_length,
        "global_batch": config.global_batch,
        "seed": config.seed,
        "shards": [
            {
                "path": shard.path,
                "source": shard.source,
                "split": shard.split,
                "window": window,
                "first": int(shard.counts.get("first", 0)),  # rows of the file before it
                "highest_token": shard.counts["highest_token"],
            }
            for shard, window in zip(shards, windows, strict=True)
        ],
        "windows": plan.windows.tolist(),
        "bins": len(plan),
        "steps": -(-len(plan) // config.global_batch),
        "max_documents": max(_most_documents(plan), _most_documents(heldout_plan)),
        "documents": documents.count,
        "tokens": tokens,
        "trained_tokens": int(documents.trained.sum()),
        "truncated": int(cut[np.unique(documents.row)].sum() + cut[np.unique(aside.row)].sum()),
        "fill": tokens / (len(plan) * config.sequence_length),
        "heldout_documents": aside.count,
        "heldout_tokens": int(aside.length.sum()),
        "heldout_trained_tokens": int(aside.trained.sum()),
    }


def _most_documents(plan: Plan) -> int:
    return int(np.diff(plan.offsets).max()) if len(plan) else 0
