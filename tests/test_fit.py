from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch

from qscope_monitor.fit import check_fit, check_fvu

pytest.importorskip("transformers")

import models


@dataclass
class FakeSAE:
    d_model: int = models.HIDDEN
    layer: int | None = 1
    source: str | None = "Qwen/SAE-Res-test"
    backbone: str | None = None
    result: float = 0.3

    def fvu(self, x: torch.Tensor) -> float:
        assert x.ndim == 2
        assert not x.requires_grad
        self.seen = x
        return self.result


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_check_fit_accepts_a_matching_pair(name: str) -> None:
    try:
        model = models.ARCHITECTURES[name]()
    except ImportError as error:
        pytest.skip(f"this version of transformers has no {name}: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(model, {1: FakeSAE()})


def test_check_fit_says_what_was_found() -> None:
    model = models.qwen3()
    with pytest.raises(ValueError, match="d_model 2048, but the model's hidden size is 32"):
        check_fit(model, {1: FakeSAE(d_model=2048)})
    with pytest.raises(ValueError, match=r"layer 20 .*SAE-Res-test.*4 layers"):
        check_fit(model, {20: FakeSAE(layer=20)})
    with pytest.raises(ValueError, match="trained on layer 2, but is to be used at layer 1"):
        check_fit(model, {1: FakeSAE(layer=2)})


def test_backbone_name() -> None:
    model = models.qwen3()
    saes = {1: FakeSAE(backbone="Qwen/Qwen3-1.7B-Base")}
    model.config._name_or_path = "Qwen/Qwen3-8B-Base"
    with pytest.warns(UserWarning, match=r"trained on Qwen/Qwen3-1\.7B-Base.*'Qwen/Qwen3-8B-Base'"):
        check_fit(model, saes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base", "runs/my-qwen3-1.7b-sft/checkpoint-20"):
            model.config._name_or_path = name
            check_fit(model, saes)


def test_check_fvu() -> None:
    residuals = {1: torch.randn(2, 5, 32, requires_grad=True), 3: torch.randn(2, 5, 32)}
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[:, 0] = False
    good, bad = FakeSAE(), FakeSAE(layer=3, result=1.7)
    with pytest.warns(UserWarning, match=r"layer 3 .* leaves 1\.70 .*another model, layer or hook point"):
        assert check_fvu(residuals, {1: good, 2: FakeSAE(), 3: bad}, keep) == {1: 0.3, 3: 1.7}
    assert torch.equal(good.seen, residuals[1][keep])
    with pytest.warns(UserWarning, match="nan"):
        check_fvu(residuals, {1: FakeSAE(result=float("nan"))}, keep)
    assert check_fvu(residuals, {1: good}, torch.zeros_like(keep)) == {}
