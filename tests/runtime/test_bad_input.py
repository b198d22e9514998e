"""The design's table of bad input, row by row: one clear line, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from ramekin import (
    Engine,
    FormatVersionError,
    ModelFormatError,
    ModelNotFoundError,
    RuntimeVersionError,
    VerificationError,
    golden,
)
from ramekin.cli import main
from ramekin.manifest import FileRecord, Manifest
from ramekin.model import Model
from ramekin.onnxfile import external_locations
from tests.runtime.conftest import CUDA_MODEL, INT8_MODEL, RUNS_CUDA_GRAPHS, TINY_MODEL


def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """The command in a process of its own: status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "ramekin", *arguments], input=stdin, capture_output=True, timeout=120, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], rehash: bool = False) -> None:
    """Change a manifest; with `rehash` also as somebody would who wants to deceive."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    if rehash:
        for name in raw["files"]:
            if (folder / name).is_file():
                record = FileRecord.of(folder / name)
                raw["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    path.write_text(json.dumps(raw))


# Missing file, a folder that is not a model


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such model folder"):
        Engine.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        Engine.load(tmp_path / "none")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"not a ramekin model folder \(it has no manifest.json\)"):
        Engine.load(tmp_path)
    for model in (TINY_MODEL, INT8_MODEL):  # half of a copy
        shutil.copytree(model, tmp_path / model.name)
        (tmp_path / model.name / "manifest.json").unlink()
        with pytest.raises(ModelFormatError, match=r"not a ramekin model folder \(it has no manifest.json\)"):
            Engine.load(tmp_path / model.name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[]", "no format_version"),
        ('{"format_version": 99}', "format version 99, but this ramekin reads 3"),
        ("[" * 200_000, "not JSON"),
        (f'{{"format_version": 3, "recipe": {"[" * 400 + "]" * 400}}}', "nested deeper than any manifest"),
        ('{"format_version": 3}', "not a complete manifest"),
        ('{"format_version": 3, "dims": 3}', "not a complete manifest"),
    ],
)
def test_broken_manifests(model_copy: Path, text: str, says: str) -> None:
    (model_copy / "manifest.json").write_text(text)
    with pytest.raises(ModelFormatError, match=says) as caught:
        Engine.load(model_copy)
    assert isinstance(caught.value, FormatVersionError) == ("99" in text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["dims"].update(num_heads=0), "dims.num_heads"),
        (lambda raw: raw["dims"].update(decoder_layers=2**31 - 1), "dims.decoder_layers must be at most 1024"),
        (lambda raw: raw["dims"].update(decoder_layers=2), "does not belong to this manifest"),
        (lambda raw: raw["dims"].update(head_dim=4), "has shape"),
        (lambda raw: raw["dims"].update(vocab_size=600), "has shape"),
        (lambda raw: raw["dims"].update(vocab_size=100), "outside the vocabulary"),
        (lambda raw: raw["tokens"]["named"].update(We=9999), "outside the vocabulary"),
        (lambda raw: raw["tokens"]["named"].update({"We" * 1000: 5}), "texts of at most 256 characters"),
        (lambda raw: raw.update(prompt=5), "prompt must be str"),
        (lambda raw: raw.update(prompt="{foo} {"), "prompt template"),
        (lambda raw: raw.update(prompt="no paper"), "neither {abstract} nor {introduction}"),
        (lambda raw: raw.update(variant="\ud800"), "not JSON"),
        (lambda raw: raw.update(generation={"top_p": 5}), "top_p must be"),
        (lambda raw: raw.update(generation=[1]), "generation must be an object"),
        (lambda raw: raw.update(source=[1]), "source must be an object"),
        (lambda raw: raw["files"]["spiece.model"].update(bytes="x"), "files must give bytes"),
        (lambda raw: raw["onnxruntime"].update(at_least="9" * 5000 + ".1.1"), "range of versions"),
        (lambda raw: raw["tokens"].update(eos=[]), "at least one eos"),
        (lambda raw: raw["tokens"].update(start=9999), "outside the vocabulary"),
        (lambda raw: raw["tokens"].update(start=512), "outside the vocabulary of 512"),
        (lambda raw: raw["tokens"].update(eos=[1, -1]), "all of them integers >= 0"),
        (lambda raw: raw["files"].pop("decoder.onnx"), "must list decoder.onnx"),
        (lambda raw: raw.update(max_source_tokens=0), "max_source_tokens"),
        (lambda raw: raw.update(clean_up_tokenization_spaces=1), "clean_up_tokenization_spaces must be bool"),
        (lambda raw: raw.update(onnxruntime={"at_least": "new"}), "onnxruntime must be a range of versions"),
        (lambda raw: raw.update(surprise=1), "not a complete manifest"),
        (lambda raw: raw["files"].update({"\x1b[2J": {"bytes": 1, "sha256": ""}}), "plain names inside the folder"),
        (lambda raw: raw["files"]["spiece.model"].update(bytes=10**400), "files must give bytes"),
        (lambda raw: raw.update(precision="\x1b[2J"), "precision must be str without control characters, not "),
        (lambda raw: raw.update(generation={"top_p": 10**400}), "top_p must be"),
        (lambda raw: raw["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "plain names inside the folder"),
        (lambda raw: raw["files"].update({"..\\x": {"bytes": 1, "sha256": ""}}), "plain names inside the folder"),
        (lambda raw: raw["files"].update({"manifest.json": {"bytes": 1, "sha256": ""}}), "plain names inside the folder"),
    ],
)
def test_manifests_that_contradict_themselves(model_copy: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    rewrite(model_copy, change)
    with pytest.raises(ModelFormatError, match=says):
        Engine.load(model_copy)


# Truncated, swapped or altered model files

FILES = ["encoder.onnx", "encoder.bin", "decoder.onnx", "decoder.bin", "embedding.bin", "spiece.model"]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(model_copy: Path, name: str) -> None:
    path = model_copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ModelFormatError, match=f"{name}: {len(content) - 1} bytes instead of {len(content)}"):
        Engine.load(model_copy)
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(ModelFormatError, match=f"{name}: altered since the export"):
        Engine.load(model_copy)
    path.unlink()
    with pytest.raises(ModelFormatError, match=f"{name}: missing"):
        Engine.load(model_copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "spiece.model"])
def test_files_that_are_something_else(model_copy: Path, name: str) -> None:
    """Even with a manifest that was made to fit."""
    for content in (b"not at all", b"", bytes(range(256)) * 9):
        (model_copy / name).write_bytes(content)
        rewrite(model_copy, lambda _: None, rehash=True)
        with pytest.raises(ModelFormatError):
            Engine.load(model_copy)


@pytest.mark.parametrize(("one", "other"), [("encoder.onnx", "decoder.onnx"), ("encoder.bin", "decoder.bin")])
def test_swapped_files(model_copy: Path, one: str, other: str) -> None:
    (model_copy / one).rename(model_copy / "x")
    (model_copy / other).rename(model_copy / one)
    (model_copy / "x").rename(model_copy / other)
    with pytest.raises(ModelFormatError, match=r"(en|de)coder"):
        Engine.load(model_copy)
    rewrite(model_copy, lambda _: None, rehash=True)
    with pytest.raises((ModelFormatError, VerificationError)):
        golden.check(Engine.load(model_copy), Manifest.load(model_copy).golden)


def test_verify_notices_what_a_fitting_manifest_hides(model_copy: Path) -> None:
    path = model_copy / "decoder.bin"
    content = bytearray(path.read_bytes())
    content[-9000:] = bytes(9000)
    path.write_bytes(content)
    rewrite(model_copy, lambda _: None, rehash=True)
    status, _, err = run("verify", str(model_copy))
    assert status == 1
    assert "golden run: log-probabilities differ by" in err
    assert err.count("\n") == 1


def test_verify_hashes_large_files_too(model_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loading takes those over 32 MB by their size."""
    with (model_copy / "more.bin").open("wb") as stream:
        stream.truncate((32 << 20) + 1)
    rewrite(model_copy, lambda raw: raw["files"].update({"more.bin": {}}), rehash=True)
    with (model_copy / "more.bin").open("r+b") as stream:
        stream.write(b"x")
    assert Engine.load(model_copy)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(model_copy)])
    assert ended.value.code == 1
    assert "more.bin: altered since the export" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "passes"), [(0.0, True), (0.01, False), (float("nan"), False), (-0.01, False)])
