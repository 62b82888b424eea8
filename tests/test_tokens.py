from __future__ import annotations

import pytest
import torch

from qscope_monitor.tokens import Segment, TokenBatch, TokenRules, drop_norm_outliers

PAD, EOS, THINK, END_THINK = 0, 1, 2, 3
RULES = TokenRules({PAD, EOS}, thinking=(THINK, END_THINK))
P, T, A = Segment.PROMPT, Segment.THINKING, Segment.ANSWER


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def counts(batch: TokenBatch) -> dict[str, int]:
    return {reason: int(n) for reason, n in batch.excluded.items()}


def accounted(batch: TokenBatch) -> bool:
    """Every token is either kept or excluded for exactly one reason."""
    return int(batch.keep.sum()) + sum(counts(batch).values()) == batch.keep.numel()


def test_right_padding() -> None:
    ids = torch.tensor([[10, 11, 12, EOS, PAD, PAD], [10, 11, 12, 13, 14, EOS]])
    batch = RULES.batch(ids, attention_mask=(ids != PAD).long())
    assert batch.keep.tolist() == [[False, True, True, False, False, False], [False, True, True, True, True, False]]
    assert batch.sequence.tolist() == [[0, 0, 0, 0, -1, -1], [1] * 6]
    assert batch.num_sequences == 2
    assert counts(batch) == {"padding": 2, "position_0": 2, "special": 2}
    assert accounted(batch)
    assert batch.segment.dtype == torch.int8
    assert set(batch.segment[batch.keep].tolist()) == {A}
    assert torch.equal(batch.response, ids != PAD)


@pytest.mark.parametrize("filler", [0, 1])
@pytest.mark.parametrize("with_positions", [True, False])
def test_left_padding(filler: int, with_positions: bool) -> None:
    ids = torch.tensor([[PAD, PAD, 10, 11, 12], [10, 11, 12, 13, 14]])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)  # what generate() passes
    batch = RULES.batch(ids, mask, position_ids=positions if with_positions else None)
    assert batch.keep.tolist() == [[False, False, False, True, True], [False, True, True, True, True]]
    assert batch.sequence.tolist() == [[-1, -1, 0, 0, 0], [1] * 5]
    assert batch.num_sequences == 2
    assert counts(batch) == {"padding": 2, "position_0": 2, "special": 0}


def test_masks_of_other_types_agree() -> None:
    ids = torch.tensor([[PAD, PAD, 10, 11, 12], [10, 11, 12, PAD, PAD]])
    flat = ids != PAD
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    square = (causal & flat[:, None, :])[:, None]  # [batch, 1, query, key]
    unmasked = square.clone()
    unmasked[0, :, :2] = True  # rows that see nothing are made to see everything
    additive = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    infinite = torch.zeros(square.shape).masked_fill(~square, -torch.inf)
    expected = RULES.batch(ids, flat)
    for mask in (flat.long(), flat.float(), square, unmasked, additive, infinite, square.expand(2, 3, 5, 5)):
        got = RULES.batch(ids, mask)
        assert torch.equal(got.keep, expected.keep)
        assert torch.equal(got.sequence, expected.sequence)


def test_a_row_of_padding_keeps_its_number() -> None:
    ids = torch.tensor([[PAD, PAD], [10, 11]])
    batch = RULES.batch(ids, ids != PAD)
    assert batch.sequence.tolist() == [[-1, -1], [1, 1]]
    assert batch.num_sequences == 2


DOCUMENTS = [[10, 11, 12, EOS], [20, THINK, 21, 22, END_THINK, 23, EOS], [30, 31], [40]]


def by_sequence(batch: TokenBatch) -> list[list[tuple[int, int]]]:
    """Kept (id, segment) pairs of each sequence that has any token, in order."""
    result = []
    for number in range(batch.num_sequences):
        here = batch.sequence == number
        if here.any():
            kept = here & batch.keep
            result.append(list(zip(batch.input_ids[kept].tolist(), batch.segment[kept].tolist())))
    return result


