"""Causal language models besides the one under training: scorers, and the reference model. No torch at import."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.errors import ConfigError, DataFlexError, UnsupportedError
from dataflex.state import read_json

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter_config.json"
"""File of a folder that holds a PEFT adapter instead of a whole model."""
KEY = "reference"
"""The parameter that names the folder of a reference model, for messages."""
_WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
_FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def base_model(name: str | Path) -> str | None:
    """Return the base model of a folder that holds an adapter, or None."""
    file = Path(name) / ADAPTER
    if not file.is_file():
        return None
    return str(read_json(file)["base_model_name_or_path"])


def sizes_of(folder: str | Path) -> dict[str, Any]:
    """Return the ``config.json`` of the model in a folder, that of its base model for an adapter, its text part on top.

    Raises:
        OSError, ValueError, KeyError, TypeError: It cannot be read, or is none.
    """
    found = dict(read_json(Path(base_model(folder) or folder) / "config.json"))
    return {**found, **(found.get("text_config") or {})}


def _load_causal(name: str | Path, dtype: torch.dtype | str, device: torch.device) -> torch.nn.Module:
    """Return a model by folder or hub id, or an adapter on its base model, frozen and in eval mode."""
    if (Path(name) / ADAPTER).is_file():
        from peft import AutoPeftModelForCausalLM as Loader
    else:
        from transformers import AutoModelForCausalLM as Loader
    model: Any = Loader.from_pretrained(name, dtype=dtype)
    from dataflex.signals.passes import watch_other

    loaded: torch.nn.Module = model.to(device).eval().requires_grad_(False)
    watch_other(loaded)
    return loaded


def _largest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=0)


class LoadError(DataFlexError):
    """Another model could not be loaded."""


@contextmanager
def loading(told: str, error: type[DataFlexError] = LoadError) -> Iterator[None]:
    """Load a model in a block: random states stay as they are, and what cannot be loaded is told as ``error``."""
    from dataflex.signals.sweep import preserve_state

    with preserve_state():  # a model may draw random numbers while it is built
        try:
            yield
        except (OSError, ValueError, KeyError) as problem:  # of a folder or hub id that from_pretrained cannot load
            raise error(f"{told}: {problem}") from problem


class Scorer:
    """A causal language model by folder (an adapter's too) or hub id, its weights not loaded yet.

    ``identity`` changes when its values may change; ``same_tokens`` says whether the run's tokens mean the same to it,
    and if not, ``translation`` turns them into its own. Sequences begin with ``start`` and have up to ``limit`` tokens.
    LoadError where there is no such model, or it has no tokenizer.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name, self._theirs = name, tokenizer
        base = base_model(name)
        with loading(f"model {name}: cannot be loaded to score rows"):
            config: Any = AutoConfig.from_pretrained(base or name)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        text, commit = config.get_text_config(), getattr(config, "_commit_hash", None)
        self.identity = _files_identity(name, commit, base and _files_identity(base, commit), "causal")
        vocabularies = tokenizer.get_vocab().items() <= self._tokenizer.get_vocab().items()
        self.same_tokens = _largest_id(tokenizer) < int(text.vocab_size) and vocabularies
        self.start = start_tokens(self._tokenizer)
        self.limit: int | None = getattr(text, "max_position_embeddings", None)
        self.translation: Callable[[list[int]], list[int]] | None = None if self.same_tokens else self._translated

    def _translated(self, ids: list[int]) -> list[int]:
        """Return its tokens of the text of the run's tokens, without special tokens."""
        text = self._theirs.decode(ids, skip_special_tokens=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[torch.nn.Module]:
        """Give the model in float32 and eval mode, frozen, for the length of a block.

        LoadError where it is no causal language model, UnsupportedError where parameters are partitioned over ranks.
        """
        import torch
        from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

        if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
            raise UnsupportedError(
                f"model {self.name}: another model cannot score rows while parameters are partitioned over ranks "
                "(ZeRO-3, FSDP); use ZeRO-2 or less, or the model under training"
            )
        with loading(f"model {self.name}: is not a causal language model"):
            model = _load_causal(self.name, torch.float32, device)
        yield model


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the token that a tokenizer puts before every text by itself, or none."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return (int(bos),) if bos is not None and first == [bos] else ()


def check_folder(folder: str | Path) -> Path:
    """Return the folder of a reference model; ConfigError where it is not there, or holds no model."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{KEY}: no such folder: {folder} (the model to compare losses with; train it first)")
    if not any((path / name).is_file() for name in ("config.json", ADAPTER)):
        raise ConfigError(f"{KEY}: {folder} holds no model (neither config.json nor {ADAPTER})")
    return path


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse a reference without a tokenizer, or whose tokens are not those of the run, by a ConfigError."""
    from transformers import AutoTokenizer

    with loading(f"{KEY}: {folder} has no tokenizer that can be loaded", ConfigError):
        ours, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(folder).get_vocab()
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        token = differing[0]
        raise ConfigError(
            f"{KEY}: the tokenizer of {folder} is not that of the run: {len(theirs):,} tokens against {len(ours):,}, "
            f"{len(differing):,} differ (such as {token!r}: id {theirs.get(token)} there, {ours.get(token)} here). "
            "Losses of different tokens cannot be compared; take a reference with the tokenizer of the run"
        )


def load_reference(folder: Path, tokenizer: Any, device: torch.device) -> torch.nn.Module:
    """Return the model of a folder (or the adapter on its base model), whole, frozen, in eval mode.

    ConfigError where it cannot be loaded, or has fewer embeddings than the tokenizer has ids.
    """
    with loading(f"{KEY}: {folder} cannot be loaded as a language model", ConfigError), loading_whole():
        model: Any = _load_causal(folder, "auto", device)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = _largest_id(tokenizer)
    if largest >= rows:
        raise ConfigError(f"{KEY}: {folder} knows {rows:,} tokens, and the tokenizer has ids up to {largest:,}")
    return model


def _files_identity(model: str, commit: str | None, *settings: Any) -> str:
    """Return a hash of what another model's values depend on: its files (or hub commit) and its settings."""
    digest = hashlib.blake2b(repr(settings).encode("utf-8"), digest_size=16)
    folder = Path(model)
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in _WEIGHTS:
                digest.update(path.relative_to(folder).as_posix().encode("utf-8"))
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    else:
        digest.update(f"{model}@{commit}".encode())
    return digest.hexdigest()


@contextmanager
def loading_whole() -> Iterator[None]:
    """While inside, ``from_pretrained`` gives every rank a whole model."""
    from transformers.integrations import deepspeed

    kept, efficient = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        if efficient is not None:
            os.environ[_FSDP] = efficient