def test_how_far_a_golden_run_may_be(engine: Engine, wrong: float, passes: bool) -> None:
    """In float32 a hundredth at one token is too much; in int8 it is rounding."""
    told = engine.manifest.golden
    golden_run = {**told, "logprobs": [told["logprobs"][0] + wrong, *told["logprobs"][1:]]}
    if passes:
        assert golden.check(engine, golden_run) < 2e-3
    else:
        with pytest.raises(VerificationError, match="golden run: log-probabilities differ by"):
            golden.check(engine, golden_run)


# An untrusted model folder


@pytest.mark.parametrize("location", [b"/etc/hostname", b"../../../x.bin", b"encoder.bi\x00", b"manifest.json"])
def test_graphs_that_reach_out_of_the_folder(model_copy: Path, location: bytes) -> None:
    path = model_copy / "encoder.onnx"
    content = path.read_bytes()
    old, padded = b"encoder.bin", location
    assert old in content
    # Every length in the file would change with the name, so the new name gets the same length, where it is not longer.
    if len(padded) <= len(old):
        padded = padded + b" " * (len(old) - len(padded))
        path.write_bytes(content.replace(old, padded))
    else:
        path.write_bytes(graph_with_external_data(location))
    rewrite(model_copy, lambda _: None, rehash=True)
    with pytest.raises(ModelFormatError, match="asks for weights in"):
        Engine.load(model_copy)


