"""The program itself: help, version, and errors of use."""

import pytest

COMMANDS = ("ascend-check", "bench", "certify", "check", "demo", "run", "status", "verify")


def test_without_arguments_help_has_one_whole_line_a_command(bi_patch):
    done = bi_patch()
    assert done.returncode == 0 and not done.stderr
    listed = done.stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
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
        (["status", "--every-platform"], "SettingError: --every-platform goes with --all"),
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


def test_check_prints_plain_rows_into_a_pipe(bi_patch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = '0.32.0'\n")
    done = bi_patch("check", str(tmp_path))
    assert done.returncode == 1 and not done.stderr
    title, header, row = done.stdout.splitlines()[:3]
    assert title.strip() == "Patch series against vLLM" and header.split()[:2] == ["vLLM", "source"]
    assert row.startswith("0.32.0") and "problems: " in row
