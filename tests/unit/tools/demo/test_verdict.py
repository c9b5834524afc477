"""From answers to cells, divergences, words and the exit code."""

import io

import msgspec
import pytest

from bi_patch.tools.demo import picture, show, verdict
from bi_patch.tools.demo.cases import Round, Slot
from bi_patch.tools.verify.answers import Request

REQUEST = Request((1, 2))
ALONE = Round("", "alone", (Slot(REQUEST, 0),))
BATCH = Round("batch of 2", "a pair", (Slot(REQUEST), Slot(REQUEST, 0)))
NAMES, COLUMNS = ("cat",), ("batch of 2",)


def side(mode, answer, beside=None, **changes):
    judge = verdict.Judge(mode, NAMES)
    judge.take(ALONE, [answer])
    judge.take(BATCH, [answer, beside or answer])
    return msgspec.structs.replace(judge.side, **changes)


@pytest.fixture
def varied(answer):
    return msgspec.structs.replace(answer, tokens=[5, 6, 8], logprobs=[-0.5, -1.25, -2.5], text=" the cat <ran>")


def test_equal_sides_are_invariant(answer):
    armed = side("armed", answer)
    assert (armed.compared, armed.differing, armed.divergences) == (5, 0, [])
    assert verdict.exit_code(armed) == 0
    assert "all 5 positions were bitwise the same" in verdict.sentences(armed, armed)[1]


def test_a_difference_is_counted_and_shown(answer, varied):
    stock = side("stock", answer, varied)
    (cell,) = stock.cells
    assert (cell.prompt, cell.batch) == ("cat", "batch of 2")
    assert (cell.compared, cell.differing, cell.tokens_changed, cell.largest) == (5, 2, 1, 0.25)
    (divergence,) = stock.divergences
    assert verdict.words(divergence.alone)[divergence.word] == " sat"
    assert verdict.exit_code(stock) == 1


def test_stock_without_differences_is_said_and_no_error(answer):
    stock, armed = side("stock", answer), side("armed", answer)
    assert verdict.sentences(stock, armed)[0].startswith("Stock vLLM showed no difference on this machine")
    assert verdict.exit_code(armed) == 0


def test_an_open_seam_is_named_and_proves_nothing(answer, varied):
    armed = side("armed", answer, open_seams=["attention.cpu_forward"])
    assert verdict.exit_code(armed) == 2
    assert verdict.exit_code(side("armed", answer, varied, open_seams=["attention.cpu_forward"])) == 1
    assert any("attention.cpu_forward" in s for s in verdict.sentences(armed, armed))


def test_variance_with_all_seams_closed_asks_for_a_report(answer, varied):
    armed = side("armed", answer, varied)
    said = " ".join(verdict.sentences(side("stock", answer), armed))
    assert "NOT batch-invariant" in said and "defect of bi_patch" in said


def test_nothing_compared_is_not_a_pass():
    assert verdict.exit_code(verdict.Side("armed")) == 2


def test_a_stop_leaves_its_reason(answer):
    judge = verdict.Judge("stock", NAMES)
    judge.take(ALONE, [answer])
    judge.stop([BATCH], "no offset")
    assert judge.side.cells[0].stopped == "no offset" and judge.side.compared == 0
    assert "stopped with an error (no offset)" in verdict.sentences(judge.side, side("armed", answer))[0]


@pytest.mark.parametrize(
    ("a", "b", "index"), [("a b c", "a b d", 2), ("a b", "a b c", 2), ("x", "y", 0), ("a  b", "a b", 1)]
)
def test_first_word(a, b, index):
    assert verdict.first_word(a, b) == index


def test_pick_takes_each_pair_once_and_every_prompt_first():
    def made(prompt, beside, word):
        return verdict.Divergence(prompt, "batch", "a b c", beside, word)

    found = [made("p", "a b x", 2), made("p", "a x", 1), made("p", "a x", 1), made("q", "a b y", 2)]
    assert [(d.prompt, d.beside) for d in show.pick(found, 9)] == [("p", "a x"), ("q", "a b y"), ("p", "a b x")]
    assert len(show.pick(found, 2)) == 2


def render(thing, width=80):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_the_table_fits_a_terminal(answer, varied):
    stock, armed = side("stock", answer, varied), side("armed", answer)
    text = render(show.table(NAMES, COLUMNS, stock, armed))
    assert "batch of 2" in text and "2.5e-01" in text and "…" not in text
    line = next(row for row in text.splitlines() if "batch of 2" in row)
    assert line.split() == ["cat", "batch", "of", "2", "5", "1", "2", "2.5e-01", "0", "0", "0"]


def test_the_divergence_shows_both_texts(answer, varied):
    text = render(show.divergences(side("stock", answer, varied)))
    assert "sat" in text and "<ran>" in text
    assert show.divergences(side("armed", answer)) is None


def test_the_picture_stands_alone_and_escapes(answer, varied):
    stock, armed = side("stock", answer, varied), side("armed", answer)
    page = picture.page("Title & more", ["Said."], NAMES, COLUMNS, stock, armed)
    assert page.count("<svg") == 2 and "2 / 5" in page and "0 / 5" in page
    assert "Title &amp; more" in page and "<mark> &lt;ran&gt;</mark>" in page
    assert "<script" not in page and "src=" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_colours_tell_equal_from_changed():
    equal, few, many = (verdict.Cell("p", "b", 100, n) for n in (0, 1, 100))
    assert len({picture.colour(c) for c in (equal, few, many, verdict.Cell("p", "b", stopped="x"))}) == 4
