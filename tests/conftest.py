"""Shared fixtures. Nothing here reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from qscope_monitor import Alert, ReadOut, WatchList, bundled
from qscope_monitor.alerts import ReadOutChange, TokenContext


@pytest.fixture(scope="session")
def tokenizer():
    return bundled.tokenizer()


@pytest.fixture
def model():
    """The bundled model, fresh for each test."""
    return bundled.model()


@pytest.fixture
def watch():
    """Four read-outs on two layers of a residual stream of width 192: three judge Chinese, one acts."""
    generator = torch.Generator().manual_seed(0)

    def read_out(layer: int, feature: int | None, role: str = "judge") -> ReadOut:
        weight = torch.randn(192, generator=generator) / 192**0.5
        return ReadOut(
            layer=layer,
            feature=feature,
            weight=weight,
            bias=0.1,
            threshold=2.0,
            scale=1.5,
            direction=weight * 2,
            behaviour="code-switching",
            language="zh",
            role=role,
            label="fires in zh",
            promotes=("的", "文件"),
            evidence={"token_auroc": 0.9},
        )

    return WatchList([read_out(3, 7), read_out(1, 5), read_out(3, None), read_out(1, 9, "act")], {"model": "m"})


@pytest.fixture
def alert() -> Alert:
    """A behaviour alert with everything in it."""
    return Alert(
        kind="behaviour",
        severity="ALERT",
        step=3,
        stream="rollout",
        behaviour="code-switching-zh",
        message="code-switching-zh: read-outs are abnormally active in rollouts",
        rate=0.5,
        baseline_rate=0.05,
        counts=(32, 64, 13, 256),
        p_value=1e-9,
        level=0.001,
        smallest_effect=0.2,
        text_rate=0.4,
        text_baseline_rate=0.01,
        read_outs=(ReadOutChange(5, 7, "fires in zh", ("的", "|"), 0.1, 0.01),),
        contexts=(TokenContext(("Click ", "保", "存", " now"), (0.0, 1.0, 2.0, 0.0), 2.0, "How do I save?"),),
    )
