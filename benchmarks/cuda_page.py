"""The page of a GPU's results: `python -m benchmarks.cuda_page results.json > docs/speed-gpu.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


def page(result: Result) -> str:
    """All of it, from what `benchmarks.cuda` wrote."""
    return "\n".join([*_head(result), *_goals(result), *_jobs(result), *_rest(result)]) + "\n"


def _head(result: Result) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield "# Speed on a GPU\n"
    yield "Made by `python -m benchmarks.cuda` and `python -m benchmarks.cuda_page`; what was tried stands in the [log](log.md).\n"
    yield f"- Model: **{result['shape']}**, random weights. A prompt of 900 tokens, 100 forced tokens for each sample."
    yield f"- Machine: {result['device']}; {versions}."
    yield "- One process; the engines take turns, medians of three rounds after one that is not counted.\n"


def _goals(result: Result) -> Iterator[str]:
    logits, samples, fast, limit = (result[part] for part in ("logits", "samples", "times", "limit"))
    ours, ratios = fast[fast["best"]], fast["times as fast"]
    share = limit["bytes"] / limit["bandwidth"] / ours["step_p50_ms"] * 1e3
    yield "| | goal | reached |"
    yield "|---|---|---|"
    yield (
        f"| logits next to transformers on the same GPU, float32, largest difference | 1e-3 "
        f"| {logits['fp32-cuda']['largest']:.1e} (their standard deviation is {logits['logits_std']:.2f}) |"
    )
    yield (
        f"| KL from float32, bf16 | that of transformers' bf16: {logits['transformers bfloat16']['kl']:.1e} "
        f"| {logits['bf16']['kl']:.1e} (fp16: {logits['fp16']['kl']:.1e}) |"
    )
    yield f"| samples equal to the CPU's, float32, one seed | all | {samples['equal']} of {samples['samples']} |"
    yield f"| nodes that copy between host and device | none | {result['nodes']['memcpy']['nodes']} |"
    yield f"| 16 samples, next to bitsandbytes fp4 | 10 x | {ratios['transformers fp4']:.1f} x |"
    yield f"| 16 samples, next to transformers bf16 | 3 x | {ratios['transformers bfloat16']:.1f} x |"
    yield f"| a step's bytes at the GPU's bandwidth, as a share of its time | | {share:.0%} ({limit['share']:.0%} measured apart) |\n"


def _jobs(result: Result) -> Iterator[str]:
    for part, title in (("times", "16 samples"), ("one_sample", "1 sample")):
        found = result[part]
        best = found[found["best"]]["job_s"]
        yield f"## {title}\n"
        yield "| | job | ours as fast | first token | step p50 / p95 | tokens/s | first run |"
        yield "|---|---|---|---|---|---|---|"
        for name, row in found.items():
            if name not in ("best", "times as fast"):
                yield (
                    f"| {name} | {row['job_s']:.3f} s | {row['job_s'] / best:.1f} x | {row['first_token_s'] * 1e3:.1f} ms "
                    f"| {row['step_p50_ms']:.2f} / {row['step_p95_ms']:.2f} ms | {row['tokens_per_s']:,.0f} "
                    f"| {row['first_run_s']:.2f} s |"
                )
        yield '\n"First run" is the first one of an engine\'s: libraries are loaded and steps recorded in it (of 8 tokens for the others).\n'


def _rest(result: Result) -> Iterator[str]:
    many, memory, limit = (result[part] for part in ("throughput", "memory", "limit"))
    yield "## Many papers, and memory\n"
    yield (
        f"{many['papers']} prompts of 630 to 990 tokens, {many['n']} samples each: **{many['seconds']:.2f} s**, "
        f"{many['tokens_per_s']:,.0f} tokens/s, {many['papers_per_hour']:,.0f} papers an hour "
        f"({many['first_run_s']:.2f} s the first time)."
    )
    yield (
        f"An engine takes {memory['loaded'] / 1e9:.2f} GB of the GPU's memory once it is loaded, {memory['after_job'] / 1e9:.2f} GB after "
        f"a job of 16 samples. The GPU read {limit['bandwidth'] / 1e12:.2f} TB/s; a step has to read {limit['bytes'] / 1e9:.2f} GB."
    )


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
