"""Train the larger model of docs/quantization.md: 22 million parameters on real papers, on two CPU cores in 15 to 40 minutes.

    pip install torch sentencepiece 'transformers>=5'
    python -m benchmarks.train_larger OUT --papers FOLDER --tokenizer spiece.model [--minutes 40]

A T5 v1.1 with T5's own vocabulary, grown from the demo model, learns to find invented facts among the sentences of real
papers, and to continue real papers, from prompts of up to 1024 tokens. It is a test object of middling size; it knows
nothing worth knowing.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from benchmarks.grown import grow, transplant
from benchmarks.mixed import RealPaper, continuation, held_out, mixed_paper, read_real_papers
from examples.synthetic import make_paper
from examples.train_demo import Batch, Row, accuracy, build_model, encode, pack, questions, save, train

SHAPE = {
    "vocab_size": 32128,
    "d_model": 256,
    "d_kv": 64,
    "num_heads": 4,
    "d_ff": 512,
    "num_layers": 4,
    "num_decoder_layers": 3,
}
DEMO = Path(__file__).parents[1] / "examples" / "checkpoint"
PEAK_LEARNING_RATE = 8e-4
# Two kinds of batches: rows, most source tokens, most words of real text.
SHORT, LONG = (16, 240, 70), (2, 1024, 540)
TARGET_TOKENS = 96
RAMP = 100, 400  # copying is learned first where there is little else to read: no real text, then more and more


class NarrowHead(nn.Linear):
    """A head over the tokens that occur in the texts, and a last row that stands for each of the others.

    It computes what a full head would whose other rows are all alike, at a third of the work.
    """

    def __init__(self, full: torch.Tensor, used: list[int]) -> None:
        super().__init__(full.shape[1], len(used) + 1, bias=False)
        others = torch.ones(len(full), dtype=torch.bool)
        others[used] = False
        self.weight = nn.Parameter(torch.cat([full[used], full[others].mean(0, keepdim=True)]).detach().clone())
        self.count = math.log(int(others.sum()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits; the last one is that of all others together."""
        logits = super().forward(hidden)
        return torch.cat([logits[..., :-1], logits[..., -1:] + self.count], -1)


class Narrow:
    """A model over the tokens that occur in the texts, numbered anew, and the way back to its whole vocabulary."""

    def __init__(self, model: T5ForConditionalGeneration, used: list[int]) -> None:
        self.model, self._used, self._embedding = model, used, model.shared.weight.detach().clone()
        model.lm_head = NarrowHead(model.lm_head.weight, used)
        embedding = nn.Embedding(len(used) + 1, model.config.d_model)
        embedding.weight = nn.Parameter(torch.cat([self._embedding[used], self._embedding[-1:]]))
        model.set_input_embeddings(embedding)
        self._number = torch.full((len(self._embedding),), len(used))
        self._number[used] = torch.arange(len(used))

    def numbered(self, batch: Batch) -> Batch:
        """The batch with the model's own token numbers."""
        labels = batch["labels"]
        return {
            **batch,
            "input_ids": self._number[batch["input_ids"]],
            "decoder_input_ids": self._number[batch["decoder_input_ids"]],
            "labels": torch.where(labels < 0, labels, self._number[labels.clamp_min(0)]),
        }

    def widened(self) -> T5ForConditionalGeneration:
        """A copy of the model with its whole vocabulary."""
        wide, size, width = copy.deepcopy(self.model), len(self._embedding), self.model.config.d_model
        head = self.model.lm_head.weight.detach()
        wide.lm_head = nn.Linear(width, size, bias=False)
        wide.lm_head.weight = nn.Parameter(head[self._number])
        embedding = nn.Embedding(size, width)
        embedding.weight = nn.Parameter(self._embedding.clone())
        embedding.weight.data[self._used] = self.model.shared.weight.detach()[:-1]
        wide.set_input_embeddings(embedding)
        return wide


def used_tokens(tokenizer: sentencepiece.SentencePieceProcessor, real: list[RealPaper]) -> list[int]:
    """The tokens of the real papers and of some thousand synthetic ones."""
    found = {0, 1, 2}
    for paper in real:
        for sentence in paper.abstract + paper.introduction:
            found.update(tokenizer.encode(sentence))
    for seed in range(3000):
        synthetic = make_paper(seed)
        texts = [synthetic.abstract, synthetic.introduction, *map(" [SEP] ".join, synthetic.answers().items())]
        for text in texts:
            found.update(tokenizer.encode(text))
    return sorted(found)


def batches(
    tokenizer: sentencepiece.SentencePieceProcessor, real: list[RealPaper], ramp: tuple[int, int] = RAMP
) -> Iterator[Batch]:
    """Endless batches: seven short ones, then a long one; a few rows continue a real paper."""
    rng = np.random.default_rng(0)
    seeds = count()
    for number in count():
        share = min(1, max(0, (number - ramp[0]) / (ramp[1] - ramp[0])))
        rows, source_tokens, most_words = LONG if share and number % 8 == 7 else SHORT
        batch: list[Row] = []
        for row in range(rows):
            seed, words = next(seeds), int(rng.integers(0, most_words + 1) * share)
            if row or number % 2 or not share:
                source, targets = questions(tokenizer, mixed_paper(seed, real, words), rng)
            else:
                before, after = continuation(seed, real, 2 * words)
                source, targets = encode(tokenizer, before), [encode(tokenizer, after)[:TARGET_TOKENS]]
            batch.append((source if len(source) <= source_tokens else [*source[: source_tokens - 1], 1], targets))
        yield pack(batch, target_tokens=TARGET_TOKENS)


def main() -> None:
    """Train, save and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--papers", type=Path, required=True, help="folder of .jsonl files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="T5's spiece.model")
    parser.add_argument("--minutes", type=float, default=40)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.tokenizer, arguments.out / "spiece.model")
    torch.manual_seed(0)
    tokenizer = sentencepiece.SentencePieceProcessor(str(arguments.tokenizer))
    training, judging = read_real_papers(arguments.papers)
    model = build_model(SHAPE)
    small = T5ForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    grow(model, small)
    transplant(model, tokenizer, small, sentencepiece.SentencePieceProcessor(str(DEMO / "spiece.model")))
    narrow = Narrow(model, used_tokens(tokenizer, training + judging))
    papers = held_out(100, judging, 70)

    def evaluate() -> None:
        whole = narrow.widened()
        save(whole, arguments.out)
        print("  well-formed {:.1%}, right {:.1%}".format(*accuracy(whole, tokenizer, papers)), flush=True)

    endless = map(narrow.numbered, batches(tokenizer, training))
    train(narrow.model, narrow.model, endless, arguments.minutes, PEAK_LEARNING_RATE, evaluate)


if __name__ == "__main__":
    main()
