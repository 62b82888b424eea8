import math

import pytest
import torch

from qscope_monitor.sae import CheckpointError, TopKSAE
from qscope_monitor.sae.fitting import fit_sae

D_MODEL, FEATURES, ACTIVE = 64, 96, 4


def sparse_data(tokens, seed=0):
    """Sums of a few of 96 fixed directions plus an offset and a little noise, `[tokens, 64]`, on a raw scale."""
    fixed, drawn = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    directions = torch.randn(FEATURES, D_MODEL, generator=fixed)
    directions /= directions.norm(dim=1, keepdim=True)
    offset = torch.randn(D_MODEL, generator=fixed)
    chosen = torch.rand(tokens, FEATURES, generator=drawn).topk(ACTIVE).indices
    strength = torch.rand(tokens, ACTIVE, generator=drawn) + 0.5
    x = torch.einsum("nk,nkd->nd", strength, directions[chosen]) + offset
    return 20 * (x + 0.02 * torch.randn(tokens, D_MODEL, generator=drawn)), directions


def fit(tokens=20000, **changes):
    data, _ = sparse_data(tokens)
    held_out, _ = sparse_data(2000, seed=1)
    settings = {"d_sae": 128, "k": 6, "epochs": 2, "batch_size": 512, "progress": False}
    return fit_sae(data, held_out, **(settings | changes))


@pytest.fixture(scope="module")
def fitted():
    return fit(epochs=10, batch_size=256)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))


