"""Blocks of the cache: who holds them, what is shared, and that no field of a salt imitates another."""

from __future__ import annotations

import random

import pytest

from rankwise.errors import RankwiseError
from rankwise.serve.cache.block_pool import KV, BlockPool, PoolUnit
from rankwise.serve.cache.prefix import PrefixIndex, salt

PAGE = 4


def index_of(blocks: int) -> PrefixIndex:
    return PrefixIndex(BlockPool({KV: PoolUnit(1, blocks)}), PAGE, tag=KV)


def fill(index: PrefixIndex, first: bytes, tokens: list[int]) -> list[int]:
    """What a request does that computes ``tokens``: match, take the rest, enter the full blocks."""
    links = index.chain(first, tokens)
    blocks = index.match(links)
    chain, done = (links[len(blocks) - 1] if blocks else first), len(blocks)
    taken = index.take(-(-len(tokens) // PAGE) - done)
    assert taken is not None
    blocks += taken
    for i in range(done, len(tokens) // PAGE):
        chain = index.complete(blocks[i], chain, tokens[i * PAGE : (i + 1) * PAGE])
    return blocks


def test_a_known_prefix_is_shared_and_one_token_is_left_to_compute() -> None:
    index, first = index_of(10), salt({"base": "b"})
    mine = fill(index, first, list(range(8)))
    again = index.match(index.chain(first, list(range(8))))
    assert again == mine[:1]  # the second block ends the prompt, whose last token must be computed for its logits
    longer = index.match(index.chain(first, [*range(8), 99]))
    assert longer == mine
    assert index.match(index.chain(first, [0, 1, 2, 99, 4])) == []


def test_other_salts_share_nothing_and_fields_do_not_imitate_each_other() -> None:
    """An adapter's name and a caller's salt of the same text, moved bytes between fields, a reload (another digest)."""
    index, tokens = index_of(40), list(range(9))
    fields = [
        {"base": "b", "adapter": "", "tenant": "", "salt": ""},
        {"base": "b", "adapter": "x", "tenant": "", "salt": ""},
        {"base": "b", "adapter": "", "tenant": "", "salt": "x"},
        {"base": "b", "adapter": "", "tenant": "x", "salt": ""},
        {"base": "bx", "adapter": "", "tenant": "", "salt": ""},
        {"base": "b", "adapter": "y", "tenant": "", "salt": ""},
    ]
    for f in fields:
        assert index.match(index.chain(salt(f), tokens)) == [], f
        fill(index, salt(f), tokens)
    assert len({salt(f) for f in fields}) == len(fields)


def test_idle_blocks_are_kept_until_room_is_wanted_the_end_of_a_chain_first() -> None:
    index, first = index_of(4), salt({})
    blocks = fill(index, first, list(range(12)))
    index.release(blocks)
    assert index.available() == 4 and len(index.idle) == 3
    assert index.match(index.chain(first, list(range(13)))) == blocks
    index.release(blocks)
    taken = index.take(2)
    assert taken is not None and blocks[2] in taken and blocks[0] not in taken
    kept = index.match(index.chain(first, list(range(13))))
    assert kept == blocks[:2]


def test_taking_more_than_there_is_takes_nothing() -> None:
    index = index_of(3)
    assert index.take(4) is None
    assert index.available() == 3


def test_a_block_released_twice_is_a_fault() -> None:
    index = index_of(2)
    blocks = index.take(1)
    assert blocks is not None
    index.release(blocks)
    with pytest.raises(RankwiseError, match="released more often"):
        index.release(blocks)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_whatever_the_order(seed: int) -> None:
    """Random requests over few prefixes: held, idle and free always add up, and all comes back in the end."""
    rnd, index = random.Random(seed), index_of(24)
    held: list[list[int]] = []
    for _ in range(120):
        if held and rnd.random() < 0.5:
            index.release(held.pop(rnd.randrange(len(held))))
        else:
            tokens = [rnd.randrange(2) for _ in range(rnd.randrange(1, 20))]
            links = index.chain(salt({"a": str(rnd.randrange(2))}), tokens)
            found = index.match(links)
            taken = index.take(-(-len(tokens) // PAGE) - len(found))
            if taken is None:
                index.release(found)
                continue
            blocks = found + taken
            chain = links[len(found) - 1] if found else salt({"a": "0"})
            for i in range(len(found), len(tokens) // PAGE):
                chain = index.complete(blocks[i], chain, tokens[i * PAGE : (i + 1) * PAGE])
            held.append(blocks)
        live = {b for blocks in held for b in blocks}
        assert set(index.refs) == live
        assert not live & set(index.idle)
        assert len(live) + index.available() == 24
    for blocks in held:
        index.release(blocks)
    assert index.available() == 24
    assert index.shrink(99) == len(index.hash_of) or not index.hash_of
    assert not index.block_of and index.pool.room(KV) == 24
