"""Models to be judged, ours and others', behind one small protocol. Each imports its own library only when it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.engines import ENGINES
from benchmarks.naive import Int8PerTensor, NearestPerBlock
from ramekin import Engine, SamplingParams
from ramekin_export.pipeline import export
from ramekin_export.recipe import RECIPES, Int8Normed, Int8PerToken, Int8TwoBytes, Layers, PerBlock, Recipe
from ramekin_export.verify import Checks

Floats = npt.NDArray[np.float32]
Tokens = Sequence[int]


class Predictor(Protocol):
    """A model of one checkpoint in some precision.

    Attributes:
        weight_bytes: what its weights take, on disk or, for PyTorch, in memory.
    """

    weight_bytes: int

    def logits(self, source: Tokens, targets: Sequence[Tokens]) -> list[Floats]:
        """Teacher-forced logits of each target, `(target, vocab)`; token by token, as in generation."""

    def greedy(self, sources: Sequence[Tokens], most: int) -> list[list[int]]:
        """The most likely continuation of each prompt, without its eos."""


class Ramekin:
    """A model folder of ours."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine.load(folder, threads=1)
        self.weight_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))

    def logits(self, source: Tokens, targets: Sequence[Tokens]) -> list[Floats]:
        model, start = self.engine.model, self.engine.manifest.tokens.start
        longest = max(map(len, targets))
        cache = model.new_cache(model.prefill(source), len(targets), longest, 1)
        fed = np.full((len(targets), longest), start)
        for row, target in zip(fed, targets, strict=True):
            row[1 : len(target)] = target[:-1]
        steps = [model.step(fed[:, step], cache).full.copy() for step in range(longest)]
        return [np.stack([steps[t][row] for t in range(len(target))]) for row, target in enumerate(targets)]

    def greedy(self, sources: Sequence[Tokens], most: int) -> list[list[int]]:
        params = SamplingParams(greedy=True, max_new_tokens=most, seed=0)
        eos = self.engine.manifest.tokens.eos
        outputs = (self.engine.generate(source, params)[0].token_ids for source in sources)
        return [[token for token in output if token not in eos] for output in outputs]


class Torch:
    """Anything with transformers' interface, fed token by token with its own cache."""

    def __init__(self, model: Any, weight_bytes: int) -> None:
        self._model, self.weight_bytes = model, weight_bytes

    def logits(self, source: Tokens, targets: Sequence[Tokens]) -> list[Floats]:
        import torch

        rows, longest = len(targets), max(map(len, targets))
        ids = torch.tensor([list(source)]).expand(rows, -1)
        mask = torch.ones_like(ids)
        fed = np.zeros((rows, longest), np.int64)
        for row, target in zip(fed, targets, strict=True):
            row[1 : len(target)] = target[:-1]
        steps, past = [], None
        with torch.no_grad():
            encoded = self._model.get_encoder()(input_ids=ids, attention_mask=mask)
            for step in range(longest):
                output = self._model(
                    encoder_outputs=encoded,
                    attention_mask=mask,
                    decoder_input_ids=torch.tensor(fed[:, step : step + 1]),
                    past_key_values=past,
                    use_cache=True,
                )
                past = output.past_key_values
                steps.append(output.logits[:, -1].float().numpy())
        return [np.stack([steps[t][row] for t in range(len(target))]) for row, target in enumerate(targets)]

    def greedy(self, sources: Sequence[Tokens], most: int) -> list[list[int]]:
        import torch

        results: list[list[int]] = []
        for first in range(0, len(sources), 10):
            batch = [list(source) for source in sources[first : first + 10]]
            longest = max(map(len, batch))
            ids = torch.tensor([source + [0] * (longest - len(source)) for source in batch])
            with torch.no_grad():
                output = self._model.generate(
                    input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=most, do_sample=False, num_beams=1
                )
            results += [[token for token in row if token > 1] for row in output.tolist()]
        return results


