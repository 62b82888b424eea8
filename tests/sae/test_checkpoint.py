import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qscope_monitor.sae import CheckpointError, TopKSAE, load_sae, load_saes, save_sae

D_MODEL, D_SAE = 12, 40


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_SAE, D_MODEL), "W_dec": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "b_dec": (D_MODEL,)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def equal(sae, expected):
    return all(torch.equal(getattr(sae, name), expected[name]) for name in expected)


@pytest.fixture
def folder(tmp_path):
    """As Qwen-Scope lays a set out: three layers and a config."""
    for layer in (0, 3, 10):
        write(tmp_path / "set" / f"layer{layer}.sae.pt", weights(layer))
    config = {"model_type": "topk_sae", "hook_point": "resid_post", "d_model": D_MODEL, "d_sae": D_SAE, "k": 5}
    (tmp_path / "set" / "config.json").write_text(json.dumps(config | {"base_model": "Qwen/Qwen3-1.7B-Base"}))
    return tmp_path / "set"


@pytest.mark.parametrize("suffix", [".sae.pt", ".sae.safetensors", ".safetensors", ".pt"])
def test_one_file(tmp_path, suffix):
    path = write(tmp_path / f"layer7{suffix}", weights())
    for source in (path, str(path)):
        sae = load_sae(source, k=5)
        assert equal(sae, weights())
        assert (sae.k, sae.layer, sae.source) == (5, 7, str(path))


def test_a_folder(folder):
    sae = load_sae(folder, layer=3)
    assert equal(sae, weights(3))
    assert (sae.k, sae.layer, sae.backbone) == (5, 3, "Qwen/Qwen3-1.7B-Base")
    assert sae.source == str(folder)


def test_a_file_reads_the_config_beside_it(folder):
    assert load_sae(folder / "layer3.sae.pt").k == 5


def test_a_layer_that_is_not_there_lists_those_that_are(folder):
    for call in (lambda: load_sae(folder, layer=4), lambda: load_saes(folder, layers=[3, 4])):
        with pytest.raises(CheckpointError, match=r"4.*layers there: 0, 3, 10"):
            call()
    with pytest.raises(ValueError, match=r"pass layer=.*0, 3, 10"):
        load_sae(folder)
    (folder / "empty").mkdir()
    with pytest.raises(CheckpointError, match="layers there: none"):
        load_saes(folder / "empty")


def test_the_layer_may_be_left_out_where_there_is_one(tmp_path):
    write(tmp_path / "layer4.sae.pt", weights())
    assert load_sae(tmp_path, k=3).layer == 4


def test_several_layers_are_loaded_when_asked_for(folder, monkeypatch):
    read = []
    original = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **kwargs: read.append(os.path.basename(path)) or original(path, **kwargs)
    )
    saes = load_saes(folder, layers=[10, 0])
    assert list(saes) == [10, 0]
    assert len(saes) == 2
    assert 0 in saes
    assert 3 not in saes
    assert not read
    assert equal(saes[10], weights(10))
    assert saes[10] is saes[10]
    assert read == ["layer10.sae.pt"]
    assert "loaded 10" in repr(saes)
    assert list(load_saes(folder)) == [0, 3, 10]
    with pytest.raises(KeyError, match="layer 3 is not one of 0, 10"):
        saes[3]


def test_several_layers_of_a_single_file(folder):
    assert list(load_saes(folder / "layer3.sae.pt")) == [3]
    with pytest.raises(CheckpointError, match="no such file"):
        load_saes(folder / "layer5.sae.pt")


