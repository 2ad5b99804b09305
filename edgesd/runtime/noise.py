"""Normals that are the same on every device: Philox keyed by what the noise is for, or torch's CPU stream re-made.

`NoiseSource.normal(shape, image, row, purpose)` is all that a caller sees. `batch` and `step_noise` stack images.

Philox (the default), exactly, so that another language can follow:
- generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), multipliers 0xD2511F53
  and 0xCD9E8D57, key increments 0x9E3779B9 and 0xBB67AE85 after each of the first nine rounds.
- key = (seed mod 2^32, seed div 2^32), seed 0 .. 2^53-1 (a safe integer in JavaScript).
- counter = (block, image, row, purpose), each a u32; block b makes elements 4b .. 4b+3 of the array in C order, and
  what the last block has too many is dropped.
- block words (x0, x1, x2, x3) -> r = sqrt(-2 ln((x0+1) / 2^32)), a = 2 pi x1 / 2^32, elements r cos a, r sin a; then
  the same with (x2, x3). All in float64, rounded to float32 once. Golden vectors: tests/golden/noise.json; cos, sin and
  ln differ by an ulp of float64 between libraries, so compare to 1 ulp of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

from edgesd.errors import RequestError

MAX_SEED = 2**53 - 1
_U32 = np.uint64(0xFFFFFFFF)


class Purpose(IntEnum):
    """What noise is for: a part of its key, so that one use never shifts another. Numbers are frozen."""

    START = 0  # start latents; row 0
    STEP = 1  # what a stochastic sampler adds after a row
    RENOISE = 2  # start image to the noise of its start row, and the kept part of an inpainting; row 0
    POSTERIOR = 3  # sampling the VAE encoder's posterior; row 0


class NoiseSource(Protocol):
    """Standard normals [shape] f32. image: index in the request; row: the table's row; purpose: what they are for."""

    def normal(self, shape: Sequence[int], image: int, row: int, purpose: Purpose) -> np.ndarray: ...


def check_seed(seed: int) -> int:
    """The seed, or RequestError when it is no integer of 0 .. 2^53-1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed {seed!r}", f"an integer from 0 to {MAX_SEED}", "Choose a seed in that range")
    return seed


def philox4x32(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Any, ...]:
    """Ten rounds on four u64 words below 2^32 (arrays [N] or scalars) -> the block's four words, u64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        wide0, wide1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (wide1 >> np.uint64(32)) ^ (c1 ^ np.uint64(k0)),
            wide1 & _U32,
            (wide0 >> np.uint64(32)) ^ (c3 ^ np.uint64(k1)),
            wide0 & _U32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Philox:
    """Noise keyed by (seed, image, row, purpose), never by draw order: any array can be made at any time, alone."""

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)

    def normal(self, shape: Sequence[int], image: int, row: int, purpose: Purpose) -> np.ndarray:
        """[shape] f32. image and row: 0 .. 2^32-1."""
        count = math.prod(shape)
        blocks = np.arange(-(-count // 4), dtype=np.uint64)
        rest = [np.uint64(n) for n in (image, row, int(purpose))]
        words = philox4x32((blocks, *rest), (self.seed & 0xFFFFFFFF, self.seed >> 32))
        out = np.empty((len(blocks), 4), np.float32)
        for pair in (0, 2):
            radius = np.sqrt(-2.0 * np.log((words[pair] + 1.0) * 2.0**-32))
            angle = (2.0 * math.pi * 2.0**-32) * words[pair + 1]
            out[:, pair], out[:, pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
        return out.reshape(-1)[:count].reshape(tuple(shape))


class TorchNoise:
    """What `torch.randn(shape, generator=Generator().manual_seed(seed))` draws on a CPU, to 2e-6, without torch.

    A stream: arrays depend on the order of the calls, as in diffusers, and row and purpose are ignored. Image i has its
    own generator, seeded seed + i, like diffusers' list of generators; so image i of seed s is image 0 of seed s + i.
    Torch keeps the low 32 bits of a seed. A resumed run first draws again what had been drawn (see `step_noise`).
    """

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)
        self._streams: dict[int, _TorchStream] = {}

    def normal(self, shape: Sequence[int], image: int, row: int, purpose: Purpose) -> np.ndarray:
        """[shape] f32: the next draw of that image's generator. row and purpose are not looked at."""
        stream = self._streams.setdefault(image, _TorchStream((self.seed + image) & 0xFFFFFFFF))
        return stream.randn(math.prod(shape)).reshape(tuple(shape))


class _TorchStream:
    """One torch CPU generator: MT19937 words, float32 block transform from 16 elements on, float64 pairs below."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(seed)._bit_generator  # legacy seeding = init_genrand, as in torch
        self._spare: float | None = None  # the scalar path keeps its second normal for the next call

    def randn(self, count: int) -> np.ndarray:
        if count < 16:
            return np.array([self._scalar() for _ in range(count)], np.float32)
        uniform = self._uniform(count)
        whole = count // 16 * 16
        out = np.empty(count, np.float32)
        out[:whole] = _blocks(uniform[:whole])
        if whole != count:  # torch draws the last 16 anew and overwrites what they cover
            out[-16:] = _blocks(self._uniform(16))
        return out

    def _uniform(self, count: int) -> np.ndarray:
        words = self._bits.random_raw(count) & np.uint64(0xFFFFFF)
        return words.astype(np.float32) * np.float32(2.0**-24)

    def _scalar(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        first, second = self._double(), self._double()
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _double(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _blocks(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller as torch lays it out: in each 16 uniforms, 8 radii then 8 angles become 8 cosines then 8 sines."""
    first, second = uniform.reshape(-1, 2, 8).transpose(1, 0, 2).astype(np.float64)
    radius, angle = np.sqrt(-2.0 * np.log(1.0 - first)), 2.0 * math.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).reshape(-1)


SOURCES: dict[str, Callable[[int], NoiseSource]] = {"philox": Philox, "torch": TorchNoise}


def make_source(rng: str, seed: int) -> NoiseSource:
    """The source called `rng`; raises RequestError for an unknown name or a seed out of range."""
    if rng not in SOURCES:
        raise RequestError(f"random generator {rng!r}", ", ".join(SOURCES), "Choose one of these")
    return SOURCES[rng](seed)


def batch(source: NoiseSource, shape: Sequence[int], images: Sequence[int], row: int, purpose: Purpose) -> np.ndarray:
    """[len(images), *shape] f32: one draw per image, in that order."""
    return np.stack([source.normal(shape, image, row, purpose) for image in images])


def step_noise(source: NoiseSource, shape: Sequence[int], images: Sequence[int]) -> Callable[[int], np.ndarray]:
    """The `noise` that `loop.run` takes: row -> [len(images), *shape] f32.

    To resume on TorchNoise, draw again first what was drawn: the start latents, then the rows of
    `np.flatnonzero(table.draws[start:row]) + start`.
    """
    return lambda row: batch(source, shape, images, row, Purpose.STEP)
