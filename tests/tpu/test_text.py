"""Tests odd cases with short modules in the TPU compiler's text format."""

import textwrap
from types import SimpleNamespace

import pytest

from mask2dit_jax.parallel.chips import parse_topology
from mask2dit_jax.tpu.collectives import Interconnect, first_group
from mask2dit_jax.tpu.hlo import HBM, Array, arrays_at_least, parse
from mask2dit_jax.tpu.report import ModelFlops, refused, splash_kernel_flops
from mask2dit_jax.tpu.timeline import KernelFlops, measure
from mask2dit_jax.tpu.work import hbm_bytes, mxu_padding

V5E = parse_topology("v5e:4x4")
PEAK, HBM_BANDWIDTH, LINK = V5E.chip.peak_flops, V5E.chip.hbm_bandwidth, V5E.chip.ici_link_bandwidth


def chips(topology):
    """Return the devices of a slice, numbered along x first and then along y."""
    x_size, y_size = topology.shape
    return [SimpleNamespace(coords=[x, y, 0]) for y in range(y_size) for x in range(x_size)]


def work_of(text, topology=V5E, kernels=None):
    module = parse(textwrap.dedent(text))
    interconnect = Interconnect(topology, chips(topology))
    return measure(module, topology.chip, interconnect, KernelFlops(kernels or {}, 64))


def test_types_and_lines():
    module = parse(
        textwrap.dedent("""
        HloModule m, is_scheduled=true

        ENTRY %main (p: bf16[8,128]) -> f32[8] {
          %p = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
          %call.1 = (f32[8]{0:T(128)}, /*index=1*/pred[3]) custom-call(%p), frontend_attributes={kernel_metadata={
        "xprof_metadata":"{}"
        }}, metadata={op_name="jit(f)/k/pallas_call"}
          ROOT %first = f32[8]{0:T(128)} get-tuple-element(%call.1), index=0
        }
        """)
    )
    call = module.entry.instructions["call.1"]
    assert module.entry.arrays_of("p") == (Array("bf16", (8, 128), memory=1),)
    assert call.arrays == (Array("f32", (8,), HBM), Array("pred", (3,)))
    assert [array.bytes for array in call.arrays] == [32, 3]
    assert call.operands == ("p",)
    assert call.attribute(r'op_name="([^"]*)"') == "jit(f)/k/pallas_call"
    assert module.entry.root.name == "first"


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        parse("HloModule m\n")


LOOP = """
    %body (c: (s32[], f32[128,128], s32[])) -> (s32[], f32[128,128], s32[]) {{
      %c = (s32[], f32[128,128], s32[]) parameter(0)
      %i = s32[] get-tuple-element(%c), index=0
      %x = f32[128,128] get-tuple-element(%c), index=1
      %n = s32[] get-tuple-element(%c), index=2
      %step = s32[] constant({step})
      %next = s32[] add(%i, %step)
      %y = f32[128,128] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
      ROOT %t = (s32[], f32[128,128], s32[]) tuple(%next, %y, %n)
    }}

    %condition (c.1: (s32[], f32[128,128], s32[])) -> pred[] {{
      %c.1 = (s32[], f32[128,128], s32[]) parameter(0)
      %i.1 = s32[] get-tuple-element(%c.1), index=0
      %n.1 = s32[] get-tuple-element(%c.1), index=2
      %bound = s32[] constant({last})
      ROOT %more = pred[] compare(%i.1, %{bound}), direction={direction}
    }}

    ENTRY %main (x: f32[128,128]) -> f32[128,128] {{
      %x.1 = f32[128,128] parameter(0)
      %first = s32[] constant({first})
      %last = s32[] constant({last})
      %copy = s32[] copy(%first)
      %start = (s32[], f32[128,128], s32[]) tuple(%copy, %x.1, %last)
      %loop = (s32[], f32[128,128], s32[]) while(%start), condition=%condition, body=%body{known}
      ROOT %result = f32[128,128] get-tuple-element(%loop), index=1
    }}
"""


def loop(first=0, last=6, step=1, direction="LT", bound="bound", known=""):
    return LOOP.format(first=first, last=last, step=step, direction=direction, bound=bound, known=known)


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (loop(), 6),
        (loop(first=2, last=9, step=3), 3),
        (loop(direction="LE"), 7),
        (loop(first=6, last=0, step=-1, direction="GT"), 6),
        (loop(bound="n.1"), 6),  # the end is part of the carry
        (loop(first=5, last=2), 0),
        (loop(bound="i.1", known=', backend_config={"known_trip_count":{"n":"42"}}'), 42),
    ],
)
def test_turns_of_a_loop(text, turns):
    work = work_of(text)
    assert work.matmul_flops == turns * 2 * 128**3
    assert work.unknown_loops == []


