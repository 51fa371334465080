import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot.data.batches import BatchPlan

many = settings(max_examples=80)


@st.composite
def plans(draw):
    return dict(
        lengths=draw(st.lists(st.integers(1, 60), min_size=1, max_size=90)),
        batch_size=draw(st.integers(1, 40)),
        rows_per_batch=draw(st.integers(1, 5)),
        max_row_tokens=draw(st.none() | st.integers(1, 150)),
        seed=draw(st.integers(0, 2**64)),
    )


def ranks(world_size: int, **settings) -> list[BatchPlan]:
    return [BatchPlan(**settings, rank=rank, world_size=world_size) for rank in range(world_size)]


def examples(micro_batches) -> list[int]:
    return [example for rows in micro_batches for row in rows for example in row]


@many
@given(plans(), st.integers(1, 5), st.integers(0, 3))
def test_every_example_once_an_epoch(settings, world_size, epoch):
    plans = ranks(world_size, **settings)
    steps = range(epoch * plans[0].steps_per_epoch, (epoch + 1) * plans[0].steps_per_epoch)
    seen = [example for step in steps for plan in plans for example in examples(plan.micro_batches(step))]
    assert sorted(seen) == list(range(len(settings["lengths"])))


@many
@given(plans(), st.integers(1, 5), st.integers(0, 30))
def test_a_step_is_the_same_for_any_number_of_ranks(settings, world_size, step):
    plans = ranks(world_size, **settings)
    micro_batches = [plan.micro_batches(step) for plan in plans]
    alone = BatchPlan(**settings).micro_batches(step)
    assert sorted(example for mine in micro_batches for example in examples(mine)) == sorted(examples(alone))
    assert len({len(mine) for mine in micro_batches}) == 1
    assert 1 <= len(examples(alone)) <= settings["batch_size"]


@many
@given(plans(), st.integers(1, 5), st.integers(0, 30))
def test_rows_keep_their_limits(settings, world_size, step):
    limit, lengths = settings["max_row_tokens"], np.array(settings["lengths"])
    for plan in ranks(world_size, **settings):
        for rows in plan.micro_batches(step):
            assert 1 <= len(rows) <= settings["rows_per_batch"]
            assert all(len(row) <= 1 or (limit is not None and lengths[row].sum() <= limit) for row in rows)
            assert all(rows) or rows == [[]]
            tokens = [int(lengths[row].sum()) for row in rows]
            assert tokens == sorted(tokens, reverse=True)


@many
@given(plans(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_does_not_depend_on_what_was_asked_before(settings, steps):
    plan = BatchPlan(**settings)
    for step in steps:
        assert plan.micro_batches(step) == BatchPlan(**settings).micro_batches(step)
    assert pickle.loads(pickle.dumps(plan)).micro_batches(steps[0]) == plan.micro_batches(steps[0])


LENGTHS = np.random.default_rng(0).integers(20, 1000, 2000).tolist()


def plan(lengths=LENGTHS, **changed) -> BatchPlan:
    settings = dict(batch_size=32, rows_per_batch=4, max_row_tokens=None, seed=3, rank=0, world_size=1)
    return BatchPlan(lengths, **settings | changed)


def padding(micro_batches) -> float:
    filled = [[sum(LENGTHS[example] for example in row) for row in rows] for rows in micro_batches]
    return 1 - sum(map(sum, filled)) / sum(max(rows) * len(rows) for rows in filled)


def test_order_differs_by_epoch_and_seed():
    first, steps = plan(), plan().steps_per_epoch
    sets = [frozenset(examples(first.micro_batches(step))) for step in range(2 * steps)]
    assert steps == 63
    assert len(set(sets)) == 2 * steps
    assert frozenset(examples(plan(seed=4).micro_batches(0))) not in sets


def test_a_small_set_too_has_other_batches_in_another_epoch():
    small = plan(LENGTHS[:200], batch_size=10)
    first, second = ({frozenset(examples(small.micro_batches(e * 20 + s))) for s in range(20)} for e in range(2))
    assert not first & second


def test_like_lengths_come_together():
    steps = range(plan().steps_per_epoch)
    assert np.mean([padding(plan().micro_batches(step)) for step in steps]) < 0.02
    means = [np.mean([LENGTHS[example] for example in examples(plan().micro_batches(step))]) for step in steps]
    assert abs(np.corrcoef(means, steps)[0, 1]) < 0.3  # the batches themselves are shuffled


def test_ranks_have_like_lengths_in_the_same_micro_batch():
    plans = [plan(rank=rank, world_size=8, rows_per_batch=2) for rank in range(8)]
    for rows in zip(*(plan.micro_batches(5) for plan in plans), strict=True):
        longest = [max(LENGTHS[row[0]] for row in mine) for mine in rows]
        assert max(longest) - min(longest) <= 50


def test_packed_rows_are_full_and_ranks_balanced():
    shares, gaps = [], []
    for step in range(63):
        plans = [plan(rank=rank, world_size=4, max_row_tokens=2048, rows_per_batch=1) for rank in range(4)]
        parts = [each.micro_batches(step) for each in plans]
        tokens = [sum(LENGTHS[example] for example in examples(part)) for part in parts]
        gaps.append(max(tokens) / np.mean(tokens) - 1)
        shares.append(sum(tokens) / sum(2048 for part in parts for _ in part))
    assert np.mean(gaps[:-1]) < 0.03
    assert np.mean(shares[:-1]) > 0.75  # 32 examples of 510 tokens on 4 ranks: 4,080 tokens, 2 rows, sometimes 3


def test_packed_rows_of_a_micro_batch_are_filled_evenly():
    packed = plan(max_row_tokens=4096, rows_per_batch=4)
    assert np.mean([padding(packed.micro_batches(step)) for step in range(62)]) < 0.02


def test_an_example_longer_than_a_row_is_alone():
    rows = plan([5, 100, 5, 5], max_row_tokens=16, rows_per_batch=2).micro_batches(0)
    assert [sorted(row) for row in rows[0]] == [[1], [0, 2, 3]]


def test_a_rank_with_nothing_to_do_has_an_empty_row():
    for limit in (None, 50):
        rows = [plan([10, 20], rank=rank, world_size=3, max_row_tokens=limit).micro_batches(0) for rank in range(3)]
        assert rows == [[[[1]]], [[[0]]], [[[]]]]


def test_the_order_is_the_same_on_every_machine():
    assert plan(LENGTHS[:12], batch_size=6).micro_batches(7) == [[[11], [0], [1]], [[3], [8], [7]]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"rows_per_batch": 0}, "rows_per_batch must be >= 1, got 0"),
        ({"world_size": 0}, "world_size must be >= 1, got 0"),
        ({"max_row_tokens": 0}, "max_row_tokens must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\), got 2"),
        ({"lengths": []}, "lengths must be at least one, each >= 1, got none"),
        ({"lengths": [3, 0]}, "lengths must be at least one, each >= 1, got 0"),
    ],
)
def test_bad_settings(changed, message):
    with pytest.raises(ValueError, match=message):
        plan(**changed)


def test_a_negative_step():
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        plan().micro_batches(-1)
