"""A twin whose outlier channels carry signal: no rewrite makes them small again.

    pip install torch sentencepiece 'transformers>=5'
    python -m benchmarks.signal_twin CHECKPOINT OUT [--papers FOLDER] [--minutes 4]

Two channels of the residual stream become 30 times larger wherever they are written, and 30 times smaller behind every
norm. The norms now see a root mean square that these channels decide, differently for each token, so the function is not
the same; a short further training mends it. Without `--papers` the model is trained as the demo was, else as the larger one.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import T5ForConditionalGeneration

from benchmarks import train_larger
from benchmarks.mixed import held_out, read_real_papers
from examples import train_demo
from examples.synthetic import held_out_papers

CHANNELS, FACTOR, RATE = 2, 30.0, 4e-4


def amplify(model: T5ForConditionalGeneration, batch: train_demo.Batch) -> None:
    """Make the channels large, and each norm's gains what the median token of a batch then needs."""
    width = model.config.d_model
    chosen = np.random.default_rng(0).choice(width, CHANNELS, replace=False).tolist()
    growth: dict[str, float] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
            squares = inputs[0].square()
            grown = squares.sum(-1) + (FACTOR**2 - 1) * squares[..., chosen].sum(-1)
            growth[name] = float((grown / squares.sum(-1)).sqrt().median())

        return hook

    norms = [(name, module) for name, module in model.named_modules() if name.endswith("layer_norm")]
    hooks = [module.register_forward_hook(record(name)) for name, module in norms]
    with torch.no_grad():
        model(**batch)
        for hook in hooks:
            hook.remove()
        for name, weight in model.named_parameters():
            if name == "shared.weight":
                weight[:, chosen] *= FACTOR
            elif name.endswith((".o.weight", ".wo.weight")):
                weight[chosen] *= FACTOR
            elif name.endswith("layer_norm.weight"):
                weight.mul_(growth[name.removesuffix(".weight")])
                weight[chosen] /= FACTOR


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--papers", type=Path)
    parser.add_argument("--minutes", type=float, default=4)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.checkpoint / "spiece.model", arguments.out / "spiece.model")
    torch.manual_seed(0)
    tokenizer = sentencepiece.SentencePieceProcessor(str(arguments.checkpoint / "spiece.model"))
    model = T5ForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    model.train()
    if arguments.papers:
        training, judging = read_real_papers(arguments.papers)
        narrow = train_larger.Narrow(model, train_larger.used_tokens(tokenizer, training + judging))
        batches = map(narrow.numbered, train_larger.batches(tokenizer, training, (-1, 0)))
        papers, whole = held_out(60, judging, 70), narrow.widened
    else:
        batches, papers, whole = train_demo.batches(tokenizer), held_out_papers(100), lambda: model

    amplify(model, next(batches))

    def evaluate() -> None:
        train_demo.save(whole(), arguments.out)
        shares = train_demo.accuracy(whole(), tokenizer, papers)
        print("  well-formed {:.1%}, right {:.1%}".format(*shares), flush=True)

    train_demo.train(model, model, batches, arguments.minutes, RATE, evaluate, warmup=20)


if __name__ == "__main__":
    main()
