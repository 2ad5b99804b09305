"""Weight tables: the 2^bits values that stand for a weight with the least squared error (k-means on a line)."""

from __future__ import annotations

import numpy as np

ROUNDS = 60


def table_of(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(table [2^bits] of the weight's dtype, index of each weight's nearest entry, flat uint8).

    Lloyd's algorithm (1982) on the distinct values, started at quantiles of even share; deterministic.
    """
    values, inverse, counts = np.unique(weight.astype(np.float64).ravel(), return_inverse=True, return_counts=True)
    mass = np.concatenate([[0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(values * counts)])
    shares = (np.arange(2**bits) + 0.5) / 2**bits * mass[-1]
    table = values[np.searchsorted(mass[1:], shares)]
    for _ in range(ROUNDS):
        cuts = np.concatenate([[0], np.searchsorted(values, (table[1:] + table[:-1]) / 2), [len(values)]])
        members = np.diff(mass[cuts])
        means = np.where(members > 0, np.diff(moment[cuts]) / np.maximum(members, 1), table)
        if np.array_equal(means, table):
            break
        table = np.sort(means)
    table = table.astype(weight.dtype)
    middles = (table[1:].astype(np.float64) + table[:-1]) / 2
    return table, np.searchsorted(middles, values).astype(np.uint8)[inverse]
