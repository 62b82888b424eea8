import numpy as np
import pytest
import torch

from qscope_monitor.sae import TopKSAE


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    shapes = ((100, 16), (16, 100), (100,), (16,))
    return TopKSAE(*(torch.randn(*shape, generator=generator) for shape in shapes), k=7, layer=3)


@pytest.fixture
def x():
    return torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(1))


def as_numpy(sae):
    return (w.double().numpy() for w in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))


def dense_reference(sae, x):
    """Dense activations and reconstruction in numpy, fp64: no b_dec and no scaling before the encoder."""
    W_enc, W_dec, b_enc, b_dec = as_numpy(sae)
    pre = x.double().numpy().reshape(-1, sae.d_model) @ W_enc.T + b_enc
    acts = np.where(pre >= np.sort(pre, -1)[:, -sae.k][:, None], np.maximum(pre, 0), 0)
    return acts, acts @ W_dec.T + b_dec


def test_encode_and_decode_by_their_definition(sae, x):
    acts = sae.encode(x)
    dense, expected = dense_reference(sae, x)
    scattered = torch.zeros(45, 100).scatter_add_(1, acts.indices.view(45, 7), acts.values.view(45, 7))
    np.testing.assert_allclose(scattered.numpy(), dense, atol=1e-5)
    np.testing.assert_allclose(sae.decode(acts).view(45, 16).numpy(), expected, atol=1e-4)


def test_b_dec_plays_no_part_in_encode(sae, x):
    moved = TopKSAE(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec + 100, 7)
    assert torch.equal(moved.encode(x).values, sae.encode(x).values)
    torch.testing.assert_close(moved.decode(sae.encode(x)), sae.decode(sae.encode(x)) + 100)


def test_pre_activations(sae, x):
    W_enc, _, b_enc, _ = as_numpy(sae)
    full = x.double().numpy() @ W_enc.T + b_enc
    for features in ([5, 0, 99, 5], (3,), torch.tensor([7, 8]), [], np.array([1, 2])):
        pre = sae.pre_activations(x, features)
        assert pre.dtype == torch.float32
        assert pre.shape == (5, 9, len(features))
        np.testing.assert_allclose(pre.numpy(), full[..., np.array(list(features), dtype=int)], atol=1e-5)
    for single in (42, torch.tensor(42)):
        np.testing.assert_allclose(sae.pre_activations(x, single).numpy(), full[..., 42], atol=1e-5)


