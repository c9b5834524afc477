"""Only the worker of the tool faults can plant faults; verify's worker cannot."""

import pytest

from bi_patch.errors import SettingError
from bi_patch.tools.faults import base, run, worker
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.verify import instruments
from bi_patch.tools.verify.child import ChildEngine


@pytest.fixture
def served(monkeypatch):
    """The instruments of this process. After the test, an instrument that it registered is removed."""
    monkeypatch.setattr(instruments, "SERVED", dict(instruments.SERVED))
    return lambda: set(instruments.SERVED)


def test_only_the_worker_of_faults_plants(monkeypatch, served):
    monkeypatch.setattr(worker.worker, "main", lambda: None)
    assert served() == {"trace", "precision", "sleep", "pause", "update", "update in flight", "held", "calls"}
    before = served()
    worker.main()
    assert served() - before == {"plant", "plant over ranks"}
    assert FaultyEngine.worker != ChildEngine.worker


def test_a_fault_that_cannot_be_planted_here_is_named_before_an_engine_starts():
    for name, error, said in (("num_splits 0", SettingError, "on cpu"), ("nothing", base.UnknownFault, "no fault")):
        with pytest.raises(error, match=said):
            run.measure("cpu", only=[name], tell=print, keep=print)
