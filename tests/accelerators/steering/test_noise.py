"""Streams of noise: what a particle draws is its own business."""

from __future__ import annotations

import pytest
import torch

from hasten.accelerators.steering.noise import RESAMPLING, NoiseStreams, stream


def test_a_particles_noise_does_not_depend_on_how_many_there_are() -> None:
    few, many = NoiseStreams(3, prompts=2, particles=2), NoiseStreams(3, prompts=3, particles=5)
    for _ in range(3):  # also of later steps
        a, b = few.normal(range(4), (2, 3)), many.normal(range(15), (2, 3))
        assert torch.equal(a[:2], b[:2]) and torch.equal(a[2:], b[5:7])


def test_rows_that_are_left_out_do_not_shift_the_others() -> None:
    all_, some = NoiseStreams(3, 1, 4), NoiseStreams(3, 1, 4)
    first = all_.normal(range(4), (2,))
    assert torch.equal(some.normal([2], (2,)), first[2:3])
    assert torch.equal(some.normal(torch.tensor([2, 3]), (2,))[0], all_.normal(range(4), (2,))[2])


def test_no_two_slots_share_a_stream_and_neither_do_neighbouring_seeds() -> None:
    first = {
        float(torch.rand(1, generator=stream(seed, prompt, slot), dtype=torch.float64))
        for seed in (0, 1, 2**40)
        for prompt in range(8)
        for slot in (*range(40), RESAMPLING)
    }
    assert len(first) == 3 * 8 * 41


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 9223372036854775807, not -1"):
        stream(-1)
    with pytest.raises(ValueError, match="slot must be a whole number from 0 to 65535, not 65536"):
        stream(0, 0, 65536)
    with pytest.raises(ValueError, match="particles must be from 1 to 65534, not 0"):
        NoiseStreams(0, 1, 0)