def test_sparse_data_are_explained(fitted):
    report = fitted[1]
    assert report.explained_variance > 0.9
    assert (1 - report.dead) * 128 > 0.9 * FEATURES  # the others have nothing to find
    assert 3 < report.l0 <= 6
    assert report.steps == 10 * (20000 // 256)
    assert (report.tokens, report.held_out, report.dropped) == (20000, 2000, 0)


def test_the_directions_behind_the_data_are_found(fitted):
    _, directions = sparse_data(1)
    similarity = (directions @ fitted[0].W_dec).max(dim=1).values
    assert (similarity > 0.9).float().mean() > 0.8


def test_the_result_acts_on_raw_activations(fitted):
    sae, report = fitted
    held_out, _ = sparse_data(2000, seed=1)
    assert 1 - sae.fvu(held_out) == pytest.approx(report.explained_variance)
    x_hat = sae.decode(sae.encode(held_out))
    assert 1 - float((held_out - x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum()) > 0.9
    torch.testing.assert_close(sae.W_dec.norm(dim=0), torch.ones(128))
    assert sae.meta["training"]["explained_variance"] == report.explained_variance


def test_equal_seeds_give_equal_weights_and_the_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    runs = [fit(4000, epochs=2, seed=seed)[0] for seed in (3, 3, 4)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@pytest.mark.parametrize("stop", [1, 9, 13])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(tmp_path, monkeypatch, stop):
    expected, report = fit(4000, epochs=2)  # 7 steps an epoch
    file = tmp_path / "state.pt"
    from qscope_monitor.sae import fitting

    original, steps = fitting._Fit.update, []

    def interrupted(self, batch):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(1)
        return original(self, batch)

    monkeypatch.setattr(fitting._Fit, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(4000, epochs=2, state_file=file)
    monkeypatch.setattr(fitting._Fit, "update", lambda self, batch: steps.append(1) or original(self, batch))
    resumed, again = fit(4000, epochs=2, state_file=file)
    assert equal(resumed, expected)
    assert again.explained_variance == report.explained_variance
    assert len(steps) == report.steps == again.steps == 14


def test_the_state_of_another_fit_is_refused(tmp_path, monkeypatch):
    from qscope_monitor.sae import fitting

    file = tmp_path / "state.pt"
    with monkeypatch.context() as patch:
        patch.setattr(fitting._Fit, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(4000, state_file=file)
    for change, quoted in (
        ({"k": 5}, r"k 6 \(now 5\)"),
        ({"seed": 1}, "seed"),
        ({"lr": 0.1}, "lr"),
        ({"epochs": 3}, "steps"),
    ):
        with pytest.raises(CheckpointError, match=f"state of another fit, with.*{quoted}"):
            fit(4000, state_file=file, **change)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state.pt: not readable"):
        fit(4000, state_file=file)


@pytest.mark.parametrize("weight", [0.0, 1 / 32])
def test_features_that_have_been_silent_are_taught_by_the_auxiliary_loss_alone(monkeypatch, weight):
    from qscope_monitor.sae import fitting

    monkeypatch.setattr(fitting, "AUX_WEIGHT", weight)
    data, _ = sparse_data(256)
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(128, D_MODEL, generator=generator)
    b_enc = torch.cat([torch.full((20,), 1e4), torch.zeros(108)])  # twenty features shout the others down
    init = TopKSAE(W_enc, W_enc.T / W_enc.norm(dim=1), b_enc, torch.zeros(D_MODEL), 6)
    mean, scale = fitting._moments(data, torch.arange(256))
    state = fitting._Fit(mean, scale, 128, 6, 1e-3, 1000, 256, 256, 0, torch.device("cpu"), init)
    before = {name: p.detach().clone() for name, p in state.params.items()}
    assert state.update(data)[1] == 0  # nothing counts as dead before enough tokens were seen
    assert all(torch.equal(state.params[name][20:], before[name][20:]) for name in ("W_enc", "b_enc"))
    state.seen += state.dead_after
    assert state.update(data)[1] >= 108  # those, and the few of the twenty that are never among the top
    moved = (state.params["W_enc"] - before["W_enc"]).abs().sum(1)[20:] > 0
    assert bool(moved.any()) == (weight > 0)


def test_a_fit_starts_exactly_at_init(fitted):
    sae, report = fitted
    # columns of other norms: rescaling a feature must leave the function alone
    norms = torch.linspace(0.5, 2, 128)
    uneven = TopKSAE(sae.W_enc / norms[:, None], sae.W_dec * norms, sae.b_enc / norms, sae.b_dec, 6)
    started, _ = fit(4000, init=uneven, epochs=0.01, lr=0.0)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(started, name), getattr(uneven, name), rtol=1e-5, atol=1e-5)
    better, again = fit(init=sae, lr=0.0005)
    assert again.explained_variance > report.explained_variance - 0.01
    assert better.d_sae == 128


def test_outliers_and_tokens_that_are_not_finite_are_left_out():
    data, _ = sparse_data(4000)
    held_out, _ = sparse_data(500, seed=1)
    clean, _ = fit_sae(data[3:], held_out, d_sae=64, k=6, epochs=2, progress=False)
    data[0] *= 1000
    data[1, 4] = float("nan")
    data[2, 0] = float("inf")
    dirty, report = fit_sae(data, held_out, d_sae=64, k=6, epochs=2, progress=False)
    assert report.dropped == 3
    assert report.tokens == 3997
    assert equal(clean, dirty)


def test_half_precision_activations_are_fitted_in_fp32():
    data, _ = sparse_data(4000)
    held_out, _ = sparse_data(500, seed=1)
    exact = fit_sae(data, held_out, d_sae=64, k=6, epochs=2, progress=False)[1]
    sae, half = fit_sae(data.half(), held_out.half(), d_sae=64, k=6, epochs=2, progress=False)
    assert sae.dtype == torch.float32
    assert half.explained_variance == pytest.approx(exact.explained_variance, abs=0.02)


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"k": 0}, "k must be between 1 and d_sae = 128, got 0"),
        ({"k": 129}, "got 129"),
        ({"epochs": 0}, "got 0"),
        (
            {"init": TopKSAE(torch.zeros(4, 3), torch.zeros(3, 4), torch.zeros(4), torch.zeros(3), 1)},
            "d_model 3.*64 wide",
        ),
    ],
)
def test_wrong_settings_are_quoted(change, quoted):
    with pytest.raises(ValueError, match=quoted):
        fit(100, **change)


def test_too_little_or_constant_data():
    for data in (torch.empty(0, 4), torch.full((5, 4), math.nan)):
        with pytest.raises(ValueError, match="only 0 training"):
            fit_sae(data, torch.randn(5, 4), d_sae=8, k=2)
    with pytest.raises(ValueError, match="all activations are equal"):
        fit_sae(torch.ones(50, 4), torch.ones(5, 4), d_sae=8, k=2)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        fit_sae(torch.ones(5), torch.ones(5), d_sae=8, k=2)
