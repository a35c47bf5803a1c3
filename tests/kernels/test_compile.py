"""Compiled for chips that are not here. The PR subset: three targets, two shapes an operator; `make kernels-all` has
the whole matrix.

Everything runs in processes of its own, because this one may have Triton's interpreter switched on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aifactory_train.kernels import OPERATORS, hardware

HERE = Path(__file__).parent
ROW = {"op", "target", "dtype", "shape", "registers", "spills", "shared_bytes", "occupancy", "load_bytes", "status"}


def aifactory(*words, code=0):
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "aifactory_train", "kernels", *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def rows(*words):
    done = aifactory(*words, "--json")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_one_operator_on_one_chip(tmp_path):
    """What every change compiles: RMSNorm on an MI300A, the whole row of facts."""
    found = rows("check", "--sku", "MI300A", "--op", "rms_norm", "--dtype", "bf16", "--quick", "--asm", str(tmp_path))
    dumps = list(tmp_path.iterdir())
    assert len(dumps) == len(found) and all("s_endpgm" in dump.read_text() for dump in dumps)
    assert {name for r in found for name in r["limiter"].split(", ")} <= {"registers", "waves", "LDS", "blocks"}
    assert {r["kernel"] for r in found} == {"rms_norm_fwd", "rms_norm_bwd", "rms_norm_sum"}
    for row in found:
        assert row.keys() >= ROW
        assert row["status"] == "ok" and row["spills"] == 0 and row["load_bytes"] == 16
        assert 0 < row["shared_bytes"] <= hardware.TARGETS["gfx942"].block_memory
        assert row["occupancy"] >= 1 and row["atomics"] == 0 and row["int32_hazards"] == 0


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_attention_with_a_window_keeps_to_its_registers(target):
    """The assembler for NVIDIA GPUs would keep the keys' kernel to 128 registers a lane by itself, and spill."""
    code = f"""
import json
from aifactory_train.kernels import registry
from aifactory_train.kernels.attention import space
from aifactory_train.kernels.workbench import check
operator = registry.operator("attention")
shape = next(s for s in operator.checks if s["window"] and not s["softcap"] and s["head_dim"] == 128)
kernel = next(k for k in operator.kernels if k.name == space.KEYS)
print(json.dumps(check.one(operator, kernel, registry.select("attention", "{target}", None, "bf16", shape), "{target}",
                           "bf16", shape)))
"""
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout)
    assert row["status"] == "ok" and row["spills"] == 0 and row["config"]["maxnreg"] > 128, row


@pytest.mark.parametrize("target", ["gfx90a", "gfx942", "sm_90"])
@pytest.mark.slow
def test_pr_subset(target):
    found = rows("check", "--target", target, "--quick")
    assert {r["op"] for r in found} == set(OPERATORS)
    assert {r["dtype"] for r in found} == {"bf16", "fp32"}
    for row in found:
        assert row["status"] == "ok", row


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", sorted(hardware.TARGETS))
def test_whole_matrix(target):
    for row in rows("check", "--target", target):
        assert row["status"] == "ok" or row["status"].startswith("unsupported"), row


