"""Bytes as a tested number: counted traffic against the floor, and offsets beyond 2^31 elements."""

import pytest
import torch

from aifactory_train.kernels import registry
from aifactory_train.kernels.workbench import interpreter, traffic

POINTWISE = [op for op in registry.OPERATORS if registry.operator(op).pointwise]


@pytest.mark.parametrize("op", POINTWISE)
def test_traffic_keeps_the_bound(op):
    """128 rows here; the share of partial sums does not depend on the number of rows (16 rows a program or more)."""
    rows = list(traffic.count(op, 128, 4096))
    assert len(rows) == len(registry.operator(op).counted)
    for row in rows:
        assert row["floor_bytes"] <= row["bytes"] <= row["bound"] * row["floor_bytes"], row
        assert row["requested_bytes"] >= row["bytes"], row


@pytest.mark.slow
@pytest.mark.parametrize("op", POINTWISE)
def test_traffic_at_the_size_of_a_step(op):
    for row in traffic.count(op, 4096, 4096):
        assert row["bytes"] <= row["bound"] * row["floor_bytes"], row


def test_the_count_is_exact_on_a_known_kernel():
    """Column sum of [40, 96] fp32: every input byte once, every output byte once, nothing else."""
    from aifactory_train.kernels.reduce import column_sum

    p, out = torch.randn(40, 96), torch.empty(96)
    with interpreter.counting() as launches:
        column_sum[(3,)](p, out, 40, 96, ROWS=16, BLOCK=32)
    (launch,) = launches
    assert (launch.loaded, launch.stored) == (40 * 96 * 4, 96 * 4)
    assert (launch.requested_loads, launch.requested_stores) == (40 * 96 * 4, 96 * 4)
    torch.testing.assert_close(out, p.sum(0))


def test_a_reread_counts_once_as_traffic_and_twice_as_request():
    from aifactory_train.kernels.rms_norm.triton_kernels import rms_norm_fwd

    x, w = torch.randn(2, 64), torch.ones(64)
    y, r = torch.empty(2, 64), torch.empty(2)
    with interpreter.counting() as launches:  # two chunks of 32: the row is read for its norm and again for its output
        rms_norm_fwd[(2,)](
            x, x, w, y, y, r, 64, 64, 64, 64, 2, 64, 1e-6, 0.0, HAS_RES=False, HAS_W=True, ROWS=1, BLOCK=32, CHUNKS=2
        )
    (launch,) = launches
    assert launch.loaded == x.numel() * 4 + w.numel() * 4
    assert launch.requested_loads == 2 * x.numel() * 4 + 2 * w.numel() * 4


FAR = 1 << 30  # elements between two rows: fits 32 bits, but the fourth row starts beyond 2^31


def far(run):
    """Addresses that the launches inside touch, relative to the tensors' own start, in a dry run."""
    with interpreter.counting(dry=True) as launches:
        run()
    return [launch.spans for launch in launches]


def reach(tensor, spans):
    """Farthest byte behind the start of a tensor."""
    return max(s[1] for pair in spans for s in pair if s) - tensor.data_ptr()


