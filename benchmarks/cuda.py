"""Everything about one GPU in one call: is it right, is it fast, how far from the limit, how many papers an hour.

    pip install '.[gpu,export]' torch 'transformers<4.58' bitsandbytes accelerate optimum-onnx
    python -m benchmarks.cuda --tokenizer spiece.model --out results.json [--shape flan-t5-large]

Writes JSON after each part, so that a run that is cut keeps what it has; with the same `--out` more parts are added, and with
`--work` they need no new export. `--provider cpu` runs the float32 graphs and the peers on the CPU: that times nothing worth
knowing, and shows that the script works where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import distributions, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_checkpoint import SHAPES, config_of, write_checkpoint
from ramekin import Engine, SamplingParams
from ramekin.bench import Job, Timing
from ramekin.bench import run as run_ours
from ramekin.manifest import DECODER, MOST_SOURCE_TOKENS, PROVIDERS, Manifest, VersionRange
from ramekin.provider import cuda_problem
from ramekin.session import onnxruntime
from ramekin_export.fidelity import compare_rows
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks

JOB = Job(n=16, source=900, tokens=100)
SAMPLED = SamplingParams(n=4, max_new_tokens=30, seed=7)
TARGET, PAPERS, REPEAT = 24, 64, 3
PEERS = ("bfloat16", "fp4", "nf4")
PARTS = ("logits", "samples", "nodes", "memory", "times", "one_sample", "limit", "throughput", "optimum")
Run = Callable[[Job], Timing]


class Suite:
    """The parts, on one checkpoint and one device."""

    def __init__(self, checkpoint: Path, folder: Path, provider: str, job: Job) -> None:
        self._checkpoint, self._folder, self._provider, self._job = checkpoint, folder, provider, job
        rng = np.random.default_rng(0)
        self._source = rng.integers(3, 32_000, job.source)
        self._target = rng.integers(3, 32_000, TARGET)

    @property
    def precisions(self) -> list[str]:
        """What can be computed there."""
        return ["bf16", "fp16", "fp32-cuda"] if self._provider == "cuda" else ["fp32-cuda"]

    def exports(self) -> dict[str, float]:
        """All models that the other parts need, several at a time; the seconds that each took."""
        wanted = [each for each in (*self.precisions, "fp32") if not (self._folder / each).exists()]
        if not wanted:
            return {}
        with ProcessPoolExecutor(max(1, min(len(wanted), (os.cpu_count() or 1) // 2)), get_context("spawn")) as pool:
            made = pool.map(_export, [self._checkpoint] * len(wanted), [self._folder / each for each in wanted])
        return dict(zip(wanted, made, strict=True))

    def ours(self, precision: str, provider: str) -> Engine:
        """An engine of ours, which cuts no prompt: no peer does."""
        return Engine.load(self._folder / precision, provider, max_source_tokens=MOST_SOURCE_TOKENS)

    def peer(self, kind: str) -> Any:
        """A model of transformers: float32, bfloat16, fp4 or nf4."""
        import torch
        from transformers import BitsAndBytesConfig, T5ForConditionalGeneration

        if kind not in ("fp4", "nf4"):
            model = T5ForConditionalGeneration.from_pretrained(self._checkpoint, dtype=getattr(torch, kind))
            return model.to(self._provider).eval()
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type=kind)
        return T5ForConditionalGeneration.from_pretrained(
            self._checkpoint, quantization_config=config, device_map=self._provider
        ).eval()

    def logits(self) -> dict[str, Any]:
        """Ours next to transformers' on the same device: largest difference in float32, KL from float32 in half precision."""
        expected = self._peer_logits("float32")
        found: dict[str, Any] = {"logits_std": float(expected.std())}
        for precision in self.precisions:
            ours = self.ours(precision, self._provider).logits(self._source, self._target)
            found[precision] = {"largest": float(np.abs(ours - expected).max()), "kl": self._kl(expected, ours)}
        half = self._peer_logits("bfloat16")
        found["transformers bfloat16"] = {"largest": float(np.abs(half - expected).max()), "kl": self._kl(expected, half)}
        return found

    def samples(self) -> dict[str, Any]:
        """How many samples of the float32 graphs equal those of the graphs for the CPU, token by token."""
        wanted = self.ours("fp32", "cpu").generate(self._source, SAMPLED)
        found = self.ours("fp32-cuda", self._provider).generate(self._source, SAMPLED)
        equal = [one.token_ids == other.token_ids for one, other in zip(found, wanted, strict=True)]
        return {"samples": len(equal), "equal": sum(equal)}

    def nodes(self) -> dict[str, dict[str, int]]:
        """Where the decoder's nodes run, and how many copies between host and device were put in, from a profile."""
        engine, counts = self.ours(self.precisions[0], self._provider), {}
        ort = onnxruntime(engine.manifest.onnxruntime)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # as in `open_session`
        options.enable_profiling, options.profile_file_prefix = True, str(self._folder / "profile")
        path = self._folder / self.precisions[0] / DECODER
        session = ort.InferenceSession(str(path), options, providers=[PROVIDERS[self._provider]])
        model: Any = engine.model
        model._decoder = session
        cache = model.new_cache(model.prefill(self._source), self._job.n, 8, 64)
        model.step([0] * self._job.n, cache)
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
        counts["provider"] = dict(Counter(each["provider"] for each in ran))
        counts["memcpy"] = {"nodes": sum(each["op_name"].startswith("Memcpy") for each in ran)}
        return counts

    def times(self) -> dict[str, Any]:
        """The job with ours and PyTorch's models."""
        runs = {f"ramekin {each}": self._run_of_ours(each) for each in self.precisions}
        return self._in_turn({**runs, **{f"transformers {kind}": self._run_of_peer(kind) for kind in PEERS}}, self._job)

    def one_sample(self) -> dict[str, Any]:
        """The same with a single sample, for those that matter most."""
        peers = {f"transformers {kind}": self._run_of_peer(kind) for kind in PEERS[:2]}
        best = self.precisions[0]
        return self._in_turn({f"ramekin {best}": self._run_of_ours(best), **peers}, replace(self._job, n=1))

    def optimum(self) -> dict[str, Any]:
        """The job with optimum's own export, in float32 as it comes; it takes heads of d_model / heads, which small FLAN-T5 has not."""
        from optimum.onnxruntime import ORTModelForSeq2SeqLM

        provider = PROVIDERS[self._provider]
        model = ORTModelForSeq2SeqLM.from_pretrained(self._checkpoint, export=True, provider=provider, use_io_binding=True)
        best = self.precisions[0]
        runs = {f"ramekin {best}": self._run_of_ours(best), "optimum float32": partial(self._run_peer, model)}
        return self._in_turn(runs, self._job)

    def _in_turn(self, runs: Mapping[str, Run], job: Job) -> dict[str, Any]:
        """Medians of a job. What the first run costs (what is recorded, and what libraries load) is apart."""
        first, short = {}, replace(job, tokens=min(8, job.tokens))
        for name, run in runs.items():
            first[name] = self._timed(partial(run, job if name.startswith("ramekin") else short))
        rounds = [{name: run(job) for name, run in runs.items()} for _ in range(REPEAT)]
        found: dict[str, Any] = {}
        for name in runs:
            timings = [each[name] for each in rounds]
            times = [timing.job_s for timing in timings]
            spread = {"job_spread": (max(times) - min(times)) / 2 / float(np.median(times)), "first_run_s": first[name]}
            figures = {**asdict(Timing.median(timings)), **spread}
            found[name] = {key: value for key, value in figures.items() if not math.isnan(value)}
        best = min((name for name in found if name.startswith("ramekin")), key=lambda name: found[name]["job_s"])
        ratios = {name: row["job_s"] / found[best]["job_s"] for name, row in found.items() if not name.startswith("ramekin")}
        return {"best": best, **found, "times as fast": ratios}

    def _run_of_ours(self, precision: str) -> Run:
        return partial(run_ours, self.ours(precision, self._provider))

    def _run_of_peer(self, kind: str) -> Run:
        return partial(self._run_peer, self.peer(kind))

    def limit(self) -> dict[str, float]:
        """The bytes that a step must read, and the device's bandwidth."""
        import torch

        block = torch.ones(1 << (30 if self._provider == "cuda" else 28), dtype=torch.float32, device=self._provider)
        seconds = min(self._timed(lambda: block.sum().item()) for _ in range(5))
        bandwidth = block.nbytes / seconds
        precision, job = self.precisions[0], self._job
        manifest = Manifest.load(self._folder / precision)
        dims, wide = manifest.dims, 4 if precision == "fp32-cuda" else 2
        cached = 2 * dims.decoder_layers * dims.inner * wide * (job.source + job.n * job.tokens // 2)
        needed = manifest.files["decoder.bin"].bytes + cached
        return {"bandwidth": bandwidth, "bytes": needed}

    def memory(self) -> dict[str, float]:
        """What an engine of ours takes of the device's memory: loaded, and after the job."""
        import torch

        if self._provider != "cuda":
            return {}
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        engine = self.ours(self.precisions[0], self._provider)
        loaded = before - torch.cuda.mem_get_info()[0]
        run_ours(engine, self._job)
        return {"loaded": loaded, "after_job": before - torch.cuda.mem_get_info()[0]}

    def throughput(self) -> dict[str, float]:
        """Many papers, each with its samples, together."""
        engine = self.ours(self.precisions[0], self._provider)
        rng, tokens = np.random.default_rng(1), self._job.tokens
        prompts = [rng.integers(3, 32_000, int(self._job.source * share)) for share in rng.uniform(0.7, 1.1, PAPERS)]
        params = SamplingParams(n=self._job.n, max_new_tokens=tokens, min_new_tokens=tokens, seed=1)
        first, seconds = (self._timed(lambda: engine.generate_many(prompts, params)) for _ in range(2))
        speed = {"tokens_per_s": PAPERS * self._job.n * tokens / seconds, "papers_per_hour": PAPERS / seconds * 3600}
        return {"papers": PAPERS, "n": self._job.n, "first_run_s": first, "seconds": seconds, **speed}

    def _run_peer(self, model: Any, job: Job) -> Timing:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        ends: list[float] = []

        class Ticks(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                if input_ids.is_cuda:
                    torch.cuda.synchronize()
                ends.append(time.perf_counter() - start)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(self._source[None], device=model.device)
        start, n, tokens = time.perf_counter(), job.n, job.tokens
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=50, top_p=0.95, num_beams=1,
                num_return_sequences=n, min_new_tokens=tokens, max_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([Ticks()]),
            )  # fmt: skip
        return Timing.of(job, ends)

    def _peer_logits(self, kind: str) -> Any:
        import torch

        model = self.peer(kind)
        fed = np.concatenate([[0], self._target[:-1]])
        with torch.inference_mode():
            ids = [torch.tensor(each[None], device=model.device) for each in (self._source, fed)]
            return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0].float().cpu().numpy()

    def _kl(self, expected: Any, found: Any) -> float:
        return float(compare_rows(expected, found, self._target)[:, 0].mean())

    @staticmethod
    def _timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def _export(checkpoint: Path, folder: Path) -> float:
    began = time.perf_counter()
    export(str(checkpoint), folder, folder.name, checks=Checks(verify=False))
    return time.perf_counter() - began


