"""What is measured in which order, and what has been: a plan of visits, a journal that survives a kill.

A visit is one contender's turn in a round, in a process of its own. Contenders take turns, a peer, then one of edgesd's
(A B A B), round after round, so that a machine that slows down or is shared slows all of them; ratios are made within a
round. Each finished visit is a line of the journal: a run that is stopped goes on behind the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contenders as who

PARTS = ("unet", "picture", "package", "scaling", "profile", "arithmetic", "loop", "int8")
SCRIPTS = ("arithmetic", "loop", "int8")  # parts that are a script of their own, not contenders
INT8_TARGETS = ("onnx-web", "openvino", "tflite")


@dataclass(frozen=True)
class Visit:
    """part: one of PARTS, or make (an artefact that others need, once). name: the contender or artefact.

    options: what differs from the settings, such as {"steps": 8}.
    """

    part: str
    name: str
    round: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        more = json.dumps(self.options, sort_keys=True, separators=(",", ":")) if self.options else ""
        return f"{self.part}/{self.name}{more}/{self.round}"


def interleaved(peers: Sequence[str], ours: Sequence[str]) -> list[str]:
    """A peer, one of ours, a peer, …; what one side has more is spread over the end."""
    order: list[str] = []
    for i in range(max(len(peers), len(ours))):
        order += [*peers[i : i + 1], *ours[i : i + 1]]
    return order


def plan(parts: Iterable[str], names: Sequence[str], rounds: int, settings: dict[str, Any]) -> list[Visit]:
    """All visits in the order they are made: artefacts first, then part by part, round by round."""
    parts = [part for part in PARTS if part in set(parts)]
    measured = [visit for part in parts for visit in _part(part, names, rounds, settings)]
    made: dict[str, Visit] = {}
    for visit in measured:
        if visit.part in ("unet", "picture", "scaling", "profile") and (artefact := who.find(visit.name).artefact):
            options = {"size_px": visit.options["size_px"]} if "size_px" in visit.options else {}
            needed = Visit("make", artefact, options=options)
            made.setdefault(needed.key, needed)
    return [*made.values(), *measured]


def _part(part: str, names: Sequence[str], rounds: int, settings: dict[str, Any]) -> Iterator[Visit]:
    order = interleaved([n for n in names if not who.CONTENDERS[n].ours], [n for n in names if who.CONTENDERS[n].ours])
    for round_ in range(rounds):
        if part in ("unet", "picture"):
            yield from (Visit(part, name, round_) for name in order)
        elif part == "package":
            yield from (Visit(part, name, round_) for pair in _packaged(names) for name in pair)
        elif part == "profile":
            yield from (Visit(part, name, round_) for name in who.PROFILED if name in names)
        elif part == "scaling":
            yield from _curves(round_, [n for n in who.SCALED if n in names], settings)
        else:
            yield from (Visit(part, name, round_) for name in (INT8_TARGETS if part == "int8" else (part,)))


def _packaged(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of who.PACKAGED whose artefacts are those of the contenders asked for."""
    asked = {who.CONTENDERS[name].artefact for name in names}
    return [pair for pair in who.PACKAGED if asked.issuperset(pair)]


def _curves(round_: int, names: Sequence[str], settings: dict[str, Any]) -> Iterator[Visit]:
    """One point of each contender, then the next point."""
    for axis, points in who.CURVES.items():
        for point in points:
            options = {axis: point}
            if axis == "size_px":
                options = {} if point == 1 else {axis: [round(side * point) for side in settings["size_px"]]}
            for name in (who.WIDE,) if axis == "width" else names:
                yield Visit("scaling", name, round_, options)


# ---- the journal -----------------------------------------------------------------------------------------------


class Journal:
    """Finished visits, a JSON line each, in WORK/visits.jsonl. A line that a kill tore is left out, and made again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.lines[entry["key"]] = entry
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, visit: Visit, result: dict[str, Any]) -> None:
        """Writes it down, to the disk, before anything else happens. A later line of the same visit replaces it."""
        entry = {"key": visit.key, "part": visit.part, "name": visit.name, "round": visit.round,
                 "options": visit.options, **result}  # fmt: skip
        entry = json.loads(json.dumps(entry, allow_nan=False))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
        self.lines[visit.key] = entry

    def left(self, visits: Iterable[Visit], retry: bool = False) -> list[Visit]:
        """Those that were not made yet; with retry those that failed as well."""
        return [
            v for v in visits
            if v.key not in self.lines or (retry and "failed" in self.lines[v.key])
        ]  # fmt: skip
