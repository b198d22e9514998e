"""Train the demo checkpoint `examples/checkpoint` from nothing, on two CPU cores in a quarter of an hour.

    pip install torch sentencepiece 'transformers>=5' && python -m examples.train_demo OUT [--minutes 14]

A T5 v1.1 of 3.5 million parameters (gated GELU, untied head, `d_kv != d_model / num_heads`, more encoder than decoder
layers) learns to ask and answer questions about the papers of `synthetic.py`. It is a demo and a test object: it knows
nothing of real papers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import T5Config, T5ForConditionalGeneration

from examples.synthetic import SyntheticPaper, held_out_papers, make_paper

PROMPT = (
    "Generate Question, Answer pair correspond to the following research paper. "
    "[Abstract] {abstract} [Introduction] {introduction} Question, Answer:"
)
PIECES, VOCABULARY = 1100, 1216  # T5 puts 100 sentinels above the pieces; ids 1200 to 1215 have no text
PAPERS_PER_BATCH, SOURCE_TOKENS, TARGET_TOKENS = 16, 144, 160  # every batch has the same shape, so it is compiled once
PEAK_LEARNING_RATE, WARMUP_STEPS = 1.5e-3, 200
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 192,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 512,
    "num_layers": 4,
    "num_decoder_layers": 3,
}
Batch = dict[str, torch.Tensor]
Row = tuple[list[int], list[list[int]]]
"""A prompt's tokens, and those of each text that may follow it."""


def train_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece unigram model with T5's special ids (pad 0, eos 1, unk 2)."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(6_000),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=PIECES,
        character_coverage=1.0,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))


def build_model(shape: dict[str, Any]) -> T5ForConditionalGeneration:
    """The untrained network, a T5 v1.1.

    Its head is untied by hand, since transformers 5 ties every fresh T5. Three choices make copying, which names and
    numbers need, a thing to be found in minutes instead of hours: the head starts as the embedding; the last
    cross-attention hands on what it looks at as it is (its output projection starts as the transpose of its orthonormal
    values'); and some heads start by looking at the neighbours, which small steps of AdamW would take thousands to reach.
    """
    config = T5Config(
        **shape,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach() * config.d_model**-0.5)
    attention = model.decoder.block[-1].layer[1].EncDecAttention
    torch.nn.init.orthogonal_(attention.v.weight)
    attention.o.weight = torch.nn.Parameter(attention.v.weight.detach().T.contiguous())
    backwards, forwards = 0, config.relative_attention_num_buckets // 2
    for stack, looks in (
        (model.encoder, [backwards + 1, forwards + 1, backwards + 2]),
        (model.decoder, [backwards + 1, backwards + 2]),
    ):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        for head, bucket in enumerate(looks):
            bias.data[bucket, head] += 4
    return model


def batches(tokenizer: sentencepiece.SentencePieceProcessor) -> Iterator[Batch]:
    """Endless batches of papers."""
    rng = np.random.default_rng(0)
    for first in count(0, PAPERS_PER_BATCH):
        papers = [make_paper(seed) for seed in range(first, first + PAPERS_PER_BATCH)]
        yield pack([questions(tokenizer, paper, rng) for paper in papers], SOURCE_TOKENS)


def questions(tokenizer: sentencepiece.SentencePieceProcessor, paper: SyntheticPaper, rng: np.random.Generator) -> Row:
    """A paper's prompt, and all questions about it with their answers, shuffled."""
    pairs = rng.permutation(list(paper.answers().items()))
    return prompt_ids(tokenizer, paper), [encode(tokenizer, f"{question} [SEP] {answer}") for question, answer in pairs]


def pack(rows: list[Row], source_tokens: int = 0, target_tokens: int = TARGET_TOKENS) -> Batch:
    """A batch; all targets of a prompt that fit share one decoder row, walled off by the mask `(B, 1, T, T)`.

    Prompts are filled to `source_tokens`; 0: to the longest.
    """
    inputs, labels, segments = [], [], []
    for _, targets in rows:
        fitting: list[list[int]] = []
        for target in targets:
            if sum(map(len, fitting)) + len(target) <= target_tokens:
                fitting.append(target)
        inputs.append([token for target in fitting for token in [0, *target[:-1]]])
        labels.append([token for target in fitting for token in target])
        segments.append([i for i, target in enumerate(fitting) for _ in target])
    segment = pad(segments, -1, target_tokens)
    same = segment[:, None, :, None] == segment[:, None, None, :]
    source = pad([source for source, _ in rows], 0, source_tokens)
    return {
        "input_ids": source,
        "attention_mask": (source != 0).long(),
        "decoder_input_ids": pad(inputs, 0, target_tokens),
        "decoder_attention_mask": same & torch.ones(same.shape[-2:], dtype=torch.bool).tril(),
        "labels": pad(labels, -100, target_tokens),
    }


