"""The commands as a person and as a program would use them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from ramekin import Completion, Engine, RamekinError
from ramekin.cli import main
from ramekin.manifest import MANIFEST, Manifest
from ramekin.model import Model
from ramekin.terminal import progress_in_groups, write
from tests.runtime.conftest import CUDA_MODEL, RUNS_CUDA_GRAPHS, TINY_MODEL
from tests.runtime.test_bad_input import run

PAPER = {"title": "T", "abstract": "We propose a parser.", "introduction": "It is new."}


@pytest.fixture
def paper(tmp_path: Path) -> str:
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(PAPER))
    return str(path)


def test_help_names_every_command() -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("generate", "questions", "bench", "info", "verify", "export", "demo"):
        assert f"  {command} " in out
    for command in ("generate", "questions", "bench", "info", "verify"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert "Usage: ramekin" in out
    out = run("generate", "--help")[1]
    assert (
        out.index(" -n ") < out.index(" --top-k ") < out.index(" --stop ") < out.index(" --threads ") < out.index(" --json ")
    )


def test_examples_stand_on_lines_of_their_own() -> None:
    for command in ("generate", "questions"):
        lines = run(command, "--help")[1].splitlines()
        assert any(line.strip().startswith("ramekin ") and "-n" in line for line in lines)
        assert "\\b" not in "".join(lines)


def test_bare_command_is_the_help() -> None:
    assert run()[:2] == run("--help")[:2]


def test_a_host_is_left_as_it_was(paper: str) -> None:
    shown, stream = warnings.showwarning, TextIOWrapper(BytesIO(), encoding="ascii", errors="strict")
    with redirect_stdout(stream):
        main(["questions", str(TINY_MODEL), paper, "-n", "2", "--json"])
    assert warnings.showwarning is shown
    assert stream.errors == "strict"
    stream.flush()
    assert stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_greedy_questions_are_one_by_default(paper: str) -> None:
    for options, count in (((), 16), (("--greedy",), 1), (("--greedy", "-n", "3"), 3)):
        status, out, _ = run("questions", str(TINY_MODEL), paper, "--json", *options)
        assert (status, len(json.loads(out)["pairs"])) == (0, count)


def test_a_separator_that_texts_leave_out_is_told_of(paper: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    raw = json.loads((model / "manifest.json").read_text())
    raw["tokens"]["named"]["[SEP]"] = 500
    raw["tokens"]["silent"].append(500)
    (model / "manifest.json").write_text(json.dumps(raw))
    told = "[SEP] is a special token of this model's tokenizer"
    assert told in run("questions", str(model), paper, "-n", "1")[2]
    assert told not in run("questions", str(TINY_MODEL), paper, "-n", "1")[2]


def test_a_command_whose_parts_are_not_installed() -> None:
    code = """
