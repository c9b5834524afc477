"""The demo's view of two verify reports: the table, the texts that changed, the verdict and the picture."""

import io
import json

import msgspec
import pytest
import typer

from bi_patch.errors import SettingError
from bi_patch.tools.cli.demo import demo
from bi_patch.tools.demo import level, picture, run, show, texts
from bi_patch.tools.demo.run import Side
from bi_patch.tools.verify import report
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.report import Axis, Report

SIZE, SEEDED = AXES = ("batch size", "seeded sampling")
REQUEST = Request((1, 2))
BESIDE = Scenario([REQUEST.but(prompt=(9,)), REQUEST], 1)


@pytest.fixture
def varied(answer):
    return msgspec.structs.replace(answer, tokens=[5, 6, 8], logprobs=[-0.5, -1.25, -2.5], text=" the cat <ran>")


def case(expected, got, axis=SIZE, label="bread in a batch of 2"):
    return Case.of(axis, label, Scenario.alone(REQUEST), BESIDE, expected, got)


def side(mode, *cases, fails=(), **changes):
    """A side whose report holds these pairs. fails: axes that ended in an error, with the error's message."""
    axes = [Axis(name, "about it") for name in AXES]
    for axis in axes:
        for one in (c for c in cases if c.axis == axis.name):
            axis.add(one)
        reason = dict(fails).get(axis.name, "")
        axis.settle(report.FAILED if reason else "" if axis.pairs else report.LEFT_OUT, reason)
    made = Report("a model", mode, "demo", "2026-01-01", axes, **changes)
    made.conclude()
    return Side(made, cases)


@pytest.fixture
def both(answer, varied):
    """A stock side that differs in one of two pairs, and an armed side that does not differ."""
    equal = case(answer, answer)
    return side("stock", case(answer, varied), equal), side("armed", equal, equal)


