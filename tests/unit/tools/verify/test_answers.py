"""The bitwise comparison of answers."""

import math

import msgspec
import pytest

from bi_patch.tools.verify import wire
from bi_patch.tools.verify.answers import Answer, AnswerIncomplete, Difference, Request, checked, compare, same, ulps


def changed(answer, **changes):
    return msgspec.structs.replace(answer, **changes)


def test_equal_answers_have_no_difference(answer):
    assert compare(answer, changed(answer)) == Difference(compared=5)


def test_the_last_bit_of_a_logprob_counts(answer):
    nudged = math.nextafter(-1.5, 0.0)
    found = compare(answer, changed(answer, logprobs=[-0.5, nudged, -2.5]), "p, batch of 2")
    assert (found.compared, found.differing, found.tokens_changed) == (5, 1, 0)
    assert found.largest == nudged + 1.5
    assert found.first.startswith("p, batch of 2: generated position 1: logprob -1.5 became")


def test_a_top_logprob_alone_counts(answer):
    found = compare(answer, changed(answer, top=[[(5, -0.5), (8, -0.75)], [(6, -1.5)], [(7, -2.5)]]))
    assert (found.differing, found.tokens_changed) == (1, 0)


def test_prompt_positions_count(answer):
    found = compare(answer, changed(answer, prompt_logprobs=[-3.0, -4.5]))
    assert found.differing == 1 and found.largest == 0.5
    assert found.first == "prompt position 2: logprob -4.0 became -4.5"


def test_logprobs_after_a_changed_token_do_not_enter_the_largest_difference(answer):
    found = compare(answer, changed(answer, tokens=[5, 8, 7], logprobs=[-0.5, -1.5, -99.0]))
    assert found.tokens_changed == 1 and found.differing == 2 and found.largest == 0.0
    assert "token 6 became 8" in found.first


def test_a_shorter_answer_differs(answer):
    found = compare(answer, changed(answer, tokens=[5, 6], logprobs=[-0.5, -1.5], top=answer.top[:2]))
    assert found.differing == 1 and found.tokens_changed == 1


def test_answers_of_another_prompt_are_refused(answer):
    with pytest.raises(ValueError):
        compare(answer, changed(answer, prompt_logprobs=[-3.0]))


def test_nan_on_both_sides_proves_nothing(answer):
    nan = changed(answer, logprobs=[-0.5, math.nan, -2.5], prompt_logprobs=[math.nan, -4.0])
    assert compare(nan, nan) == Difference(compared=3, undefined=2)
    top = changed(answer, top=[[(5, math.nan)], [(6, -1.5)], [(7, -2.5)]])
    assert compare(top, top) == Difference(compared=4, undefined=1)
    found = compare(answer, nan)
    assert (found.compared, found.differing, found.undefined, found.largest) == (5, 2, 0, math.inf)


def test_an_answer_without_what_was_asked_for_is_refused(answer):
    request = Request((1, 2, 3), max_tokens=3, logprobs=1, prompt_logprobs=1)
    assert checked([request], [answer]) == [answer]
    for lacking, said in (
        ({"logprobs": [], "top": []}, "3 tokens came with 0 logprobs"),
        ({"top": answer.top[:2]}, "2 lists of top tokens"),
        ({"prompt_logprobs": [-3.0]}, "1 of 2 prompt logprobs"),
        ({"tokens": [], "logprobs": [], "top": []}, "got none"),
    ):
        with pytest.raises(AnswerIncomplete, match=said):
            checked([request], [changed(answer, **lacking)])
    with pytest.raises(AnswerIncomplete, match="got 0 answers"):
        checked([request], [])
    plain = Request((1, 2, 3), max_tokens=3, logprobs=None)
    assert checked([plain], [changed(answer, logprobs=[], top=[], prompt_logprobs=[])])


def test_an_aborted_request_has_no_answer():
    request = Request((1, 2, 3), abort=2)
    assert checked([request], [Answer([])]) == [Answer([])]
    with pytest.raises(AnswerIncomplete):
        checked([request.but(abort=0)], [Answer([])])


def test_returned_experts_are_compared_by_position(answer):
    one, two = changed(answer, experts=["00", "01", "02"]), changed(answer, experts=["00", "03", "02"])
    assert compare(one, one).differing == 0 and compare(one, one).compared == compare(answer, answer).compared + 3
    found = compare(one, two)
    assert found.differing == 1 and "position 1: the returned experts" in found.first


def test_digests_that_one_engine_lacks_are_no_difference(answer):
    found = compare(changed(answer, digests=["a", "b", "c"]), answer)
    assert (found.differing, found.digests) == (0, 0)


def test_same_is_bitwise():
    assert same(float("nan"), float("nan")) and same(-math.inf, -math.inf)
    assert not same(0.0, -0.0) and not same(1.0, math.nextafter(1.0, 2.0))


def test_the_pipe_keeps_every_bit(answer):
    odd = changed(answer, logprobs=[-math.inf, math.nextafter(-1.5, 0.0), -0.0])
    (back,) = wire.unpack(
        msgspec.json.decode(msgspec.json.encode(wire.Reply(answers=wire.pack([odd]))), type=wire.Reply).answers
    )
    assert back == odd and math.copysign(1.0, back.logprobs[2]) == -1.0


def test_distances_are_counted_in_steps_of_float32(answer):
    assert ulps(1.0, 1.0 + 2**-23) == 1 and ulps(0.0, -0.0) == 1 and ulps(-1.0, -1.0) == 0 and ulps(1.0, 2.0) == 2**23
    found = compare(answer, changed(answer, logprobs=[-0.5, -1.5 - 2**-23, -2.5]))
    assert (found.ulps, found.generated, found.prompt) == (1, (1,), ())


def test_a_digest_of_logits_alone_counts(answer):
    one, two = changed(answer, digests=["a", "b", "c"]), changed(answer, digests=["a", "x", "c"])
    found = compare(one, two)
    assert (found.differing, found.digests, found.generated) == (1, 3, (1,)) and "row of logits" in found.first


def test_the_numbers_of_a_pooled_vector_count():
    vector = Answer([], pooled=[0.5, -0.25, 0.0])
    assert compare(vector, vector) == Difference(compared=3)
    found = compare(vector, Answer([], pooled=[0.5, math.nextafter(-0.25, 0.0), -0.0]), "p, batch of 2")
    assert (found.compared, found.differing) == (3, 2)
    assert found.first.startswith("p, batch of 2: number 1 of 3: -0.25 became")
    shorter = compare(vector, Answer([], pooled=[0.5]))
    assert (shorter.compared, shorter.differing) == (3, 3) and shorter.first == "3 numbers became 1"
    nothing = compare(Answer([], pooled=[math.nan]), Answer([], pooled=[math.nan]))
    assert (nothing.compared, nothing.differing, nothing.undefined) == (0, 0, 1)


def test_a_request_that_is_pooled_needs_no_tokens():
    request = Request((1, 2), max_tokens=4, logprobs=3)
    assert checked([request], [Answer([], pooled=[1.0])])
    with pytest.raises(AnswerIncomplete):
        checked([request], [Answer([])])
