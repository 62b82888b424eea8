"""The hub code against a local stub that speaks what huggingface_hub asks for, in processes of their own."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

REPO = "someone/SAE-Res-Tiny-W1K-L0_8"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(layer):
    generator = torch.Generator().manual_seed(layer)
    shapes = {"W_enc": (20, 6), "W_dec": (6, 20), "b_enc": (20,), "b_dec": (6,)}
    buffer = io.BytesIO()
    torch.save({name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}, buffer)
    return buffer.getvalue()


class Stub(ThreadingHTTPServer):
    """Serves a few repositories from memory and remembers what was fetched."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        layers = {f"layer{n}.sae.pt": checkpoint(n) for n in (0, 3, 4)}
        self.repos = {
            REPO: layers | {"config.json": json.dumps({"k": 5, "base_model": "someone/tiny"}).encode()},
            "someone/no-config-L0_8": layers,
        }
        self.fetched = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        files = self.server.repos.get(repo)
        if files is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
            ]
            self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        elif api:
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif rest[1] not in ("main", "v1", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Revision not found")
        elif "/".join(rest[2:]) not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            name = "/".join(rest[2:])
            if self.command == "GET":
                self.server.fetched.append((rest[1], name))
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            self.answer(200, files[name], ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(code, hub, home, offline=False):
    """Run `code`, which fills `out`, with the stub as the hub; environment variables are read at import."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }  # fmt: skip
    script = (
        "import json, warnings\n"
        "from qscope_monitor.sae import CheckpointError, load_sae, load_saes\n"
        "def failure(call):\n"
        "    try:\n        call()\n    except CheckpointError as error:\n        return str(error)\n"
        f"REPO = {REPO!r}\nout = {{}}\n{code}\nprint(json.dumps(out))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_only_what_is_needed_is_fetched_and_the_cache_serves_offline(hub, tmp_path):
    online = run(
        "saes = load_saes(REPO)\n"
        "out['listed'] = list(saes)\n"
        "sae = load_sae(REPO, layer=3)\n"
        "out['sae'] = [sae.k, sae.layer, sae.source, sae.backbone, float(sae.W_enc.sum())]\n"
        "out['lazy'] = [list(load_saes(REPO, layers=[3, 4])), saes[3].layer]\n"
        "out['pinned'] = load_sae(REPO, layer=3, revision='v1').source",
        hub,
        tmp_path,
    )
    expected = float(torch.load(io.BytesIO(checkpoint(3)))["W_enc"].sum())
    assert online["listed"] == [0, 3, 4]
    assert online["sae"] == [5, 3, REPO, "someone/tiny", pytest.approx(expected)]
    assert online["lazy"] == [[3, 4], 3]
    assert online["pinned"] == f"{REPO}@v1"
    assert {name for _, name in hub.fetched} == {"layer3.sae.pt", "config.json"}

    hub.fetched.clear()
    offline = run(
        "out['sae'] = load_sae(REPO, layer=3).k\n"
        "out['listed'] = list(load_saes(REPO))\n"
        "out['absent'] = failure(lambda: load_sae(REPO, layer=4))\n"
        "known = 'Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50'  # the catalogue needs no network\n"
        "out['known'] = list(load_saes(known))\n"
        "out['wrong'] = failure(lambda: load_saes(known, layers=[5, 28]))",
        hub,
        tmp_path,
        offline=True,
    )
    assert offline["sae"] == 5
    assert offline["listed"] == [3]
    assert "layer4.sae.pt is not in the local cache" in offline["absent"]
    assert offline["known"] == list(range(28))
    assert "no SAE for layer 28; layers there: 0-27" in offline["wrong"]
    assert not hub.fetched


def test_what_goes_wrong_is_said(hub, tmp_path):
    out = run(
        "out['layer'] = failure(lambda: load_sae(REPO, layer=9))\n"
        "out['repository'] = failure(lambda: load_sae('someone/nothing', layer=0))\n"
        "out['listing'] = failure(lambda: load_saes('someone/nothing'))\n"
        "out['revision'] = failure(lambda: load_sae(REPO, layer=0, revision='v9'))\n"
        "out['k from the name'] = load_sae('someone/no-config-L0_8', layer=0).k\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    out['k'] = load_sae(REPO, layer=0, k=7).k\n"
        "out['warned'] = [str(w.message) for w in caught if 'k=7' in str(w.message)]",
        hub,
        tmp_path,
    )
    assert "no file for layer 9; layers there: 0, 3-4" in out["layer"]
    for name in ("repository", "listing"):
        assert "someone/nothing: cannot be read from the hub" in out[name]
    assert f"{REPO}@v9: cannot be read from the hub" in out["revision"]
    assert out["k from the name"] == 8
    assert out["k"] == 7
    assert len(out["warned"]) == 1
