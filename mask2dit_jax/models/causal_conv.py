"""Causal convolution over the frames of a chunk, and the frame-by-frame form that a CPU needs for large chunks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.parallel.mesh import platform

LARGE = 2**26  # elements from which a CPU processes a chunk frame by frame


class Frames(NamedTuple):
    """Frames that are made when needed, by `make(*parts)`: all at once, or any run of them.

    Norms with their activation return such frames, so that a convolution that goes frame by frame holds few in memory.
    """

    parts: tuple[Array, ...]  # (b f ...) each
    make: Callable[..., Array]

    def __getitem__(self, run: slice) -> "Frames":
        """Return a run of frames."""
        return Frames(tuple(part[:, run] for part in self.parts), self.make)

    def all(self) -> Floats["b f h w c"]:
        """Make all frames."""
        return self.make(*self.parts)

    @classmethod
    def of(cls, x: Floats["b f h w c"]) -> "Frames":
        """Wrap frames that exist already."""
        return cls((x,), lambda x: x)


def is_frame_by_frame(x: Array) -> bool:
    """Tell whether a chunk is so large that this platform processes it frame by frame, to save memory."""
    return platform() == "cpu" and x.size >= LARGE


def take_frame(x: Floats["b f ..."], i) -> Floats["b 1 ..."]:
    """Return frame `i`. Without the barrier XLA widens all frames of a narrower `x` to float32 before the loop."""
    x, i = jax.lax.optimization_barrier((x, i))
    return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)


def _in_place(step: Callable, carry, x: Floats["b f h w i"], features: int):
    """Run `carry, frame = step(carry, frame of x, number)` frame by frame; return carry and frames of `features`.

    If the widths agree, frames overwrite those they are made from. Otherwise the result starts as a slice or padding of
    `x`, because XLA allocates results that start as zeros at the start of the program, those of all loops together.
    """
    width = x.shape[-1]
    out = x[..., :features] if features <= width else jnp.pad(x, [(0, 0)] * 4 + [(0, features - width)])

    def body(i, state):
        carry, out = state
        carry, frame = step(carry, take_frame(out if features == width else x, i), i)
        return carry, jax.lax.dynamic_update_slice_in_dim(out, frame, i, axis=1)

    return jax.lax.fori_loop(0, x.shape[1], body, (carry, out))


def map_frames(layer: Callable, x: Floats["b f h w i"], features: int) -> Floats["b f h_y w_y o"]:
    """Return `layer(x)` for a layer that does not mix frames."""
    if layer is nnx.identity or not is_frame_by_frame(x):
        return layer(x)
    return _in_place(lambda carry, frame, i: (carry, layer(frame)), (), x, features)[1]


class CausalConv3d(nnx.Module):
    """3x3x3 convolution, zero-padded in space and causal in time: the first frame is repeated before the clip.

    XLA's 3-D convolution is used on TPUs only. A CPU sums one 2-D convolution for each time tap, which is two to four
    times as fast there. A GPU runs one 2-D convolution over the joined channels of three frames: on an H200 that is 1.2
    to 1.3 times as fast as a 3-D convolution in bfloat16, and twice as fast as one with fp32 output (docs/gpu.md).
    """

    TAPS = 3

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        """Build the kernel and bias."""
        shape = (self.TAPS, 3, 3, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.dtype = dtype

    def __call__(self, frames: Frames, past: Floats["b 2 h w i"] | None):
        """Convolve a chunk; return (output, the last two input frames), which are `past` of the next chunk."""
        if past is None:
            past = jnp.repeat(frames[:1].all(), self.TAPS - 1, axis=1)
        if is_frame_by_frame(frames.parts[0]):
            return self._frame_by_frame(frames, past)
        x = jnp.concatenate([past, frames.all()], axis=1)
        convolve = CONVOLUTIONS.get(platform(), _conv_3d)
        return self._finish(convolve(x, self.kernel[...].astype(self.dtype))), x[:, -(self.TAPS - 1) :]

    def _frame_by_frame(self, frames: Frames, past):
        kernel = self.kernel[...].astype(self.dtype)
        x, *rest = frames.parts

        def convolve(past, x, i):
            now = frames.make(x, *(take_frame(part, i) for part in rest))
            window = jnp.concatenate([past, now], axis=1)
            return window[:, 1:], self._finish(_conv_by_taps(window, kernel))

        past, out = _in_place(convolve, past, x, kernel.shape[-1])
        return out, past

    def _finish(self, out) -> Floats["b f h w o"]:
        return (out + self.bias[...]).astype(self.dtype)


def _conv_3d(x: Floats["b f_x h w i"], kernel: Floats["t 3 3 i o"]) -> Floats["b f h w o"]:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1, 1),
        padding=((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        preferred_element_type=jnp.float32,
    )


def _conv_by_taps(x: Floats["b f_x h w i"], kernel: Floats["t 3 3 i o"]) -> Floats["b f h w o"]:
    """Convolve with one 2-D convolution for each time tap."""
    frames = x.shape[1] - len(kernel) + 1
    return sum(_conv_frames(x[:, tap : tap + frames], kernel[tap]) for tap in range(len(kernel)))


def _conv_over_channels(x: Floats["b f_x h w i"], kernel: Floats["t 3 3 i o"]) -> Floats["b f h w o"]:
    """Convolve over the joined channels of the frames of all time taps. Holds the input t times."""
    frames = x.shape[1] - len(kernel) + 1
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(len(kernel))], axis=-1)
    # cuDNN accumulates in fp32 whatever it returns; with fp32 results its autotuning takes minutes.
    return _conv_frames(x, jnp.concatenate(list(kernel), axis=2), x.dtype)


CONVOLUTIONS = {"cpu": _conv_by_taps, "gpu": _conv_over_channels}  # by platform; `_conv_3d` elsewhere


def _conv_frames(
    x: Floats["b f h w i"], kernel: Floats["3 3 i o"], out_dtype: DTypeLike = jnp.float32
) -> Floats["b f h w o"]:
    """Convolve every frame in 2-D. By default the output is fp32, so that time taps are summed before rounding."""
    b, f, h, w, _ = x.shape
    out = jax.lax.conv_general_dilated(
        x.reshape(b * f, h, w, -1),
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=out_dtype,
    )
    return out.reshape(b, f, h, w, -1)
