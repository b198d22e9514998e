"""optimum's graphs behind the two verbs of `Model`: `prefill` and `step`.

The graphs concatenate their cache, so every step makes a new one. What can be had all the same: the prompt is encoded once,
the first step is computed for one row, and the prompt's keys and values stay one row that all samples share, if the graph's
products broadcast it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramekin.errors import ModelFormatError, RamekinError
from ramekin.model import Logits
from ramekin.optimum_folder import REMEDY, OptimumFolder
from ramekin.session import failure, open_session

Array = npt.NDArray[Any]
_IDS, _MASK, _HIDDEN, _SOURCE_MASK = "input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"
_BRANCH = "use_cache_branch"
_BROKEN = RamekinError, ValueError, LookupError
"""What steps through graphs fail with whose results have other shapes."""
_PAST = re.compile(r"past_key_values\.(\d+)\.(decoder|encoder)\.(key|value)")


@dataclass(frozen=True)
class Encoded:
    """A prompt: `hidden (1, S, d_model)` and `mask (1, S)`."""

    hidden: Array
    mask: Array


class OptimumCache:
    """What a running generation keeps between steps.

    Attributes:
        rows: how many samples are running, n.
        length: how many positions are filled.
        candidates: how many of the largest logits are ranked for each row.
        own: each sample's keys and values by the name of the graph's input, OrtValues of `(n, heads, length, head_dim)`.
        prompt: the prompt's, OrtValues of `(1, heads, S, head_dim)`, or n equal rows of them.
    """

    def __init__(self, ort: Any, encoded: Encoded, rows: int, candidates: int) -> None:
        self._value = ort.OrtValue.ortvalue_from_numpy
        self.encoded, self.rows, self.candidates, self.length = encoded, rows, candidates, 0
        self.own: dict[str, Any] = {}
        self.prompt: dict[str, Any] = {}

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these. Return, for each row of the smaller batch, which row it was."""
        order = list(rows)
        self.rows = len(order)
        self.own = {name: self._value(value.numpy()[order]) for name, value in self.own.items()}
        if any(value.shape()[0] > 1 for value in self.prompt.values()):  # equal rows: any will do
            self.prompt = {name: self._value(value.numpy()[: self.rows]) for name, value in self.prompt.items()}
        return order


