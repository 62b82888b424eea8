"""The same weights in SAELens' TopK SAE, set as its Qwen-Scope loader sets it, must give the same features."""

import pytest
import torch

from qscope_monitor.sae import TopKSAE, load_sae, save_sae

pytestmark = pytest.mark.peers


@pytest.fixture
def sae_lens():
    return pytest.importorskip("sae_lens")


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 64), (64, 512), (512,), (64,))
    sae = TopKSAE(*(torch.randn(*shape, generator=generator) for shape in shapes), k=20, layer=2)
    return save_sae(sae, tmp_path / "layer2.sae.pt")


def theirs_from(sae_lens, file):
    """Load as `qwen_scope_sae_huggingface_loader` does: transposed, fp32, no b_dec before the encoder, no scaling."""
    raw = torch.load(file, weights_only=True)
    config = sae_lens.TopKSAEConfig(d_in=64, d_sae=512, k=20, dtype="float32", device="cpu", apply_b_dec_to_input=False)
    theirs = sae_lens.TopKSAE(config)
    state = {"W_enc": raw["W_enc"].T, "W_dec": raw["W_dec"].T, "b_enc": raw["b_enc"], "b_dec": raw["b_dec"]}
    theirs.load_state_dict(state)
    return theirs


def test_same_features_and_same_reconstruction(sae_lens, file):
    ours, theirs = load_sae(file, k=20), theirs_from(sae_lens, file)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) * 5
    acts = ours.encode(x)
    dense = torch.zeros(100, 512).scatter_(1, acts.indices, acts.values)
    with torch.no_grad():
        expected = theirs.encode(x)
        assert torch.equal(dense > 0, expected > 0)
        torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.decode(acts), theirs.decode(expected), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.direction(7), theirs.W_dec[7].detach())
