"""Everything that has transformers' `generate`: PyTorch, bitsandbytes, optimum, OpenVINO."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import Clock


class HuggingFace:
    """A model with transformers' interface.

    Attributes:
        padded: fill the prompt to this many tokens first, as the model card does.
        bits: of the weights that optimum or OpenVINO converts to.
        dequantizing: let bitsandbytes make bfloat16 weights of its 4 bits at every product, as it does by itself where the
            processor has no bfloat16, and keep everything else in bfloat16 too.
    """

    def __init__(self, kind: str, padded: int = 0, bits: int = 32, dequantizing: bool = False) -> None:
        self._kind, self._padded, self._bits, self._dequantizing = kind, padded, bits, dequantizing
        self.model: Any = None

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        {"optimum": self._prepare_optimum, "openvino": self._prepare_openvino}[self._kind](checkpoint, folder)

    def _prepare_optimum(self, checkpoint: Path, folder: Path) -> None:
        from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        if self._bits == 32:
            ORTModelForSeq2SeqLM.from_pretrained(checkpoint, export=True).save_pretrained(folder)
            shutil.copy(checkpoint / "spiece.model", folder)
            return
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            ORTModelForSeq2SeqLM.from_pretrained(checkpoint, export=True).save_pretrained(scratch)
            for graph in sorted(Path(scratch).glob("*.onnx")):
                quantizer = ORTQuantizer.from_pretrained(scratch, file_name=graph.name)
                quantizer.quantize(quantization_config=settings, save_dir=folder)

    def _prepare_openvino(self, checkpoint: Path, folder: Path) -> None:
        from optimum.intel import OVModelForSeq2SeqLM, OVWeightQuantizationConfig

        model = OVModelForSeq2SeqLM.from_pretrained(
            checkpoint, export=True, quantization_config=OVWeightQuantizationConfig(bits=self._bits)
        )
        model.save_pretrained(folder)

    def load(self, checkpoint: Path, folder: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        load = _load_dequantizing if self._dequantizing else _LOADERS.get(self._kind, _load_torch)
        self.model = load(self._kind, checkpoint, folder, threads)

    def run(self, prompt: Sequence[int], lengths: Sequence[int], clock: Clock) -> None:
        import torch
        from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

        model, ends = self.model, torch.tensor(lengths)
        eos = model.config.eos_token_id

        class Ends(LogitsProcessor):  # type: ignore[misc]  # the library has no types
            def __call__(self, input_ids: Any, scores: Any) -> Any:
                token = input_ids.shape[1]  # the start token is one of them: this many tokens after this step
                scores[:, eos] = -torch.inf
                due = ends == token
                if token < max(lengths) and due.any():
                    scores[due] = -torch.inf
                    scores[due, eos] = 0
                return scores

        class Ticks(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((len(lengths),), clock.tick(), dtype=torch.bool)

        ids = torch.tensor([list(prompt)])
        if self._padded:
            ids = torch.nn.functional.pad(ids, (0, self._padded - ids.shape[1]), value=model.config.pad_token_id)
        torch.manual_seed(1)
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=(ids != model.config.pad_token_id).long(),
                do_sample=True,
                top_k=50,
                top_p=0.95,
                num_beams=1,
                num_return_sequences=len(lengths),
                max_new_tokens=max(lengths),
                logits_processor=LogitsProcessorList([Ends()]),
                stopping_criteria=StoppingCriteriaList([Ticks()]),
                # OpenVINO computes a rare NaN on random weights, and torch.multinomial then raises
                remove_invalid_values=self._kind == "openvino",
            )


def _load_torch(kind: str, checkpoint: Path, folder: Path, threads: int) -> Any:
    import torch
    from transformers import T5ForConditionalGeneration

    if kind in ("float32", "bfloat16"):
        return T5ForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, kind)).eval()
    return _load_bitsandbytes(kind, checkpoint)


def _load_bitsandbytes(kind: str, checkpoint: Path, **others: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig, T5ForConditionalGeneration

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type=kind)
    others |= {"quantization_config": config, "device_map": "cpu"}
    return T5ForConditionalGeneration.from_pretrained(checkpoint, **others).eval()


def _load_dequantizing(kind: str, checkpoint: Path, folder: Path, threads: int) -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit

    model = _load_bitsandbytes(kind, checkpoint, dtype=torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


def _load_optimum(kind: str, checkpoint: Path, folder: Path, threads: int) -> Any:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    names = {path.stem.removesuffix("_quantized"): path.name for path in folder.glob("*.onnx")}
    return ORTModelForSeq2SeqLM.from_pretrained(
        folder,
        session_options=options,
        encoder_file_name=names["encoder_model"],
        decoder_file_name=names["decoder_model"],
        decoder_with_past_file_name=names["decoder_with_past_model"],
    )


def _load_openvino(kind: str, checkpoint: Path, folder: Path, threads: int) -> Any:
    from optimum.intel import OVModelForSeq2SeqLM

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return OVModelForSeq2SeqLM.from_pretrained(str(folder), ov_config=config)


_LOADERS: dict[str, Callable[[str, Path, Path, int], Any]] = {"optimum": _load_optimum, "openvino": _load_openvino}


def make(**settings: Any) -> HuggingFace:
    """One kind."""
    return HuggingFace(**settings)
