"""The page of a GPU's results: `python -m benchmarks.cuda_page results.json > docs/speed-gpu.md`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


def page(result: Result) -> str:
    """What `benchmarks.cuda` wrote; a part that is missing or failed is left out, or its error told."""
    errors = {name: part["error"] for name, part in result.items() if isinstance(part, dict) and "error" in part}
    good = {name: part for name, part in result.items() if name not in errors}
    failed = [f"The part `{name}` failed: {error}\n" for name, error in errors.items()]
    return "\n".join([*_head(good), *_goals(good), *_jobs(good), *_rest(good), *failed])


def _head(result: Result) -> Iterator[str]:
    versions, job = ", ".join(f"{name} {version}" for name, version in result["versions"].items()), result["job"]
    yield "# Speed on a GPU\n"
    yield "Made by `python -m benchmarks.cuda` and `python -m benchmarks.cuda_page`; what was tried stands in the [log](log.md).\n"
    yield f"- Model: **{result['shape']}**, random weights. A prompt of {job['source']} tokens, {job['tokens']} forced for each sample."
    yield f"- Machine: {result['device']}; {versions}."
    yield "- The engines take turns, medians of three rounds after a run that is not counted."
    yield (
        "- PyTorch's models are launched kernel by kernel from Python, and most of their time is that: on a faster processor the"
        " ratios are smaller. `torch.compile` with fixed caches was not tried. The card's call pads its prompt to 1024 tokens; here nothing is padded."
    )
    yield f"- {result['note']}\n" if "note" in result else ""


def _goals(result: Result) -> Iterator[str]:
    yield "| | goal | reached |"
    yield "|---|---|---|"
    if logits := result.get("logits"):
        yield (
            f"| logits next to transformers on the same GPU, float32, largest difference | 1e-3 "
            f"| {logits['fp32-cuda']['largest']:.1e} (their standard deviation is {logits['logits_std']:.2f}) |"
        )
        yield (
            f"| KL from float32, bf16 | that of transformers' bf16: {logits['transformers bfloat16']['kl']:.1e} "
            f"| {logits['bf16']['kl']:.1e} (fp16: {logits['fp16']['kl']:.1e}) |"
        )
    if samples := result.get("samples"):
        yield f"| samples equal to the CPU's, both in float32, one seed | all | {samples['equal']} of {samples['samples']} |"
    if nodes := result.get("nodes"):
        yield f"| nodes that copy between host and device | none | {nodes['memcpy']['nodes']} |"
    if fast := result.get("times"):
        ratios = fast["times as fast"]
        yield f"| {result['job']['n']} samples, next to bitsandbytes fp4 | 10 x | {ratios['transformers fp4']:.1f} x |"
        yield f"| {result['job']['n']} samples, next to transformers bf16 | 3 x | {ratios['transformers bfloat16']:.1f} x |"
        if limit := result.get("limit"):
            share = limit["bytes"] / limit["bandwidth"] / fast[fast["best"]]["step_p50_ms"] * 1e3
            yield f"| a step's bytes at the GPU's bandwidth, as a share of its time | | {share:.0%} |"
    yield ""


def _jobs(result: Result) -> Iterator[str]:
    titles = {"times": f"{result['job']['n']} samples", "one_sample": "1 sample", "optimum": "optimum"}
    for part, title in titles.items():
        if part not in result:
            continue
        found = result[part]
        best = found[found["best"]]["job_s"]
        yield f"## {title}\n"
        yield "| | job | times ours | first token | step p50 / p95 | tokens/s | first run |"
        yield "|---|---|---|---|---|---|---|"
        for name, row in found.items():
            if name not in ("best", "times as fast"):
                spread = f" ± {row['job_spread']:.0%}" if "job_spread" in row else ""
                yield (
                    f"| {name} | {row['job_s']:.3f} s{spread} | {row['job_s'] / best:.1f} | {row['first_token_s'] * 1e3:.1f} ms "
                    f"| {row['step_p50_ms']:.2f} / {row['step_p95_ms']:.2f} ms | {row['tokens_per_s']:,.0f} "
                    f"| {row['first_run_s']:.2f} s |"
                )
        yield ""
    yield "The first run of an engine of ours loads libraries and records its steps; PyTorch's is one of 8 tokens.\n"


def _rest(result: Result) -> Iterator[str]:
    if many := result.get("throughput"):
        source = result["job"]["source"]
        yield "## Many papers\n"
        yield (
            f"{many['papers']} prompts of {source * 0.7:.0f} to {source * 1.1:.0f} tokens, {many['n']} samples each, bf16: "
            f"**{many['seconds']:.2f} s**, {many['tokens_per_s']:,.0f} tokens/s, {many['papers_per_hour']:,.0f} papers an hour "
            f"({many['first_run_s']:.2f} s the first time).\n"
        )
    if (memory := result.get("memory")) and (limit := result.get("limit")):
        yield "## Memory\n"
        yield (
            f"The bf16 engine takes {memory['loaded'] / 1e9:.2f} GB of the GPU's memory once it is loaded, beside CUDA's own, and "
            f"{memory['after_job'] / 1e9:.2f} GB after the job. The GPU read {limit['bandwidth'] / 1e12:.2f} TB/s; a step has to read "
            f"{limit['bytes'] / 1e9:.2f} GB.\n"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    sys.stdout.write(page(json.loads(parser.parse_args().results.read_text("utf-8"))))
