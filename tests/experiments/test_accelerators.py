"""Programs for devices that are not there: what is counted, asked and refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from repository import ROOT

from resvariants import InputError

sys.path.insert(0, str(ROOT / "experiments"))
import accelerators
from configs import digits
from targets import devices, hlo, programs, tables, traffic


def module(entry, *computations):
    """A module's text: each computation is its name and its lines, the last of them its root."""
    texts = []
    for name, lines in (*computations, ("ENTRY main", entry)):
        *rest, last = lines.strip().splitlines()
        start, _, name = name.rpartition(" ")
        body = "\n".join(f"  {line.strip()}" for line in rest)
        head = f"{start} %{name} (x: f32[]) -> f32[] {{".strip()
        texts.append(f"{head}\n{body}\n  ROOT {last.strip()}\n}}")
    return "HloModule m\n\n" + "\n\n".join(texts) + "\n"


def counted(entry, *computations, cache=0):
    return traffic.count(hlo.parse(module(entry, *computations)), cache)


STACK = """
%stack = f32[10,4,8]{2,1,0} parameter(0)
%i = s32[] parameter(1)
"""


def test_a_fusion_reads_its_parameters_and_writes_its_results():
    found = counted(
        """
        %a = f32[4,8]{1,0} parameter(0)
        %b = bf16[4,8]{1,0} parameter(1)
        %f = (f32[4,8]{1,0}, f32[]) fusion(%a, %b, %a), kind=kLoop, calls=%fused
        """,
        (
            "fused",
            """
            %p = f32[4,8]{1,0} parameter(0)
            %q = bf16[4,8]{1,0} parameter(1)
            %again = f32[4,8]{1,0} parameter(2)
            %c = f32[4,8]{1,0} convert(%q)
            %s = f32[4,8]{1,0} add(%p, %c)
            %zero = f32[] constant(0)
            %t = (f32[4,8]{1,0}, /*index=1*/f32[]) tuple(%s, %zero)
            """,
        ),
    )
    assert found.kernels == {"elementwise": 1}
    assert found.bytes == {"elementwise": 128 + 64 + 128 + 4}


@pytest.mark.parametrize(
    ("lines", "bytes_"),
    [
        # One of ten (4, 8): 128 bytes, the index, and the result.
        ("%y = f32[1,4,8]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,4,8}", 260),
        # Through a bitcast, and a static slice of two: 256 bytes each way; no index is read.
        (
            "%u = f32[40,8]{1,0} bitcast(%p)\n%y = f32[8,8]{1,0} slice(%u), slice={[0:8], [0:8]}",
            512,
        ),
        # What is computed of all and then cut is computed of the part alone, once: 256 bytes each.
        (
            "%e = f32[10,4,8]{2,1,0} exponential(%p)\n%n = f32[10,4,8]{2,1,0} negate(%p)\n"
            "%m = f32[10,4,8]{2,1,0} multiply(%e, %n)\n"
            "%y = f32[2,4,8]{2,1,0} slice(%m), slice={[0:2], [0:4], [0:8]}",
            512,
        ),
        # A slice of a slice: one of its four, 128 bytes, the index, and the result.
        (
            "%a = f32[4,4,8]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={4,4,8}\n"
            "%y = f32[1,4,8]{2,1,0} slice(%a), slice={[3:4], [0:4], [0:8]}",
            260,
        ),
        # Two slices of one parameter, 128 and 256 bytes, and a result of 128 bytes.
        (
            "%a = f32[1,4,8]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,4,8}\n"
            "%u = f32[2,4,8]{2,1,0} slice(%p), slice={[0:2], [0:4], [0:8]}\n"
            "%v = f32[4,8]{1,0} reduce(%u, %z), dimensions={0}, to_apply=%fused\n"
            "%b = f32[4,8]{1,0} bitcast(%a)\n"
            "%y = f32[4,8]{1,0} add(%b, %v)",
            128 + 256 + 4 + 128,
        ),
        # All of it, and all of it again.
        ("%y = f32[10,4,8]{2,1,0} negate(%p)", 1280 + 1280),
        # A slice is written into the stack that is given; nothing else of the stack moves.
        (
            "%a = f32[1,4,8]{2,1,0} broadcast(%z), dimensions={}\n"
            "%y = f32[10,4,8]{2,1,0} dynamic-update-slice(%p, %a, %i, %z, %z)",
            4 + 128,
        ),
    ],
    ids=["dynamic slice", "slice", "computed", "slice of a slice", "two slices", "whole", "update"],
)
def test_of_what_is_sliced_slices_count(lines, bytes_):
    body = "%p = f32[10,4,8]{2,1,0} parameter(0)\n%i = s32[] parameter(1)\n%z = s32[] constant(0)"
    last = lines.splitlines()[-1].split(" = ")[1].split(" ")[0]
    entry = f"{STACK}%f = {last} fusion(%stack, %i), kind=kLoop, calls=%fused"
    found = counted(entry, ("fused", f"{body}\n{lines}"))
    assert sum(found.bytes.values()) == bytes_


