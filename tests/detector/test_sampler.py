from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from detector.data.annotations import LvisAnnotations
from detector.data.sampler import SampleRef, TrainBatchSampler, repeat_factors
from tests.detector.lvis_files import annotation_entry, category_entry, image_entry, lvis_file, write_json


def sampler_of(factors, batch_size=4, *, seed=7, portrait=None, **options):
    count = factors if isinstance(factors, int) else len(factors)
    ratios = np.full(count, 1.5)
    ratios[: portrait or 0] = 0.7
    return TrainBatchSampler(factors, ratios, batch_size, seed=seed, **options)


def indices(batches):
    return [ref.index for batch in batches for ref in batch]


def test_repeat_factors_golden(tmp_path):
    # 10 images: class 3 in images 0-7, class 7 in 0 and 8, class 9 twice in 0, which counts once. 9 is empty.
    annotations = [annotation_entry(k, k, category_id=3) for k in range(8)]
    annotations += [annotation_entry(20, 0, category_id=7), annotation_entry(21, 8, category_id=7)]
    annotations += [annotation_entry(22, 0, category_id=9), annotation_entry(23, 0, category_id=9)]
    annotations += [annotation_entry(24, 1, category_id=9, iscrowd=1)]  # a crowd region repeats nothing
    path = write_json(tmp_path, lvis_file([image_entry(k) for k in range(10)], annotations))
    data = LvisAnnotations.from_file(path)
    factors = repeat_factors(data, 0.4)
    # f = 0.8, 0.2, 0.1 and t = 0.4: r(3) = max(1, sqrt(0.5)) = 1, r(7) = sqrt(2), r(9) = sqrt(4) = 2.
    np.testing.assert_allclose(factors, [2, 1, 1, 1, 1, 1, 1, 1, np.sqrt(2), 1], rtol=1e-15)
    assert factors.dtype == np.float64
    np.testing.assert_array_equal(repeat_factors(data, 0.0), np.ones(10))
    np.testing.assert_array_equal(repeat_factors(data, 0.05), np.ones(10))
    with pytest.raises(ValueError, match="must not be negative"):
        repeat_factors(data, -1e-3)


def test_repeat_factors_of_a_class_without_images(tmp_path):
    path = write_json(tmp_path, lvis_file(categories=[category_entry(3), category_entry(4)]))
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(repeat_factors(LvisAnnotations.from_file(path), 1e-3), [1.0])


def test_lvis_v1_threshold_gives_the_published_maximum(tmp_path):
    # A class seen in one of LVIS v1's 100,170 training images: sqrt(1e-3 * 100170) = 10.0085.
    count = 100_170
    path = write_json(tmp_path, lvis_file([image_entry(k) for k in range(count)]))
    factors = repeat_factors(LvisAnnotations.from_file(path), 1e-3)
    assert len(factors) == count
    assert factors.max() == pytest.approx(10.008496, abs=1e-6)
    assert (factors == 1).sum() == count - 1


def test_without_resampling_every_image_comes_once():
    sampler = sampler_of(20)
    assert sorted(indices(sampler)) == list(range(20))
    assert len(sampler) == sampler.batches_in(0) == 5


def test_whole_factors_repeat_exactly_and_fractions_between_floor_and_ceiling():
    factors = np.array([1, 2, 3, 1.5, 2.25, 1, 1, 1])
    for epoch in range(30):
        counts = Counter(sampler_of(factors, 1).epoch_indices(epoch).tolist())
        assert [counts[k] for k in (0, 1, 2, 5, 6, 7)] == [1, 2, 3, 1, 1, 1]
        assert counts[3] in (1, 2)
        assert counts[4] in (2, 3)