def test_a_loop_of_unknown_length_is_named():
    work = work_of(loop(bound="i.1"))  # compares the counter with itself, which no real loop does
    assert work.unknown_loops == ["loop"]
    assert work.matmul_flops == 2 * 128**3


def test_condition_inside_a_fusion():
    text = loop().replace(
        "ROOT %more = pred[] compare(%i.1, %bound), direction=LT",
        "ROOT %more = pred[] fusion(%bound, %i.1), kind=kLoop, calls=%less",
    )
    less = """
    %less (a: s32[], b: s32[]) -> pred[] {
      %a = s32[] parameter(0)
      %b = s32[] parameter(1)
      ROOT %smaller = pred[] compare(%b, %a), direction=LT
    }
    """
    assert work_of(less + text).matmul_flops == 6 * 2 * 128**3


@pytest.mark.parametrize(("elements", "padding"), [(1, 1), (48, 2)])
def test_products_written_as_convolutions(elements, padding):
    """At each of 48 positions, all but one of the 48 taps meet padding, which leaves 48 products of 64 x 512 x 64.

    With one element they form one product with 48 x 64 columns, which fill the matrix unit. With 48 they are separate.
    """
    text = f"""
    ENTRY %main (a: bf16[64,512,{elements}], b: bf16[48,64,512]) -> bf16[48,64,64] {{
      %a = bf16[64,512,{elements}] parameter(0)
      %b = bf16[48,64,512] parameter(1)
      ROOT %y = bf16[48,64,64] convolution(%a, %b), WINDOW, dim_labels=bf0_0oi->0bf
    }}
    """
    window = "window={size=48 pad=47_47 rhs_reversal=1}"
    if elements == 48:
        window = "window={size=48 stride=47 pad=0_0 lhs_dilate=48}"
    work = work_of(text.replace("WINDOW", window))
    assert work.matmul_flops == 2 * 48 * 64 * 512 * 64
    assert work.matmul_seconds == pytest.approx(padding * work.matmul_flops / PEAK)


def test_precision_costs_time_not_flops():
    text = """
    ENTRY %main (a: f32[256,256]) -> f32[256,256] {
      %a = f32[256,256] parameter(0)
      ROOT %y = f32[256,256] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}PRECISION
    }
    """
    once = work_of(text.replace("PRECISION", ""))
    highest = work_of(text.replace("PRECISION", ", operand_precision={highest,highest}"))
    assert once.matmul_flops == highest.matmul_flops == 2 * 256**3
    assert highest.matmul_seconds == pytest.approx(6 * once.matmul_seconds)


def test_narrow_sides_leave_the_unit_idle():
    assert mxu_padding(64.0, 128.0, 128) == 2
    assert mxu_padding(64.0, 256.0, 256) == 4
    assert mxu_padding(3072.0, 3072.0, 128) == 1


def test_fusions_read_slices_and_write_updates():
    """A layer reads its weights from the stack of all layers and writes its result into a stack in place."""
    module = parse(
        textwrap.dedent("""
        %fused (stack: f32[42,128], results: f32[42,128], i: s32[], cached: f32[128]) -> f32[42,128] {
          %stack = f32[42,128] parameter(0)
          %results = f32[42,128] parameter(1)
          %i = s32[] parameter(2)
          %cached = f32[128] parameter(3)
          %zero = s32[] constant(0)
          %slice = f32[1,128] dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,128}
          ROOT %update = f32[42,128] dynamic-update-slice(%results, %slice, %i, %zero)
        }

        ENTRY %main (stack: f32[42,128], results: f32[42,128], i: s32[], cached: f32[128]) -> f32[42,128] {
          %stack.1 = f32[42,128] parameter(0)
          %results.1 = f32[42,128] parameter(1)
          %i.1 = s32[]{:S(6)} parameter(2)
          %cached.1 = f32[128]{0:S(1)} parameter(3)
          ROOT %y = f32[42,128] fusion(%stack.1, %results.1, %i.1, %cached.1), kind=kLoop, calls=%fused
        }
        """)
    )
    assert hbm_bytes(module, module.entry, module.entry.root) == 2 * 128 * 4


