"""Saving and restoring, and what is said when it cannot be done."""

import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from meteor_jax.checkpoint import (
    CheckpointError,
    open_checkpoints,
    restore,
    restore_params,
    restore_parts,
    save,
    write_config,
)
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array
    ema: dict | None


def make_state(*, step=3, width=4, ema=True):
    params = {"llama": {"head": jnp.arange(2.0 * width).reshape(2, width)}, "clip": jnp.ones(2)}
    return State(
        step=jnp.array(step, jnp.int32),
        params=params,
        opt_state=({"mu": {"llama/head": params["llama"]["head"] * 2}}, ()),
        rng=jax.random.PRNGKey(step),
        ema=jax.tree.map(lambda x: x + 10, params) if ema else None,
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def workdir(tmp_path):
    """A run's folder with one checkpoint, after which the state was overwritten in place."""
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, make_state(), step=3, config={"seed": 1})
    return tmp_path


def test_round_trip(workdir):
    expected = make_state()
    with open_checkpoints(workdir) as checkpoints:
        state = restore(checkpoints, abstract(expected))
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_params_alone_come_from_the_moving_average(workdir):
    params = restore_params(workdir, abstract(make_state().params))
    jax.tree.map(np.testing.assert_array_equal, params, make_state().ema)


def test_restores_to_another_mesh(workdir):
    mesh = make_mesh(MeshConfig(1, 2, 4), devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    like = abstract(make_state().params)
    like["llama"]["head"] = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=sharding)
    params = restore_params(workdir, like)
    assert params["llama"]["head"].sharding == sharding
    np.testing.assert_array_equal(params["llama"]["head"], make_state().ema["llama"]["head"])


def test_a_whole_state_goes_to_another_mesh(tmp_path):
    """Saved under data=8, copied over before it is written, restored under fsdp=4 and tensor=2."""

    def laid_out(state, **sizes):
        mesh = make_mesh(MeshConfig(**sizes), devices=jax.devices()[:8])
        return jax.tree.map(jax.device_put, state, parameter_shardings(state, mesh))

    params = {"llama": {"fc1": {"kernel": jnp.arange(64.0).reshape(8, 8)}}}
    state = make_state().replace(
        params=params,
        opt_state=({"llama/fc1/kernel": params["llama"]["fc1"]["kernel"] / 2},),
        ema=jax.tree.map(jnp.square, params),
    )
    expected = jax.tree.map(np.array, state)
    saved, like = laid_out(state, data=8), abstract(laid_out(state, data=1, fsdp=4, tensor=2))
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, saved, step=3, config={})
        jax.tree.map(lambda x: x.delete(), saved)  # as the next step does, which takes it over
        checkpoints.wait_until_finished()
        restored = restore(checkpoints, like)
    kernel = restored.opt_state[0]["llama/fc1/kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 4)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_parts_come_from_several_workdirs(tmp_path):
    params = make_state().params
    for part in params:
        state = make_state(ema=False).replace(params={part: params[part]})
        with open_checkpoints(tmp_path / part) as checkpoints:
            save(checkpoints, state, step=0, config={})
    like = abstract(params)
    both = restore_parts([tmp_path / "llama", tmp_path / "clip"], like)
    jax.tree.map(np.testing.assert_array_equal, both, params)
    assert restore_parts([tmp_path / "clip"], like).keys() == {"clip"}
    assert restore_parts([], like) == {}
    with pytest.raises(CheckpointError, match=r"holds clip, which came before"):
        restore_parts([tmp_path / "clip", tmp_path / "clip"], like)
    with pytest.raises(CheckpointError, match=r"holds clip, but the model has llama"):
        restore_parts([tmp_path / "clip"], {"llama": like["llama"]})
    with pytest.raises(CheckpointError, match=r"params/clip: checkpoint \(2,\), config \(3,\)"):
        restore_parts([tmp_path / "clip"], {"clip": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_another_config_is_named_by_path_and_shapes(workdir):
    like = abstract(make_state(width=6).params)
    like["convnext"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        restore_params(workdir, like)
    message = str(error.value)
    assert "\n" not in message
    assert "ema/llama/head: checkpoint (2, 4), config (2, 6)" in message
    assert "ema/convnext: checkpoint has none, config (1,)" in message
    assert "another --workdir" in message


def test_absent_moving_average_is_said(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, make_state(ema=False), step=1, config={})
        checkpoints.wait_until_finished()
        with pytest.raises(CheckpointError, match="ema is not in it"):
            restore(checkpoints, abstract(make_state()))


def test_nothing_to_restore(tmp_path):
    with pytest.raises(CheckpointError, match=r"no workdir .*nowhere: train first"):
        restore_params(tmp_path / "nowhere", {})
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*: train first"):
        restore_params(tmp_path, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*: train first"):
        restore_params(tmp_path, {})


def test_only_the_newest_are_kept(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, make_state(step=step), step=step, config={})
        save(checkpoints, make_state(step=9), step=3, config={})
        checkpoints.wait_until_finished()
        assert list(checkpoints.all_steps()) == [2, 3]
        state = restore(checkpoints, abstract(make_state()))
    assert int(state.step) == 3


def test_config_file(tmp_path):
    write_config(tmp_path, {"seed": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}
