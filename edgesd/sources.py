"""Anything that can draw, opened by one name: a bundle, a diffusers folder, a hub id, or the embedded model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, RequestError, SetupError
from edgesd.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from edgesd.bundle import Bundle
    from edgesd.models.load import Checkpoint
    from edgesd.runtime.policy import Policy
    from edgesd.runtime.table import SamplerTable

MANIFEST = "manifest.json"


def is_bundle(source: str | None) -> bool:
    """A folder with a manifest, or one that is named like a bundle (and may be unfinished)."""
    if source is None:
        return False
    path = Path(source)
    return path.is_dir() and ((path / MANIFEST).exists() or path.name.rstrip("/").endswith(".edgesd"))


def open_pipeline(source: str | None = None, **options: Any) -> Pipeline:
    """Opens `source` ready to draw.

    options go to the target's `open` (threads, device, precision, form, …); the torch reference takes threads alone. A
    checkpoint that was trained at several widths draws at each of them.
    Raises RequestError (nothing there), DataError (broken), SetupError (a package is missing: says which).
    """
    if is_bundle(source):
        return open_bundle(Path(str(source)), **options)
    try:
        import torch
        import transformers  # noqa: F401

        import edgesd.models.load as loading
    except ModuleNotFoundError as error:
        embedded = ("shapes", "shapes-lcm")
        if not (source is None or source in embedded or Path(source).exists() or source.count("/") == 1):
            raise RequestError(f"no model or bundle at {source!r}", "a bundle folder", "Check the path") from None
        raise SetupError(
            f"opening a checkpoint needs {error.name}, not installed here", "bundles open without it",
            'Run pip install "edgesd[package]", or pass a bundle with -m',
        ) from None  # fmt: skip
    if options.get("threads") is not None:
        torch.set_num_threads(options["threads"])
    from edgesd.compress.widths import trained_forms

    model = loading.load(source)
    return torch_pipeline(model, narrow=trained_forms(model))


def open_bundle(folder: Path, verify: bool | None = None, **options: Any) -> Pipeline:
    """Opens a bundle with its target's runtime. Reads nothing but what the manifest lists and vouches for."""
    from edgesd import targets
    from edgesd.bundle import read
    from edgesd.runtime.bank import load_bank
    from edgesd.runtime.table import load_tables
    from edgesd.runtime.tokenizer import PromptTokenizer
    from edgesd.runtime.widths import read_widths

    bundle = read(folder, verify=verify)
    manifest = bundle.manifest
    target = targets.load(manifest.target)
    session = target.open(bundle.folder, manifest, **{k: v for k, v in options.items() if v is not None})

    @lru_cache(maxsize=8)
    def tables(file: str) -> Any:
        return load_tables(bundle.path(file))

    def table(name: str, steps: int) -> SamplerTable:
        for entry in manifest.samplers:
            if entry.name == name:
                if steps not in entry.steps:
                    shown = f"{min(entry.steps)} to {max(entry.steps)}"
                    raise RequestError(f"{steps} steps of {name}", f"this bundle holds {shown}",
                                       "Choose one of these, or package with --steps")  # fmt: skip
                try:
                    return tables(entry.file)[name, steps]
                except KeyError:
                    raise DataError(f"{entry.file} lacks {name} with {steps} steps", "what the manifest lists",
                                    "Package the model again") from None  # fmt: skip
        have = ", ".join(entry.name for entry in manifest.samplers)
        raise RequestError(
            f"sampler {name!r}", f"this bundle holds {have}", f"Choose one of these, or package with --sampler {name}"
        )

    return Pipeline(
        policy=lambda name: bundled_policy(bundle, name),
        widths=read_widths(manifest),
        spec=manifest.model,
        session=session,
        tokenizers=tuple(PromptTokenizer.from_file(bundle.path(t.file), t) for t in manifest.model.tokenizers),
        table=table,
        identity=f"{manifest.provenance.sha256}-{manifest.target}",
        bank=None if manifest.prompts is None else load_bank(bundle.path(manifest.prompts)),
        steps=lambda name: next((entry.steps for entry in manifest.samplers if entry.name == name), ()),
    )


def bundled_policy(bundle: Bundle, name: str) -> Policy:
    """The bundle's own policy of that name, checked as any; one it has not is looked for as `load_policy` does."""
    from edgesd.files import open_regular
    from edgesd.runtime.policy import MAX_BYTES, load_policy, parse_policy

    entry = next((p for p in bundle.manifest.policies if p.name == name), None)
    if entry is None:
        return load_policy(name)
    with open_regular(bundle.path(entry.file)) as file:
        policy = parse_policy(file.read(MAX_BYTES + 1))
    if policy.name != name:
        raise DataError(f"{entry.file} holds the policy {policy.name}", f"{name}, as its manifest says",
                        "Package the model again")  # fmt: skip
    return policy


def torch_pipeline(model: Checkpoint, **options: Any) -> Pipeline:
    """The torch reference of a checkpoint; tables are compiled when asked for.

    A loaded one is all in memory; of one that is not, a part at a time is.
    """
    from edgesd.models.ingredients import tokenizer_json
    from edgesd.models.load import LoadedModel
    from edgesd.models.session import PartsSession, TorchSession
    from edgesd.runtime.tokenizer import PromptTokenizer
    from edgesd.sampling.compile import compile_table

    @lru_cache(maxsize=64)
    def table(name: str, steps: int) -> SamplerTable:
        return compile_table(name, model.spec.scheduler, steps)

    return Pipeline(
        spec=model.spec,
        session=TorchSession(model, **options) if isinstance(model, LoadedModel) else PartsSession(model),
        tokenizers=tuple(
            PromptTokenizer(tokenizer_json(model, index), spec) for index, spec in enumerate(model.spec.tokenizers)
        ),
        table=table,
        identity=f"{model.sha256}-torch",
    )
