"""The data report: every row accounted for, warnings a person needs, and samples that show just what trains."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from flows.inspect import show_samples
from flows.pages import report_page
from packing.collate import IGNORED
from stages.errors import UserError
from stages.marks import ORIGIN_CONTENT, TRAIN_UNSET
from stages.samples import PIECE, PIECES, SAMPLES
from stages.tables import read_table
from tests.stages.chats import run_convert, smollm2, source
from tests.stages.packed import TOKENIZER, Packed, row, shard, spans

Turns = list[tuple[str, int]]


def many(tokens: Path, source: str, count: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 40, count)
    shard(tokens, f"{source}/00000", [row(("user", 2), ("assistant", int(size))) for size in sizes])


class Marks(HTMLParser):
    """The texts in and between the marks of each sample, and whether all tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.samples: list[list[tuple[str, bool]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)
        if tag == "pre":
            self.samples.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line") or self.open[-1] == tag:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.samples[-1].append((data, "mark" in self.open))


def test_the_report_can_be_read_by_people(tmp_path: Path) -> None:
    many(tmp_path / "tokens", "chat", 100)
    shard(tmp_path / "tokens", "a|b/00000", [row(("user", 3), ("assistant", 90))], dropped={"<empty>": 3})
    packed = Packed(tmp_path / "tokens", tmp_path / "out")
    lengths = packed.report["lengths"]
    assert sum(lengths["counts"]) == 101
    assert lengths["edges"][0] <= lengths["min"] <= lengths["median"] <= lengths["p95"] <= lengths["max"] == 99
    markdown = (packed.output / "report.md").read_text()
    assert "| chat | 100 | 100 | 0 | 0 | 0 |" in markdown
    assert "| a\\|b | 4 | 0 | 0 | 4 | 0 | 0 | – |" in markdown
    assert "overlong: a|b/00000, row 101\n" in markdown
    page = (packed.output / "report.html").read_text()
    assert "&lt;empty&gt;" in page
    assert "<script" not in page and "http" not in page, "the page is self-contained"
    assert Marks(page).open == ["html"] or not Marks(page).open
    tokens, rows = (ET.fromstring(part[: part.index("</svg>") + 6]) for part in page.split("<figure>")[1:])
    assert sum(int(bar[0].text.split(": ")[1].split()[0]) for bar in rows.iter("rect")) == 101  # type: ignore[union-attr]
    assert any("sequence length 64" in (text.text or "") for text in rows.iter("text"))
    assert [text.text for text in tokens.iter("text")] == ["chat", f"{packed.facts['tokens']:,}"]


def test_samples_show_just_what_trains(tmp_path: Path) -> None:
    many(tmp_path / "tokens", "a", 30)
    many(tmp_path / "tokens", "b", 2)
    packed = Packed(tmp_path / "tokens", tmp_path / "out")
    samples = packed.report["samples"]
    assert [sample["source"] for sample in samples] == ["a", "b", "a", "b", "a"] and len(samples) == SAMPLES
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    documents = read_table(packed.output / "documents.arrow")
    read = {}
    for each in (packed.bins[number] for number in range(len(packed.bins))):
        parts = (np.split(values, np.cumsum(each.lengths)[:-1]) for values in (each.ids, each.labels != IGNORED))
        for document, ids, trained in zip(each.documents, *parts, strict=True):
            (at,) = documents.slice(document, 1).to_pylist()
            read[f"{packed.plan['shards'][at['shard']]['path']}, row {101 + at['row']}"] = (ids, trained)
    for sample in samples:
        ids, trained = read[sample["place"]]
        (pieces,) = sample["sequences"]
        assert "".join(text for text, _ in pieces) == tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        first = int(trained.argmax())
        told = tokenizer.decode(ids.tolist(), skip_special_tokens=False)[
            len(tokenizer.decode(ids[:first].tolist(), skip_special_tokens=False)) :
        ]
        assert [text for text, trains in pieces if trains] == [told]
    page = Marks((packed.output / "report.html").read_text())
    assert page.samples == [[(t, trains) for t, trains in s["sequences"][0]] for s in samples]
    shown = report_page(packed.report)
    assert all(f"⟦{text}⟧" in shown for s in samples for text, trains in s["sequences"][0] if trains)
    assert shown.count("data:image/svg+xml") == 2
    alike = {**packed.report, "lengths": {**packed.report["lengths"], "edges": [33, 34], "counts": [101]}}
    assert report_page(alike).count("data:image/svg+xml") == 1, "rows of one length are told, not drawn"


def test_hundreds_of_sources_fit_a_page_of_the_dashboard(tmp_path: Path) -> None:
    many(tmp_path / "tokens", "a", 30)
    report = Packed(tmp_path / "tokens", tmp_path / "out").report
    [source] = report["sources"]
    sources = [{**source, "name": f"source-{i:03}", "tokens": 1000 + i} for i in range(300)]
    page = report_page({**report, "sources": sources})
    assert len(page.encode()) < 100_000
    assert "Tokens of the 40 largest sources" in page and "| source-000 |" in page


def test_long_samples_are_shortened(tmp_path: Path) -> None:
    shard(
        tmp_path / "tokens",
        "chat/00000",
        [row(*[("user", 1), ("assistant", 1)] * 40), row(("user", 900), ("assistant", 2))],
    )
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=2048)
    lengths = {s["place"]: [len(text) for text, _ in s["sequences"][0]] for s in packed.report["samples"]}
    assert len(lengths["chat/00000, row 101"]) == PIECES + 1
    assert max(lengths["chat/00000, row 102"]) < PIECE + 40
    assert len((packed.output / "report.json").read_text()) < 12_000


