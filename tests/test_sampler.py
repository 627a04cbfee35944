"""The order of prompts: a permutation an epoch, a function of (seed, epoch), resumable anywhere."""

import json

import pytest

from pr1.sampler import PromptSampler


@pytest.mark.parametrize("n", [1, 3, 4, 10, 25])
def test_every_epoch_holds_every_prompt_once(n):
    """Whatever the sizes of the draws, even larger than an epoch."""
    sampler = PromptSampler(10, seed=3)
    drawn = [i for _ in range(40 // n + 1) for i in sampler.draw(n)][:40]
    epochs = [drawn[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # a new order each time
    assert drawn == PromptSampler(10, seed=3).draw(40)  # the order does not depend on how it is asked for
    assert all(type(i) is int for i in drawn)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        (seed, epoch): tuple(PromptSampler(50, seed).draw(50 * (epoch + 1))[-50:])
        for seed in (0, 1, 2)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert orders[0, 0] != tuple(range(50))


def test_orders_are_random():
    """Each of the 24 orders of four prompts, over 2,400 epochs, about 100 times: chi-square below its 99.9 % point."""
    sampler, counts = PromptSampler(4, seed=0), {}
    for _ in range(2400):
        order = tuple(sampler.draw(4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 49.73  # 23 degrees of freedom


@pytest.mark.parametrize("before", [0, 3, 7, 14, 15, 21])  # 7, 14 and 21 are ends of epochs
def test_state_goes_on_where_it_was(before):
    whole, sampler = PromptSampler(7, seed=5), PromptSampler(7, seed=5)
    expected = whole.draw(before + 30)[before:]
    sampler.draw(before)
    state = json.loads(json.dumps(sampler.state_dict()))  # plain numbers
    other = PromptSampler(7, seed=5)
    other.draw(4)  # somewhere else
    other.load_state_dict(state)
    assert other.draw(30) == expected
    assert sampler.draw(30) == expected  # asking for the state changes nothing


def test_nothing_drawn_and_nothing_to_draw():
    assert PromptSampler(3, seed=0).draw(0) == []
    with pytest.raises(ValueError, match="no prompts"):
        PromptSampler(0, seed=0)