class OpenVINO(Torch):
    """Torch's interface over OpenVINO, whose batches of prompts end too early once `logits` has run (optimum-intel 2.2.0)."""

    def greedy(self, sources: Sequence[Tokens], most: int) -> list[list[int]]:
        return [super(OpenVINO, self).greedy([source], most)[0] for source in sources]


class CTranslate2:
    """CTranslate2's int8; it tells the logits of each step, those of a forced prefix included."""

    def __init__(self, folder: Path) -> None:
        import ctranslate2

        self._translator = ctranslate2.Translator(str(folder), device="cpu", intra_threads=1)
        self._pieces: list[str] = json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        self.weight_bytes = (folder / "model.bin").stat().st_size

    def logits(self, source: Tokens, targets: Sequence[Tokens]) -> list[Floats]:
        text = [self._pieces[token] for token in source]
        rows = self._translator.translate_batch(
            [text] * len(targets),
            target_prefix=[[self._pieces[token] for token in target[:-1]] for target in targets],
            beam_size=1,
            min_decoding_length=0,  # else the eos is masked in the first step
            max_decoding_length=max(map(len, targets)),
            return_logits_vocab=True,
            return_scores=True,
        )
        steps = [[np.asarray(each, np.float32).reshape(-1) for each in row.logits[0]] for row in rows]
        return [np.stack(row[: len(target)]) for row, target in zip(steps, targets, strict=True)]

    def greedy(self, sources: Sequence[Tokens], most: int) -> list[list[int]]:
        texts = [[self._pieces[token] for token in source] for source in sources]
        rows = self._translator.translate_batch(texts, beam_size=1, max_decoding_length=most, max_batch_size=16)
        return [[self._ids[piece] for piece in row.hypotheses[0] if piece != "</s>"] for row in rows]


def _ours(recipe: Recipe, precision: str = "int8", *, given: bool = True) -> Callable[[Path, Path, Path | None], Predictor]:
    """An export in some recipe of ours, or one that leaves something out; `given` the model's own papers to calibrate on."""

    def make(checkpoint: Path, scratch: Path, papers: Path | None) -> Predictor:
        kept = RECIPES[precision]
        RECIPES[precision] = recipe
        try:
            export(
                str(checkpoint),
                scratch / "model",
                precision,
                checks=Checks(calibrate=papers if given else None, verify=False),
            )
        finally:
            RECIPES[precision] = kept
        return Ramekin(scratch / "model")

    return make


def _torch(load: Callable[[Path], Any]) -> Callable[[Path, Path, Path | None], Predictor]:
    def make(checkpoint: Path, scratch: Path, papers: Path | None) -> Predictor:
        import torch

        torch.set_num_threads(1)
        model = load(checkpoint).eval()
        return Torch(model, _footprint(model))

    return make


def _footprint(model: Any) -> int:
    """Bytes of all weights, packed ones of dynamic quantization included."""
    total: int = model.get_memory_footprint()
    for module in model.modules():
        packed = getattr(module, "_packed_params", None)
        if hasattr(packed, "_weight_bias") and hasattr(module, "in_features"):
            total += module.in_features * module.out_features + 8 * module.out_features
    return total


def _bitsandbytes(kind: str) -> Callable[[Path], Any]:
    def load(checkpoint: Path) -> Any:
        import torch
        from transformers import BitsAndBytesConfig, T5ForConditionalGeneration

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16)
        return T5ForConditionalGeneration.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32)

    return load


def _torch_int8(checkpoint: Path) -> Any:
    import torch
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _optimum_int8(checkpoint: Path, scratch: Path, papers: Path | None) -> Predictor:
    folder, engine = scratch / "int8", ENGINES["optimum int8"].make()
    folder.mkdir()
    engine.prepare(checkpoint, folder)
    engine.load(checkpoint, folder, threads=1)
    graphs = (path for path in folder.glob("*.onnx") if not path.stem.startswith("decoder_model"))
    return Torch(engine.model, sum(path.stat().st_size for path in graphs))


