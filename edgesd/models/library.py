"""The libraries that models come with: their chatter kept quiet, their hub asked for files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesd.errors import RequestError, SetupError

_TALKATIVE = ("diffusers", "transformers", "torchao", "torch.utils._pytree", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the model libraries' notices and progress bars off the terminal; their errors still come through."""
    import diffusers.utils.logging as diffusers_logging  # importing them sets their loggers' levels, so it comes first
    import transformers.utils.logging as transformers_logging

    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in _TALKATIVE]
    bars = transformers_logging.is_progress_bar_enabled(), diffusers_logging.is_progress_bar_enabled()
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
        for library, enabled in zip((transformers_logging, diffusers_logging), bars, strict=True):
            if enabled:
                library.enable_progress_bar()


def hub_folder(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder of a hub model's files that match `wanted`, downloaded where they are not cached yet.

    Raises RequestError (no such model), SetupError (the hub cannot be reached).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise RequestError(
            f"the hub has no model {name!r}", "a public id, or one you may read", "Check the id, or log in"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SetupError(
            f"the model hub cannot be reached for {name!r} ({type(error).__name__})",
            "a reachable hub, a cached model, or a local folder",
            "Check the network, or download the model elsewhere and pass its folder",
        ) from None
