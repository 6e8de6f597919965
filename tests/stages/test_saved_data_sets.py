"""A folder that `datasets.save_to_disk` wrote: the rows that were saved, and neither another split nor what the library
left beside them."""

from pathlib import Path

import datasets
import pytest

from stages.errors import UserError
from stages.sources import files


def saved(folder: Path, rows: int) -> datasets.Dataset:
    made = datasets.Dataset.from_list([{"text": f"document {number}"} for number in range(rows)])
    made.save_to_disk(str(folder))
    return made


def names(folder: Path, scheme: str = "") -> list[str]:
    found = files.resolve([f"{scheme}{folder}"], {}, None, "fetch.data.x.files", folder.with_name("cache"))
    return [Path(str(one.where["path" if "path" in one.where else "url"])).name for one in found]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_map_left_beside_the_rows_is_not_read(tmp_path: Path, scheme: str) -> None:
    saved(tmp_path / "set", 6)
    before = names(tmp_path / "set", scheme)
    made = datasets.load_from_disk(str(tmp_path / "set"))
    for processes in (None, 2):
        made.map(lambda row, more=processes: {"text": f"{row}{more}"}, num_proc=processes)
    assert len([*(tmp_path / "set").glob("cache-*.arrow")]) == 3, "the library writes other caches now"
    assert names(tmp_path / "set", scheme) == before == ["data-00000-of-00001.arrow"]


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    ("held", "mend"),
    [
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000.parquet"],
            "train*",
        ),
        (["train.jsonl", "val.jsonl", "README.md"], "train*"),
        (["train/a.csv", "validation/a.csv"], "train"),
        (["train-1.jsonl", "train-2.jsonl", "trainers.jsonl", "testimony.jsonl", "test.md"], ""),
        (["en/train.jsonl", "de/train.jsonl"], ""),
        (["test/a.jsonl"], ""),
    ],
)
def test_files_named_after_splits_do_not_all_train(tmp_path: Path, held: list[str], mend: str, scheme: str) -> None:
    for name in held:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text("x")
    if not mend:
        assert names(tmp_path / "set", scheme)
        return
    with pytest.raises(UserError, match=r"named after splits: name those of one, e\.g\. (.*)$") as told:
        names(tmp_path / "set", scheme)
    suggested = str(told.value).rpartition("e.g. ")[2]
    assert suggested.endswith(f"/{mend}") and names(Path(suggested), scheme)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_several_splits_is_refused_with_the_folder_to_name(tmp_path: Path, scheme: str) -> None:
    both = datasets.DatasetDict({"train": saved(tmp_path / "a", 6), "test": saved(tmp_path / "b", 3)})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"holds the splits test, train.*name the folder of one, e\.g\. .*both/train"):
        names(tmp_path / "both", scheme)
    assert names(tmp_path / "both" / "train", scheme) == ["data-00000-of-00001.arrow"]
    del both["test"]
    both.save_to_disk(str(tmp_path / "one"))
    assert names(tmp_path / "one", scheme) == ["data-00000-of-00001.arrow"]
