import pytest
import torch

from qscope_monitor.kernels.sparse_decode import sparse_decode
from qscope_monitor.kernels.topk_encode import topk_encode


def parts(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("form", ["naive", "chunked"])
@pytest.mark.parametrize(("tokens", "d_model", "d_sae", "k"), [(7, 5, 30, 4), (3, 6, 10, 10), (1, 2, 1, 1)])
def test_encode_gradcheck(form, tokens, d_model, d_sae, k):
    case = parts((tokens, d_model), (d_sae, d_model), (d_sae,))
    assert torch.autograd.gradcheck(lambda *a: topk_encode(*a, k, form=form).values, case)


@pytest.mark.parametrize("column_major", [False, True])
def test_decode_gradcheck(column_major):
    values, W_dec, b_dec = parts((2, 3, 4), (5, 30), (5,))
    if column_major:
        W_dec = W_dec.detach().T.contiguous().T.requires_grad_()
    indices = torch.randint(0, 30, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda v, w, b: sparse_decode(v, indices, w, b), (values, W_dec, b_dec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k"), [(63, 100, 1000, 50), (100, 63, 1000, 1), (7, 16, 63, 63)]
)
def test_encode_gradients_equal_those_of_the_ground_truth(dtype, tokens, d_model, d_sae, k):
    weight = torch.randn(tokens, k, generator=torch.Generator().manual_seed(2))
    grads = {}
    for form in ("naive", "chunked"):
        x, W_enc, b_enc = (
            t.detach().to(dtype).requires_grad_() for t in parts((tokens, d_model), (d_sae, d_model), (d_sae,))
        )
        (topk_encode(x, W_enc, b_enc, k, form=form).values * weight).sum().backward()
        grads[form] = x.grad, W_enc.grad, b_enc.grad
        assert all(g.dtype == dtype for g in grads[form])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, truth in zip(grads["chunked"], grads["naive"]):
        torch.testing.assert_close(
            ours.float(), truth.float(), rtol=tolerance, atol=tolerance * float(truth.abs().max())
        )


def test_gradients_by_their_formulas():
    x, W_enc, b_enc = parts((6, 4), (20, 4), (20,))
    acts = topk_encode(x, W_enc, b_enc, 5)
    g = torch.randn(6, 5, dtype=torch.float64)
    acts.values.backward(g)
    dx, dW, db = torch.zeros(6, 4).double(), torch.zeros(20, 4).double(), torch.zeros(20).double()
    for t, j in acts.active.nonzero().tolist():
        i = int(acts.indices[t, j])
        dx[t] += g[t, j] * W_enc[i]
        dW[i] += g[t, j] * x[t]
        db[i] += g[t, j]
    for ours, truth in ((x.grad, dx), (W_enc.grad, dW), (b_enc.grad, db)):
        torch.testing.assert_close(ours, truth.detach())


@pytest.mark.parametrize("form", ["naive", "chunked"])
def test_a_token_that_is_not_finite_poisons_no_gradient(form):
    x, W_enc, b_enc = (t.detach().float().requires_grad_() for t in parts((6, 4), (20, 4), (20,)))
    with torch.no_grad():
        x[2, 1] = float("nan")
    topk_encode(x, W_enc, b_enc, 5, form=form).values.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, W_enc, b_enc))
    assert x.grad[2].eq(0).all()


def test_unused_slots_give_feature_zero_no_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    W_enc = (-torch.ones(10, 3)).requires_grad_()
    b_enc = torch.zeros(10, requires_grad=True)
    topk_encode(x, W_enc, b_enc, 4).values.sum().backward()
    assert all(t.grad.eq(0).all() for t in (x, W_enc, b_enc))


def test_only_what_is_asked_for_gets_a_gradient():
    x, W_enc, b_enc = parts((6, 4), (20, 4), (20,))
    topk_encode(x, W_enc.detach(), b_enc.detach(), 5).values.sum().backward()
    assert x.grad is not None
    acts = topk_encode(x.detach(), W_enc.detach(), b_enc.detach(), 5)
    assert not acts.values.requires_grad
    for tensor in topk_encode(x, W_enc, b_enc, 5)[1:]:
        assert not tensor.requires_grad


def test_backward_under_autocast_equals_backward_without():
    grads = []
    for enabled in (False, True):
        x, W_enc, b_enc = (t.detach().float().requires_grad_() for t in parts((6, 4), (20, 4), (20,)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            acts = topk_encode(x, W_enc, b_enc, 5)
            sparse_decode(acts.values, acts.indices, W_enc.T, torch.zeros(4)).square().sum().backward()
        grads.append((x.grad, W_enc.grad, b_enc.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_weight_gradients_are_the_same_every_time():
    def run():
        x, W_enc, b_enc = (t.detach().float().requires_grad_() for t in parts((500, 16), (50, 16), (50,)))
        acts = topk_encode(x, W_enc, b_enc, 8)
        sparse_decode(acts.values, acts.indices, W_enc.T, b_enc[:16]).square().sum().backward()
        return x.grad, W_enc.grad, b_enc.grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))
