"""How does a config become the programs that training and evaluation would compile elsewhere?

Built as training builds them, but of shapes alone: no parameter, no image and no data set is there.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from resvariants.data import sets
from resvariants.errors import InputError, first_line
from resvariants.networks.summary import count_parameters
from resvariants.platforms import made_for
from resvariants.training import keys
from resvariants.training.draws import slots_of_steps
from resvariants.training.evaluation import jitted_evaluation
from resvariants.training.parallel import Parallel, make_parallel
from resvariants.training.setup import batch_shapes, configured_step, make_model, make_optimization
from resvariants.training.step import create_state
from targets import hlo, traffic
from targets.devices import Target

# A schedule's milestones are numbers in the program: where they lie changes nothing that counts.
STEPS_PER_EPOCH = 1000.0
CROPS = 10


class Program(NamedTuple):
    """What is compiled: a network, and how its steps are laid out.

    Attributes:
      optimizer, state: as in training; the state has shapes alone.
    """

    config: ConfigDict
    target: Target
    model: nn.Module
    parallel: Parallel
    optimizer: Any
    state: Any
    image_shape: tuple[int, int, int]
    streamed: bool

    @property
    def parameters(self) -> int:
        """How many."""
        return count_parameters(self.state.params)

    @property
    def blocks(self) -> int | None:
        """How many residual blocks; None of other networks."""
        return getattr(self.model, "num_blocks", None)


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      lower_seconds, compile_seconds: tracing and lowering; XLA. On this machine.
      memory: bytes of one device by kind.
      text: the program's.
    """

    lower_seconds: float
    compile_seconds: float
    memory: dict[str, int]
    text: str

    @property
    def bytes(self) -> int:
        """What a device holds while it runs. Aliased outputs lie where arguments did."""
        return sum(self.memory.values()) - 2 * self.memory["alias"]

    def traffic(self, cache: int) -> traffic.Traffic:
        """See `traffic.count`."""
        return traffic.count(hlo.parse(self.text), cache)


class Refused(Exception):
    """The compiler gives no program; the message is the first line of what it says.

    Attributes:
      memory: whether the device's memory does not suffice.
    """

    def __init__(self, error: Exception):
        """Of the compiler's own error."""
        super().__init__(first_line(error))
        self.memory = "RESOURCE_EXHAUSTED" in str(error)


def build(config: ConfigDict, target: Target, model: nn.Module | None = None) -> Program:
    """What `config` describes, for the devices of `target`.

    Args:
      model: another network than the config's, of its data set.

    Raises:
      InputError: whatever is wrong with the config.
    """
    keys.check(config)
    dataset = config.dataset
    data_set = sets.find(dataset.name, dataset.data_dir, dataset.image_size)
    if not data_set.num_classes:
        raise InputError(
            f"dataset {dataset.name} has as many classes as its folder has; name it with"
            " dataset.data_dir, or take dataset.name=imagenet2012, of 1000"
        )
    with made_for(target.platform):
        parallel = make_parallel(config.parallel, config.sync_batch_norm, target.devices())
        if model is None:
            model = make_model(config, data_set, parallel.bn_axis_name)
        _, _, optimizer = make_optimization(config, STEPS_PER_EPOCH)
        shape = data_set.image_shape
        make = partial(create_state, model, optimizer, config.seed, shape, ema=config.ema_decay > 0)
        state = jax.eval_shape(make)
    return Program(
        config, target, model, parallel, optimizer, state, tuple(shape), data_set.streamed
    )


def compile_training(program: Program, batch_size: int) -> Compiled:
    """The train step on a global batch of so many images.

    Raises:
      Refused: the compiler does not.
    """
    parallel = program.parallel
    model = program.model
    with made_for(program.target.platform):
        slots = slots_of_steps(model, program.config.seed)(0)
    if slots is not None:  # as the first step of a run has it
        model = model.clone(slots=slots)
    step = configured_step(program.config, model, program.optimizer)
    batch = batch_shapes(program.config, batch_size, program.image_shape)
    state = program.state
    if program.config.parallel == "pmap":  # lays both out by itself, by their leading axis
        count = program.target.count
        stacked = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype))
        arguments = stacked(state), jax.eval_shape(parallel.split, batch)
    else:
        arguments = (
            laid_out(state, parallel.replicated),
            laid_out(batch, parallel.batch_sharding),
        )
    return _compiled(program.target, lambda: parallel.compile(step).lower(*arguments))


def compile_evaluation(program: Program, batch_size: int) -> Compiled:
    """The evaluation step, which is jitted always.

    Raises:
      Refused: the compiler does not.
    """
    parallel, dataset = program.parallel, program.config.dataset
    crops = (CROPS,) if program.streamed and dataset.ten_crop else ()
    height, width, channels = program.image_shape
    if dataset.eval_image_size:
        height = width = dataset.eval_image_size
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *crops, height, width, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch_size,), bool),
    }
    state = laid_out((program.state.params, program.state.batch_stats), parallel.replicated)
    batch = laid_out(batch, parallel.batch_sharding)
    return _compiled(
        program.target, lambda: jitted_evaluation(program.model, parallel).lower(*state, batch)
    )


def laid_out(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes of arrays that lie on devices so."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _compiled(target, lower):
    jax.clear_caches()  # or what was traced for one batch size would speed up the next
    clock = [time.perf_counter()]
    with made_for(target.platform):
        lowered = lower()
    clock.append(time.perf_counter())
    try:
        compiled = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise Refused(error) from error
    clock.append(time.perf_counter())
    found = compiled.memory_analysis()
    memory = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "alias": found.alias_size_in_bytes,
    }
    return Compiled(clock[1] - clock[0], clock[2] - clock[1], memory, compiled.as_text())
