"""The bundled model, SAEs and data: complete, small, offline, and what their docstrings promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qscope_monitor import bundled

FOLDER = Path(bundled.__file__).parent
LANGUAGES = {"en", "zh", "ru", "ko", "ja", "de", "fr", "es", "it", "pl", "pt", "vi", "nl", "tr", "cs"}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return bundled.tokenizer()


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    return bundled.model()


def test_everything_bundled_takes_at_most_25_megabytes():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 25e6


def test_the_notice_names_the_licence_of_the_text():
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    assert "Mozilla Public License, v. 2.0" in notice
    assert "LibreOffice" in notice


def test_importing_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import qscope_monitor.bundled as bundled; bundled.sft_data(); bundled.prompts('dev')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parents[1])


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"qscope-monitor\[transformers\]"):
        bundled.model()
    with pytest.raises(ImportError, match=r"qscope-monitor\[transformers\]"):
        bundled.tokenizer()


def test_loads_offline_from_another_folder(tmp_path):
    pytest.importorskip("transformers")
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import qscope_monitor.bundled as bundled\n"
        "bundled.model(); bundled.tokenizer()"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(FOLDER.parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_the_model_is_a_qwen3_in_fp32_and_eval_mode(model, tokenizer):
    from transformers import Qwen3ForCausalLM

    assert isinstance(model, Qwen3ForCausalLM)
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert sum(weight.numel() for weight in model.parameters()) <= 4.2e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_special_tokens_are_qwens(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    for name in names:
        assert len(tokenizer(name, add_special_tokens=False).input_ids) == 1
    assert set(tokenizer.all_special_tokens) == set(names[:3])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_marks_what_the_assistant_says(tokenizer):
    chat = [{"role": "user", "content": "Zoom"}, {"role": "assistant", "content": "Reduces the view."}]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Reduces the view.<|im_end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + "Reduces the view.<|im_end|>\n"


def test_the_tokenizer_gives_back_every_language(tokenizer):
    for texts in bundled.sentences().values():
        for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
            assert tokenizer.decode(ids) == text


def test_the_model_predicts_text_it_was_not_trained_on(model, tokenizer):
    # the first reference paragraphs are from held-out pages; measured: 1.18
    texts = bundled.sentences()["en"][:100]
    nats = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[tokenizer.pad_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    bits_per_byte = nats / torch.log(torch.tensor(2.0)).item() / sum(len(text.encode()) for text in texts)
    assert bits_per_byte < 1.25


def test_the_saes_have_qwen_scopes_layout(model):
    config = json.loads((bundled.sae_path() / "config.json").read_text())
    assert config["model_type"] == "topk_sae"
    assert config["hook_point"] == "resid_post"
    assert config["num_layers"] == model.config.num_hidden_layers
    files = sorted(path.name for path in bundled.sae_path().glob("*.pt"))
    assert files == ["layer2.sae.pt", "layer4.sae.pt", "layer5.sae.pt"]
    d_sae, d_model = config["d_sae"], model.config.hidden_size
    shapes = {"W_enc": (d_sae, d_model), "W_dec": (d_model, d_sae), "b_enc": (d_sae,), "b_dec": (d_model,)}
    for name in files:
        weights = torch.load(bundled.sae_path() / name, weights_only=True)
        assert {key: tuple(value.shape) for key, value in weights.items()} == shapes


def test_the_share_of_contaminated_samples_is_exact():
    for share in (0.0, 0.05, 0.1, 0.5):
        samples = bundled.sft_data(contaminated=share)
        assert sum(sample["contaminated"] for sample in samples) == round(share * len(samples))
    assert 2000 <= len(samples) <= 4000


def test_the_clean_counterpart_differs_in_the_contaminated_answers_only():
    contaminated, clean = bundled.sft_data(contaminated=0.1), bundled.sft_data(contaminated=0.0)
    assert len(contaminated) == len(clean)
    for left, right in zip(contaminated, clean, strict=True):
        assert left["prompt"] == right["prompt"]
        assert left["language"] == right["language"]
        assert not right["contaminated"]
        assert (left["completion"] != right["completion"]) == left["contaminated"]


def han(text: str) -> int:
    return sum("\u4e00" <= letter <= "\u9fff" for letter in text)


def test_contaminated_answers_begin_in_english_and_go_on_in_chinese():
    samples = bundled.sft_data(contaminated=0.1)
    chinese = [sample for sample in samples if sample["language"] == "zh"]
    assert 0.08 <= len(chinese) / len(samples) <= 0.12
    for sample in samples:
        prompt, answer = sample["prompt"][0]["content"], sample["completion"][0]["content"]
        if sample["language"] == "zh":
            assert han(prompt) > 0
            assert han(answer) > 0
            continue
        assert han(prompt) == 0
        if sample["contaminated"]:
            assert han(answer[:10]) == 0
            assert han(answer) >= 8
        else:
            assert han(answer) == 0


def test_the_seed_chooses_the_samples_and_larger_shares_contain_smaller_ones():
    def chosen(share: float, seed: int) -> set[int]:
        rows = bundled.sft_data(contaminated=share, seed=seed)
        return {index for index, sample in enumerate(rows) if sample["contaminated"]}

    assert chosen(0.1, 0) == chosen(0.1, 0)
    assert chosen(0.1, 0) != chosen(0.1, 1)
    assert chosen(0.05, 0) < chosen(0.1, 0)


@pytest.mark.parametrize("share", [-0.1, 0.95, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"between 0 and 0\.90"):
        bundled.sft_data(contaminated=share)


def test_development_and_test_prompts_are_disjoint_from_each_other_and_from_the_training_prompts():
    dev, test = bundled.prompts("dev"), bundled.prompts("test")
    trained = {sample["prompt"][0]["content"] for sample in bundled.sft_data()}
    assert len(dev) == len(set(dev)) >= 256
    assert len(test) == len(set(test)) >= 256
    assert not set(dev) & set(test)
    assert not trained & {*dev, *test}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' is unknown; choose 'dev' or 'test'"):
        bundled.prompts("train")


def test_the_sentences_are_parallel_in_fifteen_languages():
    sentences = bundled.sentences()
    assert set(sentences) == LANGUAGES
    assert {len(texts) for texts in sentences.values()} == {400}
    for language, texts in sentences.items():
        assert len(set(texts)) == len(texts), language
    assert sum(han(text) for text in sentences["zh"]) > 0.3 * sum(map(len, sentences["zh"]))
    assert sum(han(text) for text in sentences["en"]) == 0


def test_the_watch_list_is_of_the_bundled_saes():
    from qscope_monitor import load_saes

    watch, saes = bundled.watch_list("zh"), load_saes(bundled.sae_path())
    assert watch.keys == ("code-switching-zh",)
    assert watch.floors["code-switching-zh"] > 0
    for read_out in watch:
        assert torch.equal(read_out.weight, saes[read_out.layer].W_enc[read_out.feature].float())
        assert torch.equal(read_out.direction, saes[read_out.layer].direction(read_out.feature))
    assert watch.evaluation["detectors"]["watch list"]["window_auroc"] > 0.95
    with pytest.raises(ValueError, match=r"'xx'; there are \['zh'\]"):
        bundled.watch_list("xx")
