"""CTranslate2. Its defaults are beam 2 and top-k 1: both are set to what everyone else does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import Clock


class CTranslate2:
    """int8 weights, dynamic int8 activations."""

    def __init__(self) -> None:
        self._translator: Any = None
        self._pieces: list[str] = []

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        import ctranslate2

        converter = ctranslate2.converters.TransformersConverter(str(checkpoint), low_cpu_mem_usage=True)
        converter.convert(str(folder), quantization="int8", force=True)

    def load(self, checkpoint: Path, folder: Path, threads: int) -> None:
        import ctranslate2

        self._translator = ctranslate2.Translator(
            str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self._pieces = json.loads((folder / "shared_vocabulary.json").read_text("utf-8"))

    def run(self, prompt: Sequence[int], lengths: Sequence[int], clock: Clock) -> None:
        step, stop = -1, False

        def callback(result: Any) -> bool:  # called for each running sample of each step
            nonlocal step, stop
            if result.step > step:
                step, stop = result.step, clock.tick()
            return stop or result.step + 1 >= lengths[result.hypothesis_id]

        self._translator.translate_batch(
            [[self._pieces[token] for token in prompt]],
            beam_size=1,
            num_hypotheses=len(lengths),
            sampling_topk=50,
            sampling_topp=0.95,
            min_decoding_length=max(lengths),
            max_decoding_length=max(lengths),
            max_input_length=0,
            callback=callback,
        )


def make() -> CTranslate2:
    """The only setting."""
    return CTranslate2()
