"""Shared by all tests: helpers beside this file import by name (`import tiny`), torch keeps to one core."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or fills the caches of the user who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def fake_target(tmp_path_factory):
    """The test target, installed as any plug-in is: by metadata on the path, which children of edgesd inherit."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "fake_target-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-target\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[edgesd.targets]\nfake = fake_target\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        import fake_target

        yield fake_target
    sys.modules.pop("fake_target", None)


@pytest.fixture(scope="session")
def small_bundle(fake_target, tmp_path_factory):
    """A bundle of the test target, only to be read: exact fp32, a rounded fp16 flavour, and a UNet of two rows."""
    both = [(fake_target.FP32, {}), (fake_target.FP16, {"round": "float16"})]
    made = {name: list(both) for name in fake_target.COMPONENTS}
    made["unet"].insert(1, (fake_target.FP32.model_copy(update={"batch": 2}), {}))
    return fake_target.make(tmp_path_factory.mktemp("bundles") / "shapes-fake.edgesd", made)
