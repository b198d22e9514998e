"""A twin whose outlier channels carry signal: no scale of a channel makes them small again.

    pip install torch sentencepiece 'transformers>=5'
    python -m benchmarks.signal_twin CHECKPOINT OUT [--papers FOLDER] [--minutes 12] [--rate 1e-3] [--exact]

First the residual stream is rotated so that the directions which vary most over real texts become single channels; that is
exact, and `--exact` ends here. Then the first two of them become three times larger wherever they are written, and three
times smaller behind every norm. The norms now see a root mean square that these channels decide, which changes the function
a little; further training mends it. It has to last until the twin is as sure of its tokens as the model was: a twin that is not
differs by whole nats on single tokens however it is rounded, and measures that instead. bitsandbytes nf4, which rounds no activations, tells:
its KL on the twin should be about that on the model. Without `--papers` the texts are those of the demo, else the larger model's
(`--minutes 5 --rate 2e-4` in the table).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from transformers import T5ForConditionalGeneration

from benchmarks import train_larger
from benchmarks.mixed import held_out, read_real_papers
from examples import train_demo
from examples.synthetic import held_out_papers

CHANNELS, FACTOR = 2, 3.0
_READERS = tuple(f".{name}.weight" for name in ("q", "k", "v", "wi_0", "wi_1"))
_WRITERS = (".o.weight", ".wo.weight")


@torch.no_grad()
def streams(model: T5ForConditionalGeneration, batch: train_demo.Batch) -> dict[str, torch.Tensor]:
    """What each norm of the model reads, `(tokens, channels)`."""
    seen: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _module, inputs, _output: seen.update({name: inputs[0].flatten(0, -2)})

    norms = [(name, module) for name, module in model.named_modules() if name.endswith("layer_norm")]
    hooks = [module.register_forward_hook(record(name)) for name, module in norms]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def rotate(model: T5ForConditionalGeneration, batch: train_demo.Batch) -> None:
    """Make the principal directions of the residual stream its channels, the largest first. The function stays as it is."""
    _move_gains(model)
    width = model.config.d_model
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for stream in streams(model, batch).values():
        normed = (stream / stream.square().mean(-1, keepdim=True).sqrt()).double()
        scatter += normed.T @ normed / len(normed)
    directions = torch.linalg.eigh(scatter).eigenvectors.flip(1).float()
    for name, weight in model.named_parameters():
        if name in ("shared.weight", "lm_head.weight") or name.endswith(_READERS):
            weight.copy_(weight @ directions)
        elif name.endswith(_WRITERS):
            weight.copy_(directions.T @ weight)


@torch.no_grad()
def amplify(model: T5ForConditionalGeneration, batch: train_demo.Batch) -> None:
    """Make the first channels large, and each norm's gains what the median token of a batch then needs."""
    growth = {}
    for name, stream in streams(model, batch).items():
        squares = stream.square()
        grown = squares.sum(-1) + (FACTOR**2 - 1) * squares[:, :CHANNELS].sum(-1)
        growth[name] = (grown / squares.sum(-1)).sqrt().median()
    for name, weight in model.named_parameters():
        if name == "shared.weight":
            weight[:, :CHANNELS] *= FACTOR
        elif name.endswith(_WRITERS):
            weight[:CHANNELS] *= FACTOR
        elif name.endswith("layer_norm.weight"):
            weight.mul_(growth[name.removesuffix(".weight")])
            weight[:CHANNELS] /= FACTOR


def _move_gains(model: T5ForConditionalGeneration) -> None:
    """Multiply the norms' gains into the projections that read them."""
    decoder = model.decoder
    cross = [getattr(block.layer[1].EncDecAttention, name) for block in decoder.block for name in "kv"]
    readers = [(model.encoder.final_layer_norm, cross), (decoder.final_layer_norm, [model.lm_head])]
    for stack in (model.encoder, decoder):
        for block in stack.block:
            for layer in block.layer:
                names = ("q",) if hasattr(layer, "EncDecAttention") else ("q", "k", "v", "wi_0", "wi_1")
                linears = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in names]
                readers.append((layer.layer_norm, linears))
    for norm, linears in readers:
        for linear in linears:
            linear.weight *= norm.weight
        norm.weight.fill_(1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--papers", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--exact", action="store_true", help="only rotate: the same function, to float precision")
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

    batch = next(batches)
    rotate(model, batch)
    if not arguments.exact:
        amplify(model, batch)
    for name, stream in streams(model, batch).items():
        if name.endswith("final_layer_norm"):
            sizes = stream.abs().mean(0)
            print(f"{name}: the largest channel is {sizes.max() / sizes.median():.0f} times the median one")

    if arguments.exact:
        train_demo.save(whole(), arguments.out)
        return

    def evaluate() -> None:
        train_demo.save(whole(), arguments.out)
        shares = train_demo.accuracy(whole(), tokenizer, papers)
        print("  well-formed {:.1%}, right {:.1%}".format(*shares), flush=True)

    forward = model if arguments.papers else torch.compile(model, dynamic=False)  # prompts of one length: compiled once
    train_demo.train(model, forward, batches, arguments.minutes, arguments.rate, evaluate, warmup=20, exact=True)


if __name__ == "__main__":
    main()
