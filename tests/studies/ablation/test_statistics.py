"""The paired bootstrap against every possible draw, a slow loop, and simulated experiments whose
truth is known."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from owlfuse.studies.ablation.statistics import paired_interval, resampled_means

# two seeds, six questions about three pictures of one, two and three questions
DIFFERENCES = np.array([[1.0, 0, -1, 1, 1, 0], [0, 0, 1, 1, 0, -1]])
CLUSTERS = np.array([0, 1, 1, 2, 2, 2])


def every_draw(differences, clusters):
    """D* of each of the equally likely draws of clusters and seeds, by plain loops."""
    seeds, names = range(len(differences)), sorted(set(clusters.tolist()))
    found = []
    for drawn_seeds in itertools.product(seeds, repeat=len(differences)):
        for drawn in itertools.product(names, repeat=len(names)):
            terms = [
                differences[s][q]
                for s in drawn_seeds
                for c in drawn
                for q in range(len(clusters))
                if clusters[q] == c
            ]
            found.append(sum(terms) / len(terms))
    return np.array(found)


def test_resamples_are_distributed_as_all_possible_draws():
    exact = every_draw(DIFFERENCES, CLUSTERS)
    assert len(exact) == 2**2 * 3**3
    ours = resampled_means(DIFFERENCES, CLUSTERS, 200_000, np.random.default_rng(1))
    assert ours.mean() == pytest.approx(exact.mean(), abs=0.003)
    assert ours.std() == pytest.approx(exact.std(), abs=0.003)
    for value in np.unique(exact.round(9)):
        assert np.isclose(ours, value).mean() == pytest.approx(
            np.isclose(exact, value).mean(), abs=0.005
        )


def test_the_interval_is_that_of_a_slow_loop():
    draw = random.Random(3)
    clusters = np.repeat(np.arange(12), 3)
    differences = np.array(
        [[draw.choice([-1, 0, 0, 1, 1]) for _ in clusters] for _ in range(3)], dtype=float
    )
    means = []
    for _ in range(4000):
        seeds = [draw.randrange(3) for _ in range(3)]
        pictures = [draw.randrange(12) for _ in range(12)]
        terms = [differences[s, 3 * p + i] for s in seeds for p in pictures for i in range(3)]
        means.append(sum(terms) / len(terms))
    assert paired_interval(differences, clusters) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.02
    )


def test_the_same_answers_give_the_same_interval_and_more_memory_than_one_part_is_no_matter():
    clusters = np.arange(3000)
    differences = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(2, 3000))
    assert paired_interval(differences, clusters, 2000) == paired_interval(
        differences, clusters, 2000
    )
    # 3000 clusters: more than one part
    parts = resampled_means(differences, clusters, 2000, np.random.default_rng(0))
    draw = np.random.default_rng(1)
    slow = [
        differences[draw.integers(0, 2, 2)][:, draw.integers(0, 3000, 3000)].mean()
        for _ in range(2000)
    ]
    assert parts.mean() == pytest.approx(np.mean(slow), abs=0.003)
    assert parts.std() == pytest.approx(np.std(slow), rel=0.1)


def test_one_seed_gives_an_interval_and_one_cluster_none():
    # nothing to draw from
    assert paired_interval(np.array([[1.0, 0.0, 1.0, 1.0]]), np.zeros(4, int)) is None
    low, high = paired_interval(np.array([[1.0, 0.0, 1.0, 0.0]]), np.arange(4))
    assert low < 0.5 < high


def test_pairs_are_not_taken_apart():
    """Two cells that answer alike, question by question, do not differ, however hard the
    questions are."""
    right = np.random.default_rng(0).integers(0, 2, size=(3, 60)).astype(float)
    assert paired_interval(right - right, np.arange(60)) == (0.0, 0.0)


def test_ninety_five_of_a_hundred_intervals_cover_the_difference():
    """Pictures, questions, seeds and their pairings all matter; the truth is the mean over
    endless pictures and seeds."""
    generator = np.random.default_rng(7)

    def chances(lift, seeds, pictures, questions):
        """Of a right answer of one cell:

        (seeds, pictures, questions), or without the last two for endless ones.
        """
        own = lift + generator.normal(0, 0.3, pictures.shape)  # what this cell makes of a picture
        return 1 / (1 + np.exp(-(pictures + own + questions + seeds)))

    def draw(*shape):
        return generator.normal(0, 0.7, (*shape[:-1], 1)), generator.normal(0, 1, shape)

    pictures, questions = draw(200_000, 1)
    seeds = generator.normal(0, 0.22, (200_000, 1))
    truth = (
        chances(1.1, seeds, pictures, questions).mean()
        - chances(0.8, seeds, pictures, questions).mean()
    )
    covered = []
    for _ in range(400):
        pictures, questions = draw(40, 4)
        cells = []
        for lift in (0.8, 1.1):
            likely = chances(lift, generator.normal(0, 0.22, (3, 1, 1)), pictures, questions)
            cells.append((generator.random(likely.shape) < likely).reshape(3, 160).astype(float))
        low, high = paired_interval(cells[1] - cells[0], np.repeat(np.arange(40), 4), 500)
        covered.append(low <= truth <= high)
    assert 0.90 <= np.mean(covered) <= 0.98
