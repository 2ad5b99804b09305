"""The session behind every target: picks variants, checks inputs, chains chunks; a target only opens files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.errors import DataError, EdgesdError, RequestError
from edgesd.manifest import Axes, Manifest, TensorSpec, Variant
from edgesd.runtime.session import Arrays, no_width

Call = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
Opener = Callable[[Variant, tuple[Path, ...]], Call]

# The axes that a component's shapes depend on; of the others its value says nothing (a text encoder has no size).
_SHAPED = {"unet": ("size_px", "batch"), "vae_decoder": ("size_px",), "vae_encoder": ("size_px",)}


class ComponentSession:
    """A `Session` over the variants of a bundle.

    open_variant: (variant, absolute paths of its files) -> call; a call takes the variant's inputs by name, contiguous
    and in its dtypes, and returns its outputs by name, as buffers of its own if it likes: they are copied. Whatever it
    raises becomes DataError: at opening a file that does not load, at running a component that stopped.
    precision, form, width: the variant wanted, of each component that comes in several; one that no component has is a
    RequestError. size_px: (height, width) of the picture, default the model's own. batch: only variants of that many
    rows. one_at_a_time: opening a component lets go of the others (phones, browsers: memory).
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        open_variant: Opener,
        *,
        precision: str | None = None,
        form: str | None = None,
        width: float | None = None,
        size_px: tuple[int, int] | None = None,
        batch: int | None = None,
        one_at_a_time: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            allowed = "precision, form, width, size_px, batch, one_at_a_time, and the target's own"
            raise RequestError(f"option {min(unknown)!r} for target {manifest.target}", allowed, "Leave it out")
        wanted = {"precision": precision, "form": form, "width": width, "size_px": size_px, "batch": batch}
        self._directory, self._open_variant, self._one_at_a_time = directory, open_variant, one_at_a_time
        self._manifest, self._wanted = manifest, wanted
        self._variants = {c.name: _by_batch(c.name, choose(manifest, c.name, wanted)) for c in manifest.components}
        self._calls: dict[tuple[str, int], tuple[Call, ...]] = {}

    def has(self, component: str) -> bool:
        return component in self._variants

    def batches(self, component: str) -> tuple[int, ...] | None:
        """Rows a call may have, ascending."""
        return tuple(sorted(self._chosen(component)))

    def axes(self, component: str) -> Axes:
        """The axes of the variant in use (of the smallest batch)."""
        return self._chosen(component)[min(self._chosen(component))][0].axes

    def load(self, component: str) -> None:
        """Opens the component (of the largest batch, which a run with guidance uses)."""
        self._opened(component, max(self._chosen(component)))

    def unload(self, component: str) -> None:
        for batch in self._chosen(component):
            self._calls.pop((component, batch), None)

    def widths(self, component: str) -> tuple[float, ...]:
        """Widths of the variants that are like the one in use otherwise, the widest first."""
        now = _without_batch(self.axes(component))
        like = {
            v.axes.width
            for v in self._manifest.component(component).variants
            if _without_batch(v.axes.model_copy(update={"width": now.width})) == now
        }
        return tuple(sorted(like, reverse=True))

    def use_width(self, component: str, width: float) -> None:
        if width not in self.widths(component):
            raise no_width(component, width, self.widths(component))
        now = self.axes(component)
        if width == now.width:
            return
        self.unload(component)
        same = {"width": width, "precision": now.precision, "form": now.form}
        self._variants[component] = _by_batch(component, choose(self._manifest, component, self._wanted | same))

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        by_batch = self._chosen(component)
        rows = {x.shape[0] for x in map(np.asarray, inputs.values()) if x.ndim} & set(by_batch)
        batch = max(rows, default=min(by_batch))
        chunks = by_batch[batch]
        known = _checked(component, chunks, inputs)
        for variant, call in zip(chunks, self._opened(component, batch), strict=True):
            given = {spec.name: np.ascontiguousarray(known[spec.name], spec.dtype) for spec in variant.inputs}
            try:
                made = call(given)
            except EdgesdError:
                raise
            except Exception as error:  # each vendor has its own kinds
                do = "Check the inputs (token ids within the vocabulary), or package the model again"
                raise DataError(
                    f"{component} stopped while running: {reason(error)}", "a run to the end", do
                ) from error
            known |= {spec.name: made[spec.name] for spec in variant.outputs}
        # Always a copy: runtimes hand out buffers that their next call overwrites.
        return {spec.name: np.array(known[spec.name], np.float32) for spec in chunks[-1].outputs}

    def _chosen(self, component: str) -> dict[int, tuple[Variant, ...]]:
        if component not in self._variants:
            have = ", ".join(self._variants)
            raise RequestError(f"the bundle has no component {component!r}", have, "Package the model with it")
        return self._variants[component]

    def _opened(self, component: str, batch: int) -> tuple[Call, ...]:
        if (component, batch) in self._calls:
            return self._calls[component, batch]
        if self._one_at_a_time:
            self._calls.clear()
        calls = tuple(self._open(component, variant) for variant in self._chosen(component)[batch])
        self._calls[component, batch] = calls
        return calls

    def _open(self, component: str, variant: Variant) -> Call:
        files = tuple(self._directory / file for file in variant.files)
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{component} lacks {missing[0]}", ", ".join(variant.files), "Get the bundle again")
        try:
            return self._open_variant(variant, files)
        except EdgesdError:
            raise
        except Exception as error:  # each vendor has its own kinds
            do = "Get the bundle again, or package the model again with the versions that doctor shows"
            raise DataError(f"{variant.files[0]} does not load: {reason(error)}", "a whole file", do) from error