@pytest.mark.parametrize("kernel", ["rms_norm", "layer_norm", "glu", "cross_entropy", "lora", "rope"])
def test_offsets_beyond_31_bits(kernel):
    """Rows 2^30 elements apart (fake strides, nothing is touched): the fourth row must be where 64-bit arithmetic puts
    it.
    """
    x = torch.zeros(8, 64)
    one = torch.zeros(64)
    labels = torch.zeros(8, dtype=torch.int64)

    def launch():
        if kernel == "rms_norm":
            from aifactory_train.kernels.rms_norm.triton_kernels import rms_norm_bwd, rms_norm_fwd

            rms_norm_fwd[(4,)](
                x,
                x,
                one,
                x,
                x,
                one,
                FAR,
                FAR,
                FAR,
                FAR,
                4,
                64,
                1e-6,
                0.0,
                HAS_RES=True,
                HAS_W=True,
                ROWS=1,
                BLOCK=64,
                CHUNKS=1,
            )
            rms_norm_bwd[(1, 1)](
                x,
                x,
                x,
                one,
                one,
                x,
                one,
                FAR,
                FAR,
                FAR,
                FAR,
                4,
                64,
                0.0,
                HAS_DS=True,
                HAS_W=True,
                ROWS=1,
                BLOCK=64,
                CHUNKS=1,
                STAGES=1,
            )
        elif kernel == "layer_norm":
            from aifactory_train.kernels.layer_norm.triton_kernels import layer_norm_bwd, layer_norm_fwd

            layer_norm_fwd[(4,)](
                x, one, one, x, one, one, FAR, FAR, 4, 64, 1e-6, HAS_W=True, HAS_B=True, ROWS=1, BLOCK=64, CHUNKS=1
            )
            layer_norm_bwd[(1, 1)](
                x,
                x,
                one,
                one,
                one,
                x,
                one,
                FAR,
                FAR,
                FAR,
                4,
                64,
                HAS_W=True,
                SUMS=True,
                ROWS=1,
                BLOCK=64,
                CHUNKS=1,
                STAGES=1,
            )
        elif kernel == "glu":
            from aifactory_train.kernels.swiglu.triton_kernels import glu_bwd, glu_fwd

            glu_fwd[(4, 1)](x, x, x, FAR, FAR, FAR, 64, KIND=0, BLOCK=64)
            glu_bwd[(4, 1)](x, x, x, x, x, FAR, FAR, FAR, FAR, FAR, 64, KIND=0, BLOCK=64)
        elif kernel == "cross_entropy":
            from aifactory_train.kernels.cross_entropy.triton_kernels import ce_bwd, ce_fwd, ce_fwd_bwd

            ce_fwd[(4,)](x, labels, one, one, FAR, 64, 1.0, 0.0, CAP=False, BLOCK=64)
            ce_bwd[(4, 1)](one, x, labels, one, x, 1, FAR, FAR, 64, 1.0, 0.0, CAP=False, BLOCK=64)
            ce_fwd_bwd[(4,)](x, labels, one, FAR, 64, 1.0, 0.0, CAP=False, BLOCK=64)
        elif kernel == "lora":
            from aifactory_train.kernels.lora_linear.triton_kernels import lora_epilogue

            lora_epilogue[(1, 1)](x, one, one, 1.0, 4, 64, 16, FAR, 16, 1, 16, BM=16, BN=64, BR=16, PRECISION="ieee")
        else:
            from aifactory_train.kernels.rope.triton_kernels import rope_fwd

            rope_fwd[(4,)](
                x, x, one, one, one, one, x, x, 0, 64, FAR, 0, 64, FAR, 0, 64, FAR, 0, 64, FAR, 0, 64,
                4, 1, 1, 32, 0.0, 0.0, SIGN=1, HAS_NORM=False, HEADS=1, HALF=32,
            )  # fmt: skip

    for spans in far(launch):
        assert (3 * FAR + 64) * 4 <= reach(x, [spans]) <= (3 * FAR + 4 * 64) * 4


def test_the_overflow_test_can_fail():
    """A kernel with a 32-bit row offset wraps in the interpreter, as on a device: its fourth row lands elsewhere."""
    from wrong import copy_int32

    x = torch.zeros(8, 64)
    ((loads, _),) = far(lambda: copy_int32[(4,)](x, x, FAR, 64, BLOCK=64))
    assert loads[1] - x.data_ptr() <= (FAR + 64) * 4
    assert loads[0] < x.data_ptr()


def test_exact_conversions():
    """fp32 to bf16 as torch rounds it, for every way a kernel can do it; a bf16 sum is refused."""
    from wrong import cast, sum_of_bf16

    x = torch.randn(4096)
    out = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](x, out, N=4096)
    assert torch.equal(out, x.bfloat16())
    with pytest.raises(Exception, match="convert to fp32 first"):
        sum_of_bf16[(1,)](out, x, N=4096)
