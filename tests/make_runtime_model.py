"""Make `tests/runtime/model`: a tiny random T5 v1.1 as a model folder, so that the runtime is tested without the export.

    python -m tests.make_runtime_model

Run it again when the format of model folders changes; `tests/export/test_pipeline.py` notices.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import sentencepiece
from safetensors.numpy import load_file, save_file

from benchmarks.random_checkpoint import FLAN, write_checkpoint
from examples.synthetic import make_paper
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks

MODEL = Path(__file__).parent / "runtime" / "model"
CUDA_MODEL, INT8_MODEL = MODEL.with_name("cuda_model"), MODEL.with_name("int8_model")
TINY = {
    **FLAN,
    "vocab_size": 512,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 1,
}


def train_tokenizer(path: Path) -> Path:
    """A SentencePiece model of 400 pieces with T5's special ids and T5's normalization left out, which keeps it small."""
    papers = [make_paper(seed) for seed in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for paper in papers for text in (paper.abstract, paper.introduction)]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    return path


def main() -> None:
    """Make the folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(Path(folder) / "spiece.model")
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", TINY, tokenizer)
        weights = load_file(checkpoint / "model.safetensors")
        weights["lm_head.weight"][FLAN["eos_token_id"]] *= 4  # so that samples end, at lengths that differ
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        export(str(checkpoint), MODEL, "fp32", force=True)
        export(str(checkpoint), CUDA_MODEL, "fp32-cuda", force=True)
        export(str(checkpoint), INT8_MODEL, "int8", force=True, checks=Checks(verify=False))


if __name__ == "__main__":
    main()
