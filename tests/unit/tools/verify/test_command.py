"""The command line of verify refuses wrong arguments by name, before any engine starts."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bi_patch.errors import BiPatchError, SettingError
from bi_patch.tools.cli import app, status, verify  # noqa: F401  two commands, so that each has its name
from bi_patch.tools.models.recipes import ModelMissing
from bi_patch.tools.verify import levels
from bi_patch.tools.verify.child import ChildEngine
from bi_patch.tools.verify.local import local


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--quick", "--full"], "choose one"),
        (["--mode", "fast"], "armed, upstream, stock"),
        (["--url", "http://x", "--logits"], "measures a running server: leave out --logits"),
        (
            ["--url", "http://x", "--dtype", "bfloat16", "--mode", "armed", "--eager"],
            "--mode, --dtype, --eager or --com",
        ),
        (["tiny-qwen3", "--clients", "8"], "without --url, verify asks no server: leave out --clients"),
        (["tiny-qwen3", "--json", "."], "is a folder"),
        (["tiny-qwen3", "--html", "/proc/nowhere/page.html"], "cannot be made"),
        (["tiny-qwen3", "--engine-arg", "max_model_len"], "KEY=VALUE"),
    ],
)
def test_contradictions_are_named(arguments, said):
    done = run(*arguments)
    assert isinstance(done.exception, SettingError) and said in str(done.exception)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    for given in (tmp_path, tmp_path / "nowhere"):
        done = run(str(given))
        assert isinstance(done.exception, ModelMissing) and str(given) in str(done.exception)


def test_a_folder_without_weights_asks_for_a_seed(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 700}')
    with pytest.raises(BiPatchError, match="--random-weights"):
        local(str(tmp_path), levels.QUICK)
    made = local(str(tmp_path), levels.QUICK, random_weights=3, engine_args={"max_num_seqs": 8, "seed": 5}).options
    assert (made.max_model_len, made.max_num_seqs, made.tokenizer, made.random_weights) == (700, 8, False, 3)
    assert made.extra == {"seed": 5}


def test_a_mode_or_a_level_that_does_not_exist_is_named():
    with pytest.raises(SettingError, match="armed, upstream, stock"):
        local("tiny-qwen3", levels.QUICK, mode="amred")
    with pytest.raises(SettingError, match="armed, upstream, stock"):
        ChildEngine("amred", None)


def test_a_file_that_cannot_be_written_costs_no_other(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    console = Console(record=True, width=200)
    assert not verify._keep(console, "Report", tmp_path / "r.json", full)
    assert verify._keep(console, "Page", tmp_path / "p.html", lambda path: path.write_text("page"))
    assert "No space left" in console.export_text() and (tmp_path / "p.html").read_text() == "page"


def test_engine_arguments_are_json_where_they_can_be():
    made = verify._arguments(["max-model-len=4096", "quantization=fp8", 'rope_scaling={"factor": 2}', "flag=true"])
    assert made == {"max_model_len": 4096, "quantization": "fp8", "rope_scaling": {"factor": 2}, "flag": True}


def test_a_server_that_is_down_is_a_report_with_exit_code_2(tmp_path):
    done = run("--url", "http://127.0.0.1:9", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    assert done.exit_code == 2 and "no server answers" in done.output.replace("\n", " ")
    assert (tmp_path / "r.json").is_file() and (tmp_path / "r.html").is_file()


@pytest.mark.parametrize(
    "flag, level", [("--quick", levels.QUICK), ("--logits", levels.DEFAULT), ("--full", levels.FULL)]
)
def test_a_run_states_its_expected_time(flag, level, tmp_path, monkeypatch):
    monkeypatch.setattr("bi_patch.tools.verify.measure.verify", lambda *_, **__: 1 / 0)  # before an engine starts
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 700}')
    done = run(str(tmp_path), flag, "--random-weights", "3")
    assert isinstance(done.exception, ZeroDivisionError)
    assert level.expected and f"Expected time: {level.expected}" in done.output
