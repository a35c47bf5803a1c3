"""An operator is a folder and nothing else: one that `kernels new` writes outside the package is listed, compiled, run,
counted and tuned.
"""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aifactory_train.kernels.workbench import new

HERE = Path(__file__).parent
NAME = "toy_gate_of_tests"


def start(*command, kernels, interpret="0", cwd=None, code=0):
    env = {
        **os.environ,
        "TRITON_INTERPRET": interpret,
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": "",
        "AIFACTORY_KERNELS": str(kernels),
    }
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def aifactory(*words, kernels, **more):
    return start("-m", "aifactory_train", "kernels", *words, kernels=kernels, **more)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder of operators with the one that `kernels new` writes."""
    folder = tmp_path_factory.mktemp("operators")
    done = aifactory("new", NAME, "--into", str(folder), "--json", kernels="")
    assert {Path(f).name for f in json.loads(done.stdout)["files"]} == set(new.FILES)
    return folder


def test_it_is_found_by_itself_and_nothing_heavy_is_loaded(room):
    code = f"""
import sys
from aifactory_train.kernels import OPERATORS, select
from aifactory_train.kernels.registry import operator
assert "{NAME}" in OPERATORS and "swiglu" in OPERATORS and list(OPERATORS) == sorted(OPERATORS)
chosen = select("{NAME}", "gfx90a", None, "bf16", operator("{NAME}").checks[0])
assert chosen.provenance["{NAME}_fwd"].level == "space" and chosen.provenance["{NAME}_fwd"].status == "default"
assert not {{"torch", "triton", "numpy"}} & set(sys.modules)
"""
    start("-c", code, kernels=room)


def test_it_compiles_without_an_entry_anywhere(room):
    done = aifactory("check", "--op", NAME, "--target", "sm_90", "--dtype", "bf16", "--subset", "--json", kernels=room)
    rows = json.loads(done.stdout)
    assert {r["kernel"] for r in rows} == {f"{NAME}_fwd", f"{NAME}_bwd"}
    assert all(r["status"] == "ok" and r["config_level"] == "space" for r in rows), rows


def test_its_traffic_is_counted(room):
    done = aifactory("traffic", "--op", NAME, "--rows", "16", "--hidden", "1024", "--json", kernels=room)
    rows = json.loads(done.stdout)
    assert [r["direction"] for r in rows] == ["forward", "backward"] and all(1 <= r["ratio"] <= 1.1 for r in rows), rows


def test_the_tests_of_every_operator_run_it(room):
    """Values against fp64, torch's contracts and whole-graph compilation: the same tests as for the shipped
    operators.
    """
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", NAME, "test_every_operator.py")
    done = start(*command, kernels=room, interpret="1", cwd=HERE / "interpreted")
    assert "5 passed" in done.stdout, done.stdout  # three dtypes, opcheck, one graph


def test_its_sharding_rule_is_registered(room):
    code = textwrap.dedent(f"""
        import torch, torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor
        from aifactory_train.kernels import ops
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        x, gate = torch.randn(4, 6), torch.randn(4, 6)
        cut = lambda t: distribute_tensor(t, mesh, [Shard(1)])
        y = torch.ops.aifactory.{NAME}_fwd(cut(x), cut(gate))
        assert isinstance(y, DTensor) and y.placements == (Shard(1),), y.placements
        torch.testing.assert_close(y.full_tensor(), ops.{NAME}(x, gate))
        dist.destroy_process_group()
    """)
    start("-c", code, kernels=room)


def test_tuning_writes_what_is_then_used(room):
    """Into the folder's own `configs`; the selection then names that file."""
    aifactory("tune", "--sku", "MI300A", "--op", NAME, "--keep", "1", "--write", str(room / "configs"), kernels=room)
    done = aifactory("list", "--sku", "MI300A", "--op", NAME, "--json", kernels=room)
    (row,) = json.loads(done.stdout)
    assert {(k["status"], k["level"]) for k in row["kernels"]} == {("modelled", "MI300A")}, row


def test_what_is_written_is_in_the_projects_style(room):
    for path in sorted((room / NAME).iterdir()):
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse(path.read_text())), path
            assert max(map(len, path.read_text().splitlines())) <= 120, path


@pytest.mark.parametrize(
    "words,message",
    [
        (("new", "Rms"), "no name for an operator"),
        (("new", "lambda"), "no name for an operator"),
        (("new", "swiglu"), "already a swiglu"),
        (("new", "runtime"), "already a runtime"),
    ],
)
def test_a_name_that_will_not_do_is_refused(tmp_path, words, message):
    done = aifactory(*words, "--into", str(tmp_path), kernels="", code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_operators_of_one_name_and_a_missing_folder_are_refused(tmp_path):
    (tmp_path / "swiglu").mkdir()
    (tmp_path / "swiglu" / "space.py").write_text("")
    for folder, message in ((tmp_path, "two operators are named swiglu"), (tmp_path / "none", "is no folder")):
        done = start("-c", "import aifactory_train.kernels", kernels=folder, code=1)
        assert message in done.stderr
