"""Everything about one GPU in one call: is it right, is it fast, how far from the limit, how many papers an hour.

    pip install '.[gpu,export]' torch 'transformers<5' bitsandbytes accelerate
    python -m benchmarks.cuda --tokenizer spiece.model --out results.json [--shape flan-t5-large]

Writes JSON after each part, so that a run that is cut keeps what it has. `--provider cpu` runs the float32 graphs and the peers
on the CPU: that times nothing worth knowing, and shows that the script works where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_checkpoint import SHAPES, config_of, write_checkpoint
from ramekin import Engine, SamplingParams
from ramekin.bench import Job, Timing
from ramekin.bench import run as run_ours
from ramekin.manifest import DECODER, PROVIDERS
from ramekin.session import onnxruntime
from ramekin_export.fidelity import compare_rows
from ramekin_export.pipeline import export
from ramekin_export.verify import Checks

JOB = Job(n=16, source=900, tokens=100)
SAMPLED = SamplingParams(n=4, max_new_tokens=30, seed=7)
TARGET, PAPERS, REPEAT = 24, 64, 3
PEERS = ("bfloat16", "fp4", "nf4")


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

    def ours(self, precision: str, provider: str) -> Engine:
        """An engine of ours; exported once."""
        folder = self._folder / precision
        if not folder.exists():
            export(str(self._checkpoint), folder, precision, checks=Checks(verify=False))
        return Engine.load(folder, provider)

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
        """The job with every engine, medians; the first run of each is not counted."""
        found: dict[str, Any] = {}
        for precision in self.precisions:
            engine = self.ours(precision, self._provider)
            found[f"ramekin {precision}"] = _median(lambda engine=engine: run_ours(engine, self._job))
        for kind in PEERS:
            model = self.peer(kind)
            found[f"transformers {kind}"] = _median(lambda model=model: self._run_peer(model))
            del model
        best = min((name for name in found if name.startswith("ramekin")), key=lambda name: found[name]["job_s"])
        found["times as fast"] = {
            name: row["job_s"] / found[best]["job_s"] for name, row in found.items() if name.startswith("transformers")
        }
        return {"best": best, **found}

    def limit(self) -> dict[str, float]:
        """The bytes that a step must read, at the device's measured bandwidth, as a share of the step's time."""
        import torch

        block = torch.ones(1 << 28, dtype=torch.float32, device=self._provider)
        seconds = min(self._timed(lambda: block.sum().item()) for _ in range(5))
        bandwidth = block.nbytes / seconds
        precision = self.precisions[0]
        engine = self.ours(precision, self._provider)
        dims, wide = engine.manifest.dims, 4 if precision == "fp32-cuda" else 2
        inner, job = dims.num_heads * dims.head_dim, self._job
        cached = 2 * dims.decoder_layers * inner * wide * (job.source + job.n * job.tokens // 2)
        needed = engine.manifest.files["decoder.bin"].bytes + cached
        step = run_ours(engine, job).step_p50_ms / 1e3
        return {"bandwidth": bandwidth, "bytes": needed, "step_s": step, "share": needed / bandwidth / step}

    def throughput(self) -> dict[str, float]:
        """Many papers, each with its samples, together."""
        engine = self.ours(self.precisions[0], self._provider)
        rng, tokens = np.random.default_rng(1), self._job.tokens
        prompts = [rng.integers(3, 32_000, int(self._job.source * share)) for share in rng.uniform(0.7, 1.1, PAPERS)]
        params = SamplingParams(n=self._job.n, max_new_tokens=tokens, min_new_tokens=tokens, seed=1)
        engine.generate_many(prompts[: engine.model.prompts_at_once], params)
        seconds = self._timed(lambda: engine.generate_many(prompts, params))
        return {"papers": PAPERS, "seconds": seconds, "tokens_per_s": PAPERS * self._job.n * tokens / seconds}

    def _run_peer(self, model: Any) -> Timing:
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
        start, n, tokens = time.perf_counter(), self._job.n, self._job.tokens
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=50, top_p=0.95, num_beams=1,
                num_return_sequences=n, min_new_tokens=tokens, max_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([Ticks()]),
            )  # fmt: skip
        return Timing.of(self._job, ends)

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


def _median(run: Callable[[], Timing]) -> dict[str, float]:
    run()
    timing = Timing.median([run() for _ in range(REPEAT)])
    return {"first_token_s": timing.first_token_s, "step_p50_ms": timing.step_p50_ms, "job_s": timing.job_s}


def _device(provider: str) -> str:
    if provider == "cpu":
        return "CPU"
    import torch

    return str(torch.cuda.get_device_name())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a T5 spiece.model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="flan-t5-large")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cuda")
    parser.add_argument("--source", type=int, default=JOB.source)
    parser.add_argument("--tokens", type=int, default=JOB.tokens)
    parser.add_argument("--part", action="append", help="only this one; may be repeated")
    a = parser.parse_args(arguments)
    names = (
        ("onnxruntime-gpu", "torch", "transformers", "bitsandbytes") if a.provider == "cuda" else ("torch", "transformers")
    )
    result: dict[str, Any] = {"shape": a.shape, "device": _device(a.provider), "versions": {n: version(n) for n in names}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", config_of(a.shape), a.tokenizer)
        suite = Suite(checkpoint, Path(folder), a.provider, Job(JOB.n, a.source, a.tokens))
        for part in a.part or ("logits", "samples", "nodes", "times", "limit", "throughput"):
            began = time.perf_counter()
            try:
                result[part] = getattr(suite, part)()
            except Exception as error:  # the other parts are worth having
                result[part] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{part}: {time.perf_counter() - began:.0f} s  {json.dumps(result[part])[:600]}", flush=True)
            a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
