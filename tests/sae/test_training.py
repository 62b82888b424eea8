import json
import random

import pytest
import torch

from qscope_monitor.residual import capture
from qscope_monitor.sae import CheckpointError, load_saes, train_sae
from qscope_monitor.sae.harvest import harvest

D_MODEL, VOCAB = 16, 60


class Letters:
    """A tokenizer with a token per character, which begins every text with a special token."""

    all_special_ids = (0, 1)

    def __call__(self, text):
        return {"input_ids": [1] + [2 + (ord(c) - 97) % (VOCAB - 2) for c in text]}


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijkl", k=draw.randint(5, 60))) for _ in range(60)]


def collect(model, texts, **changes):
    settings = {"tokens": None, "context": 32, "skip_positions": 4, "max_bytes": 2**30, "seed": 0, "progress": False}
    return harvest(model, Letters(), texts, [0, 2], **(settings | changes))


def train(model, texts, layers=(0, 2), **changes):
    settings = {"expansion": 4, "k": 6, "epochs": 3, "batch_size": 128, "context": 32, "progress": False}
    return train_sae(model, Letters(), texts, layers, **(settings | changes))


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))


def same_rows(a, b):
    """Equal as collections of rows, up to rounding."""
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return (
        a.shape == b.shape and float(distance.min(0).values.max()) < 1e-3 and float(distance.min(1).values.max()) < 1e-3
    )


class TestHarvest:
    def test_every_token_once_except_first_positions_specials_and_padding(self, model, texts):
        found = collect(model, texts)
        expected = {0: [], 2: []}
        for text in texts:
            ids = Letters()(text)["input_ids"]
            for start in range(0, len(ids), 32):
                window = torch.tensor([ids[start : start + 32]])
                with torch.no_grad(), capture(model, [0, 2]) as residual:
                    model(input_ids=window)
                    for layer in (0, 2):
                        expected[layer].append(residual[layer][0, 4:])
        for layer in (0, 2):
            assert same_rows(torch.cat([found.train[layer], found.held_out[layer]]), torch.cat(expected[layer]))
        assert len(found.train[0]) > 10 * len(found.held_out[0]) > 0

    def test_special_tokens_are_left_out_anywhere(self, model):
        class Dots(Letters):
            all_special_ids = (0, 1, 2)  # the letter a too

        def tokens(tokenizer):
            found = harvest(model, tokenizer, ["bbbbbbabababab"] * 30, [1], tokens=None, context=32, skip_positions=4,
                            max_bytes=2**30, seed=0, progress=False)  # fmt: skip
            return len(found.train[1]) + len(found.held_out[1])

        assert tokens(Letters()) - tokens(Dots()) == 4 * 30

    def test_budgets(self, model, texts):
        assert abs(sum(len(x[0]) for x in (collect(model, texts, tokens=500).train,)) - 500) < 80
        small = 1000 * D_MODEL * 2 * 2
        everything = collect(model, texts)
        total = len(everything.train[0]) + len(everything.held_out[0])
        assert everything.train[0].dtype == torch.float32
        with pytest.warns(UserWarning, match=f"{total} tokens of activations need more than max_bytes={small}"):
            found = collect(model, texts, max_bytes=small)
        assert found.train[0].dtype == torch.float16
        assert sum(x.nbytes for part in (found.train, found.held_out) for x in part.values()) <= small
        assert collect(model, texts, max_bytes=total * D_MODEL * 2 * 2).train[0].dtype == torch.float16

    def test_the_model_is_left_as_it_was(self, model, texts):
        model.train()
        model.model.layers[1].eval()
        state = torch.random.get_rng_state()
        try:
            collect(model, texts[:20])
            assert model.training
            assert model.model.layers[0].mlp.training
            assert not model.model.layers[1].mlp.training
        finally:
            model.eval()
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())

    def test_one_long_text_is_split(self, model):
        found = collect(model, ["abcdefghij" * 100])
        assert len(found.held_out[0]) > 0
        with pytest.raises(ValueError, match="1 texts give 1 windows"):
            collect(model, ["abcdefghij"])


def test_training_from_scratch(model, texts):
    saes = train(model, texts, epochs=10)
    assert list(saes) == [0, 2]
    for layer, sae in saes.items():
        assert (sae.layer, sae.k, sae.d_model, sae.d_sae) == (layer, 6, D_MODEL, 4 * D_MODEL)
        report = saes.report[layer]
        assert report.explained_variance > 0.7
        assert report.seconds > 0
        assert sae.meta["training"]["explained_variance"] == report.explained_variance


def test_training_is_deterministic_and_resumes(model, texts, tmp_path, monkeypatch):
    expected = train(model, texts)
    again = train(model, texts)
    assert all(equal(expected[layer], again[layer]) for layer in (0, 2))

    from qscope_monitor.sae import fitting

    original, calls = fitting._Fit.update, []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == expected.report[0].steps + 10:  # in the second layer
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(fitting._Fit, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, texts, checkpoint_dir=tmp_path)
    assert (tmp_path / "layer0.sae.pt").exists()
    assert (tmp_path / "layer2.state.pt").exists()
    calls.clear()
    monkeypatch.setattr(fitting._Fit, "update", lambda self, batch: calls.append(1) or original(self, batch))
    resumed = train(model, texts, checkpoint_dir=tmp_path)
    assert len(calls) == expected.report[2].steps - 9
    assert not (tmp_path / "layer2.state.pt").exists()
    assert all(equal(expected[layer], resumed[layer]) for layer in (0, 2))
    assert resumed.report[0].explained_variance == expected.report[0].explained_variance

    calls.clear()
    finished = train(model, texts, checkpoint_dir=tmp_path)
    assert not calls
    assert equal(finished[2], expected[2])
    assert list(load_saes(tmp_path)) == [0, 2]
    assert json.loads((tmp_path / "config.json").read_text())["k"] == 6
    with pytest.raises(CheckpointError, match=r"layer 0 was trained with \{'seed': 0\}, not \{'seed': 1\}"):
        train(model, texts, checkpoint_dir=tmp_path, seed=1)


def test_training_from_existing_saes(model, texts):
    first = train(model, texts, layers=[1])
    second = train(model, texts, layers=[1], init=first, k=None, lr=0.0, epochs=1)
    assert second[1].k == 6
    torch.testing.assert_close(second[1].W_enc, first[1].W_enc)
    third = train(model, texts, layers=[1], init=first[1])
    assert third.report[1].explained_variance > first.report[1].explained_variance - 0.02
    with pytest.raises(ValueError, match=r"init has no SAE for layers \[2\]"):
        train(model, texts, layers=[1, 2], init=first)


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"layers": []}, "layers is empty"),
        ({"texts": []}, "got 0 items"),
        ({"texts": [1, 2]}, "must be strings"),
        ({"expansion": 0}, "got 0 and None"),
        ({"tokens": 0}, "got 4 and 0"),
        ({"skip_positions": 0}, "at least 1.*got 0"),
        ({"skip_positions": 32}, "less than context = 32, got 32"),
        ({"layers": [7]}, "7"),
    ],
)
def test_wrong_arguments_are_quoted(model, texts, change, quoted):
    with pytest.raises(ValueError, match=quoted):
        train(model, **({"texts": texts} | change))
