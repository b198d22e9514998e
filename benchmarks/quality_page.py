"""The page `docs/quantization.md`, from the results of `benchmarks.quality`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
_SAMPLES = 4  # for each prompt, where a result says nothing
_TWINS = ("plain", "channels", "wo", "both", "principal", "signal")
_INTRODUCTION = """# What quantization does to answers

Made by `python -m benchmarks.quality table benchmarks/results/quality`; how to repeat the measurements: `python -m benchmarks.quality --help`.

A mean over some 1,700 tokens depends on a few of them: a difference of a fifth between two rows means nothing, and for models that are
sure of nearly everything a single token can change it by half. So the rows that matter most were measured on six times as many texts too (`--samples 24`).

Every row is one way to store the same weights, judged against float32. The texts are samples that the float32 model
writes itself (nucleus 0.95, 4 for each prompt) after prompts that no training has seen; each model is fed the same tokens one
by one. KL is the Kullback-Leibler divergence of its predictions from float32's in nats per token. "Right" is the share of
papers to which the greedy output is a question with the one right answer. Both models are small and were trained for this page;
they say nothing of any real checkpoint's answers, for which `ramekin export` and `ramekin verify --reference` measure the same.

- **demo**: the 3.5 million parameters of `examples/checkpoint`, on synthetic papers. `make demo` judges it on texts unlike those, of which it is less
  sure: there int8's KL is 5e-3.
- **larger**: 22 million parameters with T5's own vocabulary, grown from the demo and trained by `benchmarks/train_larger.py` on real
  papers with invented facts strewn in; prompts of 150 to 1024 tokens, and some that ask to continue a real paper.

Their twins compute the same function in float32, with weights that are hard to quantize: **channels** has channels 50 to 200
times larger in front of every projection, **wo** has activations 50 to 200 times larger in front of the feed-forward
output projections, **both** has both (`benchmarks/twins.py`). In **principal** and **signal** the outlier channels carry signal
(`benchmarks/signal_twin.py`): **principal** has its residual stream rotated so that the directions of most variance are single
channels, which no scale of a channel undoes. In **signal** the first two of these are made three times larger besides, and further
training mends what that changed; in the demo's these two hold a third to two thirds of the stream's energy in the end. So signal is a model
of its own, and is compared with itself in float32. How much harder such a model is, whatever rounds it, shows in nf4's row.

int4 rounds its weights by what their layers see. For these tables it is given 16 papers that the model was trained on (`--calibrate`; none that it is
judged on): more than `ramekin export` has without that option, which takes one invented paper of the package, **calibrated on other texts** here.

What is left out: **not rotated** leaves the residual stream in its own basis, where scales have to be found by token (or row and
block); **scales by token** does so in the rotated one; **not folded** leaves the scales between values and output, `wi_1` and `wo`, as
the checkpoint has them; **one scale for all tokens** is in front of `o` and `wo` of the encoder, whose other layers have a constant;
**keys and values in floats** is what an onnxruntime before 1.30 computes: all other rows of ours (naive ones aside) keep the prompt's and
each sample's own in 8 bits. **o and wo in blocks of 128** are the decoder's, with 8 bits for each row and block of their inputs instead of 16.
**pairs that saturate** uses all 8 bits of weights in pairs whose products overflow on processors with AVX2 alone; **rounded to nearest** is int4 without calibration, its scales by the largest weight; **naive** is what a first
attempt with onnxruntime's operators does: neither rotated nor folded, one activation scale for a whole tensor, weights rounded to nearest. **blocks of 128** and **of 32** are other sizes of the blocks that share a scale.