def test_lone_slices_read_what_they_give():
    found = counted(
        f"""{STACK}
        %a = f32[1,4,8]{{2,1,0}} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={{1,4,8}}
        %b = f32[2,4,8]{{2,1,0}} slice(%stack), slice={{[0:2], [0:4], [0:8]}}
        %c = f32[10,4,8]{{2,1,0}} dynamic-update-slice(%stack, %a, %i, %i, %i)
        """
    )
    assert found.bytes == {"copies": 2 * 128 + 2 * 256, "slice updates": 2 * 128}
    assert found.kernels == {"copies": 2, "slice updates": 1}


BODY = """
%p = (f32[4,8]{1,0}) parameter(0)
%x = f32[4,8]{1,0} get-tuple-element(%p), index=0
%n = f32[4,8]{1,0} negate(%x)
%m = f32[4,8]{1,0} exponential(%n)
%t = (f32[4,8]{1,0}) tuple(%m)
"""
WHILE = (
    "%x = (f32[4,8]{1,0}) parameter(0)\n"
    "%w = (f32[4,8]{1,0}) while(%x), condition=%cond, body=%body, "
    'metadata={op_name="jit(train_step)/transpose(jvp(ResNet))/stage2/while"}'
)


def test_loops_count_as_often_as_they_run():
    known = ', backend_config={"known_trip_count":{"n":"17"},"dynamic_variables":[]}'
    found = counted(WHILE + known, ("body", BODY), ("cond", BODY))
    assert found.kernels == {"elementwise": 34}
    assert found.bytes == {"elementwise": 34 * 256}
    (loop,) = found.loops
    assert (loop.trips, loop.body.kernels) == (17, {"elementwise": 2})
    assert tables.loop_name(loop.op_name) == "stage2, backward"
    assert found.unknown_loops == 0


def test_loops_of_unknown_length_count_once_and_conditionals_on_all_sides():
    unknown = counted(WHILE, ("body", BODY), ("cond", BODY))
    assert (unknown.kernels, unknown.unknown_loops) == ({"elementwise": 2}, 1)
    side = "%s = f32[4,8]{1,0} parameter(0)\n%y = f32[4,8]{1,0} negate(%s)"
    for sides in ("branch_computations={%a, %b}", "true_computation=%a, false_computation=%b"):
        found = counted(
            "%i = pred[] parameter(0)\n%x = f32[4,8]{1,0} parameter(1)\n"
            f"%c = f32[4,8]{{1,0}} conditional(%i, %x, %x), {sides}",
            ("a", side),
            ("b", side),
        )
        assert (found.kernels, found.conditionals) == ({"elementwise": 2}, 1)


def test_what_starts_and_is_done_later_counts_once():
    found = counted(
        """
        %x = f32[256]{0} parameter(0)
        %s = f32[256]{0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%fused
        %d = f32[256]{0} all-reduce-done(%s)
        %g = (f32[256]{0}, f32[512]{0}) all-gather-start(%d), dimensions={0}
        %h = f32[512]{0} all-gather-done(%g)
        %b = (f32[512]{0}, f32[512]{0}, u32[]) copy-start(%h)
        %c = f32[512]{0} copy-done(%b)
        """
    )
    assert found.collectives == {"all-reduce": 1, "all-gather": 1}
    assert found.payload == {"all-reduce": 1024, "all-gather": 1024}
    assert found.kernels == {"collectives": 2, "copies": 1}
    assert found.bytes == {"collectives": 2 * 1024 + 1024 + 2048, "copies": 2 * 2048}


def test_memory_on_the_chip_and_what_a_cache_keeps():
    lines = """
    %x = f32[1024]{0:T(1024)} parameter(0)
    %s = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%x)
    %d = f32[1024]{0:T(1024)S(1)} copy-done(%s)
    %y = f32[1024]{0:T(1024)} negate(%d)
    """
    assert counted(lines).bytes == {"copies": 4096, "elementwise": 4096}
    assert counted(lines, cache=4000).uncached == 2 * 96
    assert counted(lines, cache=5000).uncached == 0


