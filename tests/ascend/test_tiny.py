"""A tiny Qwen3 on npu:0 through the routes: the same bits alone, in a batch, in chunks, decoded."""

import json

import pytest

pytestmark = pytest.mark.ascend


@pytest.mark.parametrize("arguments", [("dense", "float32"), ("experts", "bfloat16")])
def test_rows_do_not_depend_on_the_batch(on_npu, arguments):
    done = on_npu("tests/ascend/tiny.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compared"] > 10000 and found["finite"]
    assert found["differing"] == {"batch": 0, "chunked prefill": 0, "decode": 0}


def test_leaves_that_follow_the_number_of_rows_are_caught(on_npu):
    done = on_npu("tests/ascend/tiny.py", "dense", "bfloat16", "fault")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["differing"]
    assert found["chunked prefill"] and found["decode"]
