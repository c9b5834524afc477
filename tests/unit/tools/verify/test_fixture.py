"""The pytest fixture: an unknown name fails the test with one line, before any engine starts."""

import os
from pathlib import Path

import bi_patch_pytest

pytest_plugins = "pytester"
SOURCES = str(Path(bi_patch_pytest.__file__).parent)


WORDS = {
    'axes=["batch sise"]': "NoSuchAxis: there is no axis 'batch sise'; the axes are batch size, *",
    'axes="batch sise"': "NoSuchAxis: there is no axis 'batch sise'; *",
    'level="fast"': "SettingError: there is no level 'fast'; the levels are quick, default, full",
    'mode="amred"': "SettingError: there is no mode 'amred'; *",
}


def test_a_word_that_does_not_exist_fails_in_one_line(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")]))
    made = ""
    for number, given in enumerate(WORDS):
        url = "" if "mode" in given else 'url="http://127.0.0.1:9", '
        made += f"def test_typo_{number}(verify_invariance):\n    verify_invariance({url}{given})\n\n\n"
    pytester.makepyfile(made)
    plugin = () if _installed() else ("-p", "bi_patch_pytest")
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", *plugin, timeout=900)
    done.assert_outcomes(failed=len(WORDS))
    lines = [line for number, said in enumerate(WORDS.values()) for line in (f"*test_typo_{number}*", said)]
    done.stdout.fnmatch_lines(["*FAILURES*", *lines, "*short test summary*"], consecutive=True)


def _installed() -> bool:
    """Whether pytest finds the plugin through the installed entry point."""
    from importlib.metadata import entry_points

    return any(found.value == "bi_patch_pytest" for found in entry_points(group="pytest11"))