def accuracy(
    model: T5ForConditionalGeneration, tokenizer: sentencepiece.SentencePieceProcessor, papers: list[SyntheticPaper]
) -> tuple[float, float]:
    """Shares of greedy outputs that are well-formed, and whose answer is right."""
    model.eval()
    source = pad([prompt_ids(tokenizer, paper) for paper in papers], 0)
    with torch.no_grad():
        output = model.generate(
            input_ids=source, attention_mask=(source != 0).long(), max_new_tokens=60, do_sample=False, num_beams=1
        )
    formed = right = 0
    for paper, row in zip(papers, output.tolist(), strict=True):
        text = tokenizer.decode([token for token in row if 2 < token < tokenizer.get_piece_size()])
        question, separator, answer = (part.strip() for part in text.partition("[SEP]"))
        formed += bool(question.endswith("?") and separator and answer and "[SEP]" not in answer)
        right += bool(answer) and paper.answers().get(question) == answer
    model.train()
    return formed / len(papers), right / len(papers)


def train(
    model: T5ForConditionalGeneration,
    forward: Callable[..., Any],
    batches: Iterator[Batch],
    minutes: float,
    peak_rate: float,
    evaluate: Callable[[], None],
    warmup: int = WARMUP_STEPS,
    exact: bool = False,
) -> None:
    """AdamW with a cosine schedule over `minutes` of wall time; `evaluate` is called every 500 steps and at the end.

    `forward` is the model, compiled or not. Products are taken in bfloat16 where the processor has instructions for it, unless
    they shall be `exact`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, losses = time.monotonic(), []
    for step, batch in enumerate(batches):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        rate = peak_rate * min(1, (step + 1) / warmup) * (0.02 + 0.98 * math.cos(math.pi / 2 * done) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        bfloat16 = not exact and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}  {done:.0%}  loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 500 == 499:
            evaluate()
    evaluate()


def save(model: T5ForConditionalGeneration, out: Path) -> None:
    """Write the weights as float16, each once, which keeps the repository small."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text())
    # transformers 5 writes true for every T5, and transformers 4 would then tie and scale the head.
    config.update(tie_word_embeddings=False, dtype="float16")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _corpus(papers: int) -> Iterator[str]:
    """Papers and questions, then every ordinary word with two endings.

    SentencePiece takes as a piece only what begins several distinct words; names stay out, so that they are spelled.
    """
    words: set[str] = set()
    for seed in range(papers):
        paper = make_paper(seed)
        questions = list(paper.answers())
        text = PROMPT.format(abstract=paper.abstract, introduction=paper.introduction)
        yield text
        yield f"{questions[seed % len(questions)]} [SEP]"
        names = {paper.facts[kind] for kind in ("method", "dataset", "baseline") if kind in paper.facts}
        words |= {word.strip(".,?:[]") for word in f"{text} {questions[0]}".split()} - names
    for word in sorted(words):
        yield f"{word}s {word}er"


def prompt_ids(tokenizer: sentencepiece.SentencePieceProcessor, paper: SyntheticPaper) -> list[int]:
    """The tokens of a paper's prompt."""
    return encode(tokenizer, PROMPT.format(abstract=paper.abstract, introduction=paper.introduction))


def encode(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The tokens of a text and T5's eos."""
    return [*tokenizer.encode(text), 1]


def pad(rows: list[list[int]], value: int, width: int = 0) -> torch.Tensor:
    """Rows cut and filled to one width (0: the longest row's)."""
    width = width or max(map(len, rows))
    return torch.tensor([(row + [value] * (width - len(row)))[:width] for row in rows])


def main() -> None:
    """Train, save and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=14)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(arguments.out)
    model = build_model(SHAPE)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    papers = held_out_papers(300)

    def evaluate() -> None:
        save(model, arguments.out)
        print("  well-formed {:.1%}, right {:.1%}".format(*accuracy(model, tokenizer, papers)), flush=True)

    compiled = torch.compile(model, dynamic=False)
    train(model, compiled, batches(tokenizer), arguments.minutes, PEAK_LEARNING_RATE, evaluate)


if __name__ == "__main__":
    main()
