"""The command line of verify: what it refuses, by name, before any engine starts."""

import pytest
from typer.testing import CliRunner

from bi_patch.cli import app, status, verify  # noqa: F401  two commands, so that each has its name
from bi_patch.demo.models import ModelMissing
from bi_patch.errors import BiPatchError, SettingError
from bi_patch.verify import levels
from bi_patch.verify.local import local


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments])


@pytest.mark.parametrize("arguments, said", [
    (["--quick", "--full"], "choose one"),
    (["--mode", "fast"], "armed, upstream or stock"),
    (["--url", "http://x", "--logits"], "runs already"),
    (["tiny-qwen3", "--engine-arg", "max_model_len"], "KEY=VALUE"),
])  # fmt: skip
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


def test_engine_arguments_are_json_where_they_can_be():
    made = verify._arguments(["max-model-len=4096", "quantization=fp8", 'rope_scaling={"factor": 2}', "flag=true"])
    assert made == {"max_model_len": 4096, "quantization": "fp8", "rope_scaling": {"factor": 2}, "flag": True}


def test_a_server_that_is_down_is_a_report_with_exit_code_2(tmp_path):
    done = run("--url", "http://127.0.0.1:9", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    assert done.exit_code == 2 and "no server answers" in done.output.replace("\n", " ")
    assert (tmp_path / "r.json").is_file() and (tmp_path / "r.html").is_file()
