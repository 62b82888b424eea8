import numpy as np
import pytest
import torch

from qscope_monitor.kernels.sparse_decode import sparse_decode


def case(shape, k, d_model, d_sae, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(*shape, k, generator=generator)
    indices = torch.randint(0, d_sae, (*shape, k), generator=generator)
    W_dec, b_dec = torch.randn(d_model, d_sae, generator=generator), torch.randn(d_model, generator=generator)
    return values, indices, W_dec.to(dtype), b_dec.to(dtype)


def dense(values, indices, W_dec, b_dec):
    """By way of the dense activations, in numpy, fp64; repeated indices add up."""
    flat, columns = (
        values.double().numpy().reshape(-1, values.shape[-1]),
        indices.numpy().reshape(-1, indices.shape[-1]),
    )
    acts = np.zeros((len(flat), W_dec.shape[1]))
    for row in range(len(flat)):
        np.add.at(acts[row], columns[row], flat[row])
    out = acts @ W_dec.double().numpy().T + b_dec.double().numpy()
    return out.reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(
    ("shape", "k", "d_model", "d_sae"), [((63,), 50, 100, 1000), ((4, 7), 1, 63, 100), ((1,), 7, 5, 7), ((), 3, 4, 9)]
)
def test_equals_the_dense_product(dtype, column_major, shape, k, d_model, d_sae):
    values, indices, W_dec, b_dec = case(shape, k, d_model, d_sae, dtype)
    if column_major:
        W_dec = W_dec.T.contiguous().T
    out = sparse_decode(values, indices, W_dec, b_dec)
    assert out.dtype == torch.float32
    assert out.shape == (*shape, d_model)
    np.testing.assert_allclose(out.numpy(), dense(values, indices, W_dec, b_dec), rtol=1e-5, atol=1e-4)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    whole = sparse_decode(*case((20,), 5, 64, 100))
    monkeypatch.setattr("qscope_monitor.kernels.sparse_decode._BLOCK_BYTES", 3000)
    torch.testing.assert_close(sparse_decode(*case((20,), 5, 64, 100)), whole)


def test_a_feature_is_a_column():
    W_dec = torch.arange(12.0).view(3, 4)
    out = sparse_decode(torch.tensor([[2.0]]), torch.tensor([[1]]), W_dec, torch.zeros(3))
    assert out.tolist() == [[2.0, 10.0, 18.0]]


def test_no_activation_gives_the_bias_and_no_token_gives_nothing():
    W_dec, b_dec = torch.randn(5, 9), torch.randn(5)
    out = sparse_decode(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), W_dec, b_dec)
    assert torch.equal(out, b_dec.expand(2, 5))
    assert sparse_decode(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), W_dec, b_dec).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "error", "quoted"),
    [
        ({"values": torch.zeros(2, 3).half()}, TypeError, "float16"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "int32"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"\(2, 3\).*\(2, 4\)"),
        ({"indices": torch.full((2, 3), 9)}, ValueError, r"0\.\.8.*9\.\.9"),
        ({"indices": torch.full((2, 3), -1)}, ValueError, r"-1\.\.-1"),
        ({"W_dec": torch.zeros(5, 9, dtype=torch.int8)}, TypeError, "int8"),
        ({"b_dec": torch.zeros(9)}, ValueError, r"\(5, 9\).*\(9,\)"),
        ({"W_dec": torch.zeros(5, 9, device="meta")}, ValueError, "cpu.*meta"),
    ],
)
def test_wrong_arguments_are_quoted(change, error, quoted):
    arguments = {
        "values": torch.zeros(2, 3), "indices": torch.zeros(2, 3, dtype=torch.int64),
        "W_dec": torch.zeros(5, 9), "b_dec": torch.zeros(5),
    }  # fmt: skip
    with pytest.raises(error, match=quoted):
        sparse_decode(**(arguments | change))