Settings of the others: bitsandbytes as the model card loads it (`load_in_4bit`, compute in bfloat16; its `wo` and head stay in
float32, as transformers arranges), PyTorch's dynamic int8 of all linear layers, optimum's `avx512_vnni` per channel, CTranslate2
int8. OpenVINO as in the tables of speed, but with blocks of 64 in int4, since 192 channels are no multiple of its 128, and on the demo and three of its twins only;
its weights are 8 or 4 bits, and where the processor has bfloat16 it computes with that, as here. PyTorch and optimum make one activation scale for a whole tensor. Sizes are those of the weights on disk, for PyTorch
in memory; ours hold the embedding in float32. All were measured on a processor with VNNI, where no engine's int8 sums saturate. On one
with AVX2 only, optimum's int8 was 600 times and CTranslate2's 80 times further from float32 on the plain demo ([log](log.md)); ours was not.
"""


def page(folder: Path) -> str:
    """The whole page."""
    by_samples: dict[int, dict[tuple[str, str], Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        by_samples.setdefault(result.get("samples", _SAMPLES), {})[result["model"], result["predictor"]] = result
    results = by_samples.pop(_SAMPLES, {})
    versions: dict[str, str] = {}
    for result in (results or next(iter(by_samples.values()))).values():
        versions = result["versions"] | versions  # rows of other environments know other libraries
    parts = [_INTRODUCTION, "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".\n"]
    for model in ("demo", "larger"):
        rows = _rows(results, model)
        if rows:
            parts += [f"## The {model} model\n", _plain(results, model, rows), _twins(results, model, rows)]
        for samples, more in sorted(by_samples.items()):
            if _rows(more, model):
                parts.append(_more(more, model, samples))
    return "\n".join(parts)


def _rows(results: dict[tuple[str, str], Result], model: str) -> list[str]:
    from benchmarks.predictors import PREDICTORS

    return [name for name in PREDICTORS if (model, name) in results]


def _plain(results: dict[tuple[str, str], Result], model: str, rows: list[str]) -> str:
    nf4 = results.get((model, "bitsandbytes nf4"), {}).get("kl")
    lines = [
        "| | weights, MB | KL mean | of nf4's | KL p99 | same first choice | top 50 in common | NLL change | right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in rows:
        r = results[model, name]
        if "error" in r:
            lines.append(f"| {name} | failed: {r['error'].splitlines()[-1][:80]} | | | | | | | |")
            continue
        share = f"{r['kl'] / nf4:.2f}" if nf4 else ""
        lines.append(
            f"| {name} | {r['weight_bytes'] / 1e6:.1f} | {r['kl']:.1e} | {share} | {r['kl_p99']:.1e} | {r['first_choice']:.2%} "
            f"| {r['top50']:.1%} | {r['nll_change']:+.4f} | {r['right']:.1%} |"
        )
    tokens, asked = (results[model, rows[0]][key] for key in ("tokens", "asked"))
    exact = results.get((model, "fp32"), {}).get("right")
    note = f"{tokens:,} tokens, {asked} papers asked" + (f"; float32 has {exact:.1%} right" if exact is not None else "")
    return "\n".join(lines) + f"\n\n{note}.\n"


def _twins(results: dict[tuple[str, str], Result], model: str, rows: list[str]) -> str:
    lines = [
        f"### Twins of the {model} model: mean KL (share right)\n",
        "| | " + " | ".join(_TWINS) + " |",
        "|---" * (len(_TWINS) + 1) + "|",
    ]
    for name in rows:
        cells = []
        for twin in _TWINS:
            r = results.get((model if twin == "plain" else f"{model}-{twin}", name))
            if r is None:
                cells.append("")
            elif "error" in r:
                cells.append("failed")
            else:
                odd = f", {r['non_finite']} not finite" if r["non_finite"] else ""
                cells.append(f"{r['kl']:.1e} ({r['right']:.0%}{odd})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _more(results: dict[tuple[str, str], Result], model: str, samples: int) -> str:
    kl = {key: result.get("kl", float("nan")) for key, result in results.items()}
    tokens = ", ".join(f"{r['tokens']:,}" for twin in _of(model) if (r := results.get((twin, "int8"), {})).get("tokens"))
    lines = [
        f"### {samples} samples of each prompt, {model} model: mean KL (times the plain model's)\n",
        "| | " + " | ".join(_TWINS) + " | plain, of nf4's |",
        "|---" * (len(_TWINS) + 2) + "|",
    ]
    for name in _rows(results, model):
        plain, nf4 = kl[model, name], kl.get((model, "bitsandbytes nf4"), float("nan"))
        twins = [kl.get((twin, name), float("nan")) for twin in _of(model)[1:]]
        cells = [f"{plain:.1e}", *(f"{each:.1e} ({each / plain:.2f})" for each in twins), f"{plain / nf4:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nTokens: {tokens}.\n"


def _of(model: str) -> list[str]:
    return [model if twin == "plain" else f"{model}-{twin}" for twin in _TWINS]
