"""From what a configuration says to a reward."""

from __future__ import annotations

from dataflex.errors import did_you_mean
from dataflex.rewards.base import Reward
from dataflex.rewards.command import CommandReward
from dataflex.rewards.function import FunctionReward, load_function, missing_source
from dataflex.rewards.judge import Judge, JudgeConfig
from dataflex.rewards.metrics import METRICS, metric

__all__ = ["build_reward", "reward_problem"]

_OTHERS = ("command", "judge")


def reward_problem(reward: str, command: str | None, judge: JudgeConfig | None) -> str:
    """Return what is wrong with a reward's configuration, beginning with the key, or ""; nothing is imported."""
    for name, given in (("command", command), ("judge", judge)):
        if reward == name and given is None:
            return f"{name}: missing; 'reward: {name}' needs it"
        if reward != name and given is not None:
            return f"{name}: has no effect with 'reward: {reward}'; write 'reward: {name}' or remove it"
    if reward in METRICS or reward in _OTHERS:
        return ""
    if ":" in reward:
        problem = missing_source(reward)
        return f"reward: {problem}" if problem else ""
    known = [*METRICS, *_OTHERS]
    return (
        f"reward: unknown {reward!r}{did_you_mean(reward, known)} (known: {', '.join(known)}, or a function as "
        "module:function or file.py:function)"
    )


def build_reward(reward: str, command: str | None, judge: JudgeConfig | None, timeout_seconds: float) -> Reward:
    """Return the reward.

    Args:
        reward: Name of a metric, ``command``, ``judge``, or ``module:function`` or ``file.py:function``.
        command: For ``command``.
        judge: For ``judge``.
        timeout_seconds: Of a function's call, or a command's silence.

    Raises:
        ConfigError: A function or command cannot be had, a library or the judge's key is missing.
    """
    if reward in METRICS:
        return metric(reward)
    if reward == "command":
        assert command is not None
        return CommandReward(command=command, timeout_seconds=timeout_seconds)
    if reward == "judge":
        assert judge is not None
        return Judge(judge)
    return FunctionReward(function=load_function(reward), timeout_seconds=timeout_seconds)