def _missing(provider: str, names: Sequence[str]) -> str:
    """Why nothing can be measured there, or an empty text."""
    problem = cuda_problem(onnxruntime(VersionRange())) if provider == "cuda" else ""
    if problem:
        return f"{problem} (`--provider cpu` tries the script without a GPU)"
    absent = [name for name in names if not any(distributions(name=name))]
    if absent:
        return f"not installed: {', '.join(absent)}; `--help` tells what to install"
    import torch

    return "" if provider == "cpu" or torch.cuda.is_available() else "the torch installed here does not see a GPU"


def _device(provider: str) -> str:
    import torch

    return "CPU" if provider == "cpu" else str(torch.cuda.get_device_name())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a T5 spiece.model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="flan-t5-large")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cuda")
    parser.add_argument("--source", type=int, default=JOB.source)
    parser.add_argument("--tokens", type=int, default=JOB.tokens)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument("--work", type=Path, help="a folder that keeps checkpoint and models, for more parts later")
    a = parser.parse_args(arguments)
    names = (
        ("onnxruntime-gpu", "torch", "transformers", "bitsandbytes") if a.provider == "cuda" else ("torch", "transformers")
    )
    missing = _missing(a.provider, names) if a.tokenizer.is_file() else f"there is no file {a.tokenizer}"
    if missing:
        parser.error(missing)
    job = Job(JOB.n, a.source, a.tokens)
    result: dict[str, Any] = {"shape": a.shape, "device": _device(a.provider), "versions": {n: version(n) for n in names}}
    result["job"] = asdict(job)
    if a.out.exists():
        before = json.loads(a.out.read_text("utf-8"))
        if any(before.get(key) != value for key, value in result.items()):
            parser.error(f"{a.out}: of another shape, job, device or versions; choose another --out")
        result = before
    with tempfile.TemporaryDirectory() as temporary:
        folder = (a.work or Path(temporary)) / a.shape
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, config_of(a.shape), a.tokenizer)
        suite = Suite(checkpoint, folder, a.provider, job)
        for part in ("exports", *(a.part or PARTS)):
            began = time.perf_counter()
            try:
                result[part] = getattr(suite, part)()
                json.dumps(result[part], allow_nan=False)  # numbers that are none are a failure of this part
            except Exception as error:  # the other parts are worth having
                result[part] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{part}: {time.perf_counter() - began:.0f} s  {json.dumps(result[part])[:600]}", flush=True)
            a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