def padded(left: bool = False) -> TokenBatch:
    width = max(map(len, DOCUMENTS))
    fill = [[PAD] * (width - len(d)) for d in DOCUMENTS]
    ids = torch.tensor([f + d if left else d + f for d, f in zip(DOCUMENTS, fill)])
    return RULES.batch(ids, ids != PAD, labels=ids.masked_fill(ids == PAD, -100))


def test_packing_keeps_the_same_tokens() -> None:
    flat = torch.tensor([[token for document in DOCUMENTS for token in document]])
    positions = torch.tensor([[i for d in DOCUMENTS for i in range(len(d))]])
    bounds = torch.tensor([0, *(len(d) for d in DOCUMENTS)]).cumsum(0).int()
    by_positions = RULES.batch(flat, labels=flat, position_ids=positions)
    by_bounds = RULES.batch(flat, labels=flat, position_ids=positions, cu_seq_lens=bounds)
    expected = by_sequence(padded())
    assert len(expected) == 4
    assert by_sequence(padded(left=True)) == expected
    assert by_sequence(by_positions) == expected
    assert by_sequence(by_bounds) == expected
    assert by_positions.num_sequences == by_bounds.num_sequences == 4
    assert counts(by_positions) == counts(by_bounds) == {"padding": 0, "position_0": 4, "special": 4}


def test_packed_rows_with_positions() -> None:
    # bfd packing: two rows, each with documents of its own, right-padded
    ids = torch.tensor([[10, 11, 20, 21, 22], [30, 31, 32, PAD, PAD]])
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]])
    batch = RULES.batch(ids, ids != PAD, position_ids=positions)
    assert batch.sequence.tolist() == [[0, 0, 1, 1, 1], [2, 2, 2, -1, -1]]
    assert batch.num_sequences == 3
    assert counts(batch) == {"padding": 2, "position_0": 3, "special": 0}


def test_one_row_of_positions_serves_the_batch() -> None:
    ids = torch.tensor([[10, 11, 12], [20, 21, 22]])
    batch = RULES.batch(ids, position_ids=torch.arange(3)[None])
    assert batch.sequence.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert torch.equal(batch.keep, RULES.batch(ids).keep)


def test_multimodal_positions() -> None:
    ids = row(10, 11, 12, 13, 20, 21)
    four = torch.tensor([[[0, 1, 2, 3, 0, 1]]]).repeat(4, 1, 1)
    assert RULES.batch(ids, position_ids=four).sequence.tolist() == [[0, 0, 0, 0, 1, 1]]
    image_first = torch.tensor([[[0, 0, 0, 0, 2, 3]]]).repeat(3, 1, 1)  # four patches share time 0
    assert RULES.batch(ids, position_ids=image_first).sequence.tolist() == [[0] * 6]


def test_tokens_behind_the_last_boundary_are_padding() -> None:
    batch = RULES.batch(row(10, 11, 20, 21, PAD, PAD), cu_seq_lens=torch.tensor([0, 2, 4], dtype=torch.int32))
    assert batch.sequence.tolist() == [[0, 0, 1, 1, -1, -1]]
    assert batch.num_sequences == 2
    assert counts(batch) == {"padding": 2, "position_0": 2, "special": 0}


def test_empty_documents_in_the_boundaries() -> None:
    batch = RULES.batch(row(10, 11, 20, 21), cu_seq_lens=torch.tensor([0, 2, 2, 4]))
    assert batch.sequence.tolist() == [[0, 0, 1, 1]]
    assert batch.num_sequences == 3  # an upper bound


def test_labels_are_unshifted_and_mark_the_response() -> None:
    ids = row(10, 11, 12, 13, EOS)
    batch = RULES.batch(ids, labels=row(-100, -100, 12, 13, EOS))
    assert batch.response.tolist() == [[False, False, True, True, True]]
    assert batch.segment.tolist() == [[P, P, A, A, A]]
    assert batch.keep.tolist() == [[False, True, True, True, False]]


