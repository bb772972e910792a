"""What tests of networks share: variables, images, gradients."""

import jax
import jax.numpy as jnp
import numpy as np

TINY = (16, 16, 3)


def random_variables(model, shape, seed=0):
    """Variables with nothing left at 0 or 1, so that no mistake hides behind an initial value."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    tree = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[-4:-1]) ** -0.5)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return rng.normal(size=leaf.shape, scale=0.3)

    drawn = jax.tree_util.tree_map_with_path(draw, tree)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn)


def images(batch, *shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, *shape)), jnp.float32)


def check_tree(ours, theirs, atol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, theirs)


def gradients(model, variables, x, gates):
    def loss(params):
        stats = variables["batch_stats"]
        y, updates = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            gates=gates,
            mutable=["batch_stats"],
        )
        return jnp.sum(y**2), updates

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
