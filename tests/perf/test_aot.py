"""Reading compiled programs, the roofline, and what does not fit; compiling for real where libtpu
is installed: `pytest -n 0 -m tpu_compile tests/perf/test_aot.py`."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from meteor_jax.config import ConfigError
from meteor_jax.data.pipeline import DataConfig
from meteor_jax.experiment.config import Experiment, StageConfig, TrainConfig
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.models.encoders.convnext.model import depthwise
from meteor_jax.models.layers.platform import compiling_for, target_platform
from meteor_jax.parallel.chips import CHIPS, GIB
from meteor_jax.parallel.mesh import MeshConfig, make_mesh, parse_mesh
from meteor_jax.perf import aot
from meteor_jax.perf.fit import (
    DoesNotFit,
    alternatives,
    check_held,
    chip_of,
    measure,
    read_out_of_memory,
)
from meteor_jax.perf.hlo import parse, replica_groups
from meteor_jax.perf.programs import (
    Program,
    Request,
    build_program,
    check_program,
    count_flops,
    device_bytes,
    with_remat,
)
from meteor_jax.perf.roofline import make_roofline
from meteor_jax.perf.traffic import read_traffic
from tests.tiny_model import CONFIG, METEOR

V5E = CHIPS["TPU v5 lite"]

# A loop of 4 turns that reads one of 4 layers a turn and gathers it, among 4 devices; and a sum
# that begins in one fusion and ends in another.
HLO = (Path(__file__).parents[1] / "golden" / "tpu_loop.hlo.txt").read_text()


def test_loops_count_their_turns_and_slices_what_they_touch():
    traffic = read_traffic(HLO)
    layer = 8 * 128 * 4
    gathered = traffic.collectives["all-gather"]
    assert (gathered.count, gathered.result_bytes) == (4, 4 * 4 * layer)
    assert gathered.sent_bytes == 4 * 3 * layer
    # The counter is read by an addition of a constant and by two fusions, and copied at first.
    scalars = 4 * (8 + 4 + 4) + 8
    assert traffic.hbm_bytes == 4 * (layer + layer) + scalars + 8 * 128 * 2
    assert traffic.unknown_loops == 0


def test_a_collective_that_begins_in_one_fusion_and_ends_in_another_counts_once():
    summed = read_traffic(HLO).collectives["all-reduce"]
    assert (summed.count, summed.result_bytes) == (1, 8 * 128 * 2)
    assert summed.sent_bytes == 2 * 1 / 2 * 8 * 128 * 2


def test_what_crosses_slices_goes_through_the_network():
    traffic = read_traffic(HLO, slice_size=2)  # its groups are 0, 2 and 1, 3
    assert traffic.collectives["all-reduce"].network_bytes == 8 * 128 * 2
    assert traffic.link_bytes == 0
    assert read_traffic(HLO, slice_size=4).network_bytes == 0


def test_a_loop_of_unknown_turns_counts_once_and_is_reported():
    traffic = read_traffic(HLO.replace("direction=LT", "direction=NE"))
    assert traffic.unknown_loops == 1
    assert traffic.collectives["all-gather"].count == 1
    with pytest.raises(ValueError, match="no HLO module"):
        read_traffic("")


@pytest.mark.parametrize(
    ("tail", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={1}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", []),
    ],
)
def test_replica_groups(tail, groups):
    assert replica_groups(tail) == groups


def test_roofline_is_the_slowest_part():
    amounts = {"flops": 197e12, "model_flops": 98.5e12, "hbm_bytes": 0.819e12 / 2}
    roofline = make_roofline(V5E, **amounts, link_bytes=0.0)
    assert (roofline.seconds, roofline.bound, roofline.mfu) == (1.0, "compute", 0.5)
    roofline = make_roofline(V5E, **amounts, link_bytes=4 * V5E.link_bytes_per_s)
    assert (roofline.seconds, roofline.bound, roofline.mfu) == (4.0, "links", 0.125)
    with pytest.raises(ConfigError, match="network of a v4 between slices is not specified"):
        make_roofline(CHIPS["TPU v4"], **amounts, link_bytes=0.0, network_bytes=1.0)


def test_what_every_device_holds_is_a_lower_bound():
    mesh = make_mesh(MeshConfig(2, 4, 1), devices=jax.devices()[:8])
    split = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    whole = jax.ShapeDtypeStruct((10,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    assert device_bytes((split, [whole])) == 8 * 6 * 4 / 4 + 10 * 2
    program = Program(lambda: None, (), resident_bytes=16 * GIB, total_bytes=63 * GIB, rows=1)
    check_held(program, chip=CHIPS["TPU v6 lite"])
    with pytest.raises(DoesNotFit, match=r"0.25 GiB more than .* a v5e; .* more than 4 devices$"):
        check_held(program, chip=V5E)


def test_out_of_memory_is_read_from_xla():
    says = "Ran out of memory in memory space hbm. Used 24.25G of 15.75G hbm. Exceeded hbm"
    assert "24.25 GiB a device, 8.50 GiB more than the 15.75 GiB" in str(read_out_of_memory(says))
    says = "memory required for HLO temporaries (200.00G) exceeds available HBM (15.75G)."
    assert "184.25 GiB more" in str(read_out_of_memory(says))
    assert read_out_of_memory("INTERNAL: something else") is None


def make_experiment(model=CONFIG, **stage):
    stage = {"steps": 10, "batch_size": 16, "plans": ("meteor",)} | stage
    return Experiment(
        model=model,
        data=DataConfig(sources=("easy-vqa",), text_length=12),
        train=TrainConfig(finetune=StageConfig(**stage), mesh=MeshConfig(1, -1)),
        plans={"meteor": METEOR},
        eval=EvalConfig(max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(4, 2, 1), devices=jax.devices()[:8])


def test_alternatives_go_from_remat_over_the_mesh_to_fewer_rows(mesh):
    tried = list(alternatives(Request("train", make_experiment()), mesh))
    assert [alternative.label for alternative in tried] == [
        "remat=nothing_saveable",
        "remat=nothing_saveable + mesh data=1,fsdp=8",
        "remat=nothing_saveable + mesh data=1,fsdp=8 + grad_accum_steps=2",
        "remat=nothing_saveable + mesh data=1,fsdp=4,tensor=2 + grad_accum_steps=4",
    ]
    last = tried[-1]
    assert last.mesh == MeshConfig(1, 4, 2)
    assert last.request.stage_config.grad_accum_steps == 4
    assert last.request.experiment.model.llama.remat == "nothing_saveable"
    labels = [a.label for a in alternatives(Request("prefill", make_experiment()), mesh)]
    assert labels == ["mesh data=4,tensor=2"]  # the kv heads divide no further


def with_remat_in_the_decoder():
    llama = dataclasses.replace(CONFIG.llama, remat="nothing_saveable")
    return make_experiment(dataclasses.replace(CONFIG, llama=llama))


def test_a_train_step_holds_gradients_too_and_counts_remat_apart(mesh):
    request = Request("train", with_remat_in_the_decoder())
    program = build_program(request, mesh, platform="tpu")
    state, batch = program.args
    assert program.resident_bytes == device_bytes((state, batch)) + device_bytes(state.params)
    assert program.resident_bytes < program.total_bytes < 8 * program.resident_bytes
    assert batch.images.sharding.shard_shape(batch.images.shape) == (2, 1, 32, 32, 3)
    flops, model_flops = count_flops(request, mesh, platform="tpu")
    assert 1.05 < flops / model_flops < 1.5


def test_a_train_step_knows_of_turns_where_they_stand_apart(mesh):
    experiment = make_experiment()
    _, batch = build_program(Request("train", experiment), mesh, platform="tpu").args
    assert batch.segment_ids is None
    data = dataclasses.replace(experiment.data, attention="independent_qa")
    experiment = dataclasses.replace(experiment, data=data)
    _, batch = build_program(Request("train", experiment), mesh, platform="tpu").args
    assert batch.segment_ids.shape == batch.tokens.shape
    captions = Request("train", experiment, stage="pretrain")
    assert build_program(captions, mesh, platform="tpu").args[1].segment_ids is None


def test_extend_takes_the_cache_of_prefill_split_by_rows(mesh):
    experiment = with_remat_in_the_decoder()
    config = dataclasses.replace(experiment.eval, param_dtype="bfloat16")
    experiment = dataclasses.replace(experiment, eval=config)
    request = Request("extend", experiment, plan="full", rows=8)
    program = build_program(request, mesh, platform="tpu")
    params, cache, tokens = program.args
    assert params["llama"]["head"]["kernel"].dtype == jnp.bfloat16
    assert cache.ranges[0].k.sharding.spec == P(None, ("data", "fsdp"), None, "tensor", None)
    assert tokens.shape == (8, 1)
    flops, model_flops = count_flops(request, mesh, platform="tpu")
    assert flops == model_flops > 0


def test_models_are_traced_for_the_platform_they_are_compiled_for():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((7, 7, 1, 4))

    def count_convolutions():
        return str(jax.make_jaxpr(lambda x, k: depthwise(x, k))(x, kernel)).count(
            "conv_general_dilated["
        )

    assert (target_platform(), count_convolutions()) == ("cpu", 0)
    with compiling_for("tpu"):
        assert (target_platform(), count_convolutions()) == ("tpu", 1)
    assert target_platform() == "cpu"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_mesh("data=1,fsdp"), "mesh: expected such as data=1,fsdp=64, got"),
        (lambda: parse_mesh("dat=1"), "Did you mean 'data'?"),
        (
            lambda: check_program("trian"),
            "names out of train, prefill, extend, predict, got",
        ),
        (lambda: chip_of(make_mesh(MeshConfig(1), devices=jax.devices()[:1])), "of 'cpu'"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'meteor_jax\[tpu\]'"):
        aot.open_topology("v5e:2x2")
    assert parse_mesh("fsdp=64") == MeshConfig(1, 64, 1)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("program", ("train", "prefill", "extend"))
def test_a_tiny_config_compiles_for_four_chips(program):
    pytest.importorskip("libtpu")
    llama = dataclasses.replace(CONFIG.llama, depth=2)
    model = dataclasses.replace(CONFIG, llama=llama).with_encoders("clip")
    request = with_remat(make_experiment(model, plans=("full",)), "nothing_saveable")
    mesh = make_mesh(MeshConfig(1, 4), devices=aot.open_topology("v5e:2x2"))
    measured = measure(Request(program, request), mesh)
    assert 0 < measured.argument_bytes < measured.peak_bytes + measured.alias_bytes
    assert measured.peak_bytes < V5E.memory_bytes
    assert measured.alias_bytes > 0 or program == "prefill"
    assert measured.collectives["all-gather"].count > 0
    assert measured.unknown_loops == 0
    assert 0 < measured.roofline.mfu < 1
    assert program in str(aot.report({program: measured}, chip=V5E, title="").columns[1].header)


@pytest.mark.tpu_compile
def test_a_config_that_cannot_fit_says_so_without_compiling(tmp_path):
    pytest.importorskip("libtpu")
    output = tmp_path / "aot.json"
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "meteor_jax.cli",
            "aot",
            "--config=configs/eagle.py:x4_7b",
            "--topology=v5e:2x2",
            "--programs=train",
            f"--output={output}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1, ended.stderr
    assert "train does not fit v5e:2x2" in ended.stdout
    assert "more than the 15.75 GiB of a v5e" in ended.stdout
    assert json.loads(output.read_text())["does_not_fit"]["train"]["fits_with"] is None


def test_a_kernels_metadata_does_not_end_its_computation():
    text = """HloModule m

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %k = f32[2]{0} custom-call(%p), custom_call_target="tpu", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="k"}
  ROOT %r = f32[2]{0} negate(%k)
}
"""
    assert parse(text).computations["main"].root.operands == ("k",)
