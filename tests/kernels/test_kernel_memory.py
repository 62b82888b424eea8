import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qscope_monitor.kernels.sparse_decode import sparse_decode
from qscope_monitor.kernels.topk_encode import topk_encode


class Allocations(TorchDispatchMode):
    """Follows every storage an operation returns: the largest, and the most bytes alive at once, beside `known`."""

    def __init__(self, *known):
        super().__init__()
        self.largest = self.largest_shape = self.live = self.peak = 0
        self.alive = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest_shape = max(self.largest_shape, tensor.numel())
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.known:
                    self.alive[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key):
        self.live -= self.alive.pop(key, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_bytes", [2**20, 8 * 2**20, 2**28])
@pytest.mark.parametrize(("tokens", "d_sae"), [(1000, 20000), (2000, 3072), (200, 3000), (5000, 1000)])
def test_encode_never_holds_all_pre_activations(tokens, d_sae, max_bytes, dtype):
    x, W_enc, b_enc = torch.randn(tokens, 16, dtype=dtype), torch.randn(d_sae, 16, dtype=dtype), torch.randn(d_sae)
    with Allocations(x, W_enc, b_enc) as seen:
        acts = topk_encode(x, W_enc, b_enc, 20, max_bytes=max_bytes)
    outputs = sum(t.nbytes for t in acts)
    assert seen.largest_shape < tokens * d_sae
    assert seen.largest <= max(max_bytes, outputs)
    assert seen.peak <= max_bytes + 2 * outputs


def test_gradients_never_hold_a_row_of_width_d_model_per_slot():
    tokens, d_model, d_sae, k = 2000, 64, 3000, 50
    x, W_enc, b_enc = torch.randn(tokens, d_model, requires_grad=True), torch.randn(d_sae, d_model), torch.randn(d_sae)
    for dtype in (torch.float32, torch.bfloat16):
        W_dec = torch.randn(d_model, d_sae, dtype=dtype)
        acts = topk_encode(x, W_enc.to(dtype), b_enc, k)
        out = sparse_decode(acts.values, acts.indices, W_dec, torch.zeros(d_model))
        with Allocations() as seen:
            out.sum().backward()
        assert seen.largest_shape < tokens * k * d_model / 4
        assert seen.largest_shape < tokens * d_sae


def test_a_frozen_encode_keeps_no_reference_to_the_residual_stream():
    x = torch.randn(10, 8, requires_grad=True) * 1.0
    values = topk_encode(x, torch.randn(20, 8), torch.zeros(20), 4).values
    saved = [t for t in values.grad_fn.next_functions[0][0].saved_tensors if t is not None]
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