def test_device_and_dtype(tmp_path):
    path = write(tmp_path / "layer0.sae.pt", weights(dtype=torch.bfloat16))
    assert load_sae(path, k=5).dtype == torch.float32  # 16-bit products are slow on a CPU
    assert equal(load_sae(path, k=5), weights(dtype=torch.bfloat16))
    assert load_sae(path, k=5, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_sae(path, k=5, device="meta").dtype == torch.bfloat16


class TestK:
    def test_argument_wins_with_a_warning(self, folder):
        with pytest.warns(UserWarning, match=r"k=9 is used.*config.json says 5"):
            assert load_sae(folder, layer=3, k=9).k == 9

    def test_argument_that_agrees_is_silent(self, folder, recwarn):
        assert load_sae(folder, layer=3, k=5).k == 5
        assert not recwarn

    @pytest.mark.parametrize("place", ["a-W1K-L0_8/layer0.sae.pt", "a-W1K-L0_8/deeper/layer0.sae.pt", "L0_8.pt"])
    def test_from_a_name(self, tmp_path, place):
        assert load_sae(write(tmp_path / place, weights())).k == 8

    def test_config_comes_before_the_name(self, tmp_path):
        path = write(tmp_path / "set-L0_8" / "layer0.sae.pt", weights())
        (path.parent / "config.json").write_text('{"k": 6}')
        assert load_sae(path).k == 6

    def test_nowhere(self, tmp_path):
        path = write(tmp_path / "layer0.sae.pt", weights())
        with pytest.raises(ValueError, match=r"layer0.sae.pt.*pass k="):
            load_sae(path)

    @pytest.mark.parametrize("k", [0, -1, D_SAE + 1])
    def test_out_of_range(self, folder, k):
        warned = pytest.warns(UserWarning, match="is used as asked")
        with warned, pytest.raises(ValueError, match=f"k is {k}, expected 1 to d_sae = 40"):
            load_sae(folder, layer=3, k=k)


class Hostile:
    """Writes a file when unpickled by anything but a loader of plain tensors."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return exec, (f"open({self.target!r}, 'w').write('ran')",)


class TestBadFiles:
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("protocol", ["torch", "torch-legacy", "pickle"])
    def test_code_is_not_run(self, tmp_path, protocol):
        path, proof = tmp_path / "layer0.sae.pt", tmp_path / "proof"
        content = weights() | {"extra": Hostile(proof)}
        if protocol == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=protocol == "torch")
        with pytest.raises(CheckpointError, match=r"layer0.sae.pt.*Nothing in it was executed"):
            load_sae(path, k=5)
        assert not proof.exists()
        torch.load(path, weights_only=False) if protocol != "pickle" else pickle.loads(path.read_bytes())
        assert proof.exists()  # the file would have run in an unsafe loader

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
    def test_truncated(self, tmp_path, suffix, share):
        path = write(tmp_path / f"layer0{suffix}", weights())
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(CheckpointError, match=f"layer0{suffix}.*incomplete"):
            load_sae(path, k=5)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize(
        "content", [b"", b"hello", b"<html>404</html>" * 100, os.urandom(5000), b"\x80\x02.", b"\xff" * 64]
    )
    def test_not_a_checkpoint_at_all(self, tmp_path, suffix, content):
        path = tmp_path / f"layer0{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"layer0{suffix}"):
            load_sae(path, k=5)

    def test_an_archive_without_tensors(self, tmp_path):
        path = tmp_path / "layer0.sae.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(CheckpointError, match=r"layer0.sae.pt"):
            load_sae(path, k=5)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize(
        ("change", "quoted"),
        [
            (lambda w: w.pop("b_dec"), "missing b_dec"),
            (lambda w: w.update(threshold=torch.zeros(3)), "not expected threshold"),
            (lambda w: w.update(encoder=w.pop("W_enc")), "missing W_enc; not expected encoder"),
            (
                lambda w: w.update(W_enc=w["W_enc"].T.contiguous(), W_dec=w["W_dec"].T.contiguous()),
                r"\(12, 40\).*transposed\?",
            ),
            (lambda w: w.update(W_dec=w["W_dec"].T.contiguous()), r"W_dec \(40, 12\).*transposed\?"),
            (lambda w: w.update(b_enc=torch.zeros(41)), r"b_enc \(41,\)"),
            (lambda w: w.update(b_enc=torch.zeros(40, 1)), r"b_enc \(40, 1\)"),
            (lambda w: w.update(b_dec=torch.zeros(())), r"b_dec \(\)"),
            (lambda w: w.update(W_enc=torch.zeros(40, 12, dtype=torch.int8)), "W_enc has dtype torch.int8"),
            (lambda w: w.update(W_dec=w["W_dec"].to(torch.float8_e4m3fn)), "W_dec has dtype torch.float8"),
            (lambda w: w["W_enc"].__setitem__((3, 4), float("nan")), "W_enc holds infinities or NaN"),
            (lambda w: w["b_dec"].__setitem__(0, float("inf")), "b_dec holds infinities or NaN"),
            (lambda w: w["W_dec"].__setitem__((0, 0), -float("inf")), "W_dec holds infinities or NaN"),
            (lambda w: w.update({n: torch.zeros([0] * t.ndim) for n, t in w.items()}), r"\(0, 0\)"),
        ],
    )
    def test_wrong_contents(self, tmp_path, suffix, change, quoted):
        content = weights()
        change(content)
        path = write(tmp_path / f"layer0{suffix}", content)
        with pytest.raises(CheckpointError, match=rf"layer0{suffix}.*{quoted}") as caught:
            load_sae(path, k=5)
        assert "xpected" in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "quoted"),
        [
            ([torch.zeros(2)], "found a list"),
            (torch.zeros(3), "found a Tensor"),
            (weights() | {"W_enc": 3}, "W_enc is a int"),
            (weights() | {"W_enc": torch.zeros(40, 12).to_sparse()}, "dense tensor"),
        ],
    )
    def test_wrong_kinds(self, tmp_path, content, quoted):
        with pytest.raises(CheckpointError, match=quoted):
            load_sae(write(tmp_path / "layer0.sae.pt", content), k=5)

    @pytest.mark.parametrize(
        ("content", "quoted"),
        [
            ("{", "not readable as JSON"),
            ("[1]", "JSON list"),
            ('{"k": "5"}', "k is '5'"),
            ('{"k": 0}', "k is 0"),
            ('{"k": true}', "k is True"),
            ('{"k": 5, "d_model": 13}', r"d_model is 13, but .*layer3.sae.pt has d_model 12"),
            ('{"k": 5, "d_sae": 20}', "d_sae is 20"),
        ],
    )
    def test_wrong_config(self, folder, content, quoted):
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=f"config.json.*{quoted}"):
            load_sae(folder, layer=3)

    def test_missing_files_and_sources_of_no_kind(self, tmp_path):
        for source in (tmp_path / "layer0.sae.pt", tmp_path / "nothing", "no such thing", "a/b/c"):
            with pytest.raises(CheckpointError):
                load_sae(source, layer=0, k=5)
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(CheckpointError, match=r"'\.txt'"):
            load_sae(tmp_path / "notes.txt", k=5)

    def test_revision_of_something_local(self, folder):
        with pytest.raises(ValueError, match="revision='main' is for hub repositories"):
            load_sae(folder, layer=0, revision="main")


def test_files_from_before_the_zip_format(tmp_path):
    torch.save(weights(), tmp_path / "layer0.sae.pt", _use_new_zipfile_serialization=False)
    assert equal(load_sae(tmp_path / "layer0.sae.pt", k=5), weights())


def test_a_file_asked_for_as_another_layer_warns(folder):
    with pytest.warns(UserWarning, match="named as layer 3 but loaded as layer 4"):
        assert load_sae(folder / "layer3.sae.pt", layer=4).layer == 4


class TestSave:
    @pytest.fixture
    def sae(self):
        return TopKSAE(**weights(), k=5, layer=3, meta={"base_model": "a/b", "note": {"ev": 0.5}})

    def test_pt_is_the_dict_others_read(self, sae, tmp_path):
        path = save_sae(sae, tmp_path / "new" / "layer3.sae.pt")
        content = torch.load(path, weights_only=True)
        assert set(content) == {"W_enc", "W_dec", "b_enc", "b_dec"}
        assert all(torch.equal(content[name], value) for name, value in weights().items())
        assert path.stat().st_size < 4 * sum(w.numel() for w in weights().values()) + 4000

    def test_safetensors_keep_k_and_layer(self, sae, tmp_path):
        loaded = load_sae(save_sae(sae, tmp_path / "mine.safetensors"))
        assert equal(loaded, weights())
        assert (loaded.k, loaded.layer) == (5, 3)

    def test_a_folder_keeps_everything(self, sae, tmp_path):
        path = save_sae(sae, tmp_path / "set")
        assert path == tmp_path / "set" / "layer3.sae.pt"
        other = TopKSAE(**weights(1), k=5, layer=12)
        save_sae(other, str(tmp_path / "set"))
        saes = load_saes(tmp_path / "set")
        assert list(saes) == [3, 12]
        assert equal(saes[3], weights())
        assert equal(saes[12], weights(1))
        assert saes[3].meta["note"] == {"ev": 0.5}
        assert "note" not in saes[12].meta
        assert saes[3].backbone == "a/b"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_is_kept(self, sae, tmp_path, dtype):
        path = save_sae(sae.to(dtype=dtype), tmp_path / "layer3.sae.pt")
        assert torch.load(path, weights_only=True)["W_enc"].dtype == dtype

    def test_views_are_written_compactly(self, sae, tmp_path):
        wide = torch.randn(D_SAE, 10 * D_MODEL)
        view = TopKSAE(wide[:, :D_MODEL], weights()["W_dec"].T.contiguous().T, sae.b_enc, sae.b_dec, 5, 3)
        path = save_sae(view, tmp_path / "layer3.sae.pt")
        assert path.stat().st_size < 4 * sum(w.numel() for w in weights().values()) + 4000
        assert torch.equal(load_sae(path, k=5).W_enc, wide[:, :D_MODEL])

    def test_saving_over_a_mapped_file(self, sae, tmp_path):
        path = save_sae(sae, tmp_path / "layer3.sae.pt")
        loaded = load_sae(path, k=5)
        save_sae(TopKSAE(**weights(1), k=5, layer=3), path)
        assert equal(loaded, weights())
        assert equal(load_sae(path, k=5), weights(1))

    def test_a_failed_save_leaves_the_old_file_and_no_other(self, sae, tmp_path, monkeypatch):
        path = save_sae(sae, tmp_path / "layer3.sae.pt")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_sae(TopKSAE(**weights(1), k=5, layer=3), path)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["layer3.sae.pt"]
        assert equal(load_sae(path, k=5), weights())

    def test_what_cannot_be_saved(self, sae, tmp_path):
        with pytest.raises(ValueError, match="has no layer"):
            save_sae(TopKSAE(**weights(), k=5), tmp_path / "set")
        save_sae(sae, tmp_path / "set")
        with pytest.raises(ValueError, match=r"config.json: holds SAEs with \{'k': 5\}"):
            save_sae(TopKSAE(**weights(), k=6, layer=4), tmp_path / "set")
        (tmp_path / "file.bin").write_text("")
        with pytest.raises(ValueError, match=r"'\.bin'"):
            save_sae(sae, tmp_path / "file.bin")


def test_numpy_can_follow_the_files(tmp_path):
    """The same encode from the raw file, without this package."""
    path = save_sae(TopKSAE(**weights(), k=5, layer=0), tmp_path / "layer0.sae.pt")
    raw = {name: value.double().numpy() for name, value in torch.load(path, weights_only=True).items()}
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(3))
    pre = x.double().numpy() @ raw["W_enc"].T + raw["b_enc"]
    expected = np.maximum(-np.sort(-pre, -1)[:, :5], 0)
    np.testing.assert_allclose(load_sae(path, k=5).encode(x).values.numpy(), expected, atol=1e-5)
