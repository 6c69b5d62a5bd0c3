"""`trl-tpgrpo serve-reward`: reward functions over HTTP."""

from .rewards import find_reward


def main(argv: list[str]) -> int:
    """Serve built-in and custom reward functions; raise ImportError without the extra `serve`."""
    try:
        from ..rewards.serving.program import main as serve
    except ImportError as error:
        raise ImportError(f"serve-reward needs {error.name}: pip install 'trl-tpgrpo[serve]'.") from error
    return serve(argv, find_reward)