class OptimumModel:
    """An encoder and one or two decoders.

    Attributes:
        shares_prompt: whether all samples read one copy of the prompt's keys and values.
    """

    prompts_at_once = 1
    compact = False

    def __init__(self, ort: Any, encoder: Any, decoder: Any, with_past: Any | None, found: OptimumFolder) -> None:
        self._ort, self._encoder, self._decoder = ort, encoder, decoder
        self._merged, self._next = with_past is None, with_past or decoder
        self._past = {each.name: each for each in self._next.get_inputs() if _PAST.fullmatch(each.name)}
        self._half = any(each.type == "tensor(float16)" for each in self._past.values())
        self.dims = found.dims(self._shapes(found))
        self.shares_prompt = True
        self._probe(found)

    @classmethod
    def load(cls, ort: Any, found: OptimumFolder, provider: str, threads: int) -> OptimumModel:
        """Open the graphs.

        Raises:
            ModelFormatError: a graph cannot be loaded, or is not a T5's with a cache.
            CheckpointError: `config.json` is missing, or not a T5's.
        """

        def opened(path: Path, rests: bool) -> Any:
            return open_session(ort, path, found.files, provider, threads, rests=rests, fuse=True)

        encoder = opened(found.encoder, rests=True)
        decoder = opened(found.decoder, rests=found.with_past is not None)
        return cls(ort, encoder, decoder, opened(found.with_past, rests=False) if found.with_past else None, found)

    @property
    def precision(self) -> str:
        """What the caches hold."""
        return "fp16" if self._half else "fp32"

    def prefill(self, *prompts: Sequence[int] | npt.NDArray[np.int64]) -> Encoded:
        """Encode one prompt of S tokens."""
        (source_ids,) = prompts
        ids = np.asarray(source_ids, np.int64).reshape(1, -1)
        mask = np.ones_like(ids)
        (hidden,) = self._run(self._encoder, {_IDS: ids, _MASK: mask}, ["last_hidden_state"])
        return Encoded(hidden.numpy(), mask)

    def new_cache(self, cross: Encoded, rows: int, capacity: int, candidates: int) -> OptimumCache:
        """An empty cache for `rows` samples; these graphs need no capacity."""
        return OptimumCache(self._ort, cross, rows, min(candidates, self.dims.vocab_size))

    def step(self, token_ids: Sequence[int] | npt.NDArray[np.int64], cache: OptimumCache) -> Logits:
        """Feed one token to each of the n samples of `cache`, which grows by one position."""
        ids = np.asarray(token_ids, np.int64).reshape(-1, 1)
        logits = self._following(ids, cache) if cache.length else self._first(ids, cache)
        cache.length += 1
        return _ranked(logits, cache.candidates)

    def _first(self, ids: Array, cache: OptimumCache) -> Array:
        """The step that computes the prompt's keys and values; once, if all samples are fed the same token."""
        rows = 1 if (ids == ids[0]).all() else len(ids)
        feed = {_IDS: ids[:rows], **_encoder_inputs(cache.encoded, rows)}
        if self._merged:
            shape = (rows, self.dims.num_heads, 1, self.dims.head_dim)
            empty = np.zeros(shape, np.float16 if self._half else np.float32)
            feed |= {**dict.fromkeys(self._past, empty), _BRANCH: np.array([False])}
        logits, *present = self._run(self._decoder, feed, ["logits", *map(_present, self._past)])
        value, times = self._ort.OrtValue.ortvalue_from_numpy, cache.rows // rows
        for name, new in zip(self._past, present, strict=True):
            if ".encoder." in name:
                cache.prompt[name] = value(np.repeat(new.numpy()[:1], self._prompt_rows(cache), axis=0))
            else:
                cache.own[name] = value(np.repeat(new.numpy(), times, axis=0))
        return np.repeat(logits.numpy()[:, -1], times, axis=0)

    def _following(self, ids: Array, cache: OptimumCache) -> Array:
        """A step that only adds to the samples' own keys and values."""
        feed = {_IDS: ids, _BRANCH: np.array([True]), **_encoder_inputs(cache.encoded, self._prompt_rows(cache))}
        logits, *present = self._run(
            self._next, {**feed, **cache.own, **cache.prompt}, ["logits", *map(_present, cache.own)]
        )
        cache.own = dict(zip(cache.own, present, strict=True))
        return np.asarray(logits.numpy()[:, -1])

    def _prompt_rows(self, cache: OptimumCache) -> int:
        return 1 if self.shares_prompt else cache.rows

    def _run(self, session: Any, feed: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """OrtValues of these outputs. Of the feed (arrays and OrtValues) a graph gets what it has inputs for."""
        value = self._ort.OrtValue.ortvalue_from_numpy
        known = {each.name for each in session.get_inputs()} & feed.keys()
        given = {name: value(feed[name]) if isinstance(feed[name], np.ndarray) else feed[name] for name in known}
        try:
            result: list[Any] = session.run_with_ort_values(list(outputs), given)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise failure(error, hint="") from error  # a folder of optimum's own has nothing to verify
        return result

    def _shapes(self, found: OptimumFolder) -> dict[str, int]:
        """What the graphs tell of the sizes.

        Raises:
            ModelFormatError: they are not a T5's with a cache.
        """
        own = [each for name, each in self._past.items() if ".decoder." in name]
        hidden = {each.name: each.shape for each in self._encoder.get_outputs()}.get("last_hidden_state")
        logits = {each.name: each.shape for each in self._decoder.get_outputs()}.get("logits")
        if len(own) * 2 != len(self._past) or not own or len(own[0].shape) != 4 or not hidden or not logits:
            raise ModelFormatError(
                f"{found.graphs[-1]}: its inputs are not those of a T5 with past keys and values; {REMEDY}"
            )
        _, heads, _, width = own[0].shape
        sizes = {"num_heads": heads, "head_dim": width, "decoder_layers": len(own) // 2}
        sizes |= {"vocab_size": logits[-1], "d_model": hidden[-1]}
        return {name: size for name, size in sizes.items() if isinstance(size, int)}

    def _probe(self, found: OptimumFolder) -> None:
        """Find out whether the graph broadcasts the prompt's keys and values, with two samples after two tokens."""
        try:
            alone, together = (self._two_steps(rows) for rows in (1, 2))
            self.shares_prompt = bool(np.abs(together[0] - alone[0]).max() <= 1e-3 * max(1, np.abs(alone[0]).max()))
        except _BROKEN:
            self.shares_prompt = False
        if self.shares_prompt:
            return
        try:
            self._two_steps(2)
        except _BROKEN as error:
            raise ModelFormatError(f"{found.graphs[-1]}: two steps of it fail: {error}") from None

    def _two_steps(self, rows: int) -> Array:
        cache = self.new_cache(self.prefill([3, 1]), rows, 2, 1)
        for _ in range(2):
            logits = self.step([0] * rows, cache)
        return logits.full


def _encoder_inputs(encoded: Encoded, rows: int) -> dict[str, Array]:
    parts = {_HIDDEN: encoded.hidden, _SOURCE_MASK: encoded.mask}
    return {name: np.repeat(array, rows, axis=0) for name, array in parts.items()}


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def _ranked(logits: Array, candidates: int) -> Logits:
    """The logits and the largest of each row, in falling order; of equal ones the smaller id first."""
    full = np.ascontiguousarray(logits, np.float32)
    ids = np.sort(np.argpartition(full, full.shape[1] - candidates, axis=1)[:, full.shape[1] - candidates :], axis=1)
    values = np.take_along_axis(full, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return Logits.of(full, np.take_along_axis(values, order, axis=1), np.take_along_axis(ids, order, axis=1))