def test_response_mask_goes_before_labels() -> None:
    batch = RULES.batch(row(10, 11, 12), labels=row(10, 11, 12), response_mask=row(0, 0, 1))
    assert batch.segment.tolist() == [[P, P, A]]


def test_without_labels_everything_is_answer() -> None:
    batch = RULES.batch(row(10, 11, 12))
    assert batch.segment.tolist() == [[A, A, A]]


def test_thinking_segments() -> None:
    ids = row(10, 11, THINK, 12, 13, END_THINK, 14, EOS)
    batch = RULES.batch(ids, labels=row(-100, -100, *ids[0, 2:].tolist()))
    assert batch.segment.tolist() == [[P, P, T, T, T, A, A, A]]
    assert batch.keep.tolist() == [[False, True, False, True, True, False, True, False]]


def test_unclosed_thinking_runs_to_the_end_of_its_sequence() -> None:
    ids = row(10, THINK, 11, 12, 20, 21, 22)
    batch = RULES.batch(ids, cu_seq_lens=torch.tensor([0, 4, 7]))
    assert batch.segment.tolist() == [[A, T, T, T, A, A, A]]
    two_rows = RULES.batch(torch.tensor([[10, THINK, 11], [20, 21, 22]]))
    assert two_rows.segment.tolist() == [[A, T, T], [A, A, A]]


def test_thinking_opened_by_the_prompt_template() -> None:
    ids = row(10, 11, THINK, 12, 13, END_THINK, 14)
    batch = RULES.batch(ids, response_mask=row(0, 0, 0, 1, 1, 1, 1))
    assert batch.segment.tolist() == [[P, P, P, T, T, A, A]]
    closed = RULES.batch(row(10, THINK, END_THINK, 12, 13), response_mask=row(0, 0, 0, 1, 1))  # thinking switched off
    assert closed.segment.tolist() == [[P, P, P, A, A]]


def test_closing_marker_alone_and_several_passages() -> None:
    assert RULES.batch(row(10, 11, END_THINK, 12)).segment.tolist() == [[A, A, A, A]]
    ids = row(10, THINK, 11, END_THINK, 12, THINK, 13, END_THINK, 14)
    assert RULES.batch(ids).segment.tolist() == [[A, T, T, A, A, T, T, A, A]]


def test_models_without_thinking() -> None:
    batch = TokenRules({PAD}).batch(row(10, THINK, 12))
    assert batch.segment.tolist() == [[A, A, A]]
    assert batch.keep.tolist() == [[False, True, True]]
    assert TokenRules().batch(row(10, 11)).keep.tolist() == [[False, True]]


