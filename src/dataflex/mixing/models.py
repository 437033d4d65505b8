"""``dataflex mix mixmin`` and ``chameleon``: proportions from one proxy model per domain, or from embeddings.

MixMin (Thudi et al., ICML 2025, arXiv 2502.10510): F(w) = -mean_x [ log sum_d w_d p_d(x) / len(x) ] is convex in w.
Exponentiated gradient from equal weights minimizes it. Chameleon (Xie et al., ICML 2025, arXiv 2505.24844): ridge
leverage scores of the domains. Pre-training gives more weight to domains that the others explain well (low score),
fine-tuning to those that they do not (high score). Models are loaded one at a time, in float32.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.config.args import data_set_names
from dataflex.config.needs import model_folder_problem
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.mixing.options import Solution, by_name, check_effective, check_out, fill_in, given, write_result
from dataflex.mixing.runs import read_csv
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import provenance, softmax
from dataflex.printable import Answer
from dataflex.rng import stream
from dataflex.state import refusals, replacing
from dataflex.storage import place_problem

if TYPE_CHECKING:
    import torch

Purpose = Literal["pretraining", "finetuning"]

_TOLERANCE = 1e-4
_LEAST = 1e-9
_RIDGE = 10.0


def check_matrix(loglik_NK: Floats, lengths_N: Floats) -> None:
    """Raise ``DataError`` unless the numbers are log-likelihoods [N, K] and lengths [N] of texts."""
    if loglik_NK.ndim != 2 or loglik_NK.shape[1] < 2 or len(loglik_NK) < 1:
        raise DataError(f"log-likelihoods: expected [texts, domains >= 2], found shape {list(loglik_NK.shape)}")
    if lengths_N.shape != loglik_NK.shape[:1]:
        raise DataError(f"lengths: expected one per text ({len(loglik_NK)}), found shape {list(lengths_N.shape)}")
    bad = ~np.isfinite(loglik_NK)
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        raise DataError(f"log-likelihoods: {int(bad.sum())} are not finite, the first of text {row}, domain {column}")
    if (loglik_NK > 0).any():
        raise DataError("log-likelihoods: some are above 0, so that they are none; are they losses? Then negate them")
    if not (np.isfinite(lengths_N) & (lengths_N > 0)).all():
        raise DataError("lengths: every text needs a length in tokens above 0")


def objective(weights_K: Floats, loglik_NK: Floats, lengths_N: Floats) -> tuple[float, Floats]:
    """Return MixMin's F in nats per token at weights [K] on the simplex, and its gradient [K]; see ``solve``."""
    top_N = loglik_NK.max(axis=1, keepdims=True)
    ratio_NK = np.exp(loglik_NK - top_N)
    mixed_N = ratio_NK @ weights_K
    with np.errstate(divide="ignore", invalid="ignore"):
        value = -float(((np.log(mixed_N) + top_N[:, 0]) / lengths_N).mean())
        gradient = -(ratio_NK / (mixed_N * lengths_N)[:, None]).mean(axis=0)
    return value, gradient


def solve(
    loglik_NK: Floats, lengths_N: Floats, *, rate: float = 1.0, most_steps: int = 100, tolerance: float = _TOLERANCE
) -> Solution:
    """Minimize MixMin's F by w <- w exp(-rate grad F), renormalized.

    Args:
        loglik_NK: Log-likelihood of each text under each domain's proxy [N, K], in nats.
        lengths_N: Number of tokens of each text [N].
        rate: Step size.
        most_steps: Maximum number of steps.
        tolerance: Gap (in nats per token) at which to stop. By convexity F - min F <= <grad, w> - min grad.
    """
    weights = np.full(loglik_NK.shape[1], 1.0 / loglik_NK.shape[1])
    steps = 0
    while True:
        value, gradient = objective(weights, loglik_NK, lengths_N)
        gap = float(weights @ gradient - gradient.min())
        if gap <= tolerance or steps == most_steps:
            return Solution(proportions=weights, value=value, gap=max(gap, 0.0), steps=steps)
        weights = weights * np.exp(-rate * (gradient - gradient.min()))
        weights /= weights.sum()
        steps += 1


