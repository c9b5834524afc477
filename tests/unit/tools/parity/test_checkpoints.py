"""A checkpoint of GRPO gives back every bit, and one of another run is refused."""

from types import SimpleNamespace

import msgspec
import pytest
import torch

from bi_patch.errors import SettingError
from bi_patch.tools.parity import checkpoints
from bi_patch.tools.parity.plan import Plan, Spent, Step

SPENT = Spent(1.0, 2.0, 3.0, 4.0)


def session(folder, dtype=torch.bfloat16, **changes):
    engine = SimpleNamespace(
        info=SimpleNamespace(vllm="0.32.0", torch="2.13", device="a CPU"), options=SimpleNamespace(model="/models/tiny")
    )
    return SimpleNamespace(
        plan=Plan(folder=str(folder), **changes), engine=engine, trainer=SimpleNamespace(dtype=dtype)
    )


def trained(steps, masters=None, optimizer=None):
    """Master weights and an optimizer after some steps."""
    draw = torch.Generator().manual_seed(0)
    if masters is None:
        masters = {"b": torch.randn(5, 3, generator=draw), "a": torch.randn(4, generator=draw)}
        optimizer = torch.optim.AdamW(list(masters.values()), lr=0.1, foreach=False)
    for _ in range(steps):
        for value in masters.values():
            value.grad = value.sin()
        optimizer.step()
        optimizer.zero_grad()
    return masters, optimizer


def step(masters):
    return Step(0.5, 1.0, 0.0, 20, 0, checkpoints.checksum(masters))


def test_a_run_goes_on_with_the_same_bits(tmp_path):
    masters, optimizer = trained(3)
    held = checkpoints.Checkpoint(session(tmp_path, steps=3), 5, 7)
    assert held.load(*trained(0)) == ([], [], 1)
    held.save([step(masters)], [SPENT], 1, masters, optimizer)
    again, other = trained(0)
    later = checkpoints.Checkpoint(session(tmp_path, steps=6), 5, 7)  # more steps are no other run
    assert later.load(again, other) == ([step(masters)], [SPENT], 2)
    trained(3, again, other)
    whole, _ = trained(6)
    assert checkpoints.checksum(again) == checkpoints.checksum(whole) != checkpoints.checksum(masters)


@pytest.mark.parametrize("other", [{"tokens": 9}, {"rate": 1e-4}, {"dtype": torch.float32}])
def test_another_run_is_refused(tmp_path, other):
    masters, optimizer = trained(1)
    checkpoints.Checkpoint(session(tmp_path), 5, 7).save([step(masters)], [SPENT], 1, masters, optimizer)
    with pytest.raises(SettingError, match=f"{next(iter(other))} is .*Give another folder"):
        checkpoints.Checkpoint(session(tmp_path, **other), 5, 7).load(masters, optimizer)
    assert checkpoints.Checkpoint(session(tmp_path, **other), 24, 7).load(masters, optimizer)[0] == []


def test_damaged_weights_are_named(tmp_path):
    masters, optimizer = trained(1)
    other, _ = trained(2)
    held = checkpoints.Checkpoint(session(tmp_path), 5, 7)
    held.save([step(other)], [SPENT], 1, masters, optimizer)
    with pytest.raises(SettingError, match="is damaged"):
        held.load(masters, optimizer)


def test_progress_is_read_while_a_run_writes(tmp_path):
    masters, _ = trained(1)
    held = checkpoints.Checkpoint(session(tmp_path), 5, 7)
    assert checkpoints.progress(tmp_path, 5, 7) == []
    held.tell(0, step(masters), SPENT)
    with (tmp_path / "grpo-5-7.jsonl").open("ab") as file:
        file.write(msgspec.json.encode({"at": 1})[:4])
    (told,) = checkpoints.progress(tmp_path, 5, 7)
    assert told.step == step(masters) and told.spent.total == 10.0


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masters, optimizer = trained(1)
    held = checkpoints.Checkpoint(session(""), 5, 7)
    held.save([step(masters)], [SPENT], 1, masters, optimizer)
    held.tell(0, step(masters), SPENT)
    assert held.load(masters, optimizer) == ([], [], 1) and not list(tmp_path.iterdir())