def _openvino(**settings: int) -> Make:
    def make(checkpoint: Path, scratch: Path, papers: Path | None) -> Predictor:
        from optimum.intel import OVModelForSeq2SeqLM, OVWeightQuantizationConfig

        folder, kept = scratch / "openvino", OVWeightQuantizationConfig(**settings)
        OVModelForSeq2SeqLM.from_pretrained(checkpoint, export=True, quantization_config=kept).save_pretrained(folder)
        engine = ENGINES["OpenVINO int8"].make()
        engine.load(checkpoint, folder, threads=1)
        return OpenVINO(engine.model, sum(path.stat().st_size for path in folder.glob("*.bin")))

    return make


def _ctranslate2(checkpoint: Path, scratch: Path, papers: Path | None) -> Predictor:
    import ctranslate2

    folder = scratch / "ct2"
    ctranslate2.converters.TransformersConverter(str(checkpoint)).convert(str(folder), quantization="int8_float32")
    return CTranslate2(folder)


_INT8, _INT4 = RECIPES["int8"], RECIPES["int4"]
_BY_TOKEN, _BY_BLOCK = Layers.alike(Int8PerToken()), Layers.alike(PerBlock(8))
_NAIVE = Recipe(
    Layers.alike(Int8PerTensor(pairs=False)),
    Layers.alike(NearestPerBlock(8)),
    NearestPerBlock(8),
    rotated=False,
    folded=False,
)
_SATURATING = replace(
    _INT8,
    encoder=Layers(Int8Normed(pairs=False), Int8PerToken(pairs=False)),
    decoder=Layers(Int8Normed(pairs=False), Int8TwoBytes(pairs=False)),
)
Make = Callable[[Path, Path, "Path | None"], Predictor]
PREDICTORS: Mapping[str, Make] = {
    "fp32": _ours(RECIPES["fp32"], "fp32"),
    "int8": _ours(_INT8),
    "int8, not rotated, scales by token": _ours(replace(_INT8, rotated=False, encoder=_BY_TOKEN, decoder=_BY_BLOCK)),
    "int8, scales by token": _ours(replace(_INT8, encoder=_BY_TOKEN, decoder=_BY_BLOCK)),
    "int8, not folded": _ours(replace(_INT8, folded=False)),
    "int8, one scale for all tokens": _ours(replace(_INT8, encoder=Layers(Int8Normed(), Int8PerTensor()))),
    "int8, o and wo in blocks of 128": _ours(replace(_INT8, decoder=Layers(Int8Normed(), PerBlock(8)))),
    "int8, pairs that saturate": _ours(_SATURATING),
    "int8, keys and values in floats": _ours(replace(_INT8, compact=False)),
    "int8, head in blocks of 32": _ours(replace(_INT8, head=PerBlock(8, block=32))),
    "int8, naive": _ours(_NAIVE),
    "int4": _ours(_INT4, "int4"),
    "int4, not rotated, scales by token": _ours(replace(_INT4, rotated=False, encoder=_BY_TOKEN), "int4"),
    "int4, not folded": _ours(replace(_INT4, folded=False), "int4"),
    "int4, calibrated on other texts": _ours(_INT4, "int4", given=False),
    "int4, not calibrated": _ours(replace(_INT4, calibrated=False), "int4"),
    "int4, rounded to nearest": _ours(
        replace(_INT4, decoder=Layers.alike(NearestPerBlock(4, block=256)), calibrated=False), "int4"
    ),
    "int4, keys and values in floats": _ours(replace(_INT4, compact=False), "int4"),
    "int4, blocks of 128": _ours(replace(_INT4, decoder=Layers.alike(PerBlock(4))), "int4"),
    "int4, naive": _ours(replace(_NAIVE, decoder=Layers.alike(NearestPerBlock(4)), head=NearestPerBlock(4)), "int4"),
    "bitsandbytes nf4": _torch(_bitsandbytes("nf4")),
    "bitsandbytes fp4": _torch(_bitsandbytes("fp4")),
    "torch dynamic int8": _torch(_torch_int8),
    "optimum int8": _optimum_int8,
    "CTranslate2 int8": _ctranslate2,
    "OpenVINO int8": _openvino(bits=8),
    "OpenVINO int4, blocks of 64": _openvino(bits=4, group_size=64),
}
