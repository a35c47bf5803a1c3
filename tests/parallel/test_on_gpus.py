"""What is decided for GPUs alone, tested where there is none: on arguments, order and bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import curves
import gpu_shaped
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

from aifactory_train.core import compat
from aifactory_train.model import attention, attention_choice, base, weight_files
from aifactory_train.model.precision import Precision
from aifactory_train.parallel import build, deepspeed, fsdp, memory_advice, torch_engine, world
from aifactory_train.parallel.state import Piece, Sharded
from aifactory_train.training import staging as staging_module
from aifactory_train.training.probe import try_step
from aifactory_train.training.staging import Staging

MIXED = Precision(torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)


# ---- attention


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "hip", "fast"),
    [
        ("cpu", torch.float32, None, None, True),
        ("cuda", torch.bfloat16, (9, 0), None, True),
        ("cuda", torch.float32, (9, 0), None, False),
        ("cuda", torch.float16, (7, 0), None, False),  # V100
        ("cuda", torch.float32, (9, 4), "6.4", True),
    ],
)
def test_where_sdpa_shares_heads_in_a_fast_kernel(device, dtype, capability, hip, fast, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert attention.shares_heads(SimpleNamespace(device=torch.device(device), dtype=dtype)) is fast  # type: ignore[arg-type]


def test_elsewhere_heads_are_repeated_and_the_result_is_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    documents = attention.Documents.of(torch.tensor([0, 5, 12], dtype=torch.int32), "cpu")
    shared, _ = attention.per_document_attention(torch.nn.Module(), q, k, v, None, documents=documents)
    asked, whole = [], F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "shares_heads", lambda query: False)

    def sdpa(q, k, v, **more):
        asked.append((more.get("enable_gqa", False), q.shape[1] == k.shape[1] == v.shape[1]))
        return whole(q, k, v, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    repeated, _ = attention.per_document_attention(torch.nn.Module(), q, k, v, None, documents=documents)
    assert asked == [(False, True)] * 2
    torch.testing.assert_close(repeated, shared)


@pytest.fixture
def kernel(monkeypatch):
    """A variable-length kernel for heads of at most 256."""

    def attend(q, *rest, **more):
        if q.shape[-1] > 256:
            raise RuntimeError("FlashAttention only supports head dimension at most 256\nand more")
        return gpu_shaped.attend(q, *rest, **more)

    monkeypatch.setattr(compat, "varlen_attention", lambda: attend)
    monkeypatch.setattr(compat, "varlen_supports_gqa", lambda: True)
    monkeypatch.setattr(
        attention_choice, "trial", lambda device, *rest, _whole=attention_choice.trial: _whole("cpu", *rest)
    )


def test_the_kernel_is_tried_before_it_is_chosen(kernel) -> None:
    name, why = attention_choice.choose("auto", "cuda:0", torch.bfloat16, heads=(8, 2, 64))
    assert (name, why) == (attention.VARLEN, "GPU and torch >= 2.10")
    name, why = attention_choice.choose("auto", "cuda:0", torch.bfloat16, heads=(8, 2, 512))
    assert name == attention.PER_DOCUMENT and "at most 256)" in why and "and more" not in why


def test_compiled_blocks_on_amd_do_without_it(kernel, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert attention_choice.choose("auto", "cuda:0", heads=(8, 2, 64), compiled=True)[0] == attention.PER_DOCUMENT
    assert attention_choice.choose("auto", "cuda:0", heads=(8, 2, 64), compiled=False)[0] == attention.VARLEN
    assert (
        attention_choice.choose("varlen", "cuda:0", heads=(8, 2, 64), compiled=True)[0] == attention.VARLEN
    )  # asked for


def test_heads_are_read_from_the_configuration() -> None:
    import helpers

    assert attention_choice.heads_of(helpers.tiny_config("llama")) == (4, 2, 16)
    assert attention_choice.heads_of(helpers.tiny_config("qwen3", head_dim=32)) == (4, 2, 32)


# ---- memory: what the trial and the advice count


class Recorded:
    """An engine that writes down what is asked of it."""

    def __init__(self, updates: int = 0, fails: bool = False):
        self.updates, self.fails, self.asked = updates, fails, []

    def prepare_state(self, updates: int) -> None:
        self.asked.append(("moments", updates))

    def forward_backward(self, batch, scale: float, last: bool) -> None:
        self.asked.append(("backward", last))
        if self.fails:
            raise torch.OutOfMemoryError

    def discard(self) -> None:
        self.asked.append(("discard",))


def test_the_trial_holds_what_later_steps_hold() -> None:
    engine = Recorded()
    try_step(engine, None, accumulates=True)  # type: ignore[arg-type]
    assert engine.asked == [("moments", 1), ("backward", False), ("backward", True), ("discard",), ("moments", 0)]
    engine = Recorded(updates=7)
    try_step(engine, None, accumulates=False)  # type: ignore[arg-type]
    assert engine.asked == [("moments", 7), ("backward", True), ("discard",), ("moments", 7)]
    engine = Recorded(fails=True)
    with pytest.raises(torch.OutOfMemoryError):
        try_step(engine, None, accumulates=False)  # type: ignore[arg-type]
    assert engine.asked[-1] == ("moments", 0)


def test_the_trial_leaves_no_moments(monkeypatch) -> None:
    recipe = curves.make_recipe({"engine": "ddp"})
    alone = world.World(0, 1, 0, 1, "cpu", "alone", "here")
    engine = build.build_engine("ddp", curves.make_core({}, recipe, MIXED), recipe, MIXED, alone)
    held = []
    whole = engine.forward_backward
    monkeypatch.setattr(
        engine, "forward_backward", lambda *a, **k: (held.append(len(engine.optimizer.state)), whole(*a, **k))
    )
    before = [p.detach().clone() for _, p in engine.named]
    try_step(engine, curves.make_batch(curves.step_documents(0), "cpu"), accumulates=True)
    assert held == [len(engine.named)] * 2 and not engine.optimizer.state and engine.updates == 0
    assert all(torch.equal(a, p) and p.grad is None for a, (_, p) in zip(before, engine.named, strict=True))


@pytest.mark.parametrize("ranks", [2, 8])
def test_advice_counts_this_rank_s_shards(ranks: int) -> None:
    recipe = curves.make_recipe({"engine": "fsdp2"})
    with gpu_shaped.rank_of(ranks) as everyone:
        engine = build.build_engine("fsdp2", curves.make_core({}, recipe, MIXED), recipe, MIXED, everyone)
        engine.prepare_state(1)
        whole = sum(p.numel() for p in engine.core.parameters())
        mine = sum(p.to_local().numel() for p in engine.core.parameters())
        resident, trained = memory_advice.held(engine)
    assert mine < 1.2 * whole / ranks
    assert (resident, trained) == (4 * mine * 3, 4 * mine * 4)  # weights, two moments; and the gradients


def test_advice_counts_zero_s_partitions() -> None:
    """ZeRO-3 empties a parameter while it is not in use (its partition is beside it) and keeps an fp32 master
    elsewhere.
    """
    emptied = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    emptied.ds_tensor = torch.empty(10, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def entry(*numbers: int) -> Sharded:
        return Sharded((10,), torch.float32, [Piece((0,), torch.empty(n)) for n in numbers])

    engine = SimpleNamespace(
        name="zero3",
        core=SimpleNamespace(parameters=lambda: [emptied]),
        state=lambda: {"model": {"w": entry(10)}, "optimizer": {"a/w": entry(10), "b/w": entry(10)}},
    )
    assert memory_advice.held(engine) == (10 * 2 + 10 * 4 + 20 * 4, 2 * 40 + 80)  # type: ignore[arg-type]


# ---- DeepSpeed


def test_zero_overlaps_and_pins_on_gpus_alone() -> None:
    recipe = curves.make_recipe({"engine": "zero2", "offload": True})
    for device, wanted in (("cuda:1", True), ("cpu", False)):
        zero = deepspeed.deepspeed_json(recipe, MIXED, 8, 2, 64, device)["zero_optimization"]
        assert zero["overlap_comm"] is zero["offload_optimizer"]["pin_memory"] is wanted


def test_offloaded_gradients_are_waited_for(monkeypatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    flat = torch.zeros(3)
    flat.grad = torch.ones(3)
    engine = SimpleNamespace(
        recipe=curves.make_recipe({"engine": "zero2", "offload": True}),
        world=SimpleNamespace(device="cuda:2"),
        stage=2,
        zero=SimpleNamespace(single_partition_of_fp32_groups=[flat]),
    )
    assert deepspeed.DeepSpeedEngine._gradients(engine)[0] is flat.grad and waited == ["cuda:2"]  # type: ignore[arg-type]


# ---- copies to the host


def test_checkpoints_are_staged_in_memory_that_is_kept_with_one_wait(monkeypatch) -> None:
    waited, made = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(
        staging_module, "pinned_memory", lambda shape, dtype: made.append(shape) or torch.empty(shape, dtype=dtype)
    )

    class OnDevice(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0)

    values = [torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)]
    pieces = [Piece((0,) * v.dim(), v.as_subclass(OnDevice)) for v in values]
    state = {
        "model": {
            str(i): Sharded(tuple(v.shape), v.dtype, [p]) for i, (v, p) in enumerate(zip(values, pieces, strict=True))
        }
    }
    state["model"]["another's"] = Sharded((2,), torch.float32, [Piece((0,), torch.ones(2))], owned=False)
    flat = {f"{kind}/{name}": entry for kind, entries in state.items() for name, entry in entries.items()}
    staging = Staging("cuda:0")
    kept = []
    for number in range(2):
        values[0].fill_(number)
        staged = staging.copies(flat)
        copies = [piece.tensor for entry in staged.values() for piece in entry.pieces]
        assert [torch.equal(a, b) for a, b in zip(copies, values, strict=True)] == [True, True]
        kept.append([c.data_ptr() for c in copies])
    assert waited == ["cuda:0"] * 2 and made == [(2, 3), (4,)] and kept[0] == kept[1]


@pytest.mark.parametrize(("rows", "shards"), [(7, 3), (8, 4), (2, 4), (1, 2), (13, 5)])
def test_rows_are_gathered_in_slices(rows: int, shards: int, monkeypatch) -> None:
    whole = torch.arange(rows * 5.0).view(rows, 5)
    parts = [*torch.chunk(whole, shards), *[whole[:0]] * shards][:shards]
    monkeypatch.setattr(fsdp, "GATHER_BYTES", 2 * shards * 5 * 4)
    for rank in (0, shards - 1):
        sent: list[list[torch.Tensor]] = [[] for _ in range(shards)]
        each = -(-rows // shards)

        def gather(part, into, dst, group, rank=rank, sent=sent, each=each):
            assert part.shape[0] <= 2  # two rows of each rank at once
            start = 2 * len(sent[rank])
            for shard in range(shards):
                padded = torch.zeros(each, 5)
                padded[: len(parts[shard])] = parts[shard]
                sent[shard].append(padded[start : start + len(part)])
                if into is not None:
                    into[shard].copy_(sent[shard][-1])
            assert torch.equal(part, sent[rank][-1])

        monkeypatch.setattr(dist, "gather", gather)
        found = fsdp.collect_rows(parts[rank], whole.shape, shards, None, 0, receives=rank == 0)
        assert found is None if rank else torch.equal(found, whole)


# ---- norms and factors


def test_norm_and_factor_of_many_tensors_take_few_operators(monkeypatch) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, n) for n in range(1, 40)] + [torch.randn(5).bfloat16(), torch.zeros(0)]
    exact = sum(float(t.double().square().sum()) for t in tensors)
    with gpu_shaped.Operators() as used:
        square = torch_engine.sum_of_squares(tensors, "cpu")
    assert float(square) == pytest.approx(exact, rel=1e-4) and square.dtype == torch.float32
    assert sum(used.found.values()) < 30, used.found
    factor = torch.tensor(1 / 3)
    expected = [(t.float() * factor).to(t.dtype) for t in tensors]
    with gpu_shaped.Operators() as used:
        torch_engine.multiply(tensors, factor)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert sum(used.found.values()) < 10, used.found


# ---- joining and loading


def test_the_process_group_is_not_bound_to_a_device(monkeypatch) -> None:
    """Bound (``device_id``), a device mesh would split it, and its groups would lose the gloo side that checkpoints
    use.
    """
    given: dict = {}
    monkeypatch.setattr(world.compat, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: given.update(more, backend=backend))
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "SLURM_STEP_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    world.join_world()
    world._BEFORE.clear()
    assert given["backend"] == "cpu:gloo,cuda:nccl" and "device_id" not in given


@pytest.mark.parametrize(
    ("name", "integrated", "local_rank", "dropped"),
    [
        ("AMD Instinct MI300A", 0, 0, True),
        ("AMD Instinct MI300A", 0, 1, False),
        ("A GPU", 1, 0, True),
        ("NVIDIA H100", 0, 0, False),
    ],
)
def test_pages_of_weight_files_are_let_go_where_the_gpu_needs_them(
    name, integrated, local_rank, dropped, tmp_path: Path, monkeypatch
) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    reported: list = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=name, is_integrated=integrated)
    )
    monkeypatch.setattr(weight_files.os, "posix_fadvise", lambda *arguments: reported.append(arguments[1:]))
    monkeypatch.setattr(base, "base_folder", lambda recipe: tmp_path)
    monkeypatch.setattr(
        build, "traits_of", lambda engine: SimpleNamespace(compute_copies=False, load=lambda: lambda *a: "engine")
    )
    monkeypatch.setattr(build, "refuse_what_it_cannot_do", lambda recipe, engine: None)
    everyone = world.World(local_rank, 2, local_rank, 2, f"cuda:{local_rank}", "a test", "here")
    settings = curves.make_recipe({"engine": "ddp"})
    core = torch.nn.Module()
    assert build.build_engine("ddp", core, settings, MIXED, everyone) == "engine"  # type: ignore[arg-type]
    assert reported == ([(0, 0, weight_files.os.POSIX_FADV_DONTNEED)] if dropped else [])


def test_zero_3_s_buffers_are_on_the_device_and_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves those of a model that it partitioned on the host, where each forward would fetch them anew, and
    casts them to bf16.
    """

    def initialise(model, **more):
        for buffer in model.buffers():
            buffer.data = buffer.data.bfloat16()
        return SimpleNamespace(optimizer=SimpleNamespace()), None, None, None

    stub = SimpleNamespace(initialize=initialise, zero=SimpleNamespace(register_external_parameter=lambda *a: None))
    monkeypatch.setattr(deepspeed, "import_deepspeed", lambda: stub)
    recipe = curves.make_recipe({"engine": "zero3"})
    core = curves.make_core({}, recipe, MIXED)
    core.unread = None
    before = {name: buffer.dtype for name, buffer in core.named_buffers()}
    moved, whole = [], torch.Tensor.to

    def to(self, *args, **more):
        if args and args[0] == "cuda:1":
            moved.append(self.dtype)
            return self
        return whole(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", to)
    everyone = world.World(1, 2, 1, 2, "cuda:1", "a test", "here")
    deepspeed.DeepSpeedEngine("zero3", core, recipe, MIXED, everyone)
    found = {name: buffer.dtype for name, buffer in core.named_buffers()}
    assert found == before and torch.bfloat16 not in found.values()
    assert moved == list(before.values()) != []