def test_the_terminal_shows_what_trains_in_colour_or_between_brackets() -> None:
    samples = [{"place": "chat/00000, row 1", "sequences": [[["Say [hi]\n", False], ["hi", True]]]}]
    plain = Console(width=80, force_terminal=False)
    with plain.capture() as told:
        show_samples(samples, plain)
    assert "Say [hi]\n⟦hi⟧\n" in told.get()
    colour = Console(width=80, force_terminal=True, color_system="standard", no_color=False)
    with colour.capture() as told:
        show_samples(samples, colour)
    assert "\x1b[2mSay [hi]\x1b[0m\n\x1b[1;32mhi\x1b[0m" in told.get()
    assert "⟦" not in told.get()


def warnings(folder: Path, *rows: Turns, counts: dict[str, Any] | None = None) -> list[str]:
    """What is said of a source with those rows."""
    shard(folder / "tokens", "chat/00000", [row(*each) for each in rows])
    path = folder / "tokens" / "chat/00000" / "counts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (counts or {})))
    told: list[str] = Packed(folder / "tokens", folder / "out", sequence_length=512).report["warnings"]
    return told


GOOD = [[("user", 5), ("assistant", 9)]] * 3


def test_good_data_gives_no_warning(tmp_path: Path) -> None:
    assert warnings(tmp_path, *GOOD, [("system", 9), ("user", 5), ("assistant", 2)]) == []


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([[("assistant", 3), ("user", 5), ("assistant", 2)]], "in 1 of 4 conversations the assistant speaks first"),
        ([[("user", 3), ("assistant", 3), ("user", 2)]], "1 of 4 conversations end with a user's words"),
        ([[("user", 3), ("assistant", 0)]], "1 of the assistant's turns are empty"),
        ([[("text", 0)]] * 2, "2 of the assistant's turns are empty"),
        ([[("user", 400), ("assistant", 1)]] * 3, "users say 40 times as much as the assistant"),
        ([[("user", 3), ("assistant", 600)]] * 9, "9 of 12 rows are dropped, most of them as overlong"),
    ],
)
def test_what_looks_wrong_is_said(tmp_path: Path, rows: list[Turns], told: str) -> None:
    (found,) = warnings(tmp_path, *GOOD, *rows)
    assert found.startswith(f"chat: {told}")


