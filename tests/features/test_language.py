"""Discovery of language features on the bundled model, where the answer can be checked."""

import numpy as np
import pytest
import torch
from scipy import stats

from qscope_monitor import bundled, find_language_features, load_saes
from qscope_monitor.behaviours import script_shares
from qscope_monitor.features.evaluation import auroc
from qscope_monitor.features.language import firing_rates
from qscope_monitor.features.promotes import promoted_tokens
from qscope_monitor.features.texts import read_texts
from qscope_monitor.tokens import TokenRules

LANGUAGES = ("en", "zh", "ru", "ko", "de")
TEXTS = {language: bundled.sentences()[language][:24] for language in LANGUAGES}


@pytest.fixture(scope="module")
def bundle():
    return bundled.model(), bundled.tokenizer(), load_saes(bundled.sae_path())


@pytest.fixture(scope="module")
def found(bundle):
    return find_language_features(*bundle, target="zh", texts=TEXTS, features=6, progress=False)


def test_rates_equal_a_text_by_text_count(bundle) -> None:
    model, tokenizer, saes = bundle
    texts = TEXTS["zh"][:3]
    rates = firing_rates(model, tokenizer, saes, {"zh": texts}, [5])[5]["zh"]
    special = TokenRules.from_tokenizer(tokenizer).special_ids
    fired, tokens = np.zeros(saes[5].d_sae), 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = []
            handle = model.model.layers[5].register_forward_hook(lambda m, i, o, h=hidden: h.append(o))
            model(input_ids=torch.tensor([ids]))
            handle.remove()
        residual = hidden[0][0]
        norms = residual[1:].norm(dim=-1)
        for position in range(1, len(ids)):
            if ids[position] in special or norms[position - 1] > 6 * norms.median():
                continue
            pre = (residual[position].double() @ saes[5].W_enc.double().T + saes[5].b_enc.double()).numpy()
            top = np.argsort(-pre)[: saes[5].k]
            fired[top[pre[top] > 0]] += 1
            tokens += 1
    np.testing.assert_allclose(rates.numpy() * tokens, fired, atol=1.01)  # one token may tie at the k-th place
    assert np.abs(rates.numpy() * tokens - fired).sum() <= 4


def test_the_features_found_fire_in_chinese_and_not_elsewhere(found) -> None:
    assert len(found) == 6
    assert found.keys == ("code-switching-zh",)
    for read_out in found:
        assert read_out.evidence["firing_rate_target"] > 5 * read_out.evidence["firing_rate_others"]
        assert read_out.evidence["firing_rate_others"] <= 0.1
    detectors = found.evaluation["detectors"]
    assert detectors["watch list"]["token_auroc"] > 0.85
    assert detectors["watch list"]["window_auroc"] > 0.95
    assert detectors["watch list"]["token_auroc"] > detectors["random features"]["token_auroc"] + 0.1


def test_thresholds_fire_as_often_as_the_top_k(found, bundle) -> None:
    model, tokenizer, saes = bundle
    read_out = found[0]
    survived = above = total = 0
    for entries in TEXTS.values():
        for batch in read_texts(model, tokenizer, entries[0::2], [read_out.layer]):
            x, _ = batch.kept(read_out.layer)
            acts = saes[read_out.layer].encode(x)
            survived += int(((acts.indices == read_out.feature) & acts.active).sum())
            above += int((read_out.score(x) > read_out.threshold).sum())
            total += len(x)
    assert survived > 20
    assert abs(above - survived) <= 0.02 * survived + 2


def test_late_chinese_features_promote_chinese_tokens(found) -> None:
    latest = max(found, key=lambda r: r.layer)
    shares = script_shares("".join(latest.promotes))
    assert max(shares, key=shares.get) == "Han"


def test_promoted_tokens_are_the_logit_lens(bundle) -> None:
    model, tokenizer, saes = bundle
    direction = saes[5].direction(11)
    logits = model.lm_head.weight @ (model.model.norm.weight * direction)
    best = [tokenizer.decode([i]) for i in logits.topk(32).indices.tolist()]
    shown = promoted_tokens(model, tokenizer, direction, limit=5)
    assert [t for t in best if t in shown][:5] == list(shown)


def test_auroc_is_the_mann_whitney_statistic() -> None:
    generator = np.random.default_rng(0)
    positive, negative = generator.integers(0, 5, 40) + 1.0, generator.integers(0, 5, 60).astype(float)
    expected = stats.mannwhitneyu(positive, negative).statistic / (40 * 60)
    assert auroc(positive, negative) == pytest.approx(expected)
    assert np.isnan(auroc(np.array([]), negative))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "xx"}, "unknown language 'xx'"),
        ({"target": "ja"}, "'ja' is not among the languages"),
        ({"texts": {"zh": ["一二三四"] * 4}}, "at least one language beside"),
        ({"texts": {"zh": ["一"], "en": ["a b c"] * 4}}, "at least 4 texts"),
        ({"texts": {"zh": "一二三四五", "en": ["a b c"] * 4}}, "list of at least 4"),
        ({"layers": [1]}, r"no SAE for layers \[1\]"),
        ({"features": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(bundle, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_language_features(*bundle, **{"target": "zh", "texts": TEXTS, "progress": False, **options})


def test_texts_must_be_texts(bundle) -> None:
    model, tokenizer, _ = bundle
    with pytest.raises(ValueError, match=r"texts\[1\] must be a string, got int"):
        list(read_texts(model, tokenizer, ["a b", 3], [5]))
    with pytest.raises(ValueError, match="none of the 2 texts"):
        list(read_texts(model, tokenizer, ["", ""], [5]))