ASYNC = """
    ENTRY %main (x: bf16[1024,1024], y: bf16[SIZE,1024]) -> bf16[SIZE,1024] {
      %x = bf16[1024,1024]{1,0:S(1)} parameter(0)
      %y = bf16[SIZE,1024]{1,0:S(1)} parameter(1)
      %start = (bf16[1024,1024], bf16[4096,1024]) all-gather-start(%x), replica_groups=[4,4]<=[16], dimensions={0}
      %product = bf16[SIZE,1024]{1,0:S(1)} dot(%y, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      %done = bf16[4096,1024] all-gather-done(%start)
      ROOT %z = bf16[SIZE,1024]{1,0:S(1)} copy(%product)
    }
"""


@pytest.mark.parametrize("rows", [1024, 65536])
def test_computation_hides_an_asynchronous_collective(rows):
    work = work_of(ASYNC.replace("SIZE", str(rows)))
    gather = 3 * 1024 * 1024 * 2 / LINK  # a line of four chips along x
    product = 2 * rows * 1024 * 1024 / PEAK
    assert work.collective_seconds == pytest.approx(gather)
    assert work.exposed_seconds == pytest.approx(max(0.0, gather - product))
    assert work.seconds == pytest.approx(max(gather, product))
    ((key, total),) = work.collectives.items()
    assert key == ("all-gather", 4, "x", "async")
    assert (total.count, total.moved_bytes) == (1, 3 * 1024 * 1024 * 2)


def test_fusions_that_carry_a_collective_along_count_it_once():
    gather = "all-gather(%p), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}"
    chain = 'frontend_attributes={chain_id="3"}, backend_config={"async_collective_fusion_config":{}}'
    text = f"""
    %begin (p: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
      %p = bf16[64,128] parameter(0)
      %g = bf16[256,128] {gather}, {chain}
      ROOT %c = (bf16[64,128], bf16[256,128]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
    }}

    %between (p: bf16[64,128], a: bf16[512,512]) -> (bf16[512,512], bf16[256,128]) {{
      %p = bf16[64,128] parameter(0)
      %a = bf16[512,512] parameter(1)
      %product = bf16[512,512] dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
      %g = bf16[256,128] {gather}, {chain}
      ROOT %t = (bf16[512,512], bf16[256,128]) tuple(%product, %g)
    }}

    %end (p: bf16[64,128]) -> bf16[256,128] {{
      %p = bf16[64,128] parameter(0)
      %g = bf16[256,128] {gather}, {chain}
      ROOT %c = bf16[256,128] custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
    }}

    ENTRY %main (x: bf16[64,128], a: bf16[512,512]) -> bf16[256,128] {{
      %x = bf16[64,128] parameter(0)
      %a = bf16[512,512] parameter(1)
      %started = (bf16[64,128], bf16[256,128]) fusion(%x), kind=kCustom, calls=%begin
      %x.1 = bf16[64,128] get-tuple-element(%started), index=0
      %worked = (bf16[512,512], bf16[256,128]) fusion(%x.1, %a), kind=kOutput, calls=%between
      ROOT %ended = bf16[256,128] fusion(%x.1), kind=kCustom, calls=%end
    }}
    """
    work = work_of(text)
    ((key, total),) = work.collectives.items()
    assert key == ("all-gather", 4, "x", "async")
    assert (total.count, total.moved_bytes) == (1, 3 * 64 * 128 * 2)
    assert work.matmul_flops == 2 * 512**3
    assert total.exposed_seconds < total.seconds


def test_a_reduction_that_keeps_its_shard_is_a_reduce_scatter():
    text = """
    %reduce (p: f32[64,128]) -> f32[16,128] {
      %p = f32[64,128] parameter(0)
      %sum = f32[64,128] all-reduce(%p), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add
      %i = u32[] constant(0)
      ROOT %mine = f32[16,128] dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={16,128}
    }

    ENTRY %main (x: f32[64,128]) -> f32[16,128] {
      %x = f32[64,128] parameter(0)
      ROOT %y = f32[16,128] fusion(%x), kind=kCustom, calls=%reduce
    }
    """
    ((key, total),) = work_of(text).collectives.items()
    assert key == ("reduce-scatter", 4, "x", "sync")
    assert total.moved_bytes == 3 / 4 * 64 * 128 * 4


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [0, 2]),
        ("replica_groups={}, to_apply=%add", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, dimensions={0}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}", [0, 1]),
    ],
)
def test_groups_of_chips(text, group):
    assert first_group(f"channel_id=1, {text}", 8) == group


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="cannot read the groups"):
        first_group("replica_groups=something", 8)


