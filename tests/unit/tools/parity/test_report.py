"""The report of parity: verdict, exit code, JSON and page, and what the command line refuses."""

from pathlib import Path

import msgspec
import pytest
from packaging.version import Version
from typer.testing import CliRunner

from bi_patch import installed
from bi_patch.errors import SettingError, UnsupportedDevice
from bi_patch.tools.cli import app, parity, status  # noqa: F401  two commands, so that each has its name
from bi_patch.tools.parity import report as parity_report
from bi_patch.tools.parity import run
from bi_patch.tools.parity.plan import LINES, Plan, Run, Step
from bi_patch.tools.parity.report import ParityReport
from bi_patch.tools.parity.run import measure
from bi_patch.tools.verify import page, terminal
from bi_patch.tools.verify import report as verify_report
from bi_patch.tools.verify.answers import Difference
from bi_patch.tools.verify.report import FAILED, Axis


def made(differing=0, failed=False):
    axes = [Axis(line.name, line.about) for line in LINES]
    for axis in axes:
        axis.count("sample 0", Difference(20, differing, first="sample 0: logprob" if differing else ""))
        axis.settle(FAILED if failed else "", "WeightsNotSynced: no" if failed else "")
    found = ParityReport("models/tiny", "armed", "parity", "2026-11-28", axes, plan=Plan(steps=1))
    found.runs = [
        Run(24, 64, [Step(0.5, 1.0, 0.0, 20, 0)], "ab" * 32),
        Run(5, 7, [Step(0.5, 1.0, 0.0, 20, 0)], "ab" * 32),
    ]
    found.conclude()
    return found


def test_equal_bits_end_with_0_and_name_the_runs():
    found = made()
    assert found.exit_code == 0 and "agree bitwise in all 220" in found.verdict[0]
    assert "KL exactly 0" in found.verdict[1] and "abab" in found.verdict[1]


def test_a_difference_ends_with_1_and_a_failed_line_with_2():
    assert made(differing=1).exit_code == 1 and "do NOT agree" in made(differing=1).verdict[0]
    found = made(failed=True)
    assert found.exit_code == 2 and "WeightsNotSynced" in found.verdict[-1]


def test_json_and_page_hold_the_runs(tmp_path):
    found = made()
    verify_report.write(found, tmp_path / "out.json")
    assert msgspec.to_builtins(parity_report.read(tmp_path / "out.json")) == msgspec.to_builtins(found)
    shown = page.page(found, parity_report.steps(found))
    assert "Do trainer and sampler agree? tiny" in shown and "SHA-256 abab" in shown
    assert "GRPO rerun" in terminal.plain(found)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--mode", "upstream"], "use armed or stock"),
        (["--micro", "24"], "not two numbers"),
        (["--seats", "0,3"], "not two numbers"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    done = CliRunner().invoke(app, ["parity", *arguments])
    assert isinstance(done.exception, SettingError) and said in str(done.exception)


def test_a_device_without_a_trainer_is_named_before_an_engine_starts(monkeypatch):
    monkeypatch.setattr(installed, "find", lambda: installed.Installed(Path(), Version("0.23.0"), "ascend", "vllm"))
    done = CliRunner().invoke(app, ["parity", "no-such-model"])
    assert isinstance(done.exception, UnsupportedDevice) and "ascend" in str(done.exception)


def test_on_a_gpu_the_sampler_leaves_memory_to_the_trainer(monkeypatch):
    monkeypatch.setattr(installed, "find", lambda: installed.Installed(Path(), Version("0.33.0"), "cuda", "vllm"))
    assert run.shared()["gpu_memory_utilization"] < 0.5


def test_an_unknown_line_is_named():
    with pytest.raises(SettingError, match="no line 'alon'"):
        measure(None, Plan(), only=["alon"])


class Broken:
    """A system whose process does not start."""

    name, mode, options = "models/tiny", "armed", None

    def start(self, options, kind):
        raise SettingError("no engine here")


def test_a_process_that_does_not_start_ends_with_2_and_the_reason():
    found = measure(Broken(), Plan())
    assert found.exit_code == 2 and "no engine here" in " ".join(found.verdict)


def test_a_plan_of_one_run_reaches_the_child():
    plan = Plan(steps=200, micro=(24,), seats=(64,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan) == plan