def field(number: int, payload: bytes) -> bytes:
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


def graph_with_external_data(location: bytes) -> bytes:
    """A ModelProto whose one tensor, hidden in a node's attribute of a nested graph, names a file."""
    entry = field(1, b"location") + field(2, location)
    attribute = field(5, field(13, entry))
    graph = field(1, field(5, attribute))
    return field(7, field(1, field(5, field(6, graph))))


def test_external_data_is_found_wherever_it_hides() -> None:
    assert external_locations(graph_with_external_data(b"/x")) == {"/x"}
    assert external_locations((TINY_MODEL / "decoder.onnx").read_bytes()) == {"decoder.bin", "embedding.bin"}


@pytest.mark.parametrize(
    "path",
    [
        [7, 5],  # a graph's initializer
        [7, 15, 1],  # a sparse one's values
        [7, 15, 2],  # and its places
        [7, 1, 5, 5],  # an attribute of a node: a tensor,
        [7, 1, 5, 10],  # several,
        [7, 1, 5, 11, 5],  # graphs,
        [7, 1, 5, 22, 1],  # a sparse tensor,
        [7, 1, 5, 23, 2],  # several
        [25, 7, 5, 5],  # a node of a function
        [25, 11, 5],  # the usual value of a function's attribute
        [20, 1, 5],  # training: how to begin
        [20, 2, 5],  # and a step
    ],
)
def test_no_place_hides_external_data(path: list[int]) -> None:
    """Field numbers of onnx.proto, from the model to a tensor."""
    content = field(13, field(1, b"location") + field(2, b"/x"))
    for number in reversed(path):
        content = varint(number << 3 | 2) + varint(len(content)) + content
    assert external_locations(content) == {"/x"}


def test_a_tag_that_protobuf_would_cut_short() -> None:
    """C++ drops what is above 32 bits of a tag, so `BA 80 80 80 10` is the graph to onnxruntime."""
    graph = graph_with_external_data(b"/x")
    with pytest.raises(ValueError, match="too large"):
        external_locations(b"\xba\x80\x80\x80\x10" + graph[1:])


