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


def names(folder: Path) -> list[str]:
    found = files.resolve([str(folder)], {}, None, "fetch.data.x.files")
    return [Path(str(one.where["path"])).name for one in found]


def test_what_map_left_beside_the_rows_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path / "set", 6)
    before = names(tmp_path / "set")
    datasets.load_from_disk(str(tmp_path / "set")).map(lambda row: {"text": row["text"].upper()})
    assert [*(tmp_path / "set").glob("cache-*.arrow")], "the library writes no caches there any more"
    assert names(tmp_path / "set") == before == ["data-00000-of-00001.arrow"]


def test_a_folder_of_several_splits_is_refused_with_the_folder_to_name(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": saved(tmp_path / "a", 6), "test": saved(tmp_path / "b", 3)})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"holds the splits train, test.*name the folder of one, e\.g\. .*both/train"):
        names(tmp_path / "both")
    assert names(tmp_path / "both" / "train") == ["data-00000-of-00001.arrow"]


def test_files_of_these_names_that_say_nothing_of_the_kind_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "set", 2)
    (tmp_path / "set" / "state.json").write_text("[]")
    (tmp_path / "set" / "dataset_dict.json").write_text("{")
    assert names(tmp_path / "set") == ["data-00000-of-00001.arrow"]
