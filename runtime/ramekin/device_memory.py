"""Memory on a GPU: what a job needs, who has it, and what to say when there is not enough."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import numpy as np

from ramekin.errors import ProviderError, RamekinError, one_line
from ramekin.manifest import Dims
from ramekin.session import about_memory, failure
from ramekin.tensors import (
    DISTANCES,
    LOGITS,
    PAST_LENGTHS,
    SOURCE_LENGTHS,
    TOKEN_IDS,
    TOP_IDS,
    TOP_LOGPROBS,
    TOP_VALUES,
    cross_names,
    past_names,
)

FLOAT32, INT64 = 1, 7  # ONNX's numbers for element types
FLOATS = {"tensor(float)": FLOAT32, "tensor(float16)": 10, "tensor(bfloat16)": 16}
BYTES = {FLOAT32: 4, INT64: 8, 10: 2, 16: 2}
_MOST_IDLE = 4 << 30
"""Bytes. Single prompts of up to 1024 tokens have 16 sizes: of FLAN-T5-large, one of each takes 0.9 GB."""


@dataclass(frozen=True)
class Plan:
    """Tensors that live on the device together.

    Attributes:
        tensors: name, shape and ONNX element type of each.
    """

    tensors: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        """How much memory they take."""
        return sum(prod(shape) * BYTES[kind] for _, shape, kind in self.tensors)

    @classmethod
    def of_prompts(cls, dims: Dims, floats: int, prompts: int, source: int) -> Plan:
        """What is kept of prompts of `source` tokens, padding included: cross-attention keys and values, and the lengths."""
        cross = [(name, (prompts, source, dims.inner), floats) for name in cross_names(dims.decoder_layers)]
        return cls(((SOURCE_LENGTHS, (prompts,), INT64), *cross))

    @classmethod
    def of_samples(cls, dims: Dims, floats: int, rows: int, capacity: int, candidates: int) -> Plan:
        """What `rows` samples need: caches of `capacity` tokens, what is fed at a step, and what comes out."""
        past = [(name, (rows, capacity, dims.inner), floats) for name in past_names(dims.decoder_layers)]
        fed = [(TOKEN_IDS, (rows, 1), INT64), (PAST_LENGTHS, (rows,), INT64), (DISTANCES, (capacity,), INT64)]
        ranked = [(name, (rows, candidates), FLOAT32) for name in (TOP_VALUES, TOP_LOGPROBS)]
        return cls((*fed, (LOGITS, (rows, dims.vocab_size), FLOAT32), *ranked, (TOP_IDS, (rows, candidates), INT64), *past))


@dataclass(frozen=True)
class Memory:
    """A plan's tensors, allocated.

    Attributes:
        values: OrtValues by name.
        number: no other memory of its pool has it, even at the same address.
    """

    values: Mapping[str, Any]
    number: int


class Pool:
    """Memory on one device. What is lent comes back when its borrower is gone, and some of it is kept for the next one."""

    def __init__(self, ort: Any, device: str) -> None:
        self._ort, self._device, self._made = ort, device, 0
        self._idle: list[tuple[Plan, Memory]] = []  # the one that was used last comes last
        self._returned: deque[tuple[Plan, Memory]] = deque()  # a borrower may go at any moment, in any thread
        self._spoiled: set[int] = set()
        self._lock = Lock()

    def lend(self, plan: Plan, borrower: object) -> Memory:
        """Memory of this plan, used before or new.

        Raises:
            ProviderError: there is not enough of it.
        """
        with self._lock:
            self._sort_in()
            fitting = [place for place, (kept, _) in enumerate(self._idle) if kept == plan]
            memory = self._idle.pop(fitting[-1])[1] if fitting else self._make(plan)
            if memory.number in self._spoiled:
                self._clear(plan, memory.values)
                self._spoiled.remove(memory.number)
        weakref.finalize(borrower, self._take_back, plan, memory).atexit = False
        return memory

    def spoil(self, memory: Memory) -> None:
        """Clear this memory before it is lent again."""
        self._spoiled.add(memory.number)

    def give_up_idle(self) -> None:
        """Keep nothing for the next job."""
        with self._lock:
            self._returned.clear()
            self._idle.clear()

    def _take_back(self, plan: Plan, memory: Memory) -> None:
        self._returned.append((plan, memory))
        if self._lock.acquire(blocking=False):  # else who has it, this thread perhaps, is looking for memory
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        """Keep what came back for the next job, but not too much; a prompt's and its samples' in any case."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        while len(self._idle) > 2 and sum(plan.bytes for plan, _ in self._idle) > _MOST_IDLE:
            del self._idle[0]

    def _make(self, plan: Plan) -> Memory:
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        with device_errors(self._device, plan.bytes):
            values = {name: make(list(shape), kind, self._device, 0) for name, shape, kind in plan.tensors}
        self._clear(plan, values)
        self._made += 1
        return Memory(values, self._made)

    def _clear(self, plan: Plan, values: Mapping[str, Any]) -> None:
        """Write zeros into caches: attention multiplies what it masks by 0, and fresh memory may hold NaN."""
        with device_errors(self._device, plan.bytes):
            caches = [each for each in plan.tensors if each[0].startswith(("past_key", "past_value"))]
            if caches:
                _, shape, kind = caches[0]
                zeros = np.zeros(shape, np.float32 if kind == FLOAT32 else np.float16)  # for all, since it may be large
                for name, _, _ in caches:
                    values[name].update_inplace(zeros)


@contextmanager
def device_errors(device: str, needed: int) -> Iterator[None]:
    """Turn what onnxruntime raises into errors of ours; the job needs so many bytes beside the weights.

    Raises:
        ProviderError: the device has too little memory.
        RamekinError: anything else failed there.
    """
    try:
        yield
    except RamekinError:
        raise
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        if about_memory(error):
            raise ProviderError(
                f"too little memory ({device}): this job needs {needed / 1e9:.1f} GB beside the weights; ask for fewer or "
                f"shorter samples ({one_line(error)})"
            ) from None
        raise failure(error) from error
