"""An export is whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ramekin import Engine, RuntimeVersionError, SamplingParams
from ramekin.cli import main
from ramekin.config_files import generation_defaults, read_generation
from ramekin.errors import FormatVersionError
from ramekin.golden import check
from ramekin.manifest import FileRecord, Manifest
from ramekin.model import COMPACT_RUNTIMES
from ramekin_export import pipeline, writer
from ramekin_export.cli import EXAMPLES
from ramekin_export.graph import WeightFile
from ramekin_export.pipeline import export
from ramekin_export.target import check_target, scratch, whole_or_not_at_all
from ramekin_export.verify import Checks
from tests.make_runtime_model import TINY, train_tokenizer
from tests.runtime.conftest import CUDA_MODEL, INT8_MODEL, TINY_MODEL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_tells_all(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    returned = export(str(checkpoint("flan")), out, "int8")
    manifest = Manifest.load(out)
    assert manifest == Manifest.from_json(returned.to_json())
    manifest.check_files(out, hash_up_to=None)
    assert set(names(out)) == {*manifest.files, "manifest.json"}
    assert manifest.dims.head_dim == 24
    assert (manifest.dims.encoder_layers, manifest.dims.decoder_layers) == (3, 2)
    assert manifest.tokens.named["<extra_id_0>"] == 499
    assert manifest.source["weights"]["model.safetensors"] == FileRecord.of(checkpoint("flan") / "model.safetensors").sha256
    assert manifest.tools["onnxruntime"]
    assert manifest.opset == 18
    assert check(Engine.load(out), manifest.golden) < 1e-4


def test_an_existing_folder_is_replaced_only_by_force(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out, source = tmp_path / "model", str(checkpoint("flan"))
    export(source, out, "fp32")
    before = (out / "manifest.json").read_text()
    told: list[str] = []
    with pytest.raises(FileExistsError, match="--force replaces it"):
        export(source, out, "int8", progress=lambda stage, _done, _all: told.append(stage))
    assert not told  # before the work, not after it
    assert (out / "manifest.json").read_text() == before
    export(source, out, "int8", force=True)
    assert Manifest.load(out).precision == "int8"
    assert names(tmp_path) == ["model"]


def test_force_replaces_a_model_of_an_older_format(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "model"
    export(str(checkpoint("flan")), out, "fp32")
    raw = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**raw, "format_version": 1, "dims": None}))
    with pytest.raises(FormatVersionError, match="export the model again"):
        Engine.load(out)
    export(str(checkpoint("flan")), out, "fp32", force=True)
    assert Engine.load(out)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_between_both_renames_loses_no_model(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    shutil.copytree(TINY_MODEL, out)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> None:
        rename(path, target)
        if (path if moment == "before" else target) == out:
            monkeypatch.setattr(Path, "rename", rename)
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_or_not_at_all(out, force=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["model"]
    assert (out / "new").exists() == (moment == "after")


def test_what_is_put_there_meanwhile_costs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    shutil.copytree(TINY_MODEL, out)
    rename = Path.rename

    def disturbed(path: Path, target: Path) -> None:
        rename(path, target)
        if path == out:
            (out / "other").mkdir(parents=True)

    monkeypatch.setattr(Path, "rename", disturbed)
    with pytest.raises(FileExistsError, match="the model before is in ") as caught, whole_or_not_at_all(out, force=True):
        pass
    kept = Path(str(caught.value).rpartition(" is in ")[2])
    Manifest.load(kept).check_files(kept, hash_up_to=None)
    assert names(out) == ["other"]


def test_where_no_model_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for out, says in (("file", "holds other things"), (".", "holds other things"), ("file/a/b", "file: a file, so nothing")):
        for force in (False, True):
            with pytest.raises(FileExistsError, match=says):
                check_target((tmp_path / out).resolve(), force)
    check_target(tmp_path / "empty", force=False)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        for place in (scratch(tmp_path / "m"), whole_or_not_at_all(tmp_path / "m", force=False)):
            with pytest.raises(OSError, match=f"{tmp_path.name}: .*make room"), place:
                raise OSError(number, os.strerror(number))
        with (
            pytest.raises(OSError, match="room") as caught,
            whole_or_not_at_all(tmp_path / "m", force=False) as folder,
            scratch(folder),
        ):
            raise OSError(number, os.strerror(number))
        assert str(caught.value) == f"{folder.parent}: {os.strerror(number)}; make room for larger files and try again"
    with pytest.raises(FileExistsError, match="holds other things"):
        check_target(Path("/"), force=True)
    assert names(tmp_path) == ["empty", "file"]


def test_force_replaces_nothing_but_models(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other things than a model"):
        export(str(checkpoint("flan")), tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="holds other things than a model"):
        export(str(checkpoint("flan")), tmp_path / "file", force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_what_appears_during_an_export_is_not_replaced(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def meanwhile(*_: object) -> dict[str, str]:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        return {}

    monkeypatch.setattr(writer, "tools", meanwhile)
    for force in (False, True):
        with pytest.raises(FileExistsError):
            export(str(checkpoint("flan")), out, "fp32", force=force)
        assert names(tmp_path) == ["out"]
        assert names(out) == ["thesis.tex"]
        (out / "thesis.tex").unlink()
        out.rmdir()


def test_a_swap_that_fails_is_undone(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    export(str(checkpoint("flan")), out, "fp32")
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        export(str(checkpoint("flan")), out, "int8", force=True)
    assert names(tmp_path) == ["model"]
    assert Manifest.load(out).precision == "fp32"


@pytest.mark.parametrize("manifest", ['{"name": "my app"}', "{}", "ours"])
def test_a_manifest_alone_makes_no_model(checkpoint: Callable[[str], Path], tmp_path: Path, manifest: str) -> None:
    """Web applications have a manifest.json too; and notes beside a model are somebody's notes."""
    out = tmp_path / "web"
    if manifest == "ours":
        export(str(checkpoint("flan")), out, "fp32")
    else:
        out.mkdir()
        (out / "manifest.json").write_text(manifest)
    (out / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other things than a model"):
        export(str(checkpoint("flan")), out, force=True)
    assert (out / "notes.md").read_text() == "mine"


def test_the_checkpoint_itself_is_not_replaced(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "own" / "checkpoint"))
    for out in (folder, folder.parent):
        with pytest.raises(FileExistsError, match="is or holds the checkpoint itself"):
            export(str(folder), out, force=True)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_fills_leaves_nothing(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    force: bool,
) -> None:
    out, source = tmp_path / "model", str(checkpoint("flan"))
    if force:
        export(source, out, "fp32")
    real, calls = WeightFile.add, []

    def failing(self: WeightFile, name: str, array: np.ndarray, parameters: int) -> object:
        calls.append(name)
        if len(calls) == 30:
            raise error
        return real(self, name, array, parameters)

    monkeypatch.setattr(WeightFile, "add", failing)
    with pytest.raises(type(error)):
        export(source, out, "int8", force=True)
    assert names(tmp_path) == (["model"] if force else [])
    if force:
        assert Manifest.load(out).precision == "fp32"
        Engine.load(out)


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (getattr(signal, "SIGHUP", 0), 129)]
)
def test_an_export_that_is_stopped_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell begin with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup's with this one
from ramekin_export import writer
real = writer.build_decoder
def slow(*arguments):
    print("decoder", flush=True); time.sleep(30)
    return real(*arguments)