def choose(manifest: Manifest, component: str, wanted: Mapping[str, Any]) -> list[Variant]:
    """The variants of `component` that fit `wanted` (axis -> value or None): they differ in batch and chunk alone.

    Raises RequestError for a value that nothing in the bundle has, naming those it has.
    """
    left = list(manifest.component(component).variants)
    shaped = _SHAPED.get(component, ())
    for axis in ("size_px", "batch"):
        if axis in shaped and (value := wanted.get(axis)) is not None:
            left = _matching(left, axis, tuple(value) if axis == "size_px" else value)
    everything = [variant for c in manifest.components for variant in c.variants]
    for axis in ("width", "precision", "form"):
        if (value := wanted.get(axis)) is not None:
            _matching(everything, axis, value)  # a value that no component has is a mistake, not a preference
            left = [v for v in left if getattr(v.axes, axis) == value] or left
    if "size_px" in shaped and wanted.get("size_px") is None:
        own = manifest.model.defaults.size_px
        left = [v for v in left if v.axes.size_px == own] or left
    first = _without_batch(left[0].axes)
    return [v for v in left if _without_batch(v.axes) == first]


def _matching(variants: list[Variant], axis: str, value: Any) -> list[Variant]:
    found = [v for v in variants if getattr(v.axes, axis) == value]
    if not found:
        have = dict.fromkeys(getattr(v.axes, axis) for v in variants)
        shown = ", ".join("x".join(map(str, h)) if isinstance(h, tuple) else repr(h) for h in have)
        raise RequestError(f"{axis} {value!r}", f"this bundle has {shown}", "Choose one of these, or package again")
    return found


def _without_batch(axes: Axes) -> Axes:
    return axes.model_copy(update={"batch": 1, "chunk": (0, 1)})


def _by_batch(component: str, variants: list[Variant]) -> dict[int, tuple[Variant, ...]]:
    """Batch -> the variant's chunks in the order they run. Raises DataError if a chunk is missing or there twice."""
    batches: dict[int, list[Variant]] = {}
    for variant in variants:
        batches.setdefault(variant.axes.batch, []).append(variant)
    for batch, chunks in batches.items():
        chunks.sort(key=lambda v: v.axes.chunk)
        if [v.axes.chunk for v in chunks] != [(i, len(chunks)) for i in range(len(chunks))]:
            found = ", ".join(f"{v.axes.chunk[0] + 1} of {v.axes.chunk[1]}" for v in chunks)
            came = f"{component} for batch {batch} has the chunks {found}"
            raise DataError(came, "each chunk once", "Package the model again")
    return {batch: tuple(chunks) for batch, chunks in sorted(batches.items())}


def _checked(component: str, chunks: tuple[Variant, ...], inputs: Arrays) -> dict[str, np.ndarray]:
    """`inputs` as arrays, each what the chunks expect. Raises RequestError for a name, shape or kind they do not."""
    needed: dict[str, TensorSpec] = {}
    made: set[str] = set()
    for variant in chunks:
        needed |= {spec.name: spec for spec in variant.inputs if spec.name not in made}
        made |= {spec.name for spec in variant.outputs}
    if set(inputs) != set(needed):
        wrong = ", ".join(sorted(set(inputs) ^ set(needed)))
        raise RequestError(f"inputs of {component} differ in {wrong}", ", ".join(needed), "Pass exactly these")
    arrays = {name: np.asarray(x) for name, x in inputs.items()}
    for name, spec in needed.items():
        if arrays[name].shape != spec.shape:
            came = f"{component} got {name} of shape {list(arrays[name].shape)}"
            raise RequestError(came, f"{list(spec.shape)}", "Pass that shape, or package the model for this one")
        integers = spec.dtype.startswith("int")
        if arrays[name].dtype.kind not in ("iu" if integers else "fiu"):
            raise RequestError(f"{component} got {name} as {arrays[name].dtype}", spec.dtype, "Pass that type")
    return arrays


def reason(error: Exception) -> str:
    """The first line of a vendor's message, short, without what could steer a terminal."""
    lines = str(error).strip().splitlines()
    return "".join(c if c.isprintable() else "?" for c in (lines[0] if lines else type(error).__name__)[:300])
