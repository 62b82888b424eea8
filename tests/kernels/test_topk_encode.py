import numpy as np
import pytest
import torch

from qscope_monitor.kernels.topk_encode import SparseActivations, topk_encode

FORMS = ("naive", "chunked", "auto")
SHAPES = [
    (1, 8, 1, 1),
    (63, 100, 1000, 50),
    (100, 63, 1000, 1000),
    (7, 5, 63, 1),
    (64, 32, 100, 63),
    (300, 16, 20000, 50),
]


def reference(x, W_enc, b_enc, k):
    """Values and indices per token in numpy, fp64: sort by (-value, index), keep k, drop what is not positive."""
    x, W_enc, b_enc = (t.double().numpy() for t in (x, W_enc, b_enc))
    pre = x @ W_enc.T + b_enc
    columns = np.broadcast_to(np.arange(pre.shape[1]), pre.shape)
    order = np.lexsort((columns, -pre), axis=-1)[:, :k]
    return np.take_along_axis(pre, order, -1), order, pre


def random_case(tokens, d_model, d_sae, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (torch.randn(*s, generator=generator) for s in ((tokens, d_model), (d_sae, d_model), (d_sae,)))
    return x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)


def whole_case(tokens, d_model, d_sae, seed=0):
    """Small whole numbers: sums are exact in every order, and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randint(-2, 3, s, generator=generator) for s in ((tokens, d_model), (d_sae, d_model), (d_sae,)))
    return tuple(t.float() for t in draw)


def check_against_reference(acts, x, W_enc, b_enc, k, tolerance):
    values, _, pre = reference(x, W_enc, b_enc, k)
    scale = np.abs(pre).max()
    expected = np.maximum(values, 0)
    np.testing.assert_allclose(acts.values.double().numpy(), expected, atol=tolerance * scale, rtol=0)
    # what is said to be feature i has feature i's value
    at_index = np.take_along_axis(pre, acts.indices.numpy(), -1)
    active = acts.active.numpy()
    np.testing.assert_allclose(acts.values.double().numpy()[active], at_index[active], atol=tolerance * scale, rtol=0)
    assert (acts.values[~acts.active] == 0).all()
    assert (acts.indices[~acts.active] == 0).all()
    assert torch.equal(acts.active, acts.values > 0)
    for row, on in zip(acts.indices, acts.active):
        assert len(set(row[on].tolist())) == int(on.sum())
    assert (acts.values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "d_model", "d_sae", "k"), SHAPES)
def test_values_agree_with_numpy(form, tokens, d_model, d_sae, k):
    case = random_case(tokens, d_model, d_sae)
    acts = topk_encode(*case, k, form=form)
    assert acts.values.dtype == torch.float32
    assert acts.indices.dtype == torch.int64
    assert acts.finite.all()
    check_against_reference(acts, *case, k, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes_accumulate_in_fp32_or_better(form, dtype):
    case = random_case(63, 100, 1000, dtype)
    acts = topk_encode(*case, 50, form=form)
    assert acts.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_against_reference(acts, *case, 50, tolerance=1e-6)


def test_input_and_weights_may_differ_in_dtype():
    x, W_enc, b_enc = random_case(63, 100, 1000)
    for case in ((x.bfloat16(), W_enc, b_enc), (x, W_enc.half(), b_enc), (x.half(), W_enc.bfloat16(), b_enc)):
        check_against_reference(topk_encode(*case, 50), *case, 50, tolerance=1e-6)


@pytest.mark.parametrize("max_bytes", [1, 2**16, 2**20, 2**28])
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k"), [(63, 5, 1000, 50), (600, 4, 1000, 1), (9, 6, 100, 100), (5, 4, 40000, 60)]
)
def test_ties_go_to_the_lowest_index_whatever_the_chunks(max_bytes, tokens, d_model, d_sae, k):
    case = whole_case(tokens, d_model, d_sae)
    values, indices, _ = reference(*case, k)
    for form in FORMS:
        acts = topk_encode(*case, k, form=form, max_bytes=max_bytes)
        assert np.array_equal(acts.values.numpy(), np.maximum(values, 0))
        assert np.array_equal(acts.indices.numpy(), np.where(values > 0, indices, 0))


@pytest.mark.parametrize("form", FORMS)
def test_equal_rows_take_the_first_features(form):
    acts = topk_encode(torch.ones(3, 4), torch.ones(1000, 4), torch.zeros(1000), 63, form=form)
    assert torch.equal(acts.indices, torch.arange(63).expand(3, 63))
    assert (acts.values == 4).all()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_positive_nothing_active(form):
    acts = topk_encode(torch.ones(3, 4), -torch.ones(1000, 4), torch.zeros(1000), 63, form=form)
    assert not acts.active.any()
    assert acts.finite.all()
    assert acts.values.eq(0).all()
    assert acts.indices.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_zero_is_not_active(form):
    b_enc = torch.tensor([0.0, -0.0, 1.0, -1.0])
    acts = topk_encode(torch.zeros(1, 2), torch.ones(4, 2), b_enc, 4, form=form)
    assert acts.indices.tolist() == [[2, 0, 0, 0]]
    assert acts.active.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_are_not_finite_are_flagged_and_leave_the_others_alone(form, bad):
    x, W_enc, b_enc = random_case(20, 16, 1000)
    clean = topk_encode(x, W_enc, b_enc, 10, form=form)
    x[3, 5] = bad
    acts = topk_encode(x, W_enc, b_enc, 10, form=form)
    assert (~acts.finite).nonzero().flatten().tolist() == [3]
    assert not acts.active[3].any()
    assert acts.values[3].eq(0).all()
    rest = torch.arange(20) != 3
    torch.testing.assert_close(acts.values[rest], clean.values[rest])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_a_pre_activation_that_is_not_finite_takes_the_token_out(form, bad):
    x, W_enc, b_enc = random_case(4, 16, 1000)
    b_enc[777] = bad
    acts = topk_encode(x, W_enc, b_enc, 10, form=form)
    assert not acts.finite.any()
    assert not acts.active.any()


@pytest.mark.parametrize("form", FORMS)
def test_fp32_overflow_is_seen(form):
    W_enc = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    acts = topk_encode(torch.tensor([[3e38, 3e38], [1.0, 1.0]]), W_enc, torch.zeros(2), 1, form=form)
    assert acts.finite.tolist() == [False, True]


@pytest.mark.parametrize("form", FORMS)
def test_leading_shapes_and_empty_input(form):
    x, W_enc, b_enc = random_case(24, 16, 100)
    flat = topk_encode(x, W_enc, b_enc, 5, form=form)
    for shape in ((2, 3, 4), (24,), (4, 6)):
        acts = topk_encode(x.view(*shape, 16), W_enc, b_enc, 5, form=form)
        assert acts.values.shape == acts.indices.shape == acts.active.shape == (*shape, 5)
        assert acts.finite.shape == shape
        assert torch.equal(acts.indices.reshape(24, 5), flat.indices)
    single = topk_encode(x[0], W_enc, b_enc, 5, form=form)
    assert single.values.shape == (5,)
    assert single.finite.shape == ()
    empty = topk_encode(x[:0].view(0, 3, 16), W_enc, b_enc, 5, form=form)
    assert empty.values.shape == (0, 3, 5)
    assert empty.finite.shape == (0, 3)
    assert topk_encode(x.T.contiguous().T, W_enc, b_enc, 5, form=form).indices.equal(flat.indices)


def test_autocast_changes_nothing():
    case = random_case(20, 64, 500)
    for form in FORMS:
        plain = topk_encode(*case, 8, form=form)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = topk_encode(*case, 8, form=form)
        assert all(torch.equal(a, b) for a, b in zip(plain, under))


def test_random_state_and_arguments_are_left_alone():
    case = random_case(20, 64, 500)
    copies = [t.clone() for t in case]
    state = torch.random.get_rng_state()
    topk_encode(*case, 8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(case, copies))


def test_record_helpers():
    acts = topk_encode(torch.eye(3), torch.eye(3), torch.zeros(3), 2)
    assert isinstance(acts, SparseActivations)
    assert acts.k == 2
    assert acts.l0().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "error", "quoted"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"d_model = 4.*\(2, 5\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"\(\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "int64"),
        ({"x": [[0.0] * 4]}, TypeError, "list"),
        ({"W_enc": torch.zeros(8)}, ValueError, r"\(8,\)"),
        ({"W_enc": torch.zeros(0, 4), "b_enc": torch.zeros(0)}, ValueError, r"\(0, 4\)"),
        ({"b_enc": torch.zeros(7)}, ValueError, r"d_sae = 8.*\(7,\)"),
        ({"b_enc": torch.zeros(8, dtype=torch.bool)}, TypeError, "bool"),
        ({"k": 0}, ValueError, "got 0"),
        ({"k": 9}, ValueError, "d_sae = 8, got 9"),
        ({"k": 2.5}, TypeError, "2.5"),
        ({"k": True}, TypeError, "True"),
        ({"form": "fast"}, ValueError, "'fast'"),
        ({"max_bytes": 0}, ValueError, "got 0"),
        ({"x": torch.zeros(2, 4, device="meta")}, ValueError, "meta.*cpu"),
    ],
)
def test_wrong_arguments_are_quoted(change, error, quoted):
    arguments = {"x": torch.zeros(2, 4), "W_enc": torch.zeros(8, 4), "b_enc": torch.zeros(8), "k": 2} | change
    with pytest.raises(error, match=quoted):
        topk_encode(**arguments)


def test_numpy_integers_are_integers():
    assert topk_encode(torch.eye(3), torch.eye(3), torch.zeros(3), np.int64(2)).k == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_numpy_within_the_memory_bound(dtype):
    case = random_case(3000, 256, 40000, dtype)
    on_device = [t.cuda() for t in case]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    acts = topk_encode(*on_device, 50, max_bytes=64 * 2**20)
    outputs = sum(t.nbytes for t in acts)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20 + 2 * outputs
    check_against_reference(SparseActivations(*(t.cpu() for t in acts)), *case, 50, tolerance=1e-5)
    exact = whole_case(600, 4, 1000)
    ours, truth = topk_encode(*(t.cuda() for t in exact), 50), topk_encode(*exact, 50, form="naive")
    assert torch.equal(ours.indices.cpu(), truth.indices)
