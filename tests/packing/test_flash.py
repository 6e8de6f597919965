"""flash-attn's kernels: which one is taken, and that what is called is what the packages offer.

They need a GPU and a compiler, so their signatures are recorded in `kernels/`, with the same arithmetic in PyTorch.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from packing import flash
from packing.attention import attend, implementation
from tests.packing.test_attention import boundaries, expected, qkv


def forget() -> None:
    """Whatever was imported by the packages' names."""
    flash._function.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "kernels"))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("version", [2, 3, 4])
def test_what_is_called_is_what_the_package_offers_and_each_document_is_by_itself(
    version: int, window: int | None
) -> None:
    q, k, v = qkv()
    parts = [each[0].transpose(0, 1) for each in (q, k, v)]
    out = flash.varlen(version, *parts, boundaries(), 64, 0.2, window, None)[None]  # type: ignore[misc]
    wanted = expected(q, k, v, window)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    sought = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    for one, two in zip((out, *found), (wanted, *sought), strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("version", [2, 3, 4])
def test_capped_scores_are_those_of_our_own_steps(version: int) -> None:
    q, k, v = qkv()
    parts = [each[0].transpose(0, 1) for each in (q, k, v)]
    out = flash.varlen(version, *parts, boundaries(), 64, 0.2, 4, 0.5)[None]  # type: ignore[misc]
    ours, _ = attend(
        nn.Identity(), q, k, v, None, scaling=0.2, sliding_window=4, softcap=0.5, cu_seq_lens_q=boundaries()
    )
    torch.testing.assert_close(out, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("packages")
def test_the_newest_that_runs_on_the_gpu_is_taken() -> None:
    assert [flash.installed(each) for each in ((9, 0), (8, 0), (10, 0), (7, 5), None)] == [4, 2, 4, None, None]


def test_the_folder_that_version_4_shares_with_version_2_is_not_taken_for_version_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [flash.installed(each) for each in ((9, 0), (8, 0))] == [4, None]


@pytest.mark.usefixtures("packages")
def test_version_4_is_an_operation_that_torchs_own_checks_pass() -> None:
    q, k, v = (each[0].transpose(0, 1) for each in qkv())
    how = (q, k, v, boundaries(), 64, 0.2, None, 0.0)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(flash.flash_attn_4, how, test_utils=checks)


def test_without_the_package_torchs_kernel_serves_and_flash_is_refused() -> None:
    assert flash.installed((9, 0)) is None
    assert implementation("cpu") == implementation("cpu", kernel="torch") == "regrow"
    with pytest.raises(ValueError, match="flash: it needs a GPU"):
        implementation("cpu", kernel="flash")


def test_a_gpu_without_the_package_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ValueError, match=r"pip install 'regrow\[flash4\]'"):
        implementation("cuda", kernel="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_installed_kernel_agrees(softcap: float | None) -> None:
    version = flash.installed(torch.cuda.get_device_capability())
    if version is None:
        pytest.skip("no flash-attn is installed")
    q, k, v = qkv(8, 2, 64, device="cuda", dtype=torch.bfloat16)
    places = boundaries("cuda")
    out, _ = attend(
        nn.Identity(),
        q,
        k,
        v,
        None,
        scaling=0.2,
        softcap=softcap,
        cu_seq_lens_q=places,
        max_length_q=64,
        flash_attn=version,
    )
    wide = [each.detach().float() for each in (q, k, v)]
    wanted, _ = attend(nn.Identity(), *wide, None, scaling=0.2, softcap=softcap, cu_seq_lens_q=places)
    assert (out.float() - wanted).norm() < 1e-2 * wanted.norm()
