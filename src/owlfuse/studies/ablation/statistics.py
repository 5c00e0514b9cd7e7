"""Intervals of scores and of their differences, by a paired bootstrap over questions and seeds.

S seeds, Q questions, C clusters of questions, R resamples.

The data are right answers of two cells to the same Q questions under the same S seeds: r_a[s, q]
and r_b[s, q], each 0 or 1 (or any number), and the difference is D = mean over s and q of d[s, q] =
r_a[s, q] - r_b[s, q]. A pair is one question under one seed: it is never taken apart. Questions
about one picture are a cluster, since they are right or wrong together.

A resample draws C clusters with replacement from the C, each with all its questions, and,
independently, S seeds with replacement from the S. The same clusters count for every seed, since
every seed answered the same questions (they are crossed, not nested). D* is the sum of d over drawn
seeds and drawn clusters, as often as they were drawn, over the number of terms in that sum. The
interval runs from the 2.5th to the 97.5th percentile of R such D*.

What it holds: in simulations of three seeds it covers the true difference in 93 to 99 of 100 cases,
the more the less seeds matter, since noise of single answers is counted with the seeds as well as
with the questions. Two seeds that differ much are too few (about 89), and with one seed nothing is
drawn of seeds: the interval is for that training run, and says nothing of others. Where all answers
are right, or all wrong, every resample is the same, and the interval has no width.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
SEED = 0
"""Seed of the resampling: the same answers give the same interval."""
BLOCK_ELEMENTS = 2_000_000
"""Counts that are in memory at a time."""


def paired_interval(
    differences: np.ndarray, clusters: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of `differences` (S, Q), whose question q is of cluster
    `clusters[q]`, 0 to C - 1.

    With zeros for the second cell it is the interval of one cell's score. Of a single cluster there
    is None: every resample would have the same questions.
    """
    if clusters.max() == 0:
        return None
    generator = np.random.default_rng(SEED)
    means = resampled_means(differences, clusters, resamples, generator)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def resampled_means(
    differences: np.ndarray, clusters: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Return D* of each resample, (R,).

    How often a cluster or seed is drawn is multinomial, so that no list of draws is made.
    """
    seeds = len(differences)
    cluster_count = int(clusters.max()) + 1
    sums = np.zeros((seeds, cluster_count))
    for seed, row in enumerate(differences):
        sums[seed] = np.bincount(clusters, weights=row, minlength=cluster_count)
    sizes = np.bincount(clusters, minlength=cluster_count)
    seed_shares = np.full(seeds, 1 / seeds)
    cluster_shares = np.full(cluster_count, 1 / cluster_count)
    seed_counts = generator.multinomial(seeds, seed_shares, size=resamples)  # (R, S)

    means = np.empty(resamples)
    block = max(1, BLOCK_ELEMENTS // cluster_count)
    for start in range(0, resamples, block):
        seed_block = seed_counts[start : start + block]
        # (R of the block, C)
        cluster_counts = generator.multinomial(cluster_count, cluster_shares, size=len(seed_block))
        totals = (cluster_counts @ sums.T * seed_block).sum(axis=1)
        means[start : start + block] = totals / (seeds * (cluster_counts @ sizes))
    return means