CONVOLUTION = (
    "%x = bf16[2,8,8,6]{3,2,1,0} parameter(0)\n%k = bf16[4,3,3,3]{3,2,1,0} parameter(1)\n"
    "%y = bf16[2,4,4,4]{3,2,1,0} "
)
OF_WINDOW = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"


def test_the_operations_of_convolutions():
    # Along each axis four outputs have three taps, of which the first output's first meets padding:
    # 11. With 2 images, 4 features of 3 inputs each (two groups), a multiplication and an addition.
    expected = 2 * 2 * 4 * 3 * 11 * 11
    lone = f"{CONVOLUTION}convolution(%x, %k), {OF_WINDOW}, feature_group_count=2"
    assert counted(lone).flops == expected
    assert counted(lone).kernels == {"convolutions": 1}
    calls = (
        ("convForward", "bf16[2,8,8,6] bf16[4,3,3,3] bf16[2,4,4,4]"),
        ("convBackwardInput", "bf16[2,4,4,4] bf16[4,3,3,3] bf16[2,8,8,6]"),
        ("convBackwardFilter", "bf16[2,8,8,6] bf16[2,4,4,4] bf16[4,3,3,3]"),
    )
    for call, types in calls:
        left, right, result = types.split()
        found = counted(
            f"%a = {left} parameter(0)\n%b = {right} parameter(1)\n%y = ({result}, u8[64]{{0}})"
            f' custom-call(%a, %b), {OF_WINDOW}, custom_call_target="__cudnn${call}"'
        )
        assert found.flops == expected, call
        assert found.kernels == {"convolutions": 1}


def test_a_dilated_convolution_is_its_strided_ones_gradient():
    # The same pairs of an output and an input, read backwards.
    found = counted(
        "%g = f32[2,4,4,4]{3,2,1,0} parameter(0)\n%k = f32[3,3,6,4]{3,2,1,0} parameter(1)\n"
        "%y = f32[2,8,8,6]{3,2,1,0} convolution(%g, %k), window={size=3x3 pad=1_2x1_2"
        " lhs_dilate=2x2}, dim_labels=b01f_01oi->b01f"
    )
    assert found.flops == 2 * 2 * 4 * 6 * 11 * 11


