"""Writes the JSON Schemas that the TypeScript readers follow: manifest, policy, golden facts. Needs edgesd alone.

python web_demo/scripts/schemas.py && npm --prefix web_demo run generate
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "src" / "runtime" / "generated"


def schemas() -> dict[str, str]:
    """File name -> content."""
    from edgesd.golden import Facts
    from edgesd.manifest import json_schema
    from edgesd.runtime.policy import Policy

    made = {"manifest": json_schema(), "policy": Policy.model_json_schema(), "golden": Facts.model_json_schema()}
    return {f"{name}.schema.json": json.dumps(schema, indent=1) + "\n" for name, schema in made.items()}


if __name__ == "__main__":
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