def test_grpo_layout() -> None:
    # prompts padded left, completions padded right, as GRPO concatenates them; labels -100 but for the completion
    prompt = torch.tensor([[PAD, PAD, 10, 11], [10, 11, 12, 13]])
    completion = torch.tensor([[THINK, 20, END_THINK, 21, EOS], [22, EOS, PAD, PAD, PAD]])
    ids = torch.cat([prompt, completion], 1)
    mask = (ids != PAD).long()
    labels = torch.cat([torch.full_like(prompt, -100), completion.masked_fill(completion == PAD, -100)], 1)
    batch = RULES.batch(ids, mask, labels)
    assert batch.segment.tolist() == [[P, P, P, P, T, T, A, A, A], [P, P, P, P, A, A, P, P, P]]
    assert batch.input_ids[batch.keep].tolist() == [11, 20, 21, 11, 12, 13, 22]
    assert batch.input_ids[batch.keep & batch.response].tolist() == [20, 21, 22]
    assert batch.num_sequences == 2
    assert accounted(batch)
    full = torch.cat([torch.zeros_like(prompt), (completion != PAD).long()], 1)
    assert torch.equal(RULES.batch(ids, mask, response_mask=full).segment, batch.segment)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": torch.zeros(1, 2)}, r"labels has shape \(1, 2\), input_ids \(1, 3\)"),
        ({"response_mask": torch.zeros(3)}, "response_mask has shape"),
        ({"attention_mask": torch.zeros(1, 2)}, "attention_mask has shape"),
        ({"attention_mask": torch.zeros(1, 1, 1, 3)}, "attention_mask has shape"),
        ({"position_ids": torch.zeros(1, 4)}, "position_ids has shape"),
    ],
)
def test_shapes_that_do_not_match(kwargs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RULES.batch(row(10, 11, 12), **kwargs)
    with pytest.raises(ValueError, match=r"\[batch, seq\]"):
        RULES.batch(torch.tensor([1, 2]))


def test_norm_outliers() -> None:
    torch.manual_seed(0)
    ids = torch.arange(10, 50).view(2, 20)
    batch = RULES.batch(ids)
    residual = torch.nn.functional.normalize(torch.randn(2, 20, 8), dim=-1)
    residual[:, 0] *= 1000  # position 0 must not move the median, nor be counted twice
    residual[0, 5] *= 6.5
    residual[0, 6] *= 5.5
    residual[1, 3, 2] = float("nan")
    residual[1, 4, 2] = float("inf")
    dropped = drop_norm_outliers(batch, residual)
    assert (batch.keep & ~dropped.keep).nonzero().tolist() == [[0, 5], [1, 3], [1, 4]]
    assert counts(dropped) == {"padding": 0, "position_0": 2, "special": 0, "non_finite": 2, "norm_outlier": 1}
    assert accounted(dropped)
    assert "norm_outlier" not in batch.excluded
    again = drop_norm_outliers(dropped, residual)
    assert torch.equal(again.keep, dropped.keep)
    assert counts(again) == counts(dropped)
    other_layer = residual.clone()
    other_layer[0, 7] *= 100
    assert counts(drop_norm_outliers(dropped, other_layer))["norm_outlier"] == 2


def test_norm_outliers_in_low_precision_and_without_tokens() -> None:
    batch = RULES.batch(row(10, 11, 12, 13))
    residual = torch.ones(1, 4, 8, dtype=torch.float16)
    residual[0, 2] = 60000  # the norm itself is beyond fp16
    assert drop_norm_outliers(batch, residual).keep.tolist() == [[False, True, False, True]]
    nothing = RULES.batch(row(10))
    assert counts(drop_norm_outliers(nothing, residual[:, :1]))["norm_outlier"] == 0
    with pytest.raises(ValueError, match="residual has shape"):
        drop_norm_outliers(batch, residual[:, :2])
    with pytest.raises(ValueError, match="factor must exceed 1"):
        drop_norm_outliers(batch, residual, factor=1.0)


def tokenizer(*, thinking: bool) -> object:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "hello", "world"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>")
    result.add_tokens([tokenizers.AddedToken("<|im_start|>", special=True), "<table>", "    ", "<tool_call>"])
    if thinking:
        result.add_tokens(["<think>", "</think>"])
    return result


def test_rules_from_a_tokenizer() -> None:
    tok = tokenizer(thinking=True)
    rules = TokenRules.from_tokenizer(tok)
    names = tok.convert_ids_to_tokens(sorted(rules.special_ids))
    assert names == ["<unk>", "<pad>", "<|im_start|>", "<tool_call>", "<think>", "</think>"]  # <table> is text
    assert tok.convert_ids_to_tokens(list(rules.thinking)) == ["<think>", "</think>"]
    plain = TokenRules.from_tokenizer(tokenizer(thinking=False))
    assert plain.thinking is None

    class Processor:
        tokenizer = tok

    assert TokenRules.from_tokenizer(Processor()).special_ids == rules.special_ids