import sys
sys.modules["ml_dtypes"] = None
from ramekin.cli import main
main(["export", "CHECKPOINT", "OUT", "--precision", "int4"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    # Which module is missed first depends on what is installed.
    assert "pip install '.[cpu,export]'" in done.stderr
    assert done.stderr.startswith("ramekin: `ramekin export` needs ")


def test_closed_streams(paper: str) -> None:
    nowhere = "ramekin: standard output is closed; the results have nowhere to go\n"
    for redirect, status, says in (("2>&-", 0, ""), ("<&-", 0, ""), (">&-", 1, nowhere)):
        command = f"{sys.executable} -m ramekin questions {TINY_MODEL} {paper} -n 2 --seed 1 --json {redirect}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (status, says), redirect
    for command in ("info", "info --json", "verify"):
        line = f"{sys.executable} -m ramekin {command} {TINY_MODEL} >&-"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (1, nowhere), command
    command = f"{sys.executable} -m ramekin generate {TINY_MODEL} <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "ramekin: standard input is closed; name a file\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_cannot_be_written_are_one_line(unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for command in (["--version"], ["info", str(TINY_MODEL)]):
        with Path("/dev/full").open("wb") as full:
            line = [sys.executable, "-m", "ramekin", *command]
            done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False, env=environment)
        assert (done.returncode, done.stderr) == (1, b"ramekin: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_notices_that_cannot_be_written_do_not_cost_the_results(unbuffered: str, paper: str) -> None:
    command = [sys.executable, "-m", "ramekin", "questions", str(TINY_MODEL), paper, "-n", "2", "--seed", "1", "--all"]
    short = [*command, "--max-source-tokens", "8"]  # tells that the prompt was cut, and that pairs are malformed
    told = subprocess.run(short, capture_output=True, timeout=60, check=True)
    assert told.stderr.count(b"\n") == 2
    with Path("/dev/full").open("wb") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(short, stdout=subprocess.PIPE, stderr=full, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0 if unbuffered else 120, told.stdout)  # 120: Python's own, at its end


def test_results_do_not_move_the_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\x1b[31mred\x1b[0m \x9b2J\x07\r a\tb\u00a0c \u200d\n"
    write(text)
    assert capsys.readouterr().out == text + "\n"  # in a pipe they are what they are
    monkeypatch.setattr("ramekin.terminal.is_terminal", lambda _: True)
    write(text, end="")
    assert capsys.readouterr().out == "?[31mred?[0m ?2J?? a\tb\u00a0c \u200d\n"


def test_a_paper_from_stdin() -> None:
    status, out, _ = run("questions", str(TINY_MODEL), "-", "-n", "2", "--json", stdin=json.dumps(PAPER).encode())
    assert status == 0
    assert json.loads(out)["title"] == "T"


def test_generate_from_stdin() -> None:
    first = run("generate", str(TINY_MODEL), "-n", "3", "--seed", "1", stdin=b"a b c\n")
    assert first[0] == 0
    assert len(first[1].splitlines()) == 3
    assert first == run("generate", str(TINY_MODEL), "-", "-n", "3", "--seed", "1", stdin=b"a b c\n")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_letters_that_stdout_has_not(encoding: str, tmp_path: Path) -> None:
    prompt, environment = "na\u00efve \u65e5\u672c \U0001f600", {**os.environ, "PYTHONIOENCODING": encoding}
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "ramekin", "generate", str(TINY_MODEL), *options]
        done = subprocess.run(command, input=prompt.encode(), capture_output=True, env=environment, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode("utf-8"))["prompt"] == prompt
    papers = tmp_path / "papers.jsonl"
    papers.write_text("\n".join(json.dumps({**PAPER, "title": prompt}) for _ in range(2)))
    command = [sys.executable, "-m", "ramekin", "questions", str(TINY_MODEL), str(papers), "-n", "1"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0
    shown = "utf-8" if encoding == "ascii" else encoding  # click takes ASCII for a setting that somebody forgot
    assert f"# {prompt}".encode(shown, "backslashreplace") in done.stdout


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_a_manifest_with_letters_that_stdout_has_not(encoding: str, model_copy: Path) -> None:
    prompt, environment = "na\u00efve {abstract} \U0001f600", {**os.environ, "PYTHONIOENCODING": encoding}
    manifest = replace(Manifest.load(model_copy), prompt=prompt)
    (model_copy / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "ramekin", "info", str(model_copy), "--json"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=True)
    assert json.loads(done.stdout.decode("utf-8"))["prompt"] == prompt


def test_generate_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n{"prompt": "two"}\n')
    status, out, err = run("generate", str(TINY_MODEL), str(path), "-n", "2", "--seed", "1", "--json")
    results = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [result["prompt"] for result in results] == ["one", "two"]
    for result in results:
        assert [sample["index"] for sample in result["samples"]] == [0, 1]
        sample = result["samples"][0]
        assert len(sample["token_ids"]) == len(sample["logprobs"])
        assert sample["finish_reason"] in ("eos", "length", "stop")
        assert sample["seed"] == 1


def test_stream_prints_the_same_text() -> None:
    whole = run("generate", str(TINY_MODEL), "--seed", "1", stdin=b"x")
    assert run("generate", str(TINY_MODEL), "--seed", "1", "--stream", stdin=b"x")[:2] == whole[:2]
    status, out, _ = run("generate", str(TINY_MODEL), "--seed", "1", "--stream", "-n", "3", stdin=b"x")
    assert status == 0
    assert sorted(line[:3] for line in out.splitlines()) == ["[0]", "[1]", "[2]"]


def test_questions_json(paper: str) -> None:
    status, out, _ = run("questions", str(TINY_MODEL), paper, "-n", "3", "--json", "--seed", "2")
    result = json.loads(out)
    assert status == 0
    assert result["title"] == "T"
    assert [pair["index"] for pair in result["pairs"]] == [0, 1, 2]
    assert {"question", "answer", "problem", "text", "finish_reason"} <= set(result["pairs"][0])


def test_questions_print_what_is_malformed_only_when_asked(paper: str) -> None:
    status, out, err = run("questions", str(TINY_MODEL), paper, "-n", "3", "--seed", "2")
    assert (status, out) == (0, "")  # a random model asks nothing
    assert "3 of 3 samples were not a question and a whole answer; --all prints them" in err
    assert run("questions", str(TINY_MODEL), paper, "-n", "3", "--seed", "2", "--all")[1].count("(no separator)") == 3


def test_what_a_paper_lacks_is_told(paper: str, tmp_path: Path) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in (PAPER, {"title": "U", "abstract": "A."}, {"abstract": "B."})))
    err = run("questions", str(TINY_MODEL), str(path), "-n", "1")[2]
    assert "no introduction found in paper 2 (U) and 1 more" in err
    assert "no abstract" not in err
    assert "found in" not in run("questions", str(TINY_MODEL), paper, "-n", "1")[2]


WRITTEN = (
    Completion(0, "What? [SEP] A net.", (5, 1), (-1.0, -1.0), "eos", 3),
    Completion(1, "Why? [SEP] It is", (5, 6), (-1.0, -1.0), "length", 3),
    Completion(2, "nothing", (7, 1), (-1.0, -1.0), "eos", 3),
)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trained model might write of any paper."""
    monkeypatch.setattr(Engine, "stream_many", lambda *_: iter([(0, completion) for completion in reversed(WRITTEN)]))


@pytest.mark.usefixtures("written")
def test_pairs_as_people_read_them(paper: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["questions", str(TINY_MODEL), paper, "-n", "3"])
    out, err = capsys.readouterr()
    assert out == "Q: What?\nA: A net.\n\n"
    assert err == "ramekin: 2 of 3 samples were not a question and a whole answer; --all prints them\n"
    main(["questions", str(TINY_MODEL), paper, "-n", "3", "--all"])
    out, err = capsys.readouterr()
    assert out.startswith("Q: What?\nA: A net.\n\nQ: Why?\nA: It is\n   (")
    assert (out.count("Q: "), out.count("\n   (")) == (3, 2)
    assert err == "ramekin: 2 of 3 samples were not a question and a whole answer\n"


@pytest.mark.usefixtures("written")
def test_an_answer_that_was_cut_is_a_problem(paper: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["questions", str(TINY_MODEL), paper, "-n", "3", "--json"])
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [bool(pair["problem"]) for pair in pairs] == [False, True, True]
    assert [(pair["question"], pair["answer"]) for pair in pairs[:2]] == [("What?", "A net."), ("Why?", "It is")]


def test_prompts_are_streamed_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where several are computed at once, as on a GPU, their texts would be mixed."""
    monkeypatch.setattr(Model, "prompts_at_once", 3)
    (tmp_path / "prompts.jsonl").write_text('"one"\n"two"\n')
    main(["generate", str(TINY_MODEL), str(tmp_path / "prompts.jsonl"), "--stream", "--seed", "1"])
    together = capsys.readouterr().out
    for prompt in ("one", "two"):
        (tmp_path / "prompt.txt").write_text(prompt)
        main(["generate", str(TINY_MODEL), str(tmp_path / "prompt.txt"), "--stream", "--seed", "1"])
    assert capsys.readouterr().out == together


def test_many_papers(tmp_path: Path) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_text(f"{json.dumps(PAPER)}\n{json.dumps({**PAPER, 'title': 'U'})}\n")
    status, out, _ = run("questions", str(TINY_MODEL), str(path), "-n", "2", "--json", "--seed", "2")
    assert status == 0
    assert [json.loads(line)["title"] for line in out.splitlines()] == ["T", "U"]


def test_info_and_verify() -> None:
    status, out, _ = run("info", str(TINY_MODEL))
    assert status == 0
    assert "t5-v1.1" in out
    assert json.loads(run("info", str(TINY_MODEL), "--json")[1])["dims"]["head_dim"] == 8
    status, out, _ = run("verify", str(TINY_MODEL))
    assert status == 0
    assert "files: 6 intact" in out
    assert "golden run: log-probabilities within" in out


def test_info_tells_of_texts_that_are_cleaned_up(model_copy: Path) -> None:
    assert "blanks" not in run("info", str(model_copy))[1]
    path = model_copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))
    assert "without blanks before punctuation" in run("info", str(model_copy))[1]


def test_prompts_that_are_too_long_are_told_of_each_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps("word " * count) + "\n" for count in (40, 50)))
    options = "generate", str(TINY_MODEL), str(path), "--max-source-tokens", "8"
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # what was asked for does not depend on the host's filters
    status, _, err = run(*options, "--seed", "1")
    assert status == 0
    assert [line.split(": ")[1] for line in err.splitlines()] == ["prompt 1", "prompt 2"]
    status, out, err = run(*options, "--on-long", "error")
    assert (status, out) == (1, "")
    assert "nothing was run" in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves(unbuffered: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('"x"\n' * 10)  # more text than a pipe holds: it cannot all be written first
    line = f"{sys.executable} -m ramekin generate {TINY_MODEL} {tmp_path}/prompts.jsonl -n 50 --max-new-tokens 400 --seed 1"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = f"({line}; echo status $? >&2) | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False, env=environment)
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b"status 1\n"


def test_too_little_memory_for_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("Unable to allocate 800. MiB")

    monkeypatch.setattr(Engine, "load", fails)
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(TINY_MODEL)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("ramekin: not enough memory (Unable to allocate 800. MiB); ask for less")


class Terminal(StringIO):
    """A person watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("results", "shown"), [(StringIO(), True), (Terminal(), False)])
def test_progress_counts_items_and_stays_out_of_results(
    results: StringIO, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", results)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress_in_groups([[1, 2], [3]], "papers")) == [[1, 2], [3]]
    assert ("3/3" in sys.stderr.getvalue()) == shown  # type: ignore[attr-defined]
    assert bool(sys.stderr.getvalue()) == shown  # type: ignore[attr-defined]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("command", ["generate", "questions"])
def test_ctrl_c_prints_the_samples_that_are_finished(command: str, paper: str) -> None:
    done = stopped_at_60(
        command, str(TINY_MODEL), paper, *["-n", "32", "--max-new-tokens", "5000", "--top-k", "0", "--seed", "1", "--json"]
    )
    told = json.loads(done.stdout)
    samples = told["samples" if command == "generate" else "pairs"]
    assert 0 < len(samples) < 32
    assert told["interrupted"]
    assert all(len(sample["token_ids"]) <= 61 and sample["finish_reason"] == "eos" for sample in samples)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_the_line_of_a_stream(paper: str) -> None:
    done = stopped_at_60(*f"generate {TINY_MODEL} {paper} --min-new-tokens 90 --seed 1 --stream".split())
    assert len(done.stdout) > 60
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("\n")


def stopped_at_60(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that gets SIGINT at its 60th step."""
    code = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell begin with it ignored
from ramekin.model import Model
real = Model.step
def step(self, token_ids, cache):
    if cache.length == 60:
        os.kill(os.getpid(), signal.SIGINT)
    return real(self, token_ids, cache)
Model.step = step
from ramekin.cli import main
main({list(arguments)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "ramekin: stopped")
    return done


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
@pytest.mark.parametrize("command", ["generate", "questions"])
@pytest.mark.parametrize("options", ["--json", ""])
def test_a_signal_while_results_are_written(command: str, options: str, paper: str) -> None:
    """It comes when all samples are finished: none is lost."""
    arguments = [command, str(TINY_MODEL), paper, *["-n", "9", "--seed", "1"], *options.split()]
    arguments += ["--all"] if command == "questions" else []
    code = f"""
import signal, sys
from ramekin import cli, sample_cli
signal.signal(signal.SIGTERM, signal.SIG_DFL)
def write(*arguments):
    signal.raise_signal(signal.SIGTERM)
    return real(*arguments)
real, sample_cli.write = sample_cli.write, write
sys.argv = ["ramekin", *{arguments!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (143, "")
    if options:
        told = json.loads(done.stdout)
        assert len(told["samples" if command == "generate" else "pairs"]) == 9
        assert "interrupted" not in told
    else:
        assert done.stdout == run(*arguments)[1]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
@pytest.mark.parametrize("n", [1, 2])
def test_a_signal_in_the_middle_of_what_is_streamed(n: int) -> None:
    """What was begun is written to its end."""
    code = f"""
import signal, sys
from ramekin import cli, terminal
signal.signal(signal.SIGTERM, signal.SIG_DFL)
def is_terminal(stream):  # asked when something is about to be written
    signal.raise_signal(signal.SIGTERM)
    return real(stream)
real, terminal.is_terminal = terminal.is_terminal, is_terminal
cli.main(["generate", {str(TINY_MODEL)!r}, "--stream", "-n", "{n}", "--seed", "1", "--min-new-tokens", "9"])
"""
    done = subprocess.run([sys.executable, "-c", code], input="x", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (143, "")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 1


def test_results_into_a_stream_of_the_host(paper: str) -> None:
    with redirect_stdout(StringIO()) as stream:
        main(["questions", str(TINY_MODEL), paper, "-n", "2", "--seed", "1", "--json"])
    assert len(json.loads(stream.getvalue())["pairs"]) == 2


@RUNS_CUDA_GRAPHS
@pytest.mark.parametrize("end", [KeyboardInterrupt, RamekinError("a GPU that fails")])
def test_what_is_finished_of_a_group_is_not_lost(
    end: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several prompts at once, as on a GPU: those with finished samples are told of, and no others."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(f"prompt {number}") + "\n" for number in range(5)))
    command = ["generate", str(CUDA_MODEL), str(prompts), "-n", "2", "--seed", "1", "--provider", "cpu", "--json"]
    main(command)
    whole = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    load, many = Engine.load, Engine.stream_many

    def grouped(*arguments: Any) -> Engine:
        engine = load(*arguments)
        engine.model.prompts_at_once = 3
        return engine

    def stopped(*arguments: Any) -> Iterator[Any]:
        for number, event in many(*arguments):
            yield number, event
            if isinstance(event, Completion):
                raise end

    monkeypatch.setattr(Engine, "load", grouped)
    main(command)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == whole
    monkeypatch.setattr(Engine, "stream_many", stopped)
    with pytest.raises(SystemExit):
        main(command)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(each["samples"]) for each in told] == [1]
