"""The framework-neutral monitor: residuals in, counters on the device, tests at the end of a window, alerts out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qscope_monitor.alerts import MINIMUM_CALIBRATION, Alert, AlertState, AlphaSpending
from qscope_monitor.behaviours import detect_text, expected_languages, scripts_of
from qscope_monitor.behaviours.vocabulary import ScriptVocabulary
from qscope_monitor.census import Census
from qscope_monitor.contexts import CONTEXTS, make_candidate, show_contexts
from qscope_monitor.counters import Counters, sum_counts
from qscope_monitor.features.read_outs import WINDOW, WatchList
from qscope_monitor.figures import EXCLUSIONS, health_scalars, window_scalars
from qscope_monitor.judging import TESTS_PER_BEHAVIOUR, census_alert, judge, read_out_changes
from qscope_monitor.panel import ReadOutPanel, highest_per_sequence, mean_over_window, present_sequences
from qscope_monitor.sae import TopKSAE
from qscope_monitor.streams import StreamState
from qscope_monitor.tokens import Segment, TokenBatch

Stream = Literal["train", "rollout"]
STREAMS: tuple[Stream, ...] = ("train", "rollout")
STATE_SCHEMA_VERSION = 1


class FeatureMonitor:
    """Counts how often watched read-outs fire, compares with a baseline, and says when that is abnormal.

    The way of use: `observe` batches, `calibrate` a stream when enough responses of the untouched model were seen,
    go on observing, and call `step` at the end of each window; it returns the new alerts. Training batches and
    rollouts are separate streams with separate baselines.

    Args:
        saes: layer -> SAE, for the census of all features and the health figures; None: read-outs only.
        watch: the read-outs to judge; None: census only.
        tokenizer: decodes token contexts and tells the language of prompts; None: no contexts, every sample judged.
        exceedance_rate: largest share of calibration responses that exceed the response threshold, in (0, 1).
        false_alarm_rate: chance of any false alarm in the whole run, in (0, 1).
        planned_windows: number of windows the run will test, when known (more power than an open end).
        pooled_windows: how many of the last windows are tested together.
        minimum_responses: calibration responses below which a stream stays INSUFFICIENT and raises nothing.
        describe: (layer, feature) -> tokens a feature promotes, for the census's messages.
        device: where counters live.

    Raises:
        ValueError: nothing to watch, rates outside (0, 1), or SAEs and watch list of different d_model.

    Example:
        >>> monitor = qs.FeatureMonitor(saes=None, watch=watch, tokenizer=tokenizer)
        >>> with qs.capture(model, watch.layers) as residual:
        ...     model(**batch)
        >>> monitor.observe(residual, rules.batch(**batch), stream="rollout")
        >>> monitor.calibrate("rollout")
    """

    def __init__(
        self,
        saes: Mapping[int, TopKSAE] | None = None,
        watch: WatchList | None = None,
        tokenizer: Any = None,
        *,
        exceedance_rate: float = 0.02,
        false_alarm_rate: float = 0.05,
        planned_windows: int | None = None,
        pooled_windows: int = 4,
        minimum_responses: int = MINIMUM_CALIBRATION,
        describe: Callable[[int, int], Sequence[str]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not saes and not watch:
            raise ValueError("nothing to watch: pass saes (census), watch (a WatchList), or both")
        check_rates(exceedance_rate, false_alarm_rate, pooled_windows)
        self.watch = watch if watch is not None else WatchList(())
        self.tokenizer = tokenizer
        self.exceedance_rate = exceedance_rate
        self.minimum_responses = minimum_responses
        self.describe = describe or (lambda layer, feature: ())
        self.device = torch.device(device)
        self.keys = self.watch.keys
        self.census = Census(saes, self.device) if saes else None
        if saes and self.watch.d_model is not None:
            for layer in saes:
                if saes[layer].d_model != self.watch.d_model:
                    raise ValueError(
                        f"SAE of layer {layer} has d_model {saes[layer].d_model}, the watch list {self.watch.d_model}"
                    )
        self._scripts = ScriptVocabulary(tokenizer) if tokenizer is not None else None
        self.panel = ReadOutPanel(self.watch, self.device)
        self.read_outs = self.panel.read_outs
        self._streams = {
            stream: StreamState(
                Counters(self._shapes(), self.device),
                AlphaSpending(false_alarm_rate / len(STREAMS), planned_windows),
                windows=deque(maxlen=pooled_windows),
                alerts={key: AlertState() for key in self.keys},
            )
            for stream in STREAMS
        }
        self.scalars: dict[str, float] = {}
        self.alerts: list[Alert] = []

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        features, keys, segments = len(self.panel.read_outs), len(self.keys), len(Segment)
        return {
            "tokens": (segments,),
            "fires": (segments, features),
            "responses": (keys,),
            "exceeding": (keys,),
            "response_scores": (keys,),
            "texts": (keys,),
            "texts_found": (keys,),
            "excluded": (len(EXCLUSIONS),),
            "positions": (),
        }

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer whose residual is wanted: the watch list's and the census's."""
        census = self.census.layers if self.census else ()
        return tuple(sorted({*self.watch.layers, *census}))

    def status(self, stream: Stream) -> Literal["CALIBRATED", "INSUFFICIENT"]:
        """Whether the stream has a baseline to compare with."""
        return "INSUFFICIENT" if self._streams[stream].thresholds is None else "CALIBRATED"

    @torch.no_grad()
    def observe(
        self,
        residuals: Mapping[int, Tensor],
        tokens: TokenBatch,
        *,
        stream: Stream,
        expected: Sequence[str | None] | None = None,
        texts: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        census: bool = False,
    ) -> None:
        """Count one batch. Nothing is copied to the host unless `texts` are judged.

        Args:
            residuals: layer -> [batch, seq, d_model]; only `self.layers` are read, the census's only when it is due.
            tokens: which tokens count, and to which response they belong.
            stream: `train` or `rollout`.
            expected: language of each sequence; None entries (or no list) are inferred from the prompt's script.
                A sequence whose language is a read-out's own is left out of that behaviour.
            texts: responses as text, one per sequence, for the text detectors.
            prompts: their prompts.
            census: also encode this batch with the SAEs and count every feature.
        """
        state = self._stream(stream)
        with torch.autocast(tokens.input_ids.device.type, enabled=False):
            if self.read_outs:
                foreign = self._foreign(tokens, expected, prompts)
                margins = self._observe_read_outs(state, residuals, tokens, foreign)
                if texts is not None:
                    self._judge_texts(state, texts, prompts or [""] * len(texts), foreign, tokens, margins)
            if census and self.census is not None:
                self.census.observe(residuals, tokens, stream)

    def _observe_read_outs(
        self, state: StreamState, residuals: Mapping[int, Tensor], tokens: TokenBatch, foreign: Tensor
    ) -> Tensor:
        """Count, and return each behaviour's margins [batch, seq, keys] on response tokens."""
        reading = self.panel.read(residuals, tokens)
        excluded = [torch.as_tensor(reading.excluded.get(name, 0), device=self.device) for name in EXCLUSIONS]
        state.counters.add("excluded", torch.stack([count.double() for count in excluded]))
        state.counters.add("positions", torch.tensor(float(tokens.input_ids.numel())))
        for segment in Segment:
            chosen = (reading.keep & (tokens.segment == segment)).unsqueeze(-1)
            row = torch.zeros(len(Segment), device=self.device)
            row[segment] = 1
            state.counters.add("tokens", row * chosen.sum())
            state.counters.add("fires", row[:, None] * ((reading.margins > 0) & chosen).sum((0, 1)))
        judged = reading.keep & tokens.response
        margins = self.panel.by_behaviour(reading, judged)
        if self.keys:
            self._count_responses(state, margins, judged, tokens, foreign)
        return margins

    def _count_responses(
        self, state: StreamState, margins: Tensor, judged: Tensor, tokens: TokenBatch, foreign: Tensor
    ) -> None:
        smooth = mean_over_window(margins, tokens, WINDOW)
        score = highest_per_sequence(smooth, tokens)  # [sequences, keys]
        eligible = present_sequences(judged, tokens).unsqueeze(-1) & foreign
        state.counters.add("responses", eligible.sum(0))
        state.counters.add("response_scores", (score * eligible).sum(0))
        score = torch.where(eligible, score, -1.0)
        if state.thresholds is None:
            state.collected.append(score)
        else:
            state.counters.add("exceeding", ((score > state.thresholds) & eligible).sum(0))
        best, index = score.max(0)  # [keys]
        for j in range(len(self.keys)):
            state.contexts.append(make_candidate(tokens, margins, j, index[j], best[j], by_text=False))

    def _foreign(
        self, tokens: TokenBatch, expected: Sequence[str | None] | None, prompts: Sequence[str] | None
    ) -> Tensor:
        """[sequences, keys] bool: False where a response is expected in the read-out's own language."""
        foreign = torch.ones(tokens.num_sequences, len(self.keys), dtype=torch.bool, device=self.device)
        for j, key in enumerate(self.keys):
            language = self.panel.language(key)
            if language is None:
                continue
            if prompts is not None:
                own = [scripts_of(language) <= expected_languages(prompt) for prompt in prompts]
                foreign[: len(own), j] = ~torch.tensor(own, device=self.device)
            elif self._scripts is not None:
                foreign[:, j] = ~self._scripts.is_language(tokens, language)
            for i, told in enumerate(expected or ()):
                if told is not None:
                    foreign[i, j] = told != language
        return foreign

    def _judge_texts(
        self,
        state: StreamState,
        texts: Sequence[str],
        prompts: Sequence[str],
        foreign: Tensor,
        tokens: TokenBatch,
        margins: Tensor,
    ) -> None:
        judged = foreign.cpu()
        found = torch.zeros_like(judged)
        for j, key in enumerate(self.keys):
            behaviour, language = self.panel.behaviour(key), self.panel.language(key)
            for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
                if judged[i, j]:
                    verdict = detect_text(behaviour, language, text, prompt)
                    judged[i, j] = verdict is not None
                    found[i, j] = verdict is not None and verdict.found
            for i in found[:, j].nonzero().flatten()[:CONTEXTS]:
                score = torch.ones((), device=self.device)  # any response found will do
                state.contexts.append(make_candidate(tokens, margins, j, i.to(self.device), score, by_text=True))
        state.counters.add("texts", judged.sum(0).to(self.device))
        state.counters.add("texts_found", found.sum(0).to(self.device))

    def calibrate(self, stream: Stream = "rollout") -> int:
        """Take everything observed in `stream` so far as its baseline.

        Returns:
            The number of responses it rests on. With fewer than `minimum_responses` the stream stays INSUFFICIENT.
        """
        state = self._stream(stream)
        window = state.counters.take()
        if window["tokens"].sum() or not state.pending:
            state.pending.append(window)
        if self.census is not None:
            self.census.end_window(stream)
        scores = _gather(torch.cat(state.collected)) if state.collected else torch.zeros(0, len(self.keys))
        if self.keys:
            responses = int((scores >= 0).any(1).sum())
        else:
            responses = self.census.collected(stream) if self.census is not None else 0
        if responses < self.minimum_responses:
            return responses
        thresholds = torch.full((len(self.keys),), float("inf"))
        baseline = sum_counts(state.pending)
        for j in range(len(self.keys)):
            own = scores[:, j][scores[:, j] >= 0].double()
            if len(own):
                rare = float(torch.quantile(own, 1 - self.exceedance_rate, interpolation="higher"))
                thresholds[j] = max(rare, self.watch.floors.get(self.keys[j], 0.0))
            baseline["exceeding"][j] = int((own.float() > thresholds[j]).sum())
        state.thresholds = thresholds.to(self.device)
        state.baseline, state.pending, state.collected = baseline, [], []
        state.contexts.clear()
        if self.census is not None:
            self.census.calibrate(stream)
        return responses

    def step(self, step: int) -> list[Alert]:
        """End a window: reduce, test, and return the new alerts. Every rank must call it at the same step.

        `self.scalars` then holds this window's figures by tag.
        """
        self.scalars = {}
        raised: list[Alert] = []
        for stream in STREAMS:
            state = self._stream(stream)
            if state.thresholds is None:
                self._step_uncalibrated(stream, state)
                continue
            window = state.counters.take()
            if window["tokens"].sum():
                state.windows.append(window)
                self._publish(stream, window, state.baseline)
                raised += self._test(step, stream, state)
                state.contexts.clear()
            if self.census is not None:
                if stream == "train" and self.census.collected(stream) >= self.minimum_responses:
                    self.census.calibrate(stream)  # it is read less often than the read-outs, so it may come later
                report = self.census.end_window(stream)
                self.scalars |= health_scalars(stream, report)
                raised += [
                    census_alert(step, stream, risen, self.describe(risen.layer, risen.feature))
                    for risen in report.risen
                ]
        self.alerts += raised
        return raised

    def _step_uncalibrated(self, stream: Stream, state: StreamState) -> None:
        if stream == "train":  # its first responses are its baseline
            self.calibrate(stream)
            if state.baseline is not None:
                self._publish(stream, state.baseline, state.baseline)
            return
        # Rollouts of a model in training are no baseline: only an explicit `calibrate` before it takes one.
        window = state.counters.take()
        if window["tokens"].sum():
            self._publish(stream, window, None)
        state.collected, state.pending = [], []
        state.contexts.clear()
        if self.census is not None:
            self.scalars |= health_scalars(stream, self.census.end_window(stream))
            self.census.discard(stream)

    def _test(self, step: int, stream: Stream, state: StreamState) -> list[Alert]:
        assert state.baseline is not None
        pooled = sum_counts(list(state.windows))
        level = state.spending.next_level(TESTS_PER_BEHAVIOUR[stream] * len(self.keys))
        raised = []
        for j, key in enumerate(self.keys):
            verdict = judge(pooled, state.baseline, j, level)
            self.scalars |= verdict.scalars(stream, key)
            if state.alerts[key].update(step, verdict.kind, verdict.rate, verdict.p_value, level):
                changes = read_out_changes(self.read_outs, self.panel.judges(key), pooled, state.baseline)
                contexts = show_contexts(state.contexts, j, self.tokenizer, by_text=verdict.kind != "behaviour")
                raised.append(verdict.alert(step, stream, key, changes, contexts))
        return raised

    def _publish(self, stream: Stream, window: dict[str, np.ndarray], baseline: dict[str, np.ndarray] | None) -> None:
        names = [r.name.replace("/", ".") for r in self.read_outs]
        self.scalars |= window_scalars(stream, self.keys, names, window, baseline)

    def _stream(self, stream: Stream) -> StreamState:
        if stream not in self._streams:
            raise ValueError(f"stream must be one of {list(STREAMS)}, got {stream!r}")
        return self._streams[stream]

    def state_dict(self) -> dict[str, Any]:
        """Baselines, windows, alert states and the ledger: plain containers and tensors, for a checkpoint."""
        return {
            "schema_version": STATE_SCHEMA_VERSION,
            "keys": list(self.keys),
            "read_outs": [r.name for r in self.read_outs],
            "streams": {name: state.state_dict() for name, state in self._streams.items()},
            "ledger": [alert.to_json() for alert in self.alerts],
            "census": self.census.state_dict() if self.census else None,
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: another schema, or a state of another watch list.
        """
        if values.get("schema_version") != STATE_SCHEMA_VERSION:
            raise ValueError(
                f"monitor state has schema_version {values.get('schema_version')!r}, "
                f"this version reads {STATE_SCHEMA_VERSION}"
            )
        names = [r.name for r in self.read_outs]
        if values["read_outs"] != names or values["keys"] != list(self.keys):
            raise ValueError(
                f"monitor state belongs to another watch list: it has {values['read_outs']}, this monitor {names}"
            )
        for name, saved in values["streams"].items():
            self._stream(name).load_state_dict(saved)
        self.alerts = [Alert.from_json(record) for record in values["ledger"]]
        if self.census is not None and values["census"] is not None:
            self.census.load_state_dict(values["census"])


def check_rates(exceedance_rate: float, false_alarm_rate: float, pooled_windows: int) -> None:
    """Raise ValueError naming the value that is out of range."""
    for name, rate in (("exceedance_rate", exceedance_rate), ("false_alarm_rate", false_alarm_rate)):
        if not isinstance(rate, int | float) or not 0 < rate < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {rate!r}")
    if not isinstance(pooled_windows, int) or pooled_windows < 1:
        raise ValueError(f"pooled_windows must be an integer of at least 1, got {pooled_windows!r}")


def _gather(scores: Tensor) -> Tensor:
    """[responses, keys] of all ranks on the host: once per run, to set thresholds every rank shares."""
    scores = scores.cpu()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, scores)
        scores = torch.cat(parts)
    return scores
