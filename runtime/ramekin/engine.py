"""Text in, samples out: the generation loop."""

from __future__ import annotations

import os
import secrets
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ramekin.arguments import check_integer
from ramekin.cache import Floats
from ramekin.cuda_model import CudaModel
from ramekin.errors import ModelFormatError, RamekinError
from ramekin.manifest import MANIFEST, MOST_SOURCE_TOKENS, PROVIDERS, TOKENIZER, Manifest, VersionRange
from ramekin.model import Model, Steps
from ramekin.optimum_folder import OptimumFolder
from ramekin.optimum_model import OptimumModel
from ramekin.paper import check_prompt
from ramekin.provider import AUTO, choose_provider
from ramekin.sample import Completion, Sample, Token, advance
from ramekin.sampling import SamplingParams, choose, log_probabilities, uniforms
from ramekin.session import MOST_THREADS, onnxruntime, usable_cores
from ramekin.tokenizer import IncrementalDecoder, Tokenizer

Source = str | Sequence[int] | npt.NDArray[np.integer]


class TruncationWarning(UserWarning):
    """A prompt was longer than the model's limit, and its end was cut."""


class Engine:
    """A model folder, ready to generate. Several threads may use it at once.

    It belongs to the process that loaded it. A forked child must neither use, replace nor delete it: onnxruntime would wait
    for threads that are the parent's. Its weights stay mapped: put a new folder in the place of the old one, or export with
    `force`, but do not write into the files.

    Attributes:
        provider: where it computes, "cpu" or "cuda".
        not_on_cuda: why "auto" chose the CPU, else empty.
    """

    def __init__(
        self, model: Steps, tokenizer: Tokenizer, manifest: Manifest, provider: str = "cpu", not_on_cuda: str = ""
    ) -> None:
        self.model, self.tokenizer, self.manifest = model, tokenizer, manifest
        self.provider, self.not_on_cuda = provider, not_on_cuda

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        provider: str = "cpu",
        threads: int | None = None,
        max_source_tokens: int | None = None,
    ) -> Engine:
        """Open a model folder that `ramekin export` wrote, or one of optimum's exporter.

        Of the former, files up to 32 MB are checked against their SHA-256, larger ones by their size; `ramekin verify`
        checks all.

        Args:
            folder: the model folder.
            provider: where to compute: "cpu", "cuda", or "auto": CUDA where model and machine allow it.
            threads: how many threads compute; None: the cores that this process may really use.
            max_source_tokens: longest prompt in tokens; None: what the model's manifest says.

        Raises:
            ModelNotFoundError: there is no such folder.
            ModelFormatError: the folder is damaged, altered or not a model.
            ProviderError: the model cannot be computed there. "cuda" never falls back to the CPU.
            RuntimeVersionError: onnxruntime is missing or of a version that is not supported.
            ValueError, TypeError: an argument is out of its range, or not of its type.
            OSError: the system does not let a file be read.
        """
        if provider not in (*PROVIDERS, AUTO):
            raise ValueError(f"provider must be one of {', '.join((*PROVIDERS, AUTO))}, not {provider!r}")
        if threads is not None:
            threads = check_integer("threads", threads, 1, MOST_THREADS)
        if max_source_tokens is not None:
            max_source_tokens = check_integer("max_source_tokens", max_source_tokens, 1, MOST_SOURCE_TOKENS)
        folder = Path(folder)
        model, manifest, provider, reason = _open(folder, provider, threads or usable_cores())
        if max_source_tokens is not None:
            manifest = replace(manifest, max_source_tokens=max_source_tokens)
        tokenizer = Tokenizer.load(folder / TOKENIZER, manifest.tokens, manifest.clean_up_tokenization_spaces)
        if tokenizer.piece_count > manifest.dims.vocab_size:
            raise ModelFormatError(f"{folder}: {TOKENIZER} has more pieces than the model; export the model again")
        try:
            check_prompt(manifest.prompt)
            SamplingParams(**SamplingParams.known(manifest.generation))
        except (TypeError, ValueError) as error:
            raise ModelFormatError(f"{folder / MANIFEST}: {error}; export the model again") from None
        return cls(model, tokenizer, manifest, provider, reason)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Engine cannot be pickled or copied; load one in each process: Engine.load(folder)")

    def params(self, **values: Any) -> SamplingParams:
        """Sampling parameters: these values, and for all others the model's own, or else the usual ones."""
        known = SamplingParams.known(self.manifest.generation)
        longest = values.get("max_new_tokens")
        if isinstance(longest, Integral) and "min_new_tokens" in known:  # the caller's limit goes before the model's wish
            known["min_new_tokens"] = min(known["min_new_tokens"], int(longest))
        return SamplingParams(**{**known, **values})

    def _chosen(self, params: SamplingParams | None) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, not {type(params).__name__}; `engine.params(n=4)` makes them")
        return self.params() if params is None else params

    def generate(self, source: Source, params: SamplingParams | None = None) -> list[Completion]:
        """All samples of one prompt, by index. See `stream` for the arguments."""
        return self.generate_many([source], params)[0]

    def stream(self, source: Source, params: SamplingParams | None = None) -> Generator[Token | Completion, None, None]:
        """Generate samples of one prompt, telling each token and, after its last token, each finished sample.

        Sample i depends on the prompt, the parameters but for `n`, and i alone, up to the rounding of the arithmetic:
        kernels for one row and for many differ in the last bit, which in int8 and int4 now and then makes another token.

        Args:
            source: a prompt as text or as token ids. A longer one than `max_source_tokens` is cut, with a
                `TruncationWarning`; Python shows one for each place, and raises all after
                `warnings.simplefilter("error", TruncationWarning)`.
            params: how to sample; None: `self.params()`. `SamplingParams(...)` knows nothing of the model's own settings,
                `self.params(...)` does.

        Raises:
            ValueError: token ids are outside the vocabulary, or there are none.
            TypeError: `source` or `params` are something else.
            RamekinError: there is not enough memory, or onnxruntime failed.
        """
        return (event for _, event in self.stream_many([source], params))

    def generate_many(self, sources: Iterable[Source], params: SamplingParams | None = None) -> list[list[Completion]]:
        """All samples of several prompts: for each prompt what `generate` gives, up to rounding (see `stream`)."""
        sources = _several(sources)
        done: list[list[Completion]] = [[] for _ in sources]
        for number, event in self.stream_many(sources, params):
            if isinstance(event, Completion):
                done[number].append(event)
        return [sorted(each, key=lambda completion: completion.index) for each in done]

    def stream_many(
        self, sources: Iterable[Source], params: SamplingParams | None = None
    ) -> Generator[tuple[int, Token | Completion], None, None]:
        """Generate samples of several prompts: what `stream` tells of each, with the prompt's number.

        On a GPU some prompts are computed together, padded to the longest of them; on a CPU, where one prompt fills every
        core, one after the other. Without a seed each prompt gets a new one of its own.

        Raises:
            ValueError, TypeError: see `stream`; and a text is one prompt, not several.
        """
        return self._run_in_groups([self.source_ids(source) for source in _several(sources)], self._chosen(params))

    def _run_in_groups(
        self, prompts: Sequence[npt.NDArray[np.int64]], params: SamplingParams
    ) -> Generator[tuple[int, Token | Completion], None, None]:
        size = self.model.prompts_at_once
        for first in range(0, len(prompts), size):
            for number, event in self._run(prompts[first : first + size], params):
                yield first + number, event

    def _run(
        self, prompts: Sequence[npt.NDArray[np.int64]], params: SamplingParams
    ) -> Generator[tuple[int, Token | Completion], None, None]:
        """The loop: all samples of one or more prompts, with the number of the prompt that each event belongs to."""
        # 53 bits stay whole for readers of JSON that know no integers but doubles.
        seeds = [secrets.randbits(53) if params.seed is None else params.seed for _ in prompts]
        eos, start = self.manifest.tokens.eos, self.manifest.tokens.start
        rows = len(prompts) * params.n
        try:
            cache = self.model.new_cache(self.model.prefill(*prompts), rows, params.max_new_tokens, params.candidates)
            draws = np.stack([uniforms(seed, params.n, params.max_new_tokens) for seed in seeds])
        except MemoryError as error:
            raise RamekinError(f"not enough memory; ask for fewer or shorter samples ({error})") from error
        running = [
            Sample(prompt, i, IncrementalDecoder(self.tokenizer), [start])
            for prompt in range(len(prompts))
            for i in range(params.n)
        ]
        while running:
            logits = self.model.step([sample.history[-1] for sample in running], cache)
            step_draws = draws[[each.prompt for each in running], [each.index for each in running], cache.length - 1]
            histories = [sample.history for sample in running]
            chosen, logprobs = choose(logits, histories, eos, params, step_draws)
            stay = []
            for row, sample in enumerate(running):
                event, completion = advance(
                    sample, int(chosen[row]), float(logprobs[row]), eos, params, seeds[sample.prompt]
                )
                yield sample.prompt, event
                if completion:
                    yield sample.prompt, completion
                else:
                    stay.append(row)
            if len(stay) < len(running):
                running = [running[row] for row in cache.keep(stay)] if stay else []

    def logits(self, source: Source, target_ids: Sequence[int] | npt.NDArray[np.integer]) -> Floats:
        """Teacher-forced logits, `(target, vocab)` float32.

        Row t is what the model predicts for `target_ids[t]`, having seen the start token and `target_ids[:t]`.

        Args:
            source: a prompt as text or as token ids.
            target_ids: the tokens whose predictions are asked for.
        """
        return np.stack([row.copy() for row in self._teacher_forced(source, self._checked(target_ids))])

    def score(self, source: Source, target: Source) -> Floats:
        """Log-probabilities under the model of each token of `target`, teacher-forced, `(target,)` float32."""
        ids = self._checked(self.tokenizer.encode(target) if isinstance(target, str) else target)
        rows = self._teacher_forced(source, ids)
        return np.concatenate([log_probabilities(row[None], ids[at : at + 1]) for at, row in enumerate(rows)])

    def _teacher_forced(self, source: Source, target: npt.NDArray[np.int64]) -> Iterator[Floats]:
        """The logits of each token of a target, `(vocab,)`, overwritten by the next."""
        cache = self.model.new_cache(self.model.prefill(self.source_ids(source)), 1, len(target), 1)
        for token in (self.manifest.tokens.start, *target[:-1].tolist()):
            yield self.model.step([token], cache).full[0]

    def source_ids(self, source: Source) -> npt.NDArray[np.int64]:
        """The token ids of a prompt, `(source,)`, cut to `max_source_tokens` as transformers does: a text keeps its eos."""
        ids = self._checked(self.tokenizer.encode(source) if isinstance(source, str) else source)
        limit = self.manifest.max_source_tokens
        if len(ids) <= limit:
            return ids
        warnings.warn(
            f"the prompt has {len(ids)} tokens; its end was cut to the model's limit of {limit}",
            TruncationWarning,
            stacklevel=_depth(),
        )
        return np.concatenate([ids[: limit - 1], ids[-1:]]) if isinstance(source, str) else ids[:limit]

    def _checked(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        if isinstance(ids, str):
            raise TypeError("expected a list of token ids, not a text, which `score` takes")
        if isinstance(ids, bytes | bytearray | memoryview) or not (isinstance(ids, Sequence) or hasattr(ids, "__array__")):
            raise TypeError(f"expected a text or a list of token ids, not {type(ids).__name__}")
        if isinstance(ids, Sequence) and ids and isinstance(ids[0], str):
            raise TypeError(
                "expected one text, or a list of token ids; `generate_many` and `stream_many` take several texts"
            )
        array = np.asarray(ids)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError("token ids must be a list of integers that is not empty")
        if array.min() < 0 or array.max() >= self.manifest.dims.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.manifest.dims.vocab_size - 1}")
        return array.astype(np.int64)


