import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["kernels.topk_encode", "sae.topk_sae"])
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"qscope_monitor.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
