"""From answers to a verdict: differences per prompt and batch, divergent texts, words and exit code. No engine here."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from bi_patch.tools.demo.cases import PROMPT, Round
from bi_patch.tools.verify.answers import Answer, Difference, compare
from bi_patch.tools.verify.report import DIFFERS, INVARIANT, UNCHECKED


class Cell(msgspec.Struct):
    """One prompt in one kind of batch, greedy and prompt logprobs together. stopped: why the engine stopped there."""

    prompt: str
    batch: str
    compared: int = 0
    differing: int = 0
    tokens_changed: int = 0
    largest: float = 0.0
    first: str = ""
    stopped: str = ""

    def add(self, difference: Difference) -> None:
        self.compared += difference.compared
        self.differing += difference.differing
        self.tokens_changed += difference.tokens_changed
        self.largest = max(self.largest, difference.largest)
        self.first = self.first or difference.first


class Divergence(msgspec.Struct):
    """A continuation that changed: both texts, and the index of the first word (see words()) that differs."""

    prompt: str
    batch: str
    alone: str
    beside: str
    word: int


class Side(msgspec.Struct):
    """One engine's outcome. cells in the order of the rounds; open_seams: required seams that were open."""

    mode: str
    cells: list[Cell] = []
    divergences: list[Divergence] = []
    open_seams: list[str] = []
    stopped: str = ""
    cached_tokens: int = 0
    seconds: float = 0.0

    @property
    def compared(self) -> int:
        return sum(c.compared for c in self.cells)

    @property
    def differing(self) -> int:
        return sum(c.differing for c in self.cells)

    @property
    def tokens_changed(self) -> int:
        return sum(c.tokens_changed for c in self.cells)

    @property
    def largest(self) -> float:
        return max((c.largest for c in self.cells), default=0.0)

    def cell(self, prompt: str, batch: str) -> Cell:
        """The cell of that prompt and batch, made when it is not there."""
        for cell in self.cells:
            if (cell.prompt, cell.batch) == (prompt, batch):
                return cell
        self.cells.append(Cell(prompt, batch))
        return self.cells[-1]


class Judge:
    """Collects the rounds of one engine in order: references are kept, everything else is compared with them."""

    def __init__(self, mode: str, names: tuple[str, ...]) -> None:
        self.side = Side(mode)
        self._names = names
        self._alone: dict[tuple[int, str], Answer] = {}

    def take(self, done: Round, answers: list[Answer]) -> Difference:
        """The answers of one round, in the order of its slots; returns the round's differences."""
        total = Difference()
        for slot, answer in zip(done.slots, answers, strict=True):
            if slot.subject is None:
                continue
            key = (slot.subject, slot.kind)
            if done.is_reference:
                self._alone[key] = answer
                continue
            name = self._names[slot.subject]
            difference = compare(self._alone[key], answer, f"{name}, {done.column}")
            self.side.cell(name, done.column).add(difference)
            total += difference
            if slot.kind != PROMPT and self._alone[key].tokens != answer.tokens:
                self._diverged(name, done.column, self._alone[key].text, answer.text)
        return total

    def stop(self, left: Iterable[Round], why: str) -> None:
        """The engine stopped: the rounds that are left get no numbers, but the reason."""
        self.side.stopped = why
        for undone in left:
            for slot in undone.slots:
                if slot.subject is not None and not undone.is_reference:
                    self.side.cell(self._names[slot.subject], undone.column).stopped = why

    def _diverged(self, name: str, batch: str, alone: str, beside: str) -> None:
        if alone != beside:
            self.side.divergences.append(Divergence(name, batch, alone, beside, first_word(alone, beside)))


def words(text: str) -> list[str]:
    """A text cut into words, each with the white space before it."""
    return re.findall(r"\s*\S+", text)


def first_word(a: str, b: str) -> int:
    """The index of the first of words(a) that words(b) does not have there."""
    left, right = words(a), words(b)
    for index, (x, y) in enumerate(zip(left, right)):
        if x != y:
            return index
    return min(len(left), len(right))


def exit_code(armed: Side) -> int:
    """0: armed and bitwise invariant. 1: a position differed. 2: it could not be checked, or a seam was open."""
    if armed.differing:
        return DIFFERS
    return INVARIANT if armed.compared and not armed.stopped and not armed.open_seams else UNCHECKED


def sentences(stock: Side, armed: Side) -> list[str]:
    """The verdict in plain words: one sentence on stock, one or two on armed."""
    said = [_stock(stock)]
    if armed.differing:
        said.append(f"Armed vLLM was NOT batch-invariant: {_share(armed)} (largest difference {armed.largest:.2g}).")
    elif not armed.compared:
        said.append("Armed vLLM could not be checked: nothing was compared.")
    else:
        said.append(
            f"Armed vLLM was batch-invariant: all {armed.compared:,} positions were bitwise the same, alone and in "
            "every batch."
        )
    if armed.open_seams:
        said.append(
            f"Open seams: {', '.join(armed.open_seams)}. With a required seam open, invariance cannot be promised."
        )
    elif armed.differing:
        said.append("No seam is open, so this is a defect of bi_patch: please report it with the JSON of this run.")
    return said


def _stock(stock: Side) -> str:
    if stock.differing:
        text = f"Stock vLLM changed its answers with the batch: {_share(stock)}"
        text += f" (largest difference {stock.largest:.2g})"
    else:
        text = f"Stock vLLM showed no difference on this machine: {stock.compared:,} positions were bitwise the same"
    if stock.stopped:
        text += f"; it then stopped with an error ({stock.stopped})"
    return text + "."


def _share(side: Side) -> str:
    return (
        f"{side.differing:,} of {side.compared:,} positions differ, {side.tokens_changed:,} of them in the token itself"
    )
