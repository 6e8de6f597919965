"""`regrow inspect`, and what changing the decisions of pack costs: no token is made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.inspect import inspect
from packing.collate import IGNORED, PackedBins
from stages.errors import UserError
from tests.flows.test_plan import Host, make_host  # noqa: F401


def shown(host: Host, as_json: bool = False, **sections: Any) -> str:
    console = Console(width=80, force_terminal=False, highlight=False)
    with console.capture() as told:
        inspect(host.start(**sections), Path("recipe.yaml"), console, as_json)
    return told.get()


def test_changing_what_trains_retokenizes_nothing(make_host: Callable[..., Host]) -> None:  # noqa: F811
    host = make_host()
    first = host.run()
    for choice, labelled in (("all", "say a<|im_end|>"), (["user"], "say a<|im_end|>"), ("last", "a<|im_end|>")):
        again = host.run(pack={"train_on": choice})
        assert again.made <= {"pack"}, "more than pack was made again"
        for stage in ("fetch", "convert", "tokenize"):
            assert again.artifacts[stage].key == first.artifacts[stage].key
        tokens, plan = (again.store.view(again.artifacts[stage].tree) for stage in ("tokenize", "pack"))
        bins = PackedBins(tokens, plan)
        trained = sum(int((bins[number].labels != IGNORED).sum()) for number in range(len(bins)))
        assert trained == bins.trained.sum() == again.artifacts["pack"].facts["trained_tokens"]
        assert f"⟦{labelled}⟧" in shown(host, pack={"train_on": choice})


def test_inspect_shows_the_rows_of_the_report(make_host: Callable[..., Host]) -> None:  # noqa: F811
    host = make_host()
    with pytest.raises(UserError, match=r"not packed yet: regrow run recipe\.yaml \+pack"):
        shown(host)
    with pytest.raises(UserError, match=r"regrow run recipe\.yaml \+pack --set 'convert\.filter=a b'$"):
        inspect(host.start(), Path("recipe.yaml"), Console(), False, ["--set", "convert.filter=a b"])
    host.run()
    told = shown(host)
    assert "2 rows read · 2 packed" in told
    assert "<|im_start|>user\nsay b<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧" in told
    assert max(map(len, told.splitlines()[:-1])) <= 80
    page = Path(told.split("the whole report: ")[1].strip())
    assert page.read_text().startswith("<!doctype html>")
    report = json.loads(shown(host, as_json=True))
    assert [s["place"] for s in report["samples"]] != [] and report["rows"] == 2
