"""The README's code runs as pasted, from top to bottom, in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_code_runs_as_pasted(tmp_path: Path) -> None:
    blocks = python_blocks()
    assert len(blocks) >= 4
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "variance unexplained" in done.stdout
    assert (tmp_path / "zh-features" / "watch_list.json").is_file()
    assert list((tmp_path / "runs" / "sft").rglob("events.out.tfevents.*"))
    assert (tmp_path / "runs" / "sft" / "sae" / "alerts.jsonl").is_file()


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [t for t in targets if not (README.parent / t).exists()] == []
