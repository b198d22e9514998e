"""What quantization does to answers: every precision of ours and of others, next to float32.

    python -m benchmarks.quality run --demo examples/checkpoint --demo-principal FOLDER --demo-signal FOLDER \
        --larger FOLDER --larger-principal FOLDER --larger-signal FOLDER --papers FOLDER --out benchmarks/results/quality
    python -m benchmarks.quality table benchmarks/results/quality > docs/quantization.md

`run` makes the outlier twins, then judges each pair of model and predictor in a fresh process, two at a time, and writes
one JSON file each; what is there already is not done again, and a predictor that fails leaves its error. The texts are samples
of the float32 model itself (nucleus 0.95) after held-out prompts; every predictor is fed the same tokens one by one.
Needs torch, transformers 4, bitsandbytes, accelerate, optimum[onnxruntime] and ctranslate2 beside ramekin[cpu,export]; for
OpenVINO (`--predictor "OpenVINO int8" --predictor "OpenVINO int4, blocks of 64"`) openvino, nncf and optimum-intel in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from benchmarks.mixed import continuation, held_out, mixed_paper, read_real_papers
from benchmarks.predictors import PREDICTORS, Predictor, Ramekin
from benchmarks.twins import KINDS, write_twin
from examples.synthetic import HELD_OUT_SEED, SyntheticPaper, held_out_papers, make_paper
from ramekin import Paper, QAPair, SamplingParams, build_prompt
from ramekin_export.fidelity import Fidelity, compare_rows

SAMPLING = SamplingParams(n=4, max_new_tokens=32, top_k=0, top_p=0.95, seed=0)
"""With `--samples`, another n: nothing else of a row depends on it, so papers are not asked about again."""
_ORDER = ("", "both", "principal", "signal", "wo", "channels")
_GIVEN = ("demo", "demo-principal", "demo-signal", "larger", "larger-principal", "larger-signal")
ASKED = 400
"""Papers that the larger model is asked about; the others a quarter of it, since the demo has them all right."""
LIBRARIES = (
    "onnxruntime",
    "torch",
    "transformers",
    "bitsandbytes",
    "optimum-onnx",
    "ctranslate2",
    "openvino",
    "optimum-intel",
)


def _paper_prompt(paper: SyntheticPaper) -> str:
    return build_prompt(Paper(paper.title, paper.abstract, paper.introduction))


class Task:
    """What a model was trained for: texts to judge it on, questions with answers, papers to calibrate with."""

    def __init__(self, name: str, papers: Path | None, asked: int) -> None:
        if name == "demo":
            self.prompts = [_paper_prompt(paper) for paper in held_out_papers(24)]
            self.asked = held_out_papers(24 + asked)[24:]
            seen = [make_paper(seed) for seed in range(16)]
        else:
            assert papers
            training, judging = read_real_papers(papers)
            mixed = held_out(14, judging, 70), held_out(18, judging, 540)[14:]
            self.prompts = [_paper_prompt(paper) for papers in mixed for paper in papers]
            self.prompts += [continuation(HELD_OUT_SEED + i, judging, 120)[0] for i in range(4)]
            self.asked = held_out(18 + asked, judging, 70)[18:]
            seen = [mixed_paper(seed, training, 70 if seed % 4 else 540) for seed in range(16)]
        self.calibration = [{"title": p.title, "abstract": p.abstract, "introduction": p.introduction} for p in seen]


def judge(checkpoint: Path, name: str, task: Task, samples: int) -> dict[str, object]:
    """Measure one predictor on one model, on so many texts for each prompt."""
    sampling = replace(SAMPLING, n=samples)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        papers = scratch / "papers.jsonl"
        papers.write_text("".join(json.dumps(paper) + "\n" for paper in task.calibration), encoding="utf-8")
        (scratch / "reference").mkdir()
        reference = PREDICTORS["fp32"](checkpoint, scratch / "reference", papers)
        assert isinstance(reference, Ramekin)
        predictor = PREDICTORS[name](checkpoint, scratch, papers)
        engine, rows = reference.engine, []
        for prompt in task.prompts:
            source = engine.source_ids(prompt)
            targets = [sample.token_ids for sample in engine.generate(source, sampling)]
            for wanted, found, target in zip(
                reference.logits(source, targets), predictor.logits(source, targets), targets, strict=True
            ):
                rows.append(compare_rows(wanted, found[:, : wanted.shape[1]], np.array(target)))
        return {
            "weight_bytes": predictor.weight_bytes,
            **asdict(Fidelity.of(rows)),
            "asked": len(task.asked),
            **({"right": right(predictor, engine.tokenizer, task)} if task.asked else {}),
        }


def right(predictor: Predictor, tokenizer: object, task: Task) -> float:
    """The share of papers to which the greedy output is one of their questions with its right answer."""
    sources = [tokenizer.encode(_paper_prompt(paper)) for paper in task.asked]  # type: ignore[attr-defined]
    count = 0
    for paper, output in zip(task.asked, predictor.greedy(sources, 48), strict=True):
        pair = QAPair.parse(tokenizer.decode(output))  # type: ignore[attr-defined]
        count += paper.answers().get(pair.question) == pair.answer
    return count / len(task.asked)


def _versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def run(models: dict[str, Path], out: Path, papers: Path, names: list[str], jobs: int, samples: int) -> None:
    """Judge everything that was not judged before."""
    suffix = "" if samples == SAMPLING.n else f".{samples}-samples"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = dict(models)
        for name in ("demo", "larger"):
            for kind in KINDS:
                if name in models:
                    checkpoints[f"{name}-{kind}"] = write_twin(models[name], Path(folder) / f"{name}-{kind}", kind)
        ordered = sorted(checkpoints.items(), key=lambda item: _ORDER.index(item[0].partition("-")[2]))
        todo = [
            (model, checkpoint, name, path)
            for model, checkpoint in ordered
            for name in names
            if not (path := out / f"{model}.{name.replace(', ', '_').replace(' ', '-')}{suffix}.json").exists()
        ]

        def one(job: tuple[str, Path, str, Path]) -> None:
            model, checkpoint, name, path = job
            task = model.partition("-")[0]
            asked = 0 if suffix else ASKED if model == "larger" else ASKED // 4
            arguments = [checkpoint, task, name, papers, asked, samples]
            command = [sys.executable, "-m", "benchmarks.quality", "judge", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            result = {"model": model, "predictor": name, "samples": samples, "versions": dict(_versions())}
            try:
                result |= json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                result["error"] = done.stderr.strip()[-600:]
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{model:16} {name:34} {result.get('kl', result.get('error'))}", file=sys.stderr, flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, todo))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="judge every model with every predictor")
    for name in _GIVEN:
        runs.add_argument(f"--{name}", type=Path)
    runs.add_argument("--papers", type=Path, required=True, help="folder of .jsonl files of real papers")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--predictor", choices=list(PREDICTORS), action="append", help="only this one; may be repeated")
    runs.add_argument("--jobs", type=int, default=2)
    runs.add_argument(
        "--samples", type=int, default=SAMPLING.n, help="texts for each prompt; other numbers add rows of their own"
    )
    single = commands.add_parser("judge", help="one pair, its result on stdout")
    single.add_argument("checkpoint", type=Path)
    single.add_argument("task", choices=("demo", "larger"))
    single.add_argument("predictor", choices=list(PREDICTORS))
    single.add_argument("papers", type=Path)
    single.add_argument("asked", type=int, help="how many papers are asked about")
    single.add_argument("samples", type=int, help="texts for each prompt")
    tables = commands.add_parser("table", help="the results as a page")
    tables.add_argument("results", type=Path)
    a = parser.parse_args()
    if a.command == "run":
        paths = {name: getattr(a, name.replace("-", "_")) for name in _GIVEN}
        models = {name: path for name, path in paths.items() if path}
        run(models, a.out, a.papers, a.predictor or list(PREDICTORS), a.jobs, a.samples)
    elif a.command == "judge":
        print(json.dumps(judge(a.checkpoint, a.predictor, Task(a.task, a.papers, a.asked), a.samples)))
    else:
        from benchmarks.quality_page import page

        print(page(a.results), end="")


if __name__ == "__main__":
    main()
