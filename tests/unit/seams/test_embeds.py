"""Keys of cached blocks: equal for equal embeddings, and for no others. With vLLM's own function."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.seams.common import weights


@pytest.fixture(scope="module")
def keys():
    from vllm.v1.core import kv_cache_utils

    close = weights._first_block(kv_cache_utils.generate_block_hash_extra_keys)

    def of(held, tokens=None, mask=None, start=0, end=4):
        request = SimpleNamespace(
            prompt_embeds=held,
            prompt_token_ids=tokens,
            prompt_is_token_ids=mask,
            mm_features=[],
            lora_request=None,
            cache_salt=None,
            _prompt_embeds_per_block_hashes={},
        )
        found = close(request, start, end, 0)[0]
        return tuple(key for key in found or () if key[0] != "weights")

    return of


HELD = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)


def test_equal_bytes_of_another_type_have_another_key(keys):
    found = {keys(HELD), keys(HELD.view(torch.float16)), keys(HELD.view(torch.int16).view(torch.bfloat16))}
    assert len(found) == 2


def test_a_token_is_no_embedding(keys):
    tokens, all_tokens = [7, 0, 8, 9], [True] * 4
    masks = (None, all_tokens, [True, False, True, True])
    assert len({keys(HELD, tokens, mask) for mask in masks} | {keys(HELD)}) == 4
    assert keys(HELD, tokens, masks[2]) == keys(HELD.clone(), list(tokens), list(masks[2]))
    # Only the block's own positions count, so that later prompts may share the block.
    assert keys(HELD, tokens, masks[2], 2) == keys(HELD, tokens, all_tokens, 2)


def test_other_blocks_keep_their_keys(keys):
    assert keys(None, [1, 2, 3, 4]) == ()
    assert not any("bi_patch" in str(key) for key in keys(HELD, start=4, end=8))
