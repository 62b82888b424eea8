"""What a user installs: wheel, sdist, plain and editable installs, used from the repository root and from elsewhere.

Each install goes into a virtual environment of its own that borrows the running environment's packages through a .pth
file, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "qscope_monitor", "callbacks", "kernels", "tests")
INSTALLS = ("wheel", "sdist", "plain", "editable")
# `import qscope_monitor` must stay light: none of these may come with it.
FRAMEWORKS = (
    *("transformers", "trl", "accelerate", "datasets", "peft", "lightning", "pytorch_lightning", "triton"),
    *("tensorboard", "wandb", "trackio", "matplotlib", "typer", "sklearn", "pandas"),
)

PROBE = """
import json, sys
import qscope_monitor as qs
from importlib.util import find_spec
from pathlib import Path
from qscope_monitor.kernels.topk_encode import topk_encode
folder = Path(qs.__file__).parent
print(json.dumps({
    "folder": str(folder),
    "typed": (folder / "py.typed").is_file(),
    "callback": find_spec("qscope_monitor.callbacks.trl").origin,
    "kernel": sys.modules["qscope_monitor.kernels.topk_encode"].__file__,
    "saes": sorted(p.name for p in qs.bundled.sae_path().iterdir()),
    "prompts": len(qs.bundled.prompts("dev")),
    "sentences": len(qs.bundled.sentences()),
    "samples": len(qs.bundled.sft_data()),
    "widths": [sae.d_model for sae in qs.load_saes(qs.bundled.sae_path()).values()],
}))
"""


def has_setuptools() -> bool:
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


def run(command: list[object], cwd: Path, fails: bool = False) -> str:
    """Run a command in a clean environment; its standard output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**inherited, **quiet}, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: Path) -> Path:
    """A virtual environment that sees the running one's packages behind its own; its Python."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages(folder) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def site_packages(folder: Path) -> Path:
    return next(folder.glob("[Ll]ib/**/site-packages"))


def copy_repository(folder: Path) -> Path:
    """What packaging reads, without what earlier builds left."""
    folder.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, the wheel built from it, the wheel built from the tree, and that tree."""
    source = copy_repository(tmp_path_factory.mktemp("build") / "source")
    isolation = ["--no-isolation"] if has_setuptools() else []
    found = {"source": source}
    for out, kinds in (("dist", []), ("direct", ["--wheel"])):
        run([sys.executable, "-m", "build", *isolation, *kinds, "--outdir", source.parent / out, source], source.parent)
    (found["sdist"],) = (source.parent / "dist").glob("*.tar.gz")
    (found["wheel from sdist"],) = (source.parent / "dist").glob("*.whl")
    (found["wheel"],) = (source.parent / "direct").glob("*.whl")
    return found


class Installed:
    def __init__(self, how: str, folder: Path, distributions: dict[str, Path]) -> None:
        self.how = how
        self.root = copy_repository(folder / "repository")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.python = environment(folder / "venv")
        self.site_packages = site_packages(folder / "venv")
        what = {"plain": [self.root], "editable": ["--editable", self.root]}.get(how) or [distributions[how]]
        offline = ["--no-index", "--no-build-isolation"] if has_setuptools() else []
        options = ["--quiet", "--no-deps", "--ignore-installed", *offline]  # the running environment has it too
        run([self.python, "-m", "pip", "install", *options, *what], self.elsewhere)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, distributions: dict[str, Path]) -> Installed:
    return Installed("wheel", tmp_path_factory.mktemp("wheel"), distributions)


@pytest.fixture(scope="module", params=INSTALLS)
def installed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    distributions: dict[str, Path],
    wheel: Installed,
) -> Installed:
    if request.param == "wheel":
        return wheel
    return Installed(request.param, tmp_path_factory.mktemp(request.param), distributions)


@pytest.mark.slow
def test_install_works_from_the_root_and_from_elsewhere(installed: Installed) -> None:
    own = installed.root if installed.how == "editable" else installed.site_packages
    for cwd, expected in ((installed.elsewhere, own), (installed.root, installed.root)):
        found = json.loads(run([installed.python, "-c", PROBE], cwd))
        folder = expected / "qscope_monitor"
        assert Path(found["folder"]) == folder
        assert Path(found["callback"]) == folder / "callbacks" / "trl.py"
        assert Path(found["kernel"]) == folder / "kernels" / "topk_encode.py"
        assert found["typed"]
        assert found["saes"] == sorted(p.name for p in (ROOT / "qscope_monitor/bundled/saes").iterdir())
        assert min(found["prompts"], found["sentences"], found["samples"], len(found["widths"])) > 0
        assert set(found["widths"]) == {192}


