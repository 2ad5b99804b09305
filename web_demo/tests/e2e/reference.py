"""Pictures by the Python reference, for the end-to-end tests: JSON on stdin, [H,W,3] as JSON lists on stdout.

{"bundle": …, "pictures": [{"prompt": …, "seed": …, "steps": …, …}]}
"""

import json
import sys
from pathlib import Path

import edgesd
from edgesd.runtime import image as images

asked = json.load(sys.stdin)
pipeline = edgesd.open_pipeline(asked["bundle"])
drawn = []
for one in asked["pictures"]:
    size = pipeline.spec.defaults.size_px
    start = images.load_image(Path(one.pop("image")), size) if "image" in one else None
    mask = images.load_mask(Path(one.pop("mask")), size) if "mask" in one else None
    picture = edgesd.generate(pipeline, one.pop("prompt"), image=start, mask=mask, **one)[0]
    drawn.append(picture.image.ravel().tolist())
json.dump(drawn, sys.stdout)
