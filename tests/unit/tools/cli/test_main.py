"""The program `bi-patch`: help, version, and usage errors."""

import importlib
import pkgutil

import pytest

from bi_patch.tools import cli

MODULES = [importlib.import_module(f"{cli.__name__}.{m.name}") for m in pkgutil.iter_modules(cli.__path__)]
COMMANDS = sorted(c.name or c.callback.__name__.replace("_", "-") for c in cli.app.registered_commands)


def test_without_arguments_help_has_one_whole_line_a_command(bi_patch):
    done = bi_patch()
    assert done.returncode == 0 and not done.stderr
    listed = done.stdout.split("Commands:\n")[1].splitlines()
    assert sorted(line.split()[0] for line in listed) == COMMANDS and len(COMMANDS) >= len(MODULES)
    assert {"ascend-check", "certify", "run", "status", "verify"} <= set(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("..") and len(line) <= 80 for line in listed), listed
    assert bi_patch("--help").stdout == done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_plain_text(bi_patch, command):
    done = bi_patch(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: bi-patch {command}")


def test_the_version_comes_with_the_vllm_that_is_found_and_not_imported(bi_patch, fake_vllm, tmp_path):
    path = fake_vllm("0.32.0+cpu")
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('imported')")
    done = bi_patch("--version", PYTHONPATH=path)
    from bi_patch import __version__

    assert (done.returncode, done.stdout) == (0, f"bi_patch {__version__}\nvLLM 0.32.0 on cpu\n"), done.stderr


def test_a_vllm_that_is_refused_does_not_hide_the_version(bi_patch, fake_vllm):
    done = bi_patch("--version", PYTHONPATH=fake_vllm("no-number"))
    first, second = done.stdout.splitlines()
    assert first.startswith("bi_patch ") and done.returncode == 0
    assert second.startswith("vLLM: UnsupportedRelease: vLLM version 'no-number'")
    done = bi_patch("--version", BI_PATCH_PLATFORM="tpu")
    assert done.returncode == 0 and "vLLM: SettingError: BI_PATCH_PLATFORM='tpu'" in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["stauts"], "UsageError: No such command 'stauts'."),
        (["status", "--bogus"], "--bogus. See `bi-patch status --help`"),
        (["ascend-check", "--rows", "0"], "'--rows'"),
        (["run"], "SettingError: no command is given"),
        (["status", "--every-platform"], "SettingError: --every-platform needs --all"),
        (["status", "--all", "--json"], "SettingError: NAME, --all and --json: choose one"),
    ],
)
def test_a_wrong_use_is_one_paragraph_with_the_errors_name(bi_patch, arguments, said):
    done = bi_patch(*arguments)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert said in line and line.split(":")[0].isidentifier()


def test_without_torch_npu_the_ascend_check_names_what_is_missing(bi_patch):
    done = bi_patch("ascend-check", "--rows", "3")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and line.startswith(
        "MissingDependency: torch-npu is not installed"
    )


def test_check_prints_plain_lines_into_a_pipe(bi_patch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = '0.32.0'\n")
    done = bi_patch("check", str(tmp_path))
    assert done.returncode == 1 and not done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("vLLM 0.32.0 ") and "problems" in first and len(first) > 80