def test_fractions_are_drawn_afresh_and_right_on_average():
    factors = np.concatenate([np.full(500, 1.3), np.full(500, 1.8)])
    sampler = sampler_of(factors)
    drawn = np.array([np.bincount(sampler.epoch_indices(e), minlength=1000) for e in range(40)])
    # 20,000 Bernoulli draws each: standard deviations 0.0032 and 0.0028; four of them are allowed.
    assert drawn[:, :500].mean() == pytest.approx(1.3, abs=0.013)
    assert drawn[:, 500:].mean() == pytest.approx(1.8, abs=0.012)
    # Independent over epochs: an image is repeated in both of two epochs with probability 0.3^2 (sd 0.0021).
    both = ((drawn[:-1, :500] == 2) & (drawn[1:, :500] == 2)).mean()
    assert both == pytest.approx(0.09, abs=0.012)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    factors = np.random.default_rng(0).uniform(1, 3, 200)
    first = sampler_of(factors, portrait=80)
    again = sampler_of(factors, portrait=80)
    again.set_position(5)
    list(again)
    again.set_position(0)
    assert list(first) == list(again)
    other_seed = sampler_of(factors, portrait=80, seed=8)
    assert list(other_seed) != list(first)
    first.set_position(1)
    again.set_position(0)
    assert list(first) != list(again)


def test_every_sample_has_its_own_seed():
    sampler = sampler_of(np.full(100, 2.0))
    refs = [ref for batch in sampler for ref in batch]
    assert len({ref.seed for ref in refs}) == 200
    assert all(isinstance(ref, SampleRef) and type(ref.seed) is int and ref.seed >= 0 for ref in refs)
    sampler.set_position(1)
    assert not {ref.seed for batch in sampler for ref in batch} & {ref.seed for ref in refs}


@pytest.mark.parametrize("start", [0, 1, 13, 24, 25])
def test_resuming_gives_exactly_the_rest(start):
    factors = np.full(100, 1.0)
    sampler = sampler_of(factors, portrait=37)
    sampler.set_position(3)
    whole = list(sampler)
    assert len(whole) == 25
    resumed = sampler_of(factors, portrait=37)
    resumed.set_position(3, start)
    assert len(resumed) == 25 - start
    assert list(resumed) == whole[start:]
    assert list(resumed) == whole[start:]  # iterating does not move the position


def test_batches_hold_one_aspect_ratio_group_and_lose_only_the_last_incomplete_batch():
    factors = np.random.default_rng(1).uniform(1, 3, 211)
    sampler = sampler_of(factors, 4, portrait=90)
    for epoch in range(10):
        sampler.set_position(epoch)
        batches = list(sampler)
        drawn = Counter(sampler.epoch_indices(epoch).tolist())
        used = Counter(indices(batches))
        assert not used - drawn
        assert (drawn - used).total() == drawn.total() % 4
        mixed = [len({ref.index < 90 for ref in batch}) > 1 for batch in batches]
        assert sum(mixed) <= 1  # what both groups have left over shares the last batch
        assert not any(mixed[:-1])


def test_both_groups_are_spread_over_the_epoch():
    sampler = sampler_of(400, 4, portrait=200)
    kinds = [batch[0].index < 200 for batch in sampler]
    assert 15 <= sum(kinds[:50]) <= 35


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(world_size):
    factors = np.random.default_rng(2).uniform(1, 2, 103)
    ranks = [sampler_of(factors, 2, portrait=41, rank=r, world_size=world_size) for r in range(world_size)]
    alone = sampler_of(factors, 2 * world_size, portrait=41)
    for epoch in (0, 4):
        for sampler in [*ranks, alone]:
            sampler.set_position(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) == ranks[0].batches_in(epoch) == alone.batches_in(epoch)
        # Step by step, the ranks together see what one rank with the whole batch sees, seeds included.
        for step, batch in enumerate(alone):
            assert [ref for share in shares for ref in share[step]] == batch


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="one repeat factor and one aspect ratio per image"):
        TrainBatchSampler(5, np.ones(4), 2, seed=0)
    with pytest.raises(ValueError, match="5 images per epoch do not fill one batch of 3 on 2"):
        TrainBatchSampler(5, np.ones(5), 3, seed=0, world_size=2)
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        TrainBatchSampler(5, np.ones(5), 1, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="finite"):
        TrainBatchSampler(np.array([1, np.nan]), np.ones(2), 1, seed=0)
    with pytest.raises(ValueError, match="seed must not be negative"):
        TrainBatchSampler(5, np.ones(5), 1, seed=-1)
    sampler = sampler_of(20)
    with pytest.raises(ValueError, match="epoch 0 has 5 batches, cannot start at batch 6"):
        sampler.set_position(0, 6)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        sampler.set_position(-1)
