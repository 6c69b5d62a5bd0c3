"""`trl-tpgrpo serve-reward`: reward functions over HTTP."""

from collections.abc import Callable
from typing import Any

from ..rewards.serving.functions import find_function


def main(argv: list[str]) -> int:
    """Serve built-in reward functions and those of one's own modules; raise ImportError without the extra `serve`."""
    try:
        from ..rewards.serving.program import main as serve
    except ImportError as error:
        raise ImportError(f"serve-reward needs {error.name}: pip install 'trl-tpgrpo[serve]'.") from error
    return serve(argv, find_reward)


def find_reward(name: str) -> Callable[..., Any]:
    """Find a reward function by its built-in name or dotted import path; raise ValueError if there is none."""
    if "." in name:
        return find_function(name)
    from .train import load_reward  # with torch, diffusers and TRL, which others need not wait for

    return load_reward(name)