def test_pre_activations_are_fp32_under_autocast_and_in_bf16(sae, x):
    plain = sae.pre_activations(x, [1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae.pre_activations(x, [1, 2]), plain)
    half = sae.to(dtype=torch.bfloat16)
    assert half.pre_activations(x.bfloat16(), [1, 2]).dtype == torch.float32


def test_rows_first_gathered_in_inference_mode_serve_a_backward(sae, x):
    with torch.inference_mode():
        sae.pre_activations(x, [1, 2])
    x.requires_grad_()
    sae.pre_activations(x, [1, 2]).sum().backward()
    torch.testing.assert_close(x.grad, sae.W_enc[[1, 2]].sum(0).expand(5, 9, 16))


def test_many_feature_lists_do_not_pile_up(sae, x):
    for feature in range(50):
        sae.pre_activations(x, [feature])
    assert len(sae._rows) <= 8


def test_gradients_reach_the_input_and_not_the_weights(x):
    weights = [torch.randn(s, requires_grad=True) for s in ((100, 16), (16, 100), (100,), (16,))]
    sae = TopKSAE(*weights, k=7)
    assert not any(w.requires_grad for w in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    x.requires_grad_()
    sae.decode(sae.encode(x)).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(w.grad is None for w in weights)


def test_direction_is_a_column_in_fp32_and_a_copy(sae):
    direction = sae.to(dtype=torch.bfloat16).direction(5)
    assert direction.dtype == torch.float32
    assert torch.equal(direction, sae.W_dec[:, 5].bfloat16().float())
    sae.direction(5).zero_()
    assert sae.W_dec[:, 5].abs().sum() > 0


def test_fvu_by_its_definition(sae, x):
    flat = x.double().numpy().reshape(-1, 16)
    _, x_hat = dense_reference(sae, x)
    expected = ((flat - x_hat) ** 2).sum() / ((flat - flat.mean(0)) ** 2).sum()
    assert sae.fvu(x) == pytest.approx(expected, rel=1e-5)


def test_fvu_in_parts_equals_fvu_in_one(sae, x, monkeypatch):
    whole = sae.fvu(x)
    monkeypatch.setattr("qscope_monitor.sae.topk_sae._FVU_TOKENS", 7)
    assert sae.fvu(x) == pytest.approx(whole, rel=1e-7)  # fp32 products round differently in other chunks


def test_fvu_leaves_out_tokens_that_are_not_finite(sae, x):
    whole = sae.fvu(x.view(45, 16)[1:])
    x[0, 0, 3] = float("nan")
    assert sae.fvu(x) == pytest.approx(whole, rel=1e-7)


def test_fvu_extremes(x):
    perfect = TopKSAE(torch.cat([torch.eye(16), -torch.eye(16)]), torch.cat([torch.eye(16), -torch.eye(16)], 1),
                      torch.zeros(32), torch.zeros(16), k=16)  # fmt: skip
    assert perfect.fvu(x) == pytest.approx(0, abs=1e-12)
    mean = x.view(45, 16).mean(0)
    constant = TopKSAE(torch.zeros(4, 16), torch.zeros(16, 4), torch.zeros(4), mean, k=1)
    assert constant.fvu(x) == pytest.approx(1, rel=1e-6)
    for nothing in (x.view(45, 16)[:0], x[0, :1], x[0, :1].expand(4, 16), torch.full((3, 16), float("nan"))):
        assert np.isnan(constant.fvu(nothing))


def test_to_moves_and_converts_and_keeps_the_rest(sae):
    half = sae.to("cpu", torch.float16)
    assert half.dtype == torch.float16
    assert (half.k, half.layer, half.source) == (sae.k, sae.layer, sae.source)
    assert sae.dtype == torch.float32
    assert sae.to("cpu").W_enc.data_ptr() == sae.W_enc.data_ptr()


def test_frozen_and_readable(sae):
    with pytest.raises(AttributeError):
        sae.k = 5
    assert repr(sae) == "TopKSAE(layer=3, d_model=16, d_sae=100, k=7, dtype=float32, device='cpu')"


@pytest.mark.parametrize(
    ("change", "error", "quoted"),
    [
        ({"W_enc": torch.zeros(16)}, ValueError, r"\(16,\)"),
        ({"W_dec": torch.zeros(100, 16)}, ValueError, r"W_dec must be \(16, 100\).*got \(100, 16\)"),
        ({"b_enc": torch.zeros(16)}, ValueError, r"b_enc must be \(100,\).*got \(16,\)"),
        ({"b_dec": torch.zeros(100)}, ValueError, r"b_dec must be \(16,\).*got \(100,\)"),
        ({"W_enc": torch.zeros(100, 16, dtype=torch.int8)}, TypeError, "int8"),
        ({"W_enc": [1]}, TypeError, "list"),
        ({"k": 0}, ValueError, "got 0"),
        ({"k": 101}, ValueError, "d_sae = 100, got 101"),
        ({"k": "7"}, TypeError, "'7'"),
    ],
)
def test_wrong_weights_are_quoted(change, error, quoted):
    good = {"W_enc": torch.zeros(100, 16), "W_dec": torch.zeros(16, 100), "b_enc": torch.zeros(100)}
    with pytest.raises(error, match=quoted):
        TopKSAE(**(good | {"b_dec": torch.zeros(16), "k": 7} | change))


@pytest.mark.parametrize(
    "call",
    [
        lambda sae: sae.direction(100),
        lambda sae: sae.direction(-1),
        lambda sae: sae.pre_activations(torch.zeros(16), [0, 100]),
    ],
)
def test_features_that_do_not_exist_are_quoted(sae, call):
    with pytest.raises(ValueError, match=r"feature (100|-1) is not one of this SAE's 0\.\.99"):
        call(sae)


def test_input_of_another_width_is_quoted(sae):
    for call in (sae.encode, sae.fvu, lambda x: sae.pre_activations(x, [0])):
        with pytest.raises(ValueError, match=r"d_model = 16.*\(2, 15\)"):
            call(torch.zeros(2, 15))
