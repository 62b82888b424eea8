"""Read-outs and watch lists."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qscope_monitor import ReadOut, WatchList


def test_score_is_an_affine_read_out(watch: WatchList) -> None:
    x = torch.randn(2, 5, 192)
    expected = (x.double() @ watch[0].weight.double()) + watch[0].bias
    torch.testing.assert_close(watch[0].score(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert watch[0].score(x.bfloat16()).dtype == torch.float32


def test_names_and_keys(watch: WatchList) -> None:
    assert [r.name for r in watch] == ["L3/F7", "L1/F5", "L3/probe", "L1/F9"]
    assert watch.keys == ("code-switching-zh",)
    assert watch.layers == (1, 3)
    assert replace(watch[0], language=None).key == "code-switching"


def test_lists_of_acting_read_outs_judge_nothing(watch: WatchList) -> None:
    assert watch.with_role("act").keys == ()


def test_saved_lists_come_back_equal(watch: WatchList, tmp_path: Path) -> None:
    watch.evaluation, watch.floors = {"token_auroc": 0.9}, {"code-switching-zh": 0.2}
    watch.save(tmp_path / "list")
    again = WatchList.load(tmp_path / "list")
    assert again.provenance == watch.provenance
    assert again.evaluation == watch.evaluation
    assert again.floors == watch[1:].floors == (watch + watch).floors == {"code-switching-zh": 0.2}
    for before, after in zip(watch, again, strict=True):
        assert torch.equal(before.weight, after.weight)
        assert torch.equal(before.direction, after.direction)
        for name in ReadOut.__dataclass_fields__:
            if name not in ("weight", "direction"):
                assert getattr(before, name) == getattr(after, name)


def test_an_empty_list_round_trips(tmp_path: Path) -> None:
    WatchList(()).save(tmp_path)
    assert len(WatchList.load(tmp_path)) == 0


def test_slices_and_sums_are_lists(watch: WatchList) -> None:
    both = watch[:1] + watch[1:]
    assert [r.name for r in both] == [r.name for r in watch]
    assert len(both.provenance["parts"]) == 2


def test_bad_read_outs_are_refused(watch: WatchList) -> None:
    with pytest.raises(ValueError, match="'jury'"):
        replace(watch[0], role="jury")
    with pytest.raises(ValueError, match="scale must be > 0"):
        replace(watch[0], scale=0.0)
    with pytest.raises(ValueError, match=r"\[d_model\]"):
        replace(watch[0], direction=torch.zeros(3))
    narrow = replace(watch[0], weight=torch.zeros(3), direction=torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[3, 192\]"):
        WatchList([watch[0], narrow])


def test_unreadable_folders_say_what_was_found(watch: WatchList, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"watch_list\.json"):
        WatchList.load(tmp_path)
    watch.save(tmp_path)
    file = tmp_path / "watch_list.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "schema_version": 7}))
    with pytest.raises(ValueError, match="schema_version 7"):
        WatchList.load(tmp_path)
    broken = {**document["read_outs"][0], "threshold": float("nan")}
    file.write_text(json.dumps({**document, "read_outs": [broken, *document["read_outs"][1:]]}))
    with pytest.raises(ValueError, match=r"watch_list\.json: L3/F7: threshold must be a finite number, got nan"):
        WatchList.load(tmp_path)
    for junk in ("[]", "{", "{}"):
        file.write_text(junk)
        with pytest.raises(ValueError, match=r"watch_list\.json: "):
            WatchList.load(tmp_path)
    file.write_text(json.dumps({**document, "d_model": 64}))
    with pytest.raises(ValueError, match=r"\[4, 192\].*\[4, 64\]"):
        WatchList.load(tmp_path)