def test_an_end_that_never_trains_is_said(tmp_path: Path) -> None:
    endless = [
        {**row(("user", 1)), "spans": spans((0, 9, ORIGIN_CONTENT, 0, "text", TRAIN_UNSET)), "ids": list(range(9))}
    ]
    shard(tmp_path / "tokens", "books/00000", endless)
    shard(tmp_path / "tokens", "chat/00000", [row(*GOOD[0])])
    packed = Packed(tmp_path / "tokens", tmp_path / "out")
    assert packed.report["warnings"] == [
        "books: no token that ends a turn trains, so the model would not learn to stop"
    ]


def test_ends_that_were_all_cut_off_do_not_train(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(("user", 5), ("assistant", 600))] * 3)
    packed = Packed(tmp_path / "tokens", tmp_path / "out", overlong="truncate", sequence_length=64)
    assert packed.report["sources"][0]["endings"] == 0
    assert any("no token that ends a turn trains" in told for told in packed.report["warnings"])


def test_what_the_template_leaves_out_is_said(tmp_path: Path) -> None:
    counts = {"unwritten": {"reasoning of assistant": 1200, "tools": 3}}
    assert warnings(tmp_path, *GOOD, counts=counts) == [
        "chat: the chat template leaves out reasoning of assistant (1,200 times)",
        "chat: the chat template leaves out tools (3 times)",
    ]


def test_special_tokens_that_stay_text_are_said(tmp_path: Path) -> None:
    assert warnings(tmp_path, *GOOD, counts={"control_as_text": 2}) == [
        "chat: 2 of 3 conversations hold the text of a special token, which is encoded as text: where it is the "
        "model's own markup, set convert.trust_special_tokens"
    ]


def test_answers_that_end_in_no_token_are_said(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|stop|>\n{% endfor %}"
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    converted, _ = run_convert(tmp_path, source(tmp_path / "rows", [talk]), smollm2(), {"template": template})
    counts = json.loads((converted / "counts.json").read_text())
    (told,) = warnings(tmp_path, *GOOD, counts={"end_in_words": counts["end_in_words"]})
    assert told.startswith("chat: the chat template ends answers with '<|stop|>', for which the tokenizer has no token")


def test_names_that_no_row_of_a_source_has_are_said(tmp_path: Path) -> None:
    for number, absent in enumerate((["note", "sys"], ["sys"])):
        shard(tmp_path / "tokens", f"chat/0000{number}", [row(("user", 5), ("assistant", 9 + number))], absent=absent)
    assert Packed(tmp_path / "tokens", tmp_path / "out").report["warnings"] == [
        "chat: no row has `sys`, which convert names: is it called otherwise?"
    ]


def test_turns_that_nothing_ends_are_said(tmp_path: Path) -> None:
    assert warnings(tmp_path, *GOOD, counts={"turns_without_end": 2}) == [
        "chat: nothing ends 2 of the turns to learn, so the model would not learn to stop there"
    ]


def test_questions_too_short_to_look_for_are_said(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(*each) for each in GOOD])
    shard(tmp_path / "tokens", "probe/00000", [row(("user", 3), ("assistant", 4))], split="heldout")
    (told,) = Packed(tmp_path / "tokens", tmp_path / "out").report["warnings"]
    assert told.startswith("1 held-out rows have a question that is too short, or whose words")


def test_turned_roles_are_said(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(*GOOD[0])])
    shard(tmp_path / "tokens", "turned/00000", [row(("user", 3), ("user", 4)) for _ in range(2)])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", train_on="all")
    assert packed.report["warnings"][0] == "turned: the assistant says nothing in it, only user: look at convert.roles"


def test_steps_are_no_missing_words_of_an_assistant(tmp_path: Path) -> None:
    rows = [{**row(("user", 90), ("text", 2)), "extra": f'{{"labels": [{label}]}}'} for label in ("true", "false")]
    shard(tmp_path / "tokens", "steps/00000", rows, kind="stepwise")
    assert Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256).report["warnings"] == []


def test_questions_that_fill_a_sequence_are_told_from_flags_and_roles_are_listed(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(("user", 90), ("assistant", 5))])
    told = r"pack\.train_on \(assistant, tool\).* flags, or raise pack\.sequence_length \(64\), at which answers are"
    with pytest.raises(UserError, match=told):
        Packed(tmp_path / "tokens", tmp_path / "out", overlong="truncate", train_on=["assistant", "tool"])