@pytest.mark.slow
def test_only_our_own_package_is_installed(installed: Installed) -> None:
    names = {path.name for path in installed.site_packages.iterdir()} - {"borrowed.pth", "__pycache__"}
    ours = {name for name in names if not name.startswith(("qscope_monitor-0", "__editable__"))}
    assert ours == (set() if installed.how == "editable" else {"qscope_monitor"})
    script = installed.python.parent / "qscope"
    assert "usage" in run([script, "--help"], installed.elsewhere).lower()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(distributions: dict[str, Path]) -> None:
    source = distributions["source"]
    expected = set()
    for folder, _, files in os.walk(source / "qscope_monitor", followlinks=True):
        expected |= {(Path(folder) / name).relative_to(source).as_posix() for name in files}
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/qscope_monitor/bundled/NOTICE") for name in names)


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(distributions: dict[str, Path]) -> None:
    def content(wheel: Path) -> dict[str, int]:
        with zipfile.ZipFile(wheel) as archive:
            return {item.filename: item.CRC for item in archive.infolist()}

    assert content(distributions["wheel from sdist"]) == content(distributions["wheel"])
    with tarfile.open(distributions["sdist"]) as archive:  # symlinks would point outside the archive's package
        assert not [item.name for item in archive if item.issym() or item.islnk()]


@pytest.mark.slow
def test_callback_and_pytest_from_the_root_and_from_elsewhere(wheel: Installed) -> None:
    check = (
        "from qscope_monitor.callbacks.trl import QScopeCallback\n"
        "from qscope_monitor.kernels.topk_encode import topk_encode\n"
        "from transformers import TrainerCallback\n"
        "def test_import(): assert issubclass(QScopeCallback, TrainerCallback) and callable(topk_encode)\n"
    )
    for cwd in (wheel.root, wheel.elsewhere):
        (cwd / "test_import.py").write_text(check)
        options = ["-c", os.devnull, "--rootdir", cwd, "-p", "no:cacheprovider"]
        assert "1 passed" in run([wheel.python, "-m", "pytest", *options, "test_import.py"], cwd)


@pytest.mark.slow
def test_type_checker_sees_the_callbacks(wheel: Installed) -> None:
    pytest.importorskip("mypy")
    folder = wheel.elsewhere / "typed"
    folder.mkdir()
    user = "from qscope_monitor.callbacks.trl import QScopeCallback\nQScopeCallback(every_n_steps={value})\n"
    (folder / "right.py").write_text(user.format(value="10"))
    (folder / "wrong.py").write_text(user.format(value="'often'"))
    # Only our own package is of interest: torch alone takes mypy a minute.
    (folder / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n"
        "[mypy-qscope_monitor.*]\nfollow_imports = silent\n"
    )
    mypy = [wheel.python, "-m", "mypy", "--cache-dir", folder / "cache"]
    said = run([*mypy, "right.py", "wrong.py"], folder, fails=True)
    assert "Found 1 error in 1 file (checked 2 source files)" in said
    assert 'wrong.py:2: error: Argument "every_n_steps" to "QScopeCallback" has incompatible type "str"' in said


def test_transformers_is_not_shadowed_at_the_root() -> None:
    pytest.importorskip("transformers")
    # A folder without __init__.py yields to an installed package of its name; with one, it would come first.
    check = (
        "import sys, transformers, transformers.integrations.hub_kernels\n"
        "from importlib.util import find_spec\n"
        "from transformers import Qwen3ForCausalLM\n"
        "for name in ('kernels', 'callbacks'):\n"
        "    spec = find_spec(name)\n"
        "    assert spec is None or spec.origin is None or spec.origin not in sys.argv, spec\n"
    )
    own = [ROOT / name / "__init__.py" for name in ("kernels", "callbacks")]
    run([sys.executable, "-c", check, *own], ROOT)


def test_import_loads_no_trainer_framework_and_no_triton() -> None:
    def loaded(statement: str) -> set[str]:
        check = f"import sys, json; {statement}; print(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
        return set(json.loads(run([sys.executable, "-c", check], ROOT).splitlines()[-1]))

    # GPU builds of torch import triton themselves
    assert (loaded("import qscope_monitor") - loaded("import torch")).isdisjoint(FRAMEWORKS)


def test_bundled_folder_is_small() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "qscope_monitor/bundled").rglob("*") if path.is_file())
    assert size <= 25_000_000


def test_no_file_names_this_machine() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    common = {Path("/"), Path(tempfile.gettempdir())}
    places = {ROOT, ROOT.parent, Path.home()} - common
    pattern = re.compile(r"(?<![\w.*~})-])(" + "|".join(re.escape(str(place)) for place in places) + r")(?![\w-])")
    named = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        except UnicodeDecodeError:
            continue
        named += [f"{name}: {found.group()}" for found in pattern.finditer(text)]
    assert named == []