def test_the_gates_can_fail():
    """Spills, narrow loads, compare-and-swap loops, 32-bit offsets and too much shared memory are found in kernels made
    for it.
    """
    code = """
import sys
sys.path.insert(0, "interpreted")
import wrong
from aifactory_train.kernels import hardware, registry
from aifactory_train.kernels.workbench import compile as c
from aifactory_train.kernels.workbench.check import is_aligned
from aifactory_train.kernels.workbench.lint import lint

def built(fn, signature, constants, target, aligned=True, **options):
    names = fn.arg_names
    full = {n: "constexpr" if n in constants else signature[n] for n in names}
    hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and aligned}
    return c.compile_function(fn, full, constants, hints, options or {"num_warps": 4}, target)

chip = hardware.TARGETS["gfx90a"]
pointers = {"Y": "*bf16", "X": "*bf16", "s": "i32", "n_cols": "i32", "n_rows": "i32"}
for fn in (wrong.copy_int32, wrong.copy_int32_loop):
    use = built(fn, pointers, {"BLOCK": 2048}, "gfx90a")
    assert any("32-bit offset" in p for p in c.findings(use, chip, False, True)), (fn, use)
use = built(wrong.copy_int32, pointers, {"BLOCK": 2048}, "gfx90a", aligned=False)
assert any("loads of" in p for p in c.findings(use, chip, False, True)), use
use = built(wrong.add_atomic, {"Y": "*fp32", "X": "*fp32", "n_cols": "i32"}, {"BLOCK": 1024}, "gfx90a")
assert "compare-and-swap loop" in c.findings(use, chip, False, False), use
assert "no matrix instruction" in c.findings(use, chip, True, False)

norm = next(k for k in registry.operator("rms_norm").kernels if k.name.endswith("_bwd"))
greedy = {"block": 16384, "rows": 1, "num_warps": 16, "num_stages": 1, "stages": 1, "grid_mult": 1, "rows_each": 16}
use = c.compile_kernel(norm, greedy, "fp32", {"rows": 8191, "hidden": 16384}, "sm_90")
assert any("spills" in p for p in c.findings(use, hardware.TARGETS["sm_90"], False, True)), use
print("ok")
"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stderr[-3000:]


@pytest.mark.parametrize(
    "words,message",
    [
        (("check", "--target", "gfx94"), "did you mean 'gfx942'"),
        (("check", "--op", "rmsnorm"), "did you mean 'rms_norm'"),
        (("check", "--sku", "MI300"), "unknown SKU"),
        (("check", "--sku", "MI300A", "--target", "sm_90"), "MI300A is a gfx942"),
        (("tune",), "one chip"),
        (("tune", "--target", "sm_90", "--keep", "0"), "keeps nothing"),
        (("plot", "--out", "x.pdf"), ".png or .html"),
        (("traffic", "--hidden", "100"), "multiple of 128"),
    ],
)
def test_bad_input_is_refused_with_a_fix(words, message):
    done = aifactory(*words, code=2)
    assert message in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr


def test_bench_times_nothing_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = aifactory("bench", code=2)
    assert "nothing can be timed here" in done.stderr


def test_list_names_every_operator_and_source():
    found = rows("list", "--sku", "MI250X-GCD")
    assert [r["op"] for r in found] == list(OPERATORS)
    assert all(k["status"] in ("default", "static-pruned", "modelled", "measured") for r in found for k in r["kernels"])


def test_tuning_without_a_gpu_is_modelled_and_keeps_its_doubters(tmp_path):
    """Top candidates, two random ones and the default are kept; the file says modelled and can be loaded."""
    done = aifactory("tune", "--sku", "MI300A", "--op", "swiglu", "--keep", "2", "--write", str(tmp_path), "--json")
    summary = json.loads(done.stdout)
    assert summary["measured"] is False and summary["why_not_measured"] and summary["rank_correlation"] is None
    assert {e["status"] for e in summary["entries"]} == {"modelled"}
    assert all(e["measured"] is None and e["static"]["spills"] == 0 for e in summary["entries"])
    assert all(3 <= len(kept) <= 5 for kept in summary["kept"].values())
    written = json.loads((tmp_path / "MI300A.json").read_text())
    assert written["toolchain"]["triton"] and len(written["entries"]) == 2


def test_rank_correlation():
    from aifactory_train.kernels.workbench.tune import spearman

    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_plot_marks_what_is_not_measured(tmp_path):
    aifactory("plot", "--sku", "MI300A", "--out", str(tmp_path / "roof.html"))
    text = (tmp_path / "roof.html").read_text()
    assert "MI300A" in text and "<svg" in text and "Nothing here was timed unless" in text
