"""Which parameters train. The others get no gradient, no optimiser state and no EMA: none of them is ever allocated."""

import re
from collections.abc import Sequence

from flax import nnx

from mask2dit_jax.errors import UserError


def split(params: nnx.State, patterns: Sequence[str]) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen): trained is what one of the regular expressions matches as a whole; all if there are none."""
    return tuple(nnx.split_state(params, lambda path, _: is_trained(path, patterns), ...))


def join(trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """Inverse of `split`."""
    return nnx.merge_state(trained, frozen)


def is_trained(path: Sequence[str], patterns: Sequence[str]) -> bool:
    name = ".".join(map(str, path))
    return not patterns or any(re.fullmatch(pattern, name) for pattern in patterns)


def check_patterns(params: nnx.State, patterns: Sequence[str]) -> None:
    """Raises UserError for a pattern that is no regular expression, or that matches none of the parameters."""
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    for pattern in patterns:
        try:
            matched = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"trainable pattern {pattern!r} is no regular expression ({error})") from error
        if not matched:
            raise UserError(
                f"trainable pattern {pattern!r} matches no parameter; they are called like {names[0]!r}, and '.*' "
                "stands for anything"
            )
