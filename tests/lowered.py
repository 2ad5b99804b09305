"""What tests of whole targets begin with: the embedded model lowered and held to its floors, and a small one."""

import numpy as np
import tiny

from edgesd.manifest import Axes

FLOORS_DB = {"fp32": 90, "fp16": 45}


def embedded(target, precision, folder):
    """(precision, folder, manifest, components) of the embedded model, all lowered into `folder`."""
    parts, facts = tiny.embedded()
    axes = Axes(size_px=facts.defaults.size_px, precision=precision)
    return precision, folder, *tiny.lower_all(target, folder, parts, facts, axes)


def small(target, folder, **axes):
    """(folder, manifest, components) of a tiny text encoder and decoder, for what does not depend on the model."""
    chosen = Axes(size_px=tiny.SIZE_PX, **axes)
    return folder, *tiny.lower_all(target, folder, tiny.modules(), tiny.spec(), chosen, ("text_encoder", "vae_decoder"))


def check_floors(target, precision, folder, manifest, components):
    """Every component's outputs, by name, in float32 and as near to the truth as the precision owes."""
    session = target.open(folder, manifest, threads=1)
    for name, (inputs, truth) in tiny.real_calls(components).items():
        got = session.run(name, inputs)
        assert set(got) == set(truth)
        for key in truth:
            assert got[key].dtype == np.float32
            assert tiny.snr_db(truth[key], got[key]) >= FLOORS_DB[precision], (name, key)