@pytest.mark.parametrize("content", [b"\x3a\x7f", b"\xff" * 20, b"\x3b\x00", b"\x3a\x02\x0a", b"\x39\x00"])
def test_bytes_that_are_no_message(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"truncated|wire type|ten bytes"):
        external_locations(content)


def test_a_graph_nested_without_end() -> None:
    content = b""
    for _ in range(40):
        content = field(1, field(5, field(6, content))) if len(content) < 110 else content
    deep = content
    for _ in range(60):
        deep = b"".join([b"\x32", varint(len(deep)), deep])
        deep = b"".join([b"\x2a", varint(len(deep)), deep])
        deep = b"".join([b"\x0a", varint(len(deep)), deep])
    with pytest.raises(ValueError, match="nested too deeply"):
        external_locations(b"\x3a" + varint(len(deep)) + deep)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_links_that_leave_the_folder(model_copy: Path, tmp_path: Path) -> None:
    shutil.move(model_copy / "encoder.bin", tmp_path / "encoder.bin")
    (model_copy / "encoder.bin").symlink_to(tmp_path / "encoder.bin")
    with pytest.raises(ModelFormatError, match=r"encoder.bin: a link that leaves the model folder"):
        Engine.load(model_copy)
    shutil.move(model_copy / "manifest.json", tmp_path / "manifest.json")
    (model_copy / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(ModelFormatError, match=r"manifest.json: a link that leaves the model folder"):
        Engine.load(model_copy)


def test_a_manifest_without_end(model_copy: Path) -> None:
    with (model_copy / "manifest.json").open("r+b") as stream:
        stream.truncate((64 << 20) + 1)
    with pytest.raises(ModelFormatError, match=r"manifest.json: larger than any manifest"):
        Engine.load(model_copy)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4t"))
    shutil.copytree(TINY_MODEL, folder)
    with pytest.raises(ModelFormatError, match="opens no path that is not valid text; rename the folder"):
        Engine.load(folder)
    status, _, err = run("generate", str(folder), stdin=b"x")
    assert (status, err.count("\n")) == (1, 1)
    assert "rename the folder" in err


def test_a_tokenizer_with_more_pieces_than_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramekin.tokenizer.Tokenizer.piece_count", 513)
    with pytest.raises(ModelFormatError, match=r"spiece.model has more pieces than the model"):
        Engine.load(TINY_MODEL)


@pytest.mark.parametrize("graph", ["_encoder", "_decoder"])
@pytest.mark.parametrize("side", ["get_inputs", "get_outputs"])
@pytest.mark.parametrize("change", [{"type": "tensor(string)"}, {"name": "another"}, {"shape": [3, 3, 3, 3]}])
def test_tensors_that_do_not_fit(engine: Engine, graph: str, side: str, change: dict[str, Any]) -> None:
    """Inputs and outputs are memory of ours, which a graph from elsewhere must not take for something else."""
    model: Any = engine.model
    sessions = {name: getattr(model, name) for name in ("_encoder", "_decoder")}
    tensors = [
        SimpleNamespace(name=each.name, shape=each.shape, type=each.type) for each in getattr(sessions[graph], side)()
    ]
    vars(tensors[-1]).update(change)
    kept = {name: getattr(sessions[graph], name)() for name in ("get_inputs", "get_outputs")} | {side: tensors}
    sessions[graph] = SimpleNamespace(get_inputs=lambda: kept["get_inputs"], get_outputs=lambda: kept["get_outputs"])
    with pytest.raises(ModelFormatError, match=f"{graph[1:]}.onnx: "):
        Model(onnxruntime, sessions["_encoder"], sessions["_decoder"], engine.manifest)


# onnxruntime


@pytest.mark.parametrize("version", ["1.22.1", "1.23.1", "2.0.0", "0.9"])
def test_unsupported_onnxruntime(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    package = "onnxruntime-gpu" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "onnxruntime"
    with pytest.raises(RuntimeVersionError, match=rf"^{package} {version} is not supported .*'{package}>=1.23.2,<2.0.0'"):
        Engine.load(TINY_MODEL)


def test_missing_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeVersionError, match=r"pip install onnxruntime$"):
        Engine.load(TINY_MODEL)


def test_a_host_with_a_thread_pool_for_the_whole_process() -> None:
    code = f"""
import onnxruntime, ramekin
onnxruntime.set_global_thread_pool_sizes(2, 1)
options = onnxruntime.SessionOptions(); options.use_per_session_threads = False
onnxruntime.InferenceSession({str(TINY_MODEL / "encoder.onnx")!r}, options)
print(len(ramekin.Engine.load({str(TINY_MODEL)!r}).generate("x", ramekin.SamplingParams(n=2, seed=1))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2\n"


def test_loading_leaves_other_sessions_and_floats_alone() -> None:
    """A library must not change its host: sessions opened before and after work, and tiny floats stay what they are."""
    code = f"""
import onnxruntime, ramekin
before = onnxruntime.InferenceSession({str(TINY_MODEL / "encoder.onnx")!r})
ramekin.Engine.load({str(TINY_MODEL)!r}).generate("x")
after = onnxruntime.InferenceSession({str(TINY_MODEL / "encoder.onnx")!r})
print(5e-324 > 0, bool(after))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True True\n"


# The commands


LONGEST = ["--max-new-tokens", "600", "--min-new-tokens", "600", "--top-k", "0"]  # the tiny model has 500 tokens


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["generate", "none"], 1, "no such model folder"),
        (["generate", "{tmp}"], 1, "not a ramekin model folder"),
        (["generate", "{model}", "none.txt"], 1, "none.txt: cannot be read: No such file"),
        (["generate", "{model}", "{tmp}/latin1.txt"], 1, "latin1.txt: not UTF-8 text (byte 1)"),
        (["generate", "{model}", "{tmp}/broken.jsonl"], 1, "broken.jsonl, line 2: not JSON"),
        (["generate", "{model}", "{tmp}/numbers.jsonl"], 1, "numbers.jsonl, line 1: expected a text or an object"),
        (["questions", "{model}", "none.json"], 1, "none.json: cannot be read"),
        (["questions", "{model}", "{tmp}/latin1.txt"], 1, "not UTF-8"),
        (["questions", "{model}", "{tmp}/text.txt"], 1, "not a paper"),
        (["questions", "{model}", "{tmp}/numbers.jsonl"], 1, "line 1: expected a JSON object"),
        (["generate", "{model}", "{tmp}/deep.jsonl"], 1, "line 1: not JSON"),
        (["questions", "{model}", "{tmp}/deep.json"], 1, "deep.json: neither JSON"),
        (["generate", "{model}", "--top-p", "0"], 2, "top_p must be a number above 0 and at most 1, not 0.0"),
        (["generate", "{model}", "--temperature", "-1"], 2, "temperature must be a number from 0.0001"),
        (["generate", "{model}", "--temperature", "nan"], 2, "temperature must be"),
        (["generate", "{model}", "-n", "0"], 2, "n must be from 1"),
        (["generate", "{model}", "-n", "many"], 2, "'many' is not a valid integer"),
        (["generate", "{model}", "--threads", "0"], 2, "threads"),
        (["generate", "{model}", "--max-source-tokens", "2000000000"], 2, "2000000000 is not in the range"),
        (["questions", "{model}", "{tmp}/text.txt", "--threads", "5000"], 2, "5000 is not in the range"),
        (["verify", "{model}", "--threads", "5000"], 2, "5000 is not in the range"),
        (["generate", "{model}", "{tmp}/blank.jsonl"], 1, "blank.jsonl: no prompts in it"),
        (["generate", "{model}", "{tmp}/nothing.txt"], 1, "nothing.txt: an empty prompt"),
        (["generate", "{model}", "{tmp}/nothings.jsonl"], 1, "nothings.jsonl, line 2: an empty prompt"),
        (["generate", "{model}", "--temperature", "10001"], 2, "temperature must be a number from 0.0001 to 10000"),
        (["generate", "{model}", "--no-repeat-ngram-size", "1", *LONGEST], 1, "every token is banned; lower min_new"),
        (["generate", "{model}", "--no-repeat-ngram-size", "1", *LONGEST, "--greedy"], 1, "every token is banned"),
        pytest.param(["bench", "{cuda}", "--provider", "cuda"], 1, "cannot compute on cuda", marks=RUNS_CUDA_GRAPHS),
        (["questions", "{model}", "{tmp}/blank.jsonl"], 1, "blank.jsonl: no papers in it"),
        (["questions", "{model}", "-"], 1, "not a paper"),
        (
            ["generate", "{model}", "{tmp}/text.txt", "--max-source-tokens", "4", "--on-long", "error"],
            1,
            "more than the limit of 4",
        ),
        (["generate"], 2, "Missing argument 'MODEL'"),
        (["generate", "{model}", "--json", "--stream"], 2, "give one of them"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["info", "none"], 1, "no such model folder"),
        (["verify", "{tmp}"], 1, "not a ramekin model folder"),
        (["verify", "{model}", "--papers", "{tmp}/text.txt"], 2, "--papers and --json belong to --reference"),
        (["verify", "{model}", "--revision", "main"], 2, "--papers and --json belong to --reference"),
        (["verify", "{model}", "--json"], 2, "--papers and --json belong to --reference"),
    ],
)
def test_wrong_commands_say_one_line(arguments: list[str], status: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"a\xe9b")
    (tmp_path / "text.txt").write_text("some text that is long enough")
    (tmp_path / "broken.jsonl").write_text('"fine"\n{\n')
    (tmp_path / "numbers.jsonl").write_text("3\n")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "nothing.txt").write_text(" \n")
    (tmp_path / "nothings.jsonl").write_text('"x"\n""\n')
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "deep.json").write_text('{"a":' * 200_000)
    filled = [each.format(tmp=tmp_path, model=TINY_MODEL, cuda=CUDA_MODEL) for each in arguments]
    found, out, err = run(*filled, stdin=b"a prompt")
    assert (found, out) == (status, "")
    assert says in err
    assert err.startswith("ramekin: ")
    assert err.count("\n") == 1


