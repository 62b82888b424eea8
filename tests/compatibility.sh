#!/usr/bin/env bash
# Runs the core tests against other versions of the libraries around us, in a throw-away virtual environment that
# borrows everything else (torch above all) from an existing one. From anywhere:
#   tests/compatibility.sh                                        the oldest versions that pyproject.toml allows
#   tests/compatibility.sh "transformers==4.57.6" "trl==0.25.1"   any others
# BASE names the Python to borrow from (default: .venv/bin/python of the checkout), TESTS the tests to run.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${BASE:-.venv/bin/python}
tests=${TESTS:-tests/test_residual.py tests/test_fit.py tests/test_tokens.py tests/test_monitor.py
  tests/test_session.py tests/sae tests/features tests/reporting tests/callbacks}
if [ $# -eq 0 ]; then
  set -- "transformers==4.56.2" "trl==0.24.0" "accelerate==1.4.0" "datasets==3.0.0" "peft==0.14.0" \
    "tensorboard==2.18.0" "huggingface_hub==0.34.0" "safetensors==0.4.5" "tqdm==4.66.3" "regex==2024.5.15"
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$base" -m venv "$folder"
"$base" - "$folder" <<'PYTHON'
import pathlib, sys, sysconfig
site_packages = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
(site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
PYTHON
torch=$("$base" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))')
# pip leaves alone what lies outside the new environment: what it must replace, it shadows.
"$folder/bin/python" -m pip install --quiet "$torch" "$@"
"$folder/bin/python" -c '
import importlib.metadata as m
for name in "torch transformers trl accelerate datasets peft huggingface_hub tokenizers safetensors numpy".split():
    print(name, m.version(name))'
# shellcheck disable=SC2086
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$folder/bin/python" -m pytest -p no:cacheprovider -m "not gpu" $tests
