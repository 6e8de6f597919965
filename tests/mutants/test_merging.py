"""What merge proves of the model that it writes, where a changed line went unnoticed by all other tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stages import merge
from stages.errors import UserError
from tests.stages.test_merge import adapted_logits, make_adapter, make_model, run


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) of logits [positions, vocabulary], by the plain formula."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in bfloat16 and an adapter of it."""
    folder = tmp_path_factory.mktemp("merging")
    model = make_model(folder / "model", dtype="bfloat16")
    return model, make_adapter(folder / "trained", model)


def test_the_figures_of_a_merge_compare_what_is_on_disk_with_the_adapter(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    model, trained = folders
    run(tmp_path / "output", model, trained)
    found = json.loads((tmp_path / "output/merge.json").read_text())["likeness"]
    probes = merge._probes(model)
    before, saved = (merge._logits(merge._load(each, "cpu"), probes) for each in (model, tmp_path / "output"))
    wanted = torch.cat([adapted_logits(model, trained, ids)[0] for ids in probes])
    assert found["positions"] == len(wanted) == sum(ids.shape[1] for ids in probes)
    assert found["kl"] == pytest.approx(kl(wanted, saved), rel=0.02) and found["kl"] > 0
    assert found["kl_of_training"] == pytest.approx(kl(wanted, before), rel=0.02)
    assert found["max_difference"] == pytest.approx(float((wanted - saved).abs().max()), rel=0.02)
    assert found["top1_agreement"] == pytest.approx(float((wanted.argmax(-1) == saved.argmax(-1)).float().mean()), 0.01)


def test_a_model_that_is_written_otherwise_than_it_was_merged_is_refused(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's library may not write what it reads, and nobody would know before production."""
    save = LlamaForCausalLM.save_pretrained

    def carelessly(self: Any, folder: Any, **given: Any) -> None:
        with torch.no_grad():
            self.model.layers[0].mlp.up_proj.weight *= 1.05
        save(self, folder, **given)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", carelessly)
    with pytest.raises(UserError, match="the saved model does not give the logits of the model that was saved"):
        run(tmp_path / "output", *folders)


def test_rounding_that_takes_too_much_of_the_training_is_refused_by_the_stage(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "NOISE", 0.0)
    monkeypatch.setattr(merge, "DAMAGE", 1e-7)
    with pytest.raises(UserError, match=r"rounding the merged weights to bfloat16, .* takes too much of the training"):
        run(tmp_path / "output", *folders)


def test_a_tensor_that_the_model_before_training_lacks_has_changed(tmp_path: Path) -> None:
    """A head that was tied and is not any more, say: the warning that nothing was trained would be wrong."""
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    network = AutoModelForCausalLM.from_pretrained(model)
    network.config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.clone())
    network.save_pretrained(tmp_path / "untied")
    changed, count = merge._changed(model, tmp_path / "untied")
    assert (changed, count) == (1, merge._changed(model, model)[1] + 1)


def test_divergence_is_that_of_the_saved_model_from_the_trained_one() -> None:
    """Not the other way round: what the trained model says must still be said."""
    before, wanted, found = (torch.tensor([[0.0, 3.0 * n, 0.0]]) for n in range(3))
    likeness = merge.compare(before, wanted, found)
    assert likeness.kl == pytest.approx(kl(wanted, found), rel=1e-2) != pytest.approx(kl(found, wanted), rel=1e-1)
    assert likeness.kl_of_training == pytest.approx(kl(wanted, before), rel=1e-2)


def test_a_model_that_came_in_pieces_leaves_no_index_of_them(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    """Who reads by the index would look for files that are not there."""
    model, trained = folders
    pieces = Path(shutil.copytree(model, tmp_path / "pieces"))
    (pieces / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(pieces, max_shard_size="20KB")
    assert len(list(pieces.glob("*.safetensors"))) > 1 and (pieces / "model.safetensors.index.json").exists()
    run(tmp_path / "output", pieces, trained)
    assert {path.name for path in (tmp_path / "output").glob("*.safetensors*")} == {"model.safetensors"}