def split_rows(num_rows: int, test_share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row numbers to fit and to test on, disjoint; 0.2 is the paper's share of the latter."""
    order = stream(seed, "mixing.mixmin").permutation(num_rows)
    num_test = round(test_share * num_rows)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


# ---- leverage scores


def centred_kernel(means_KE: Floats) -> Floats:
    """Return the centred linear kernel [K, K] of the domains' mean embeddings [K, E]: H M M' H, H = I - 1/K."""
    centred = means_KE - means_KE.mean(axis=0)
    return centred @ centred.T


def leverage(gram_KK: Floats, ridge: float = _RIDGE) -> Floats:
    """Return S = diag(G (G + ridge K I)^-1), normalized to sum 1 [K].

    Args:
        gram_KK: Kernel of the domains [K, K], symmetric and positive semi-definite.
        ridge: lambda; it is multiplied by the number of domains.

    Raises:
        DataError: The kernel is not finite, or zero: all domains are alike.
    """
    num = len(gram_KK)
    if gram_KK.shape != (num, num) or num < 2 or not np.isfinite(gram_KK).all():
        raise DataError(f"the kernel of the domains must be finite and square, at least 2 x 2, found {gram_KK.shape}")
    raw = np.diag(np.linalg.solve(gram_KK + ridge * num * np.eye(num), gram_KK)).copy()
    raw[raw < 0] = 0.0  # rounding
    if not raw.sum() > _LEAST:
        raise DataError("the domains' mean embeddings are all alike, so that nothing tells the domains apart")
    return raw / raw.sum()


def leverage_weights(scores_K: Floats, purpose: Purpose, names: Sequence[str]) -> Floats:
    """Return proportions [K]: softmax((1/S) / 5) for pre-training, softmax(S / 0.2) for fine-tuning."""
    if purpose == "finetuning":
        return softmax(scores_K / 0.2)
    least = int(scores_K.argmin())
    if scores_K[least] < _LEAST:
        raise DataError(
            f"domain {names[least]} is the mean of all domains up to rounding (score {scores_K[least]:.2g}), so that "
            "its pre-training weight is not defined; use more samples, another model, or --purpose finetuning"
        )
    return softmax((1.0 / scores_K) / 5.0)


# ---- files of numbers


def read_matrix(path: Path) -> tuple[tuple[str, ...], Floats, Floats]:
    """Return the domains [K], log-likelihoods [N, K] and lengths in tokens [N] of a saved matrix.

    An .npz has ``names``, ``log_likelihoods`` and ``lengths``; a .csv has a column per domain and one ``length``.
    """
    if path.suffix == ".csv":
        names, loglik, lengths = _from_csv(path)
    else:
        arrays = _arrays(path, ".npz or .csv")
        missing = [key for key in ("names", "log_likelihoods", "lengths") if key not in arrays]
        if missing:
            raise DataError(f"{path}: lacks {', '.join(missing)}")
        names = [str(name) for name in np.atleast_1d(arrays["names"])]
        loglik, lengths = _numbers(path, arrays["log_likelihoods"]), _numbers(path, arrays["lengths"])
    if len(set(names)) < len(names):
        raise DataError(f"{path}: names a domain twice: {', '.join(names)}")
    if loglik.ndim != 2 or loglik.shape[1] != len(names):
        raise DataError(f"{path}: {len(names)} names, but log-likelihoods of shape {list(loglik.shape)}")
    return tuple(names), loglik, lengths


def _from_csv(path: Path) -> tuple[list[str], Floats, Floats]:
    head, lines = read_csv(path)
    if "length" not in head:
        raise DataError(f"{path}: lacks a column 'length' with the tokens of each text")
    try:
        table = np.asarray([[float(cell) for cell in line] for line in lines], dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a table of numbers: {error}") from error
    if table.ndim != 2 or table.shape[1] != len(head):
        raise DataError(f"{path}: {len(head)} columns named, but rows of other lengths, or none")
    place = head.index("length")
    return [name for name in head if name != "length"], np.delete(table, place, axis=1), table[:, place]


def write_matrix(path: Path, names: Sequence[str], loglik_NK: Floats, lengths_N: Floats) -> None:
    """Write what ``read_matrix`` reads, as .npz."""
    _write(path, {"names": np.asarray(names), "log_likelihoods": loglik_NK, "lengths": lengths_N})


def read_embeddings(path: Path) -> tuple[tuple[str, ...], Floats]:
    """Return domains [K] and mean embeddings [K, E] of an .npz with an array per domain: [E], or [samples, E]."""
    means = {}
    for name, array in _arrays(path, ".npz").items():
        numbers = _numbers(path, array)
        if numbers.ndim not in (1, 2) or not numbers.size:
            raise DataError(f"{path}: {name} has shape {list(numbers.shape)}, expected [width] or [samples, width]")
        means[name] = numbers if numbers.ndim == 1 else numbers.mean(axis=0)
        if not np.isfinite(means[name]).all():
            raise DataError(f"{path}: {name} holds numbers that are not finite")
    if len(means) < 2 or len({len(mean) for mean in means.values()}) != 1:
        raise DataError(f"{path}: needs two domains or more with embeddings of one width, found {len(means)}")
    return tuple(means), np.stack(list(means.values()))


def write_embeddings(path: Path, names: Sequence[str], means_KE: Floats) -> None:
    """Write what ``read_embeddings`` reads."""
    _write(path, dict(zip(names, means_KE, strict=True)))


def _check_saved(key: str, path: Path) -> None:
    """Raise where no .npz could be written, before what it is to hold is computed."""
    told = "must end in .npz" if path.suffix != ".npz" else "is a folder" if path.is_dir() else ""
    if told or (told := place_problem(path) or ""):
        raise ConfigError(f"{key}: {path}: {told}")


def _write(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    with refusals(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # np.savez takes no name such as "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _arrays(path: Path, endings: str) -> dict[str, NDArray[np.generic]]:
    if path.suffix != ".npz":
        raise DataError(f"{path}: must end in {endings}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _numbers(path: Path, array: NDArray[np.generic]) -> Floats:
    try:
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: holds what are not numbers: {error}") from error


# ---- texts and models


def _texts(path: Path, options: argparse.Namespace, most: int, name: str) -> list[str]:
    """Return at most ``most`` non-empty texts of a .jsonl, .json or .txt file, drawn at random, in their order."""
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise DataError(f"{path}: must end in .jsonl, .json or .txt")
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            texts = content.splitlines()
        else:
            lines = (json.loads(line) for line in content.split("\n") if line.strip())
            rows = json.loads(content) if content.lstrip().startswith("[") else lines
            keys = data_set_names(options.column)
            texts = [_text(row, keys, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: malformed JSON: {error}") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path}: holds no text")
    if len(texts) <= most:
        return texts
    chosen = stream(options.seed, f"mixing.texts.{name}").choice(len(texts), size=most, replace=False)
    return [texts[place] for place in sorted(chosen.tolist())]


def _text(row: Any, keys: Sequence[str], where: str) -> str:
    known = list(row) if isinstance(row, dict) else []
    for key in keys:
        if key not in known or not isinstance(row[key], str):
            raise DataError(f"{where}: no text under {key!r}{did_you_mean(key, known)}; see --column")
    return "\n".join(row[key] for key in keys if row[key])


def log_likelihoods(
    models: Mapping[str, str], texts: Sequence[str], *, piece_tokens: int = 64, batch_size: int = 16
) -> tuple[Floats, Floats]:
    """Return the log-likelihood of every piece under every model [N, K], and the tokens predicted in each piece [N].

    Texts are cut into pieces of at most ``piece_tokens`` tokens, since with whole long texts the best proxy of each
    text gets all weight. A piece begins with the tokenizer's beginning-of-text token; without one, its first token is
    not predicted. ``models`` maps a domain to the folder of the model trained on it.
    """
    import torch

    pieces: list[list[int]] = []
    columns: list[Floats] = []
    identity, first = None, ""
    for name, folder in models.items():
        model, tokenizer = _loaded(folder, name, "AutoModelForCausalLM")
        own = (tokenizer.get_vocab(), tokenizer.bos_token_id)
        if piece_tokens >= _most_positions(model):
            raise DataError(f"--piece-tokens: {piece_tokens} are more than {name} has positions for")
        if identity is None:
            identity, first = own, name
            pieces = _pieces(tokenizer, texts, piece_tokens)
        elif own != identity:
            raise DataError(
                f"--models: {name} and {first} have different tokenizers, so that their likelihoods are of different "
                "pieces; train all proxies from one tokenizer"
            )
        found = []
        for ids, mask in _batches(pieces, batch_size, model.device):
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                picked = torch.gather(torch.log_softmax(logits, dim=-1), 2, ids[:, 1:, None])[:, :, 0]
                found.append((picked.double() * mask[:, 1:]).sum(dim=1).cpu().numpy())
        columns.append(np.concatenate(found))
        if not np.isfinite(columns[-1]).all():
            raise DataError(f"--models: {name} ({folder}) gives likelihoods that are not finite")
        del model
    lengths = np.asarray([len(piece) - 1 for piece in pieces], dtype=np.float64)
    return np.stack(columns, axis=1), lengths


def _pieces(tokenizer: Any, texts: Sequence[str], piece_tokens: int) -> list[list[int]]:
    head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    pieces = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        pieces += [[*head, *ids[start : start + piece_tokens]] for start in range(0, len(ids), piece_tokens)]
    pieces = [piece for piece in pieces if len(piece) >= 2]
    if not pieces:
        raise DataError("--target: holds no piece of at least two tokens")
    return pieces


def mean_states(folder: str, texts: Sequence[str], *, most_tokens: int = 512, batch_size: int = 16) -> Floats:
    """Return the mean hidden state of the middle layer over each text's first tokens [N, E].

    The middle layer is number floor(L / 2) of L, counted from 1; texts without a token are left out.
    """
    import torch

    model, tokenizer = _loaded(folder, "--model", "AutoModel")
    most = min(most_tokens, _most_positions(model))
    pieces = [piece for piece in tokenizer(list(texts), truncation=True, max_length=most)["input_ids"] if piece]
    found = []
    for ids, mask in _batches(pieces, batch_size, model.device):
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            middle = states[max(1, (len(states) - 1) // 2)].double()  # number 0 is the embedding of the tokens
            means = (middle * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        found.append(means.cpu().numpy())
    if not found:
        raise DataError("no text has a token")
    result = np.concatenate(found)
    if not np.isfinite(result).all():
        raise DataError(f"--model: {folder} gives hidden states that are not finite")
    return result


def _most_positions(model: Any) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 1 << 30


def _check_models(key: str, folders: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless all folders hold models, before the first of them is loaded."""
    problems = [f"{key}: {problem}" for folder in folders if (problem := model_folder_problem(folder))]
    if problems:
        raise ConfigError(problems)


def _loaded(folder: str, name: str, kind: str) -> tuple[Any, Any]:
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name}: {folder} cannot be loaded as a model: {str(error).splitlines()[0]}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _batches(pieces: list[list[int]], size: int, device: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and mask [B, T], padded on the right with 0, which the mask hides."""
    from dataflex.signals.sweep import padded

    for start in range(0, len(pieces), size):
        rows = pieces[start : start + size]
        yield padded(rows, 0).to(device), padded([[1] * len(row) for row in rows], 0).to(device)


# ---- the steps


def _by_domain(text: str, key: str) -> dict[str, str]:
    found = by_name(text, key, "NAME=PATH")
    if len(found) < 2:
        raise ConfigError(f"{key}: needs at least two domains, found {len(found)}")
    return found


def mixmin_step(options: argparse.Namespace) -> Answer:
    """Write proportions by MixMin and return what to print."""
    if (options.matrix is None) == (options.models is None):
        raise ConfigError("--models and --matrix: give one of the two (models with --target)")
    if not 0 <= options.test_share < 1:
        raise ConfigError(f"--test-share: must be at least 0 and below 1, found {options.test_share:g}")
    if options.rate <= 0 or options.steps < 1:
        raise ConfigError("--rate must be above 0 and --steps at least 1")
    check_out(options.out)
    if options.matrix is not None:
        check_effective(options, "--matrix", "target", "column", "piece_tokens", "most_texts", "save_matrix")
        names, loglik, lengths = read_matrix(options.matrix)
        inputs = [options.matrix]
    else:
        if options.target is None:
            raise ConfigError("--target: missing; name a file of texts that the mixture is for")
        fill_in(options, column="text", piece_tokens=64, most_texts=2048)
        if options.save_matrix is not None:
            _check_saved("--save-matrix", options.save_matrix)
        if options.piece_tokens < 2 or options.most_texts < 1:
            raise ConfigError("--piece-tokens must be at least 2 and --most-texts at least 1")
        models = _by_domain(options.models, "--models")
        _check_models("--models", models.values())
        texts = _texts(options.target, options, options.most_texts, "target")
        loglik, lengths = log_likelihoods(models, texts, piece_tokens=options.piece_tokens)
        names, inputs = tuple(models), [options.target, *map(Path, models.values())]
    check_matrix(loglik, lengths)
    if options.save_matrix is not None:
        write_matrix(options.save_matrix, names, loglik, lengths)
    fitted, tested = split_rows(len(loglik), options.test_share, options.seed)
    if not len(fitted):
        raise ConfigError(f"--test-share: leaves none of {len(loglik)} pieces to fit on")
    found = solve(loglik[fitted], lengths[fitted], rate=options.rate, most_steps=options.steps)

    def values(rows: NDArray[np.int64]) -> dict[str, float]:
        """Return F of the found weights, of equal ones, and of the best single domain."""
        equal = np.full(len(names), 1 / len(names))
        mixmin, same, *single = (
            objective(each, loglik[rows], lengths[rows])[0] for each in (found.proportions, equal, *np.eye(len(names)))
        )
        return {"mixmin": mixmin, "equal": same, "best_single": min(single)}

    told = {"fitted": values(fitted), **({"tested": values(tested)} if len(tested) else {})}
    keys = ("models", "target", "column", "piece_tokens", "most_texts", "rate", "steps", "test_share", "seed")
    source = provenance("dataflex mix mixmin", inputs=inputs, settings=given(options, *keys))
    details = {"pieces": len(loglik), **told, "gap": found.gap, "steps": found.steps}
    told_first = write_result(options.out, names, found.proportions, method="mixmin", source=source, details=details)
    lines = [told_first, f"nats per token on {'held-out pieces' if len(tested) else 'the fitted pieces'}:"]
    lines += [f"  {name:<20} {value:.4f}" for name, value in told.get("tested", told["fitted"]).items()]
    if found.gap > _TOLERANCE:
        lines.append(f"note: after {found.steps} steps still up to {found.gap:.2g} above the minimum; raise --steps")
    return Answer("\n".join(lines), told_first.values)


def chameleon_step(options: argparse.Namespace) -> Answer:
    """Write proportions by Chameleon and return what to print."""
    if (options.embeddings is None) == (options.model is None):
        raise ConfigError("--model and --embeddings: give one of the two (a model with --domains)")
    if not options.ridge > 0:
        raise ConfigError(f"--ridge: must be above 0, found {options.ridge:g}")
    check_out(options.out)
    if options.embeddings is not None:
        check_effective(options, "--embeddings", "domains", "column", "samples", "tokens", "save_embeddings")
        names, means = read_embeddings(options.embeddings)
        inputs = [options.embeddings]
    else:
        if options.domains is None:
            raise ConfigError("--domains: missing; name a file of texts for each domain: web=web.txt,code=code.txt")
        fill_in(options, column="text", samples=2048, tokens=512)
        if options.save_embeddings is not None:
            _check_saved("--save-embeddings", options.save_embeddings)
        if options.samples < 1 or options.tokens < 1:
            raise ConfigError("--samples and --tokens must be at least 1")
        _check_models("--model", [options.model])
        files = {name: Path(file) for name, file in _by_domain(options.domains, "--domains").items()}
        texts = [_texts(file, options, options.samples, name) for name, file in files.items()]
        states = [mean_states(options.model, rows, most_tokens=options.tokens) for rows in texts]
        names, means = tuple(files), np.stack([rows.mean(axis=0) for rows in states])
        inputs = [*files.values(), Path(options.model)]
    if options.save_embeddings is not None:
        write_embeddings(options.save_embeddings, names, means)
    scores = leverage(centred_kernel(means), options.ridge)
    shares = leverage_weights(scores, options.purpose, names)
    keys = ("model", "domains", "column", "samples", "tokens", "purpose", "ridge", "seed")
    source = provenance("dataflex mix chameleon", inputs=inputs, settings=given(options, *keys))
    details = {"scores": dict(zip(names, scores.tolist(), strict=True)), "purpose": options.purpose}
    method = f"chameleon ({options.purpose})"
    return write_result(options.out, names, shares, method=method, source=source, details=details)
