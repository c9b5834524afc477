"""Options of parallelism: an option that nobody has examined is refused, also one that a later release brings."""

import dataclasses

import pytest

from bi_patch.platforms.features import engine, parallel


def test_every_field_of_the_installed_release_is_examined_or_refused():
    """A new field of ParallelConfig belongs into one of the sets, or into this list of those that are refused."""
    config = pytest.importorskip("vllm.config.parallel").ParallelConfig
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields - parallel.KNOWN == {
        "enable_batch_sharded_sampling",
        "enable_elastic_ep",
        "enable_ep_weight_filter",
        "enable_fault_tolerance",
        "enable_hc_sp",
        "enable_shm_tensor_arena",
        "ubatch_size",
    }
    assert not parallel.unknown(config())


def test_the_sets_do_not_overlap():
    sets = (parallel.EXAMINED, parallel.PLACES, parallel.BEHIND)
    assert sum(map(len, sets)) == len(parallel.KNOWN)


@dataclasses.dataclass
class _Later:
    """A ParallelConfig of a later release."""

    tensor_parallel_size: int = 1
    rank: int = 0
    sum_by_arrival: bool = False
    switch: bool | None = None
    sizes: list = dataclasses.field(default_factory=list)


def test_an_unknown_field_is_refused_unless_it_has_its_default():
    assert parallel.unknown(_Later(tensor_parallel_size=2, rank=1, switch=False)) == []
    assert parallel.unknown(_Later(sum_by_arrival=True, switch=True)) == ["sum_by_arrival", "switch"]
    assert parallel.unknown(_Later(sizes=[2])) == ["sizes"]


def test_the_table_refuses_it():
    from types import SimpleNamespace

    row = next(row for row in engine.FEATURES if row.name.startswith("every other option of parallelism"))
    assert "sum_by_arrival" in row.asked(SimpleNamespace(parallel_config=_Later(sum_by_arrival=True)))
    assert all(cell.state == "refused" for cells in row.cells.values() for cell in cells)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("mp", ""),
        ("uni", ""),
        (None, ""),
        ("ray", "workers of Ray"),
        ("external_launcher", "workers of an external launcher"),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_workers_of_other_launchers_are_named(backend, said, eager):
    from types import SimpleNamespace

    held = SimpleNamespace(distributed_executor_backend=backend)
    config = SimpleNamespace(parallel_config=held, model_config=SimpleNamespace(enforce_eager=eager))
    rows = [row for row in engine.FEATURES if row.name.startswith("workers of")]
    found = [asked for row in rows if (asked := row.asked(config))]
    assert found == ([] if not said else [said] if eager else [said, f"compiled {said}"])


def test_options_of_expert_parallelism_are_refused():
    """Expert parallelism is served, so no option may hide behind its refusal."""
    config = pytest.importorskip("vllm.config.parallel").ParallelConfig
    assert parallel.unknown(config(enable_ep_weight_filter=True)) == ["enable_ep_weight_filter"]
