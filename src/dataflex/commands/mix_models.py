"""``dataflex mix mixmin`` and ``dataflex mix chameleon``: proportions without a swarm."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataflex.commands.mix_result import names_of, write_result
from dataflex.errors import ConfigError
from dataflex.mixing import chameleon as leverage_scores
from dataflex.mixing import mixmin as likelihood_weights
from dataflex.mixing.matrices import read_embeddings, read_matrix, write_embeddings, write_matrix
from dataflex.mixing.proportions_file import provenance

__all__ = ["chameleon", "mixmin"]

Floats = NDArray[np.float64]


def mixmin(options: argparse.Namespace) -> str:
    """Write proportions by MixMin and return what to print.

    Raises:
        ConfigError: Options that cannot work together.
        DataError: Files or models that cannot be used.
    """
    if (options.matrix is None) == (options.models is None):
        raise ConfigError("--models and --matrix: give one of the two (models with --target)")
    if not 0 <= options.test_share < 1:
        raise ConfigError(f"--test-share: must be at least 0 and below 1, found {options.test_share:g}")
    if options.rate <= 0 or options.steps < 1:
        raise ConfigError("--rate must be above 0 and --steps at least 1")
    if options.matrix is not None:
        names, loglik, lengths = read_matrix(options.matrix)
        inputs = [options.matrix]
    else:
        names, loglik, lengths, inputs = _likelihoods(options)
    likelihood_weights.check_matrix(loglik, lengths)
    if options.save_matrix is not None:
        write_matrix(options.save_matrix, names, loglik, lengths)
    fitted, tested = likelihood_weights.split_rows(len(loglik), options.test_share, options.seed)
    if not len(fitted):
        raise ConfigError(f"--test-share: leaves none of {len(loglik)} pieces to fit on")
    found = likelihood_weights.solve(loglik[fitted], lengths[fitted], rate=options.rate, most_steps=options.steps)
    equal = np.full(len(names), 1 / len(names))
    told = {"pieces": len(loglik), "fitted": _table(found.weights, equal, loglik[fitted], lengths[fitted])}
    if len(tested):
        told["tested"] = _table(found.weights, equal, loglik[tested], lengths[tested])
    keys = ("models", "target", "column", "piece_tokens", "most_texts", "rate", "steps", "test_share", "seed")
    source = provenance("dataflex mix mixmin", inputs=inputs, settings={key: getattr(options, key) for key in keys})
    details = {**told, "gap": found.gap, "steps": found.steps}
    lines = write_result(options.out, names, found.weights, method="mixmin", source=source, details=details)
    where = told.get("tested", told["fitted"])
    assert isinstance(where, dict)
    lines.append(f"nats per token on {'held-out pieces' if len(tested) else 'the fitted pieces'}:")
    lines += [f"  {name:<20} {value:.4f}" for name, value in where.items()]
    if found.gap > 1e-4:
        lines.append(f"note: after {found.steps} steps still up to {found.gap:.2g} above the minimum; raise --steps")
    return "\n".join(lines)


def _table(weights: Floats, equal: Floats, loglik: Floats, lengths: Floats) -> dict[str, float]:
    """Return F of the found weights, of equal ones, and of the best single domain."""
    single = [likelihood_weights.objective(row, loglik, lengths)[0] for row in np.eye(len(weights))]
    values = [likelihood_weights.objective(each, loglik, lengths)[0] for each in (weights, equal)]
    return {"mixmin": values[0], "equal": values[1], "best_single": min(single)}


def _likelihoods(options: argparse.Namespace) -> tuple[tuple[str, ...], Floats, Floats, list[Path]]:
    from dataflex.mixing.proxies import log_likelihoods
    from dataflex.mixing.texts import read_texts, sample

    if options.target is None:
        raise ConfigError("--target: missing; name a file of texts that the mixture is for")
    if options.piece_tokens < 2 or options.most_texts < 1:
        raise ConfigError("--piece-tokens must be at least 2 and --most-texts at least 1")
    models = _by_name(options.models, "--models")
    texts = sample(read_texts(options.target, names_of(options.column)), options.most_texts, options.seed, "target")
    loglik, lengths = log_likelihoods(models, texts, piece_tokens=options.piece_tokens)
    return tuple(models), loglik, lengths, [options.target, *(Path(folder) for folder in models.values())]


def chameleon(options: argparse.Namespace) -> str:
    """Write proportions by Chameleon and return what to print.

    Raises:
        ConfigError: Options that cannot work together.
        DataError: Files or a model that cannot be used, or domains that look alike.
    """
    if (options.embeddings is None) == (options.model is None):
        raise ConfigError("--model and --embeddings: give one of the two (a model with --domains)")
    if not options.ridge > 0:
        raise ConfigError(f"--ridge: must be above 0, found {options.ridge:g}")
    if options.embeddings is not None:
        names, means = read_embeddings(options.embeddings)
        inputs = [options.embeddings]
    else:
        names, means, inputs = _embedded(options)
    if options.save_embeddings is not None:
        write_embeddings(options.save_embeddings, names, means)
    scores = leverage_scores.leverage(leverage_scores.gram(means), options.ridge)
    shares = leverage_scores.weights(scores, options.purpose, names)
    keys = ("model", "domains", "column", "samples", "tokens", "purpose", "ridge", "seed")
    source = provenance("dataflex mix chameleon", inputs=inputs, settings={key: getattr(options, key) for key in keys})
    details = {"scores": dict(zip(names, scores.tolist(), strict=True)), "purpose": options.purpose}
    method = f"chameleon ({options.purpose})"
    return "\n".join(write_result(options.out, names, shares, method=method, source=source, details=details))


def _embedded(options: argparse.Namespace) -> tuple[tuple[str, ...], Floats, list[Path]]:
    from dataflex.mixing.proxies import mean_states
    from dataflex.mixing.texts import read_texts, sample

    if options.domains is None:
        raise ConfigError("--domains: missing; name a file of texts for each domain, as in web=web.txt,code=code.txt")
    if options.samples < 1 or options.tokens < 1:
        raise ConfigError("--samples and --tokens must be at least 1")
    files = {name: Path(file) for name, file in _by_name(options.domains, "--domains").items()}
    columns = names_of(options.column)
    texts = {
        name: sample(read_texts(file, columns), options.samples, options.seed, name) for name, file in files.items()
    }
    means = [mean_states(options.model, rows, most_tokens=options.tokens).mean(axis=0) for rows in texts.values()]
    return tuple(files), np.stack(means), [*files.values(), Path(options.model)]


def _by_name(text: str, key: str) -> dict[str, str]:
    """Return ``web=FOLDER,code=FOLDER`` as a mapping of two domains or more."""
    found: dict[str, str] = {}
    for entry in text.split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name or not value:
            raise ConfigError(f"{key}: {entry.strip()!r} is not NAME=PATH")
        if name in found:
            raise ConfigError(f"{key}: {name} is there twice")
        found[name] = value
    if len(found) < 2:
        raise ConfigError(f"{key}: needs at least two domains, found {len(found)}")
    return found