writer.build_decoder = slow
from ramekin.cli import main
sys.argv = ["ramekin", "export", {str(checkpoint("flan"))!r}, {str(tmp_path / "model")!r}]
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "decoder\n"
        assert any(".partial" in name for name in names(tmp_path))
        time.sleep(0.2)
        for _ in range(8):  # a person who hammers at Ctrl-C: only the first one counts
            process.send_signal(sent)
            time.sleep(0.003)
        _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in err
    assert names(tmp_path) == []


def test_wrong_arguments(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, int8, int4, fp32-cuda, bf16, fp16, not 'int3'"):
        export(str(checkpoint("flan")), tmp_path / "model", "int3")
    with pytest.raises(ValueError, match="prompt template: unknown field"):
        export(str(checkpoint("flan")), tmp_path / "model", prompt="{year}")
    with pytest.raises(ValueError, match=r"prompt template: \{abstract\} takes neither a format nor a conversion"):
        export(str(checkpoint("flan")), tmp_path / "model", prompt="{abstract!r}")
    with pytest.raises(ValueError, match="it is not UTF-8 text"):
        export(str(checkpoint("flan")), tmp_path / "model", prompt="\udcff{abstract}")
    with pytest.raises(ValueError, match="so no paper would be read"):
        export(str(checkpoint("flan")), tmp_path / "model", prompt="Ask something.")


def test_generation_defaults_come_from_the_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    settings = {
        "top_p": 0.8,
        "temperature": 0.9,
        "max_new_tokens": 33,
        "eos_token_id": [1, 7],
        "transformers_version": "4.57",
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    manifest = export(str(folder), tmp_path / "model", "fp32")
    assert manifest.generation == {"top_p": 0.8, "temperature": 0.9, "max_new_tokens": 33}
    assert manifest.tokens.eos == (1, 7)
    params = Engine.load(tmp_path / "model").params(seed=1)
    assert params == SamplingParams(top_p=0.8, temperature=0.9, max_new_tokens=33, seed=1)


def test_settings_that_mean_nothing_without_sampling(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    settings = {"do_sample": False, "temperature": 0.0, "seed": 3, "max_new_tokens": 7, "no_repeat_ngram_size": 10**400}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert export(str(folder), tmp_path / "model", "fp32").generation == {"max_new_tokens": 7}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": None, "transformers_version": "4.57.6"}, {"top_k": 0}),  # no limit
        ({"top_k": None, "transformers_version": "5.23.0"}, {}),  # not set
        ({"min_new_tokens": 150, "max_length": 512}, {"min_new_tokens": 150, "max_new_tokens": 511}),
        (
            {"max_length": 512, "max_new_tokens": 40, "min_length": 9, "min_new_tokens": 3},
            {"max_new_tokens": 40, "min_new_tokens": 3},
        ),
        ({"max_length": 2}, {"max_new_tokens": 1}),
        (
            {"max_length": 10, "min_length": 30, "do_sample": True, "top_p": 0.9},
            {"max_new_tokens": 9, "min_new_tokens": 9, "top_p": 0.9},
        ),
        (
            {"max_new_tokens": 40, "min_length": 60, "do_sample": True, "top_p": 0.9},
            {"max_new_tokens": 40, "min_new_tokens": 40, "top_p": 0.9},
        ),
        ({"max_length": 10**9}, {"max_new_tokens": 1 << 20}),
        ({"max_length": 20, "min_length": 20}, {"min_new_tokens": 19}),  # 20 is what nobody chose
        ({"max_length": "many", "min_length": 1}, {}),
        ({"do_sample": True, "top_k": 7}, {"top_k": 7, "top_p": 1.0}),  # what a file leaves out is transformers' default
        ({"do_sample": True, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": False, "top_k": 7}, {"top_k": 7}),
        ({"top_p": None}, {"top_p": 1.0}),
        ({"min_new_tokens": 150}, {"min_new_tokens": 150, "max_new_tokens": 150}),
        ({"min_new_tokens": 150, "max_new_tokens": 200}, {"min_new_tokens": 150, "max_new_tokens": 200}),
        ({"min_new_tokens": 9}, {"min_new_tokens": 9}),
    ],
)
def test_generation_settings_that_need_a_second_look(settings: dict[str, object], expected: dict[str, int]) -> None:
    assert generation_defaults(settings) == expected


@pytest.mark.parametrize(
    ("rule", "nothing", "something"),
    [
        ("num_beams", 1, 4),
        *((name, 1.0, 0.9) for name in ("typical_p", "guidance_scale", "encoder_repetition_penalty")),
        *((name, 0, 3) for name in ("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "encoder_no_repeat_ngram_size")),
        *((name, [], [5]) for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings")),
        *((name, None, 5) for name in ("forced_bos_token_id", "forced_eos_token_id", "max_time", "top_h", "dola_layers")),
        *((name, {}, {"a": 1}) for name in ("sequence_bias", "watermarking_config", "exponential_decay_length_penalty")),
    ],
)
def test_rules_that_we_do_not_have_are_told_of(rule: str, nothing: object, something: object) -> None:
    assert generation_defaults({rule: nothing}) == {}  # warnings are errors here
    with pytest.warns(UserWarning, match=rf"asks for {rule}, which ramekin has not"):
        generation_defaults({rule: something})


def test_nulls_in_a_config_are_no_settings(tmp_path: Path) -> None:
    """In a generation config they are: see above."""
    raw = {"top_k": None, "top_p": None, "transformers_version": "4.57.6", "num_beams": None}
    assert generation_defaults(read_generation(tmp_path, raw)) == {}
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_generation(tmp_path, {"top_p": 0.5}) == {}


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ({"_from_model_config": True, "transformers_version": "4.30.2", "top_p": 0.7, "min_length": 3}, True),
        ({"_from_model_config": True, "transformers_version": "5.0.0"}, False),
        ({"_from_model_config": False, "transformers_version": "4.30.2"}, False),
        ({"transformers_version": "4.30.2"}, False),
        ({"_from_model_config": True}, False),
    ],
)
def test_settings_beside_a_file_made_of_them(file: dict[str, Any], kept: bool, tmp_path: Path) -> None:
    """As transformers 4 does, which asks whether any setting in `config.json` is not the default."""
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    raw = {"top_p": 0.5, "top_k": None, "d_model": 64, "transformers_version": "4.30.2"}
    assert read_generation(tmp_path, raw) == ({name: raw[name] for name in raw if name != "top_k"} if kept else file)
    assert read_generation(tmp_path, raw | {"top_p": 1.0, "max_length": 20}) == file


def test_added_tokens_of_old(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Where tokenizers without Rust kept them before transformers 4.34."""
    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    (folder / "added_tokens.json").write_text('{"[SEP]": 500, "[CLS]": 501, "[NEW]": 100000}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "cls_token": {"content": "[CLS]"}}')
    with pytest.warns(UserWarning, match=r"'\[NEW\]' has id 100000, but the model has 512 tokens"):
        export(str(folder), tmp_path / "model", "fp32")
    tokenizer = Engine.load(tmp_path / "model").tokenizer
    ids = tokenizer.encode("We [SEP] propose [CLS]<extra_id_0>")
    assert {500, 501} < set(ids)
    assert tokenizer.decode(ids).replace(" ", "") == "We[SEP]propose"
    assert len(tokenizer.encode("<extra_id_0>")) == 2


def test_legacy_tokenizers_are_told_of(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    (folder / "tokenizer_config.json").write_text('{"legacy": false}')
    with pytest.warns(UserWarning, match="legacy: false; a text right behind a special token is read as with true"):
        export(str(folder), tmp_path / "model", "fp32")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5.24.0"}))
    export(str(folder), tmp_path / "by 5", "fp32")  # whose tokenizers have no such difference


@pytest.mark.parametrize(("said", "kept"), [({"clean_up_tokenization_spaces": True}, True), ({}, False)])
def test_whether_texts_are_cleaned_up_is_kept(
    said: dict[str, bool], kept: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert export(str(folder), tmp_path / "model", "fp32").clean_up_tokenization_spaces is kept
    engine = Engine.load(tmp_path / "model")
    assert engine.tokenizer.cleans_up is kept
    (sample,) = engine.generate("A parser .", engine.params(seed=1))
    assert sample.text == engine.tokenizer.decode(sample.token_ids)


def test_the_text_of_added_tokens(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Special ones are silent, a fine-tuner's own `[SEP]` is not; and prompts end with the tokenizer's eos."""
    import shutil

    folder = Path(shutil.copytree(checkpoint("flan"), tmp_path / "checkpoint"))
    added = [{"id": 500, "content": "[SEP]", "special": False}, {"id": 499, "content": "<extra_id_0>", "special": True}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {each["id"]: each for each in added}}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    export(str(folder), tmp_path / "model", "fp32")
    tokenizer = Engine.load(tmp_path / "model").tokenizer
    word = tokenizer.encode("We")
    assert word[-1] == 1
    assert tokenizer.decode([*word, 500, 499, *word]) == "We[SEP] We"


def test_progress_reaches_the_end(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    measured = ["measure keys, values"] if onnxruntime.__version__ in COMPACT_RUNTIMES else []
    stages = ["prepare calibration", "calibrate", "export int4", *measured, "prepare verification", "verify"]
    for variant in ("flan", "v1.0"):
        told: dict[str, list[tuple[int, int]]] = {}
        export(
            str(checkpoint(variant)),
            tmp_path / variant,
            "int4",
            checks=Checks(allow_quality_loss=True),
            progress=lambda stage, done, total, told=told: told.setdefault(stage, []).append((done, total)),  # type: ignore[misc]
        )
        assert list(told) == stages
        for stage, steps in told.items():
            done, total = sum(done for done, _ in steps), steps[0][1]
            assert len({total for _, total in steps}) == 1
            if "calibrate" in stage or "verify" in stage:  # samples may end early
                assert 0 < done <= total
            else:
                assert total <= done < 1.05 * total  # the total leaves norms and biases out


def test_progress_is_for_terminals(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ramekin", "export", str(checkpoint("flan")), str(tmp_path / "model"), "--no-verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-2].endswith("MB")
    assert "\r" not in done.stderr
    assert "%" not in done.stderr


def test_no_onnxruntime_no_golden_run(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(RuntimeWarning, match="without onnxruntime nothing is calibrated, measured or compared"):
        assert pipeline.export(str(checkpoint("flan")), tmp_path / "model", "int4").golden == {}
    for given in ("calibrate", "papers"):
        checks = Checks(**{given: EXAMPLES / "paper.json"})
        with pytest.raises(RuntimeVersionError, match="papers to calibrate or to verify with need onnxruntime"):
            pipeline.export(str(checkpoint("flan")), tmp_path / "other", "int4", checks=checks)


def test_an_onnxruntime_that_cannot_be_used(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to keep a model that nobody has compared."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    with pytest.raises(RuntimeVersionError, match=r"onnxruntime 1\.22\.1 is not supported"):
        pipeline.export(str(checkpoint("flan")), tmp_path / "model", "int4")
    monkeypatch.undo()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open')")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    with pytest.raises(RuntimeVersionError, match=r"cannot be imported \(libgomp"):
        pipeline.export(str(checkpoint("flan")), tmp_path / "model", "int4")
    assert names(tmp_path) == ["broken"]


def test_what_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a folder" / "model"
    out.mkdir(parents=True)
    check_target(out, force=False)
    monkeypatch.chdir(out)
    with pytest.raises(FileExistsError, match="is the current folder"):
        check_target(out, force=True)
    monkeypatch.chdir(tmp_path)
    read = Path.read_bytes
    other = b"31 28 0:27 / /elsewhere\xe2\x80\xa8 rw"
    for found in (other + b"\n", b"a line that is none\n\n", None):

        def mountinfo(path: Path, found: bytes | None = found) -> bytes:
            if path.name != "mountinfo":
                return read(path)
            if found is None:
                raise FileNotFoundError
            return found

        monkeypatch.setattr(Path, "read_bytes", mountinfo)
        check_target(out, force=False)
        with monkeypatch.context() as on_another_disk:
            on_another_disk.setattr("os.path.ismount", lambda path: path == out)
            with pytest.raises(FileExistsError, match="something is mounted there"):
                check_target(out, force=False)
    odd = tmp_path / "a b\tc\\040d"
    odd.mkdir()
    escaped = os.fsencode(odd).replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011")
    monkeypatch.setattr(
        Path, "read_bytes", lambda _: other + b"\n32 28 0:27 / " + escaped + b" rw,relatime - ext4 /dev/vda rw\n"
    )
    check_target(out, force=False)
    with pytest.raises(FileExistsError, match="something is mounted there"):
        check_target(odd, force=False)


def test_leftovers_are_told_of(tmp_path: Path) -> None:
    (tmp_path / ".model.abc.partial").mkdir()
    (tmp_path / ".model.abc.other").mkdir()
    (tmp_path / ".models.abc.scratch").mkdir()
    with pytest.warns(RuntimeWarning) as told, whole_or_not_at_all(tmp_path / "model", force=False) as folder:
        (folder / "x").write_text("")
    assert [str(each.message).partition(":")[0] for each in told] == [str(tmp_path / ".model.abc.partial")]
    assert (tmp_path / "model" / "x").exists()


def test_a_signal_while_it_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    remove = shutil.rmtree

    def interrupted(folder: Path, **options: object) -> None:
        removed.append(folder)
        if len(removed) == 1:
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr("ramekin_export.target.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path / "model") as folder:
        (folder / "weights.bin").write_text("x")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_empty(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """As of a variable that is not set: that is not the folder one is in."""
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(checkpoint("flan")), ""])
    assert stopped.value.code == 2
    assert "Invalid value for 'OUT': it is empty" in capsys.readouterr().err


def test_graphs_are_ordinary_onnx(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import onnx

    for precision in ("fp32", "int8", "int4"):
        files = export(str(checkpoint("flan")), tmp_path / precision, precision, checks=Checks(verify=False)).files
        for graph in (name for name in files if name.endswith(".onnx")):
            path = tmp_path / precision / graph
            model = onnx.load(path, load_external_data=False)
            assert model.opset_import[0].version == (21 if "compact" in graph else 18)
            for node in model.graph.node:  # onnxruntime's own, which it keeps among those of ONNX
                if node.op_type == "SimplifiedLayerNormalization":
                    assert precision == "int8"
                    assert graph.startswith("decoder")
                    node.domain = "com.microsoft"
            onnx.save(model, path)
            onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize(("kept_in", "precision"), [(TINY_MODEL, "fp32"), (CUDA_MODEL, "fp32-cuda"), (INT8_MODEL, "int8")])
def test_the_runtimes_tiny_models_are_up_to_date(kept_in: Path, precision: str, tmp_path: Path) -> None:
    """`python -m tests.make_runtime_model` makes them anew."""
    from benchmarks.random_checkpoint import write_checkpoint

    folder = write_checkpoint(tmp_path / "checkpoint", TINY, train_tokenizer(tmp_path / "spiece.model"))
    fresh = export(str(folder), tmp_path / "model", precision, checks=Checks(verify=False))
    kept = Manifest.load(kept_in)
    assert (fresh.format_version, fresh.dims, fresh.recipe) == (kept.format_version, kept.dims, kept.recipe)
    for graph in ("encoder.onnx", "decoder.onnx"):  # the compact ones hold what was measured
        assert (tmp_path / "model" / graph).read_bytes() == (kept_in / graph).read_bytes()
