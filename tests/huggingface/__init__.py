"""Trainers of transformers and TRL; TRL 0.24 takes every package for installed until LLaMA-Factory mends that."""

from importlib.util import find_spec

if find_spec("llamafactory") is not None:
    import llamafactory.extras.packages  # noqa: F401