def test_a_stride_wider_than_the_window_passes_over_input():
    found = counted(
        "%x = f32[1,8,8,2]{3,2,1,0} parameter(0)\n%k = f32[1,1,2,4]{3,2,1,0} parameter(1)\n"
        "%y = f32[1,4,4,4]{3,2,1,0} convolution(%x, %k), window={size=1x1 stride=2x2},"
        " dim_labels=b01f_01io->b01f"
    )
    assert found.bytes == {"convolutions": 512 // 4 + 32 + 256}


def test_matrix_products_within_fusions_and_in_libraries():
    dot = "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    lines = "%a = f32[4,8]{1,0} parameter(0)\n%b = f32[8,16]{1,0} parameter(1)\n"
    lone = counted(f"{lines}%y = f32[4,16]{{1,0}} {dot}")
    fused = counted(
        f"{lines}%y = f32[4,16]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%fused",
        ("fused", f"{lines}%y = f32[4,16]{{1,0}} {dot}"),
    )
    called = counted(
        f"{lines}%y = (f32[4,16]{{1,0}}, s8[64]{{0}}) custom-call(%a, %b),"
        ' custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    )
    for found in (lone, fused, called):
        assert found.flops == 2 * 4 * 16 * 8
        assert found.kernels == {"matrix products": 1}


def test_a_real_program():
    @jax.jit
    def function(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]

    x, w = jnp.zeros((16, 32)), jnp.zeros((32, 32))
    found = traffic.count(hlo.parse(function.lower(x, w).compile().as_text()))
    assert found.flops == 7 * 2 * 16 * 32 * 32
    assert found.unknown_loops == 0
    (loop,) = found.loops
    assert loop.trips == 7
    # Each round reads x and w and writes x; more moves, of counters and between the two kernels.
    least = 4 * (16 * 32 + 32 * 32 + 16 * 32)
    assert least <= sum(loop.body.bytes.values()) <= 3 * least


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Runs the program; gives what it printed, and the folder of its report."""
    monkeypatch.chdir(ROOT)

    def ask(*given):
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["accelerators.py", *given, f"--out={out}"])
        accelerators.main()
        return capsys.readouterr().out, out

    return ask


NET = "--config=configs/digits.py:resnet8"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((NET, "--targets", "h10"), "unknown device 'h10'; nearest: h100"),
        ((NET, "--targets", "h100:2x2"), "h100:8"),
        ((NET, "--targets", "v5e:4"), "v5e:2x2"),
        ((NET, "--targets", "cpu", "cpu"), "each can be there once"),
        ((NET, "--targets", "cpu:999"), "xla_force_host_platform_device_count=999"),
        ((NET, "--targets", "cpu:8", "--batch_size", "12"), "8 or 16"),
        ((NET, "--targets", "cpu", "--config.model.dtypo=8"), "model.dtype"),
        ((NET, "--targets", "cpu", "--config.model.dtype=int8"), "float32"),
        (("--config=configs/digits.py:resnet9", "--targets", "cpu"), "6n"),
        (("--config=configs/none.py:resnet8", "--targets", "cpu"), "no such config"),
        (
            (NET, "--targets", "cpu", "--set", "dataset.name=image_folder"),
            "dataset.name=imagenet2012",
        ),
    ],
)
def test_what_cannot_be_is_said_and_nothing_written(ask, tmp_path, monkeypatch, given, says):
    monkeypatch.setattr(devices, "_installed", lambda module: True)
    with pytest.raises(InputError, match=says):
        ask(*given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [("--targets", "cpu"), (NET, "--targets", "cpu", "--nonsense")])
def test_a_command_line_that_cannot_be_is_refused(ask, tmp_path, given):
    with pytest.raises(InputError, match="--help"):
        ask(*given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
def test_a_compiler_that_is_missing_is_named(ask, tmp_path, monkeypatch, target):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[accelerators\]'"):
        ask(NET, "--targets", target)
    assert not (tmp_path / "out").exists()


def test_every_device_is_described(monkeypatch):
    monkeypatch.setattr(devices, "_installed", lambda module: True)
    for name, facts in devices.facts().items():
        target = devices.find(name)
        assert target.memory > 1e9 and target.count == 1
        if target.kind == "gpu":
            assert f"device_memory_size: {facts['memory']}" in devices.target_config(facts)
        if target.kind != "cpu":
            assert facts["bfloat16"] >= facts["float32"] > facts["bandwidth"]
    assert devices.find("v5e:4x4").count == 16


def test_a_bound_is_the_larger_of_two_and_none_where_too_much_is_counted():
    target = devices.Target("h100", "gpu", 1, devices.facts()["h100"])
    by_bytes = traffic.Traffic(uncached=int(3.35e10), flops=10**9)
    assert tables.bound(target, "bfloat16", by_bytes) == {"at_best_ms": 10.0, "at_best_by": "bytes"}
    counted = traffic.Traffic(uncached=10**6, flops=int(4.947e12))
    found = tables.bound(target, "float32", counted)
    assert found == {"at_best_ms": 10.0, "at_best_by": "operations"}
    assert tables.bound(target, "bfloat16", counted)["at_best_ms"] == 5.0
    counted.conditionals = 1
    assert tables.bound(target, "float32", counted)["at_best_ms"] is None


@pytest.mark.slow_for("two depths")
@pytest.mark.parametrize("deeper", [[], ["resnet14"]], ids=["one depth", "two depths"])
def test_a_report_beside_stock_flax(ask, deeper):
    models = ["--models", *deeper] if deeper else []
    printed, out = ask(
        *(NET, *models, "--targets", "cpu", "--batch_size", "8", "--peer"),
        *("--parts", "training", "--dump", "--set", "model.unroll=0", "schedule.cut_to_steps=9"),
    )
    report = (out / "report.md").read_text()
    assert "no time of one was measured" in report and report in printed
    assert "resvariants / stock Flax" in report
    assert ("![kernels" in report) == (out / "depth.png").exists() == bool(deeper)
    assert not deeper or (out / "depth.png").stat().st_size > 10_000
    rows = json.loads((out / "accelerators.json").read_text())["steps"]
    assert [(row["network"], row["form"]) for row in rows] == [
        (network, form)
        for network in ("resnet8", *deeper)
        for form in ("resvariants", "stock Flax")
    ]
    for ours, stock in zip(rows[::2], rows[1::2], strict=True):
        assert ours["parameters"] == stock["parameters"]
        assert ours["flops"] == stock["flops"] > 0
        assert ours["blocks"] == stock["blocks"] > 0
        assert ours["fits"] and ours["kernels"] > 0 and ours["at_best_ms"] is None
        memory = ours["memory"]
        assert ours["total_memory"] == sum(memory.values()) - 2 * memory["alias"]
    assert all(row["flops"] > rows[0]["flops"] for row in rows[2:])
    assert len(list((out / "hlo").iterdir())) == len(rows)


def test_networks_that_differ_in_depth_make_a_curve(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(
        tables,
        "save_figure",
        lambda figure, path, vector: names.extend(
            text.get_text() for text in figure.legends[0].get_texts()
        ),
    )
    shared = {"part": "training", "compiles": True, "form": "ours", "target": "h100", "batch": 8}
    rows = [
        {
            **shared,
            "network": network,
            "blocks": blocks,
            "kernels": 1,
            "bytes": 1,
            "total_memory": 1,
        }
        for network, blocks in (
            ("configs/cifar10.py:resnet20", 9),
            ("configs/cifar10.py:resnet56", 27),
            ("preact_resnet110,dataset.data_dir=a=b", 54),
            ("preact_resnet164,dataset.data_dir=a=b", 54),
            ("preact_resnet1001,dataset.data_dir=a=b", 333),
        )
    ]
    assert tables.draw(rows, tmp_path / "depth.png", False)
    assert names == [
        "ResNet-N, cifar10, ours, h100, batch 8",
        "pre-activation ResNet-N, data dir a=b, ours, h100, batch 8",
    ]
    assert not tables.draw(rows[2:4], tmp_path / "depth.png", False)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_several_devices_reduce_once_when_each_has_its_own_statistics(ask, parallel):
    _, out = ask(
        *(NET, "--targets", "cpu:8", "--batch_size", "8", "--config.sync_batch_norm=False"),
        *(f"--config.parallel={parallel}", "--parts", "training"),
    )
    (row,) = json.loads((out / "accelerators.json").read_text())["steps"]
    assert row["devices"] == 8
    # Gradients, statistics and metrics, at least as many bytes as there are parameters.
    assert sum(row["collective_bytes"].values()) >= 4 * row["parameters"]
    assert set(row["collectives"]) == {"all-reduce"}


def test_stochastic_depth_is_compiled_as_a_run_would_on_the_target(monkeypatch):
    # This machine's compiler in the place of the GPU's, for the form that is the GPU's.
    monkeypatch.setattr(devices.Target, "devices", lambda self: jax.devices("cpu")[:1])
    config = digits.get_config("resnet14")
    config.model.survival_probability = 0.5
    target = devices.Target("h100", "gpu", 1, devices.facts()["h100"])
    compiled = programs.compile_training(programs.build(config, target), 4)
    counted = compiled.traffic(0)
    assert not counted.conditionals and not counted.unknown_loops


def test_the_largest_batch_is_found_to_a_tenth(monkeypatch):
    tried = []

    class Program:
        target = devices.Target("cpu:4", "cpu", 4, {})

    def attempt(program, part, size):
        tried.append(size)
        memory = {"arguments": 100 + size, "alias": 0}
        return accelerators.Compiled(0.0, 0.0, memory, "")

    monkeypatch.setattr(accelerators, "attempt", attempt)
    found = accelerators.largest_batch(Program(), 32, memory=800)
    assert found % 4 == 0 and 700 / 1.11 <= found <= 700
    assert len(tried) == len(set(tried)) < 12
    assert accelerators.largest_batch(Program(), 32, memory=100) is None
    assert accelerators.largest_batch(Program(), 32, memory=109) == 8


def test_what_the_compiler_refuses_is_a_row(ask, monkeypatch):
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\nand more")
    refused = accelerators.Refused(error)
    monkeypatch.setattr(accelerators, "attempt", lambda program, part, size: refused)
    printed, out = ask(NET, "--targets", "cpu", "--largest_batch")
    assert "does not compile: RuntimeError: RESOURCE_EXHAUSTED: Ran out of memory |" in printed
    record = json.loads((out / "accelerators.json").read_text())
    assert [row["fits"] for row in record["steps"]] == [False, False]
    assert record["largest_batches"][0]["batch"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("target", "plugin"), [("h100:2", "jax_cuda12_plugin"), ("v5e", "libtpu")])
def test_the_devices_own_compilers(tmp_path, target, plugin):
    pytest.importorskip(plugin)
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "experiments" / "accelerators.py"), NET),
            *("--targets", target, "--batch_size", "8", "--config.model.dtype=bfloat16"),
            *("--out", str(tmp_path)),
        ],
        cwd=ROOT,
        check=True,
        timeout=1200,
    )
    rows = json.loads((tmp_path / "accelerators.json").read_text())["steps"]
    assert all(row["compiles"] and row["fits"] and row["at_best_ms"] > 0 for row in rows)