def test_long_prompt_on_the_command_line() -> None:
    status, out, err = run(
        "generate", str(TINY_MODEL), "--max-source-tokens", "4", "--max-new-tokens", "3", stdin=b"a b c d e f"
    )
    assert status == 0
    assert out
    assert "was cut to the model's limit of 4" in err
    assert err.count("\n") == 1


def test_every_cut_prompt_is_told(tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('"a b c d e f"\n"a b c d e g"\n')
    arguments = [
        "generate",
        str(TINY_MODEL),
        str(tmp_path / "two.jsonl"),
        "--max-source-tokens",
        "4",
        "--max-new-tokens",
        "3",
    ]
    assert run(*arguments)[2].count("was cut") == 2
    (tmp_path / "two.jsonl").write_text('"a b c d e f"\n"a"\n')
    assert ['"truncated": true' in line for line in run(*arguments, "--json")[1].splitlines()] == [True, False]
    (tmp_path / "two.jsonl").write_text('"a b c d e f"\n"a b c d e g"\n')
    status, out, err = run(*arguments, "--json", "--on-long", "error")
    assert (status, out) == (1, "")  # no record that looks finished
    assert "prompt 1: 9 tokens, more than the limit of 4; nothing was run" in err


def test_files_that_cannot_be_read_are_failed_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the status that a file has that is not there; whether it can be read is for those to tell who open it."""
    (tmp_path / "prompt").write_text("a text")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for command in (["info"], ["verify"], ["bench", "-n", "1", "--source", "2", "--tokens", "2", "--threads", "1"]):
        assert run(*command, str(TINY_MODEL))[0] == 0, command
    assert run("generate", str(TINY_MODEL), str(tmp_path / "prompt"))[0] == 0
    status, _, err = run("questions", str(TINY_MODEL), str(tmp_path / "prompt"))
    assert (status, "not a paper" in err) == (1, True)


def test_a_prompt_with_half_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('"a \\ud800"\n')
    status, out, err = run("generate", str(TINY_MODEL), str(tmp_path / "odd.jsonl"), "--max-new-tokens", "3", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["samples"]


def test_truncation_is_a_warning_in_python(engine: Engine) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.generate("neural " * 2000)
    assert ["cut" in str(each.message) for each in caught] == [True]


def test_names_that_are_no_text(model_copy: Path) -> None:
    """onnxruntime decodes a graph's when they are asked for, SentencePiece a piece when it is met."""
    graph = model_copy / "decoder.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole.replace(b"capacity", b"\xffapacity"))
    rewrite(model_copy, lambda raw: None, rehash=True)
    with pytest.raises(ModelFormatError, match=r"decoder\.onnx: a name in it is not UTF-8"):
        Engine.load(model_copy)
    graph.write_bytes(whole)
    pieces = model_copy / "spiece.model"
    text = Engine.load(TINY_MODEL).tokenizer.text_of(5).replace(b" ", "\u2581".encode())
    pieces.write_bytes(pieces.read_bytes().replace(text, b"\xff" * len(text), 1))
    rewrite(model_copy, lambda raw: None, rehash=True)
    with pytest.raises(ModelFormatError, match=r"piece 5 of the tokenizer is not UTF-8; export the model again"):
        Engine.load(model_copy).tokenizer.text_of(5)
    pieces.write_bytes(pieces.read_bytes() * 2)  # each piece twice, and SentencePiece's error quotes one
    rewrite(model_copy, lambda raw: None, rehash=True)
    with pytest.raises(ModelFormatError, match="not a SentencePiece model"):
        Engine.load(model_copy)


def test_a_golden_run_without_end(model_copy: Path) -> None:
    rewrite(model_copy, lambda raw: raw["golden"].update(target_ids=[5] * 1025))
    with pytest.raises(ModelFormatError, match=r"no usable golden run \(more than 1024 tokens\)"):
        golden.check(Engine.load(model_copy), Manifest.load(model_copy).golden)


def test_lines_on_stderr_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": "9" * 100_000}))
    status, _, stderr = run("info", str(tmp_path))
    assert (status, len(stderr)) == (1, len("ramekin: ") + 2_000 + len("...\n"))


def test_a_golden_run_beyond_all_numbers(model_copy: Path) -> None:
    rewrite(model_copy, lambda raw: raw["golden"].update(logprobs=[10**400]))
    status, _, err = run("verify", str(model_copy))
    assert (status, err.count("\n")) == (1, 1)
    assert "no usable golden run" in err


def test_a_model_of_nothing_but_nan(model_copy: Path) -> None:
    path = model_copy / "decoder.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    rewrite(model_copy, lambda _: None, rehash=True)
    for options in ([], ["--top-k", "0"], ["--greedy"], ["--repetition-penalty", "2"]):
        status, out, err = run("generate", str(model_copy), *options, stdin=b"x")
        assert (status, out.strip(), err.count("\n")) == (1, "", 1), err
        assert "not numbers" in err


def test_a_manifest_cannot_move_the_cursor(model_copy: Path) -> None:
    rewrite(model_copy, lambda raw: raw.update(source={"\x1b[2J": "\x1b]0;x\x07"}, recipe={"a\nb": "c\rd"}))
    status, out, _ = run("info", str(model_copy))
    assert status == 0
    assert all(each.isprintable() for each in out.splitlines())
    assert "source ?[2J" in out
    (model_copy / "spiece.model").unlink()
    _, _, err = run("generate", f"{model_copy}/../\x1b[2J", stdin=b"x")
    assert err.rstrip("\n").isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_too_little_memory_is_one_line() -> None:
    """For onnxruntime too, which would log in colour."""
    code = (
        "import resource, sys; from ramekin.cli import main; import onnxruntime, numpy\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2)\n"
        f"main(['generate', {str(TINY_MODEL)!r}, sys.argv[1], '--threads', '1', '--max-source-tokens', '100000'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-"], input=b"a b c " * 9000, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"ramekin: not enough memory")