def render(thing, width=80):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start)).split()


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(stock, armed): `bi-patch demo` with these sides writes out/a.json and pages/a.html; its exit code."""

    def invoke(stock, armed, model=tmp_path):
        (tmp_path / "config.json").write_text('{"architectures": ["A"]}')
        (tmp_path / "tokenizer.json").write_text("{}")
        monkeypatch.setattr(run, "would_arm", lambda: None)
        monkeypatch.setattr(run, "side", lambda mode, *_, **__: {"stock": stock, "armed": armed}[mode])
        monkeypatch.setattr(level, "axes", lambda quick: AXES)
        with pytest.raises(typer.Exit) as ended:
            demo(str(model), "float32", False, tmp_path / "out" / "a.json", tmp_path / "pages" / "a.html")
        return ended.value.exit_code

    return invoke


def test_the_command_shows_both_sides_and_writes_both_reports(both, command, tmp_path, capsys):
    assert command(*both) == report.INVARIANT
    said = " ".join(capsys.readouterr().out.split())
    for words in ("Stock vLLM", "Armed vLLM", "2 of 10", "after an hour", "NOT batch-invariant", "bitwise invariant"):
        assert words in said
    held = json.loads((tmp_path / "out" / "a.json").read_text())
    assert {mode: report.from_json(value).differing for mode, value in held.items()} == {"stock": 2, "armed": 0}
    assert "<svg" in (tmp_path / "pages" / "a.html").read_text()


def test_the_exit_code_is_that_of_the_armed_side(answer, varied, command):
    equal, differing = side("armed", case(answer, answer)), side("armed", case(answer, varied))
    assert command(side("stock", fails={SIZE: "no"}), equal) == report.INVARIANT
    assert command(side("stock", case(answer, answer)), differing) == report.DIFFERS
    for armed in (
        side("armed", case(answer, answer), fails={SEEDED: "it died"}),
        side("armed", case(answer, answer), open_seams=("attention.cpu_forward",)),
        side("armed", stopped="SeamOpen: attention.cpu_forward"),
    ):
        assert command(side("stock", case(answer, varied)), armed) == report.UNCHECKED


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(SettingError, match="no tokenizer"):
        demo(str(bare))


def test_the_table_shows_both_reports_side_by_side_and_fits_a_terminal(both):
    text = render(show.table(AXES, *both))
    assert line(text, SIZE) == ["batch", "size", "2", "of", "10", "1", "2.5e-01", "0", "of", "10", "0", "0"]
    assert "stock" in text and "armed" in text and "…" not in text


def test_large_counts_fit_a_terminal(answer, varied, both):
    stock, armed = both
    for made in (stock, armed):
        axis = made.axis(SIZE)
        axis.name = "position and order"  # the longest of the demo's names
        axis.compared, axis.differing, axis.tokens_changed = 12345, 11234, 9876
    text = render(show.table(("position and order",), stock, armed))
    assert line(text, "position").count("11234") == 2 and "…" not in text


def test_a_stopped_stock_engine_is_said_and_is_no_failure_of_the_armed_one(answer, varied):
    why = "EngineFailed: the stock engine failed at 'generate': RuntimeError: no offset its output is in /tmp/a.log"
    sampled = case(answer, answer, SEEDED)
    stock = side("stock", case(answer, varied), sampled, fails={SEEDED: why})
    armed = side("armed", case(answer, answer), sampled, sampled)
    assert armed.report.exit_code == report.INVARIANT
    assert show.stopped(SEEDED, stock, stock, armed) and not show.stopped(SEEDED, armed, stock, armed)
    text = render(show.table(AXES, stock, armed))
    assert "then stopped" in text
    said = " ".join(show.verdict(AXES, stock, armed))
    assert (
        "It stopped early at seeded sampling: the stock engine failed at 'generate': RuntimeError: no offset." in said
    )
    assert "/tmp" not in said
    assert picture.squares(AXES, stock, armed).count("the engine stopped") == 1


def test_an_axis_without_any_pair_says_stopped(answer):
    stock, armed = side("stock", fails={SIZE: "no"}), side("armed", case(answer, answer))
    assert line(render(show.table((SIZE,), stock, armed)), SIZE)[:3] == ["batch", "size", "stopped"]


def test_an_engine_that_did_not_start_is_said(answer):
    stock = side(
        "stock", stopped="EngineFailed: the stock engine failed at 'start': ValueError: no\nits output is in x"
    )
    said = show.verdict(AXES, stock, side("armed", case(answer, answer)))
    assert said[:2] == [
        "Incomplete: the stock engine could not be checked: nothing was compared.",
        "It stopped early: the stock engine failed at 'start': ValueError: no.",
    ]
    armed = side("armed", stopped="SeamOpen: attention.cpu_forward is open")
    assert armed.report.exit_code == report.UNCHECKED
    assert "SeamOpen" in " ".join(show.verdict(AXES, stock, armed))


def test_the_verdict_tells_both_engines_apart(both):
    stock, armed = show.verdict(AXES, *both)
    assert "stock engine is NOT batch-invariant: 2 of 10 positions differ" in stock
    assert "armed engine was bitwise invariant in all 10 compared positions" in armed


def test_variance_with_all_seams_closed_asks_for_a_report(answer, varied):
    stock, differing = side("stock", case(answer, answer)), case(answer, varied)
    assert "defect of bi_patch" in show.verdict(AXES, stock, side("armed", differing))[-1]
    opened = side("armed", differing, open_seams=("attention.cpu_forward",))
    said = " ".join(show.verdict(AXES, stock, opened))
    assert "attention.cpu_forward" in said and "defect" not in said


def test_a_text_that_changed_shows_the_prompt_and_both_texts(both):
    stock, armed = both
    (found,) = texts.divergences(stock.cases)
    assert found.where == "batch size: bread in a batch of 2" and found.prompt.endswith("after an hour")
    assert texts.words(found.alone)[found.word] == " sat"
    shown = render(show.texts(stock))
    assert "after an hour" in shown and " sat" in shown and "<ran>" in shown
    assert max(map(len, render(show.texts(stock), width=9999).splitlines())) < 80
    assert show.texts(armed) is None


def test_the_same_text_from_other_tokens_is_no_divergence(answer, varied):
    assert not texts.divergences([case(answer, msgspec.structs.replace(varied, text=answer.text))])


@pytest.mark.parametrize(
    ("a", "b", "index"), [("a b c", "a b d", 2), ("a b", "a b c", 2), ("x", "y", 0), ("a  b", "a b", 1)]
)
def test_first_word(a, b, index):
    assert texts.first_word(a, b) == index


def test_pick_takes_each_pair_once_and_every_prompt_first():
    def made(prompt, beside, word):
        return texts.Divergence(prompt, "batch", "a b c", beside, word)

    found = [made("p", "a b x", 2), made("p", "a x", 1), made("p", "a x", 1), made("q", "a b y", 2)]
    assert [(d.prompt, d.beside) for d in texts.pick(found, 9)] == [("p", "a x"), ("q", "a b y"), ("p", "a b x")]
    assert len(texts.pick(found, 2)) == 2


def test_greedy_texts_come_before_sampled_ones():
    early, late = texts.Divergence("p", "batch", "a", "b", 0, sampled=True), texts.Divergence("q", "batch", "a", "b", 9)
    assert texts.pick([early, late], 2) == [late, early]


def test_a_prompt_is_shown_by_its_end():
    assert show.ending("one two three", 2) == "… two three"
    assert show.ending("one two", 2) == "one two"


def test_the_picture_stands_alone_and_escapes(both):
    page = picture.page("Title & more", ["Said."], AXES, *both)
    assert page.count("<svg") == 1 and page.count("<rect") == 4 and page.count("<circle") == 1
    assert "Title &amp; more" in page and "<mark> &lt;ran&gt;</mark>" in page
    assert "2 of 5 positions differ" in page and "0 of 5 positions differ" in page
    assert "<script" not in page and "src=" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_colours_tell_equal_from_changed_and_from_missing(answer, varied):
    few = case(answer, msgspec.structs.replace(answer, logprobs=[-0.5, -1.5, -2.25]))
    equal, many = case(answer, answer), case(answer, varied)
    assert len({picture.colour(c) for c in (equal, few, many, None)}) == 4
