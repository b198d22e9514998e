"""A model grown from a smaller one that knows the task: another vocabulary, wider, the same number of layers."""

from __future__ import annotations

import math

import sentencepiece
import torch
from transformers import T5ForConditionalGeneration

NOISE = 0.3
"""How much of a token's first embedding is its own, so that no two tokens begin alike."""


@torch.no_grad()
def grow(model: T5ForConditionalGeneration, small: T5ForConditionalGeneration) -> None:
    """Make the layers of a fresh model compute what `small` computes, and leave the rest of them free to learn.

    New channels of the residual stream are read but never written, new units of a layer written but never read, so each
    pair gets a gradient and changes nothing at first. Heads keep their places; gains undo the norms' larger mean.

    Raises:
        ValueError: the models differ in layers or heads, or `small` is the wider one.
    """
    new, old = model.config, small.config
    for each in ("num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets"):
        if getattr(new, each) != getattr(old, each):
            raise ValueError(f"cannot grow: {each} is {getattr(old, each)} in the small model, {getattr(new, each)} here.")
    if min(new.d_model - old.d_model, new.d_kv - old.d_kv, new.d_ff - old.d_ff) < 0:
        raise ValueError("cannot grow: the small model is wider.")
    inner = torch.cat([torch.arange(old.d_kv) + head * new.d_kv for head in range(old.num_heads)])
    stream, units = torch.arange(old.d_model), torch.arange(old.d_ff)
    state = model.state_dict()
    for name, tensor in small.state_dict().items():
        whole, part = state[name], name.split(".")[-2]
        if part.endswith("layer_norm"):
            whole[stream] = tensor * math.sqrt(old.d_model / new.d_model)
        elif part == "relative_attention_bias":
            whole.copy_(tensor)
        elif part in ("q", "k", "v"):
            if part == "q":
                whole.zero_()
                # a query's new half is read from the channels that are never written
                whole[:, old.d_model :].normal_(std=tensor.std().item())
            whole[inner[:, None], stream] = tensor
        elif part in ("wi_0", "wi_1"):
            whole[units[:, None], stream] = tensor
        elif part in ("o", "wo"):
            written = inner if part == "o" else units
            whole.zero_()
            whole[stream[:, None], written] = tensor


@torch.no_grad()
def transplant(
    model: T5ForConditionalGeneration,
    tokenizer: sentencepiece.SentencePieceProcessor,
    small: T5ForConditionalGeneration,
    spelling: sentencepiece.SentencePieceProcessor,
) -> None:
    """Begin each token's embedding and head row as the sum of those of the small model's tokens that spell it."""
    width = small.config.d_model
    pairs = [(model.shared.weight, small.shared.weight), (model.lm_head.weight, small.lm_head.weight)]
    bare = {spelling.id_to_piece(i).removeprefix("▁"): i for i in range(spelling.get_piece_size())}
    for mine, theirs in pairs:
        mine[:, width:] = 0
        mine[:3, :width] = theirs[:3]
    for token in range(3, tokenizer.get_piece_size()):
        piece = tokenizer.id_to_piece(token)
        spelled = spelling.encode(piece.replace("▁", " "))
        if not piece.startswith("▁") and spelled:
            first = bare.get(spelling.id_to_piece(spelled[0]).removeprefix("▁"), spelled[0])
            spelled = [first, *spelled[1:]] if spelling.id_to_piece(spelled[0]) != "▁" else spelled[1:]
        if not spelled:
            continue
        own = torch.randn(width)
        for mine, theirs in pairs:
            row = theirs[spelled].sum(0) / math.sqrt(len(spelled))
            mine[token, :width] = row + own * (NOISE * row.norm() / math.sqrt(width))
