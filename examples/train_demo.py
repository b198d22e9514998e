"""Train the demo checkpoint `examples/checkpoint` from nothing, on two CPU cores in a quarter of an hour.

    pip install torch sentencepiece 'transformers>=5' && python examples/train_demo.py OUT [--minutes 14]

A T5 v1.1 of 3.5 million parameters (gated GELU, untied head, `d_kv != d_model / num_heads`, more encoder than decoder
layers) learns to ask and answer questions about the papers of `synthetic.py`. It is a demo and a test object: it knows
nothing of real papers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from synthetic import held_out_papers, make_paper
from transformers import T5Config, T5ForConditionalGeneration

PROMPT = (
    "Generate Question, Answer pair correspond to the following research paper. "
    "[Abstract] {abstract} [Introduction] {introduction} Question, Answer:"
)
PIECES, VOCABULARY = 1100, 1216  # T5 puts 100 sentinels above the pieces; ids 1200 to 1215 have no text
PAPERS_PER_BATCH, SOURCE_TOKENS, TARGET_TOKENS = 16, 144, 160  # every batch has the same shape, so it is compiled once
PEAK_LEARNING_RATE, WARMUP_STEPS = 1.5e-3, 200


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


def build_model() -> T5ForConditionalGeneration:
    """The untrained network.

    Its head is untied by hand, since transformers 5 ties every fresh T5. Three choices make copying, which names and
    numbers need, a thing to be found in minutes instead of hours: the head starts as the embedding; the last
    cross-attention hands on what it looks at as it is (its output projection starts as the transpose of its orthonormal
    values'); and some heads start by looking at the neighbours, which small steps of AdamW would take thousands to reach.
    """
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=192,
        d_kv=32,
        num_heads=4,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=3,
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


def batches(tokenizer: sentencepiece.SentencePieceProcessor) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches; all questions about a paper share one decoder row, walled off by the mask `(B, 1, T, T)`."""
    rng = np.random.default_rng(0)
    for first in count(0, PAPERS_PER_BATCH):
        sources, inputs, labels, segments = [], [], [], []
        for seed in range(first, first + PAPERS_PER_BATCH):
            paper = make_paper(seed)
            sources.append(_encode(tokenizer, PROMPT.format(abstract=paper.abstract, introduction=paper.introduction)))
            targets: list[list[int]] = []
            for question, answer in rng.permutation(list(paper.answers().items())):
                target = _encode(tokenizer, f"{question} [SEP] {answer}")
                if sum(map(len, targets)) + len(target) <= TARGET_TOKENS:
                    targets.append(target)
            inputs.append([token for target in targets for token in [0, *target[:-1]]])
            labels.append([token for target in targets for token in target])
            segments.append([i for i, target in enumerate(targets) for _ in target])
        segment = _pad(segments, -1, TARGET_TOKENS)
        same = segment[:, None, :, None] == segment[:, None, None, :]
        source = _pad(sources, 0, SOURCE_TOKENS)
        yield {
            "input_ids": source,
            "attention_mask": (source != 0).long(),
            "decoder_input_ids": _pad(inputs, 0, TARGET_TOKENS),
            "decoder_attention_mask": same & torch.ones(same.shape[-2:], dtype=torch.bool).tril(),
            "labels": _pad(labels, -100, TARGET_TOKENS),
        }


def accuracy(
    model: T5ForConditionalGeneration, tokenizer: sentencepiece.SentencePieceProcessor, papers: int
) -> tuple[float, float]:
    """Shares of greedy outputs that are well-formed, and whose answer is right, on held-out papers."""
    model.eval()
    held_out = held_out_papers(papers)
    source = _pad([_encode(tokenizer, PROMPT.format(abstract=p.abstract, introduction=p.introduction)) for p in held_out], 0)
    with torch.no_grad():
        output = model.generate(
            input_ids=source, attention_mask=(source != 0).long(), max_new_tokens=60, do_sample=False, num_beams=1
        )
    formed = right = 0
    for paper, row in zip(held_out, output.tolist(), strict=True):
        text = tokenizer.decode([token for token in row if 2 < token < PIECES])
        question, separator, answer = (part.strip() for part in text.partition("[SEP]"))
        formed += bool(question.endswith("?") and separator and answer and "[SEP]" not in answer)
        right += bool(answer) and paper.answers().get(question) == answer
    model.train()
    return formed / papers, right / papers


def train(
    model: T5ForConditionalGeneration, tokenizer: sentencepiece.SentencePieceProcessor, minutes: float, out: Path
) -> None:
    """AdamW with a cosine schedule over `minutes` of wall time; the checkpoint is written at each evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, losses, compiled = time.monotonic(), [], torch.compile(model, dynamic=False)
    for step, batch in enumerate(batches(tokenizer)):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        rate = PEAK_LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * math.cos(math.pi / 2 * done) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}  {done:.0%}  loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 500 == 499:
            print("  well-formed {:.1%}, right {:.1%}".format(*accuracy(model, tokenizer, 100)), flush=True)
            save(model, out)
    save(model, out)


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


def _encode(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    return [*tokenizer.encode(text), 1]


def _pad(rows: list[list[int]], value: int, width: int = 0) -> torch.Tensor:
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
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, tokenizer, arguments.minutes, arguments.out)
    print("held-out papers: well-formed {:.1%}, right {:.1%}".format(*accuracy(model, tokenizer, 300)))


if __name__ == "__main__":
    main()