def _several(sources: Iterable[Source]) -> Sequence[Source]:
    if isinstance(sources, str):
        raise TypeError("several prompts are a list of texts, not one text")
    return list(sources)


def _depth() -> int:
    """How many frames lie between the caller and the first that is not of this file, for a warning that points there."""
    frame, depth = sys._getframe(1), 1
    here = frame.f_code.co_filename  # which is not `__file__` in a bundle without sources
    while frame.f_back and frame.f_code.co_filename == here:
        frame, depth = frame.f_back, depth + 1
    return depth


def _open(folder: Path, provider: str, threads: int) -> tuple[Steps, Manifest, str, str]:
    """A folder's model and manifest, where it computes, and why not on CUDA."""
    manifest, found = None, OptimumFolder.without_manifest(folder)
    if not found:
        manifest = Manifest.load(folder)
        manifest.check_files(folder)
        if manifest.layout != "optimum":
            ort = onnxruntime(manifest.onnxruntime)
            provider, reason = choose_provider(ort, provider, manifest.providers, manifest.precision)
            kind = CudaModel if manifest.layout == "cuda" else Model
            return kind.load(folder, manifest, provider, threads), manifest, provider, reason
        found = OptimumFolder.find(folder, manifest.files)
        if not found:
            raise ModelFormatError(f"{folder}: its manifest tells of optimum's graphs, but there are none; export it again")
    ort = onnxruntime(VersionRange())
    provider, reason = choose_provider(ort, provider, ("cpu",), "optimum")
    model = OptimumModel.load(ort, found, provider, threads)
    return model, manifest or found.manifest(model.dims, model.precision, model.shares_prompt), provider, reason
