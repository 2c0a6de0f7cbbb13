"""Tests the report on programs that are compiled for TPUs and small enough to count by hand."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax.parallel.chips import parse_topology
from mask2dit_jax.tpu.hlo import arrays_at_least, parse
from mask2dit_jax.tpu.report import ModelFlops, analyse, compile_and_analyse, format_table

V5E = parse_topology("v5e:2x2")
REPLICATED = P()
PROMISED = {
    "hbm_peak_gib", "hbm_limit_gib", "hbm_arguments_gib", "hbm_temporaries_gib", "hbm_headroom_gib",
    "matmul_flops_executed", "matmul_flops_ideal", "attention_flops_executed", "attention_flops_ideal",
    "collective_bytes", "collective_seconds", "exposed_collective_seconds", "roofline_seconds", "mfu_ceiling",
    "compile_seconds",
}  # fmt: skip
NO_MODEL = ModelFlops(matmul_ideal=0.0, attention_ideal=0.0)


def mesh_of(topology, shape=(2, 2), axes=("data", "fsdp")):
    return Mesh(np.array(topology.devices()).reshape(shape), axes)


def array(mesh, shape, spec=REPLICATED, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))


def report_of(function, *arguments, topology=V5E, model=NO_MODEL):
    return compile_and_analyse(lower(function, *arguments), topology=topology, model_flops=model, name="program")


def test_rematerialised_scan_under_grad():
    """A layer has one product forward. The backward pass repeats it and has two more of the same size."""
    mesh, layers, rows, width = mesh_of(V5E), 6, 512, 1024

    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ weight.astype(jnp.bfloat16)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)

    weights = array(mesh, (layers, width, width), P(None, "data", "fsdp"), jnp.float32)
    x = array(mesh, (rows, width), P("data"))
    forward = 2 * (rows // 2) * width * (width // 2) * layers
    report = report_of(jax.grad(loss), weights, x, model=ModelFlops(3.0 * forward, 0.0))
    assert report.matmul_flops_executed == 4 * forward
    assert report.mfu_ceiling == pytest.approx(3 * forward / 197e12 / report.roofline_seconds)
    assert report.fits
    assert report.hbm_arguments_gib == pytest.approx((layers * width * width + rows * width // 2 * 2) / 2**30, rel=0.01)
    # Each iteration gathers the other half of the layer's rows in bf16, in the forward and in the backward pass.
    assert report.collective_bytes["all-gather"] >= 2 * layers * width // 2 * width // 2 * 2
    assert 0 < report.exposed_collective_seconds <= report.roofline_seconds
    assert json.loads(json.dumps(report.to_json())).keys() >= PROMISED
    header, row = format_table([report]).splitlines()
    assert len(re.split(r"\s{2,}", header)) == len(re.split(r"\s{2,}", row))


def test_loops_in_loops_multiply():
    mesh, micro_batches, layers, rows, width = mesh_of(V5E, (4,), ("data",)), 3, 5, 256, 256

    def model(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    def accumulate(xs, weights):
        return jax.lax.scan(lambda total, x: (total + model(x, weights), None), jnp.zeros_like(xs[0]), xs)[0]

    xs = array(mesh, (micro_batches, rows, width), P(None, "data"))
    report = report_of(accumulate, xs, array(mesh, (layers, width, width)))
    assert report.matmul_flops_executed == micro_batches * layers * 2 * (rows // 4) * width * width
    assert report.collective_bytes == {}
    assert report.warnings == ()


def test_products_with_batch_and_head_dimensions():
    """The compiler writes them as convolutions that mostly meet padding."""
    mesh, b, s, n, k = mesh_of(V5E, (4,), ("data",)), 8, 256, 4, 64

    def attention(x, project):
        q = jnp.einsum("bsd,dnk->bnsk", x, project)
        return jnp.einsum("bnst,bntk->bsnk", jnp.exp(jnp.einsum("bnsk,bntk->bnst", q, q)), q)

    x, project = array(mesh, (b, s, n * k), P("data")), array(mesh, (n * k, n, k))
    report = report_of(attention, x, project)
    local = b // 4
    assert report.matmul_flops_executed == 2 * local * s * (n * k) ** 2 + 2 * (2 * local * n * s * s * k)
    # Heads half as wide as the matrix unit take twice the time.
    attention_flops = 2 * (2 * local * n * s * s * k)
    assert report.matmul_seconds * 197e12 >= 2 * attention_flops


def test_convolution_agrees_with_the_compilers_own_count():
    """The compiler may cut an image into overlapping pieces and then executes more than the taps inside it."""
    mesh, frames, side, channels = mesh_of(V5E, (4,), ("data",)), 4, 16, 128
    image, kernel = (4, frames, side, side, channels), (3, 3, 3, channels, channels)
    layout = ("NDHWC", "DHWIO", "NDHWC")

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1, 1), "SAME", dimension_numbers=layout)

    compiled = lower(convolve, array(mesh, image, P("data")), array(mesh, kernel)).compile()
    report = analyse(compiled, topology=V5E, compile_seconds=1.0, model_flops=NO_MODEL)
    assert report.matmul_flops_executed == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)
    assert report.matmul_flops_executed >= 2 * (3 * frames - 2) * (3 * side - 2) ** 2 * channels**2


def test_collectives_under_shard_map():
    topology = parse_topology("v5e:4x4")
    devices = np.array(sorted(topology.devices(), key=lambda device: (device.coords[1], device.coords[0])))
    mesh = Mesh(devices.reshape(4, 4), ("rows", "columns"))  # columns along x, rows along y
    local = 512 * 512 * 4

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("rows", "columns"), out_specs=P("rows", "columns"))
    def everything(x):
        total = jax.lax.psum(x, ("rows", "columns"))
        gathered = jax.lax.all_gather(jnp.sin(x), "columns", axis=0, tiled=True)
        exchanged = jax.lax.all_to_all(jnp.cos(x), "rows", 0, 1, tiled=True).reshape(x.shape)
        passed = jax.lax.ppermute(jnp.exp(x), "columns", [(i, i + 1) for i in range(3)])
        return x + total + gathered.reshape(4, *x.shape).max(0) + exchanged + passed

    report = report_of(everything, array(mesh, (2048, 2048), P("rows", "columns"), jnp.float32), topology=topology)
    rows = {row["kind"]: row for row in report.collectives}
    assert report.collective_bytes["all-gather"] == 3 * local
    assert report.collective_bytes["all-to-all"] == 3 / 4 * local
    assert report.collective_bytes["collective-permute"] == local
    assert (rows["all-gather"]["across"], rows["all-to-all"]["across"]) == ("x", "y")
    assert rows["collective-permute"]["across"] == "x"
    assert rows["all-gather"]["group_size"] == 4
    # A line of four chips has one link of 50 GB/s in each direction.
    assert rows["all-gather"]["seconds"] == pytest.approx(3 * local / 50e9)
    assert rows["all-to-all"]["seconds"] == pytest.approx(local / 50e9)
    assert rows["collective-permute"]["seconds"] == pytest.approx(local / 50e9)
    # The sum runs over 16 chips and both dimensions, in one operation or as a reduce-scatter and an all-gather.
    assert rows["all-reduce"]["across"] == "xy"
    assert report.collective_bytes["all-reduce"] == 2 * 15 / 16 * local


def test_kernels_by_name_and_number_of_calls():
    mesh = mesh_of(V5E, (4,), ("data",))

    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    def repeated(x):
        call = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="my_attention_fwd")
        return jax.lax.scan(lambda x, _: (call(x), None), x, length=7)[0]

    x = array(mesh, (1024, 128), P("data"), jnp.float32)
    given = report_of(repeated, x, model=ModelFlops(0.0, 7e9, {"my_attention": 2e9}, head_dim=64))
    assert given.kernel_calls == {"my_attention_fwd": 7}
    assert given.attention_flops_executed == 14e9
    # A head dimension of 64 on a unit 128 wide halves the rate.
    assert given.attention_seconds == pytest.approx(2 * 14e9 / 197e12)
    assert given.mfu_ceiling == pytest.approx(0.25, rel=0.05)
    assert given.warnings == ()
    left_out = report_of(repeated, x)
    assert "my_attention_fwd" in left_out.warnings[0]


def test_other_slices_are_reached_through_the_hosts():
    topology = parse_topology("v5e:2x2", num_slices=2)
    devices = sorted(topology.devices(), key=lambda device: (device.slice_index, device.id))
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "fsdp"))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data", "fsdp"), out_specs=P("data", "fsdp"))
    def mean(x):
        return x - jax.lax.pmean(x, "data")

    report = report_of(mean, array(mesh, (1024, 2048), P("data", "fsdp"), jnp.float32), topology=topology)
    (row,) = report.collectives
    local = 512 * 512 * 4
    assert (row["kind"], row["group_size"], row["across"]) == ("all-reduce", 2, "dcn")
    assert row["bytes"] == local
    assert row["seconds"] == pytest.approx(local / (25e9 / 8))


def test_what_the_compiler_refuses_is_reported():
    mesh = mesh_of(V5E)
    report = report_of(lambda x: jnp.sort(x, axis=0), array(mesh, (2**16, 2**16), dtype=jnp.float32))
    assert not report.fits
    assert report.hbm_limit_gib == 15.75
    assert report.hbm_peak_gib >= 32
    assert report.hbm_headroom_gib == pytest.approx(15.75 - report.hbm_peak_gib)
    assert report.roofline_seconds is None
    table = format_table([report])
    assert "does not fit" in table
    assert "fsdp" in table
    assert report.to_json()["matmul_flops_executed"] is None


def test_other_errors_of_the_compiler_are_not_swallowed():
    x = array(mesh_of(V5E), (8,))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compile_and_analyse(
            lower(jnp.sin, x), topology=V5E, model_flops=NO_MODEL, compiler_options={"xla_no_such_option": "1"}
        )


def test_large_arrays_are_found():
    mesh = mesh_of(V5E, (4,), ("data",))
    compiled = lower(lambda q: jnp.exp(q @ q.T) @ q, array(mesh, (1024, 128), P("data"))).compile()
    module = parse(compiled.as_text())
    assert arrays_at_least(module, rows=256, columns=1024)
    assert not arrays_at_least(module, rows=1024, columns=1024)
    report = analyse(compiled, topology=V5E, compile_seconds=1.0, model_flops=NO_MODEL)
    assert report.compile_seconds == 1.0
