"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_sft_callback(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "sft_callback.py"), "--steps", "4", "--every", "2", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "sae" / "scalars.jsonl").is_file()
    assert "watch list" in done.stdout
