"""What a checkpoint has beside its weights: files of tokenizers and processors, chat templates, the generation config."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from aqnfx.export.job import Job
from aqnfx.export.readback.child import PROBE


def copy_companions(job: Job, folder: Path) -> list[int] | None:
    """Copy to ``folder`` what ``from_pretrained`` reads beside weights, and return what the tokenizer makes of a text.

    Files come from the model's directory or the cache of its hub id, by the names that transformers gives them, byte for byte.
    A tokenizer that needs files of other names is saved by transformers itself. None where the model has no tokenizer that
    can be loaded.
    """
    from transformers import AutoTokenizer
    from transformers.utils.hub import CHAT_TEMPLATE_DIR, list_repo_templates

    local = job.loaded is None  # a model that was given may have a name that leads nowhere: nothing is asked for it
    tokenizer: Any = None
    templates: list[str] = []
    with contextlib.suppress(Exception):  # each kind of tokenizer raises its own
        tokenizer = AutoTokenizer.from_pretrained(job.home, local_files_only=local)
    names = [*_names(), *(getattr(tokenizer, "vocab_files_names", None) or {}).values()]
    if Path(job.home).is_dir():
        templates = [path.name for path in sorted(Path(job.home, CHAT_TEMPLATE_DIR).glob("*.jinja"))]
    else:
        with contextlib.suppress(Exception):
            templates = list_repo_templates(job.home, local_files_only=local)
    names += [f"{CHAT_TEMPLATE_DIR}/{name.removesuffix('.jinja')}.jinja" for name in templates]
    for name in dict.fromkeys(names):
        _copy(job.home, name, folder, local)
    if tokenizer is None:
        return None
    wanted: list[int] = tokenizer(PROBE)["input_ids"]
    try:
        same = AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"] == wanted
    except Exception:  # what was copied is not all of it
        same = False
    if not same:
        tokenizer.save_pretrained(folder)
    return wanted


def _names() -> list[str]:
    from transformers import tokenization_utils_base as tokenizers
    from transformers import utils
    from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

    return [
        tokenizers.FULL_TOKENIZER_FILE, tokenizers.TOKENIZER_CONFIG_FILE, tokenizers.SPECIAL_TOKENS_MAP_FILE,
        tokenizers.ADDED_TOKENS_FILE, utils.GENERATION_CONFIG_NAME, CHAT_TEMPLATE_FILE,
        LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, utils.PROCESSOR_NAME, utils.FEATURE_EXTRACTOR_NAME,
        utils.IMAGE_PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.AUDIO_TOKENIZER_NAME,
    ]  # fmt: skip


def _copy(home: str, name: str, folder: Path, local: bool) -> None:
    from transformers.utils.hub import cached_file

    found = None
    with contextlib.suppress(OSError, ValueError):  # a name that is no model's
        found = cached_file(
            home, name, local_files_only=local, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    if found is not None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(Path(found).read_bytes())