@pytest.mark.parametrize(
    ("name", "groups", "across", "links"),
    [
        ("v5e:4x4", "{{0,1,2,3}}", "x", 1),  # a line
        ("v5e:4x4", "{{0,4,8,12}}", "y", 1),
        ("v5e:4x4", "[1,16]<=[16]", "xy", 2),
        ("v5e:4x4", "{{0,1,4,5}}", "xy", 2),  # a square of neighbours
        ("v5e:4x4", "{{0,2}}", "x", 1 / 2),  # {1,3} uses the link between them too
        ("v5e:4x4", "{{0,5,10,15}}", "xy", 1),  # not a box
        ("v5e:16x16", "[16,16]<=[256]", "x", 2),  # a ring
        ("v5e:16x16", "[1,256]<=[256]", "xy", 4),
        ("v5e:16x16", "{{0,1,2,3,4,5,6,7}}", "x", 1),  # half of a ring is a line
        ("v5e:16x16", "{{0,2,4,6,8,10,12,14}}", "x", 1),  # two interleaved rings
    ],
)
def test_links_of_a_group(name, groups, across, links):
    text = f"""
    ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {{
      %x = f32[1024,1024] parameter(0)
      ROOT %y = f32[1024,1024] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
    }}
    """
    ((key, total),) = work_of(text, parse_topology(name)).collectives.items()
    assert key[2] == across
    assert total.seconds == pytest.approx(total.moved_bytes / (links * LINK))


def test_a_ring_passes_on_over_its_closing_link():
    text = """
    ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
      %x = f32[1024,1024] parameter(0)
      ROOT %y = f32[1024,1024] collective-permute(%x), channel_id=1, source_target_pairs={PAIRS}
    }
    """
    size = 1024 * 1024 * 4
    pairs = ",".join(f"{{{i},{(i + 1) % 16}}}" for i in range(16))
    assert work_of(text.replace("PAIRS", pairs), parse_topology("v5e:16x16")).seconds == pytest.approx(size / LINK)
    far = ",".join(f"{{{i},{(i + 2) % 16}}}" for i in range(16))  # two messages over every link
    assert work_of(text.replace("PAIRS", far), parse_topology("v5e:16x16")).seconds == pytest.approx(2 * size / LINK)


def test_the_longest_name_says_what_a_kernel_costs():
    flops = splash_kernel_flops(2 * 100 * 2 * 64)
    assert flops == {"splash_mha_fwd": 51200, "splash_mha_dq": 76800, "splash_mha_dkv": 102400}
    kernels = KernelFlops({"fwd": 1.0, "splash_mha_fwd": 2.0}, 64)
    assert kernels.of("splash_mha_fwd_residuals") == 2.0
    assert kernels.of("other") is None


def test_large_arrays_need_two_long_dimensions():
    module = parse(
        textwrap.dedent("""
        ENTRY %main (x: f32[4,64,512]) -> f32[64,512] {
          %x = f32[4,64,512] parameter(0)
          ROOT %y = f32[64,512] reduce(%x), dimensions={0}, to_apply=%add
        }
        """)
    )
    assert [name for name, _ in arrays_at_least(module, rows=64, columns=512)] == ["x", "y"]
    assert arrays_at_least(module, rows=512, columns=512) == []


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("the total memory required for HLO temporaries (340.00G) exceeds available HBM (15.75G).", 340),
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5),
    ],
)
def test_the_compilers_words_for_too_large(message, gib):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    report = refused(
        error, topology=V5E, compile_seconds=1.0, model_flops=ModelFlops(1.0, 1.0), name="sft", hint="less"
    )
    assert report.hbm_peak_gib == gib
    assert not report.fits
    assert report.warnings == (f"does not fit: {gib - 15.75:.2f} GiB more than the 15.75 GiB of a v5e chip; try less",)


def test_too_large_for_another_memory_is_no_report():
    with pytest.raises(RuntimeError, match="vmem"):
        refused(
            RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."),
            topology=V5E, compile_seconds=1.0, model_flops=ModelFlops(1.0, 1.0),
        )  # fmt: skip
