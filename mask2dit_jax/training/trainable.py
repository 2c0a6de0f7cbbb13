"""Which parameters train. For all others no gradient, optimiser state or moving average is ever allocated."""

import re
from collections.abc import Sequence

from flax import nnx

from mask2dit_jax.errors import UserError


def split(params: nnx.State, patterns: Sequence[str]) -> tuple[nnx.State, nnx.State]:
    """Split parameters into (trained, frozen).

    Args:
        params: all parameters.
        patterns: regular expressions over parameter paths such as "blocks.attn.query.kernel". A parameter trains if one
            of them matches its whole path. Without patterns all parameters train.
    """
    return tuple(nnx.split_state(params, lambda path, _: is_trained(path, patterns), ...))


def join(trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """Join what `split` has split."""
    return nnx.merge_state(trained, frozen)


def is_trained(path: Sequence[str], patterns: Sequence[str]) -> bool:
    """Tell whether the parameter at `path` trains under `patterns`."""
    name = ".".join(map(str, path))
    return not patterns or any(re.fullmatch(pattern, name) for pattern in patterns)


def check_patterns(params: nnx.State, patterns: Sequence[str]) -> None:
    """Raise UserError for a pattern that is no regular expression or matches no parameter."""
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    for pattern in patterns:
        try:
            matched = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"trainable pattern {pattern!r} is no regular expression ({error})") from error
        if not matched:
            raise UserError(
                f"trainable pattern {pattern!r} matches no parameter; their paths look like {names[0]!r}, and '.*' "
                "matches anything"
            )
