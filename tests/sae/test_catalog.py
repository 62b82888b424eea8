import re

import pytest

from qscope_monitor.sae import SAE_SETS, SAESet


def test_all_fourteen_sets_by_name():
    assert len(SAE_SETS) == 14
    for repo_id, known in SAE_SETS.items():
        assert known.repo_id == repo_id
        backbone, width, k = re.fullmatch(r"Qwen/SAE-Res-(.+)-W(\d+)K-L0_(\d+)", repo_id).groups()
        assert known.backbone == f"Qwen/{backbone}"
        assert known.d_sae == int(width) * 1024
        assert known.k == int(k)


@pytest.mark.parametrize(
    ("repo_id", "backbone", "layers", "d_model", "d_sae", "k"),
    [
        ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "Qwen/Qwen3-1.7B-Base", 28, 2048, 32768, 50),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_100", "Qwen/Qwen3-8B-Base", 36, 4096, 65536, 100),
        ("Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_100", "Qwen/Qwen3.5-2B-Base", 24, 2048, 32768, 100),
        ("Qwen/SAE-Res-Qwen3.5-9B-Base-W64K-L0_50", "Qwen/Qwen3.5-9B-Base", 32, 4096, 65536, 50),
        ("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50", "Qwen/Qwen3.5-27B", 64, 5120, 81920, 50),
        ("Qwen/SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100", "Qwen/Qwen3-30B-A3B-Base", 48, 2048, 131072, 100),
        ("Qwen/SAE-Res-Qwen3.5-35B-A3B-Base-W32K-L0_50", "Qwen/Qwen3.5-35B-A3B-Base", 40, 2048, 32768, 50),
    ],
)
def test_sizes(repo_id, backbone, layers, d_model, d_sae, k):
    assert SAE_SETS[repo_id] == SAESet(repo_id, backbone, layers, d_model, d_sae, k)


def test_the_catalogue_cannot_be_changed():
    with pytest.raises(TypeError):
        SAE_SETS["x"] = None
