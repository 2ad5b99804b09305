"""The store of finished pictures: exact requests hit, everything else does not, nothing broken comes out."""

import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from edgesd.runtime.cache import tally
from edgesd.runtime.canvas import Start
from edgesd.runtime.image import save_png
from edgesd.runtime.pictures import PictureStore, look, picture_key
from edgesd.runtime.settings import Settings

ONE = Settings(prompt="a red circle", seed=1)


def picture(path, settings, bright=lambda x, y: x, identity="weights"):
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    grey = np.broadcast_to(np.asarray(bright(x, y) * 3 % 256, np.uint8)[..., None], (64, 64, 3))
    save_png(path, np.ascontiguousarray(grey), {"settings": asdict(settings), "identity": identity})
    return path


@pytest.fixture
def store(tmp_path):
    return PictureStore(tmp_path / "store")


def test_the_same_request_gives_the_stored_bytes(store, tmp_path):
    key = picture_key("weights", ONE, None)
    assert store.take(key, tmp_path / "out.png") is None
    drawn = picture(tmp_path / "drawn.png", ONE)
    store.keep(key, drawn)
    assert store.take(key, tmp_path / "out.png")["settings"] == asdict(ONE) | {
        "crops_coords_top_left": [0, 0],
        "changes": [],
    }
    assert (tmp_path / "out.png").read_bytes() == drawn.read_bytes()
    assert store.stats() == {"hits": 1, "misses": 1, "hit_rate": 0.5, "dropped": 0, "unsaved": 0}
    store.close()
    assert tally(store.folder) == (1, 1)


def test_whatever_decides_a_picture_is_in_its_key():
    start = Start(np.zeros((8, 8, 3), np.uint8))
    keys = [
        picture_key("weights", ONE, None), picture_key("others", ONE, None),
        *(picture_key("weights", replace(ONE, **change), None)
          for change in ({"seed": 2}, {"index": 1}, {"prompt": "a"}, {"num_inference_steps": 21}, {"rng": "torch"})),
        picture_key("weights", ONE, start), picture_key("weights", ONE, replace(start, image=start.image + 1)),
        picture_key("weights", ONE, replace(start, mask=np.zeros((8, 8), np.float32))),
        picture_key("weights", ONE, replace(start, mask=np.ones((8, 8), np.float32))),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert picture_key("weights", replace(ONE), None) == keys[0]


def test_a_broken_entry_is_deleted_and_missed(store, tmp_path):
    store.keep("a" * 64, picture(tmp_path / "drawn.png", ONE))
    path = store.folder / f"{'a' * 64}.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert store.take("a" * 64, tmp_path / "out.png") is None
    assert not path.exists()
    assert not (tmp_path / "out.png").exists()
    assert store.stats()["dropped"] == 1


def test_the_least_recently_used_go_first(tmp_path):
    drawn = picture(tmp_path / "drawn.png", ONE)
    store = PictureStore(tmp_path / "store", max_bytes=2 * drawn.stat().st_size + 1)
    for age, key in enumerate("abc"):
        store.keep(key, drawn)
        os.utime(store.folder / f"{key}.png", (1000 + age, 1000 + age))
    assert {p.stem for p in store.folder.glob("*.png")} == {"b", "c"}
    store.take("b", tmp_path / "out.png")
    store.keep("d", drawn)
    assert {p.stem for p in store.folder.glob("*.png")} == {"b", "d"}


def test_the_same_words_are_offered_once_for_each_look(store, tmp_path):
    looks = {"across": lambda x, y: x, "nearly": lambda x, y: x + (y == 3), "back": lambda x, y: 63 - x}
    for age, (name, bright) in enumerate(looks.items()):
        settings = replace(ONE, seed=age, prompt="  A RED, circle ")
        store.keep(name, picture(tmp_path / "drawn.png", settings, bright))
        os.utime(store.folder / f"{name}.png", (1000 + age, 1000 + age))
    store.keep("words", picture(tmp_path / "drawn.png", replace(ONE, prompt="a red square")))
    store.keep("model", picture(tmp_path / "drawn.png", ONE, identity="others"))
    assert [path.stem for path in store.similar("weights", ONE)] == ["back", "nearly"]


def test_a_look_survives_noise_and_tells_pictures_apart(tmp_path):
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 255, (9, 9, 3)), np.ones((8, 8, 1))).astype(np.float64)
    others = np.kron(rng.integers(0, 255, (9, 9, 3)), np.ones((8, 8, 1)))
    for name, array in (("one", blocks), ("noisy", blocks + rng.normal(0, 3, blocks.shape)), ("other", others)):
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    one, noisy, other = (look(tmp_path / f"{name}.png") for name in ("one", "noisy", "other"))
    assert (one ^ noisy).bit_count() <= 4
    assert (one ^ other).bit_count() >= 16


def test_a_full_disk_is_only_counted(store, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    (tmp_path / "drawn.png").write_bytes(b"x")
    store.keep("a", tmp_path / "drawn.png")
    assert store.stats()["unsaved"] == 1
