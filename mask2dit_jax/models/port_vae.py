"""Port table of the VAE, between diffusers' AutoencoderKLCogVideoX and `models.vae.VAE`."""

from mask2dit_jax.models.port_rules import CONV2D, CONV3D, KEEP, Rule, Transform

# A 1x1x1 convolution is a Linear here: (out, in, 1, 1, 1) <-> (in, out).
POINTWISE = Transform(lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T[:, :, None, None, None])


def _layer(key: str, path: str, weight: Transform, weight_name: str = "kernel") -> tuple[Rule, Rule]:
    return Rule(f"{key}.weight", f"{path}.{weight_name}", weight), Rule(f"{key}.bias", f"{path}.bias")


def _group_norm(key: str, path: str):
    return _layer(key, path, KEEP, "scale")


def _spatial_norm(key: str, path: str):
    return (
        *_group_norm(f"{key}.norm_layer", f"{path}.norm"),
        *_layer(f"{key}.conv_y.conv", f"{path}.scale", POINTWISE),
        *_layer(f"{key}.conv_b.conv", f"{path}.shift", POINTWISE),
    )


def _resnet(key: str, path: str, norm):
    return (
        *norm(f"{key}.norm1", f"{path}.norm1"),
        *_layer(f"{key}.conv1.conv", f"{path}.conv1", CONV3D),
        *norm(f"{key}.norm2", f"{path}.norm2"),
        *_layer(f"{key}.conv2.conv", f"{path}.conv2", CONV3D),
        *_layer(f"{key}.conv_shortcut", f"{path}.conv_shortcut", POINTWISE),
    )


def _coder(coder: str, blocks: str, sampler: str, norm):
    return (
        *_layer(f"{coder}.conv_in.conv", f"{coder}.conv_in", CONV3D),
        *_resnet(f"{coder}.{blocks}.{{i}}.resnets.{{j}}", f"{coder}.{blocks}.{{i}}.resnets.{{j}}", norm),
        *_layer(f"{coder}.{blocks}.{{i}}.{sampler}s.0.conv", f"{coder}.{blocks}.{{i}}.{sampler}", CONV2D),
        *_resnet(f"{coder}.mid_block.resnets.{{j}}", f"{coder}.mid.{{j}}", norm),
        *norm(f"{coder}.norm_out", f"{coder}.norm_out"),
        *_layer(f"{coder}.conv_out.conv", f"{coder}.conv_out", CONV3D),
    )


TABLE: tuple[Rule, ...] = (
    *_coder("encoder", "down_blocks", "downsampler", _group_norm),
    *_coder("decoder", "up_blocks", "upsampler", _spatial_norm),
)
