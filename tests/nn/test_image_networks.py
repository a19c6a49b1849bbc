"""Image networks: published sizes, shapes, types, and statistics that move once a call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import bilevel
from bilevel.devices import sharding
from bilevel.nn.classification import classification_loss, init_variables
from bilevel.nn.resnet import ResNet, resnet18, resnet20, resnet50
from bilevel.nn.small import MLP, SmallCNN
from bilevel.nn.vgg import VGG16
from bilevel.nn.wide_resnet import WideResNet
from bilevel.types import UserError

CIFAR, IMAGENET, MNIST = (32, 32, 3), (224, 224, 3), (28, 28, 1)
TINY: dict[str, Any] = {
    "basic": ResNet((1,), (4,), 10),
    "padded shortcut": ResNet((1, 1), (4, 8), 10, shortcut="pad"),
    "bottleneck": ResNet((1,), (4,), 10, bottleneck=True, stem="imagenet"),
    "wide": WideResNet(10, 1, dropout=0.3),
}
"""Small enough to run, on images of 16 × 16 pixels."""


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def wide_resnet_size(k: int, classes: int = 10) -> int:
    """WRN-28-k by hand: convolutions without bias, two numbers a channel for each BatchNorm."""
    total, inside = 27 * 16, 16
    for width in (16 * k, 32 * k, 64 * k):
        total += 2 * inside + 9 * inside * width + 2 * width + 9 * width * width + inside * width
        total += 3 * (4 * width + 18 * width * width)
        inside = width
    return total + 2 * inside + inside * classes + classes


def resnet20_size() -> int:
    total, inside = 27 * 16 + 32, 16
    for width in (16, 32, 64):
        total += 9 * inside * width + 5 * 9 * width * width + 6 * 2 * width
        inside = width
    return total + 64 * 10 + 10


PUBLISHED = {
    # torchvision's documentation of resnet50, resnet18, vgg16 and vgg16_bn: num_params.
    "resnet50": (resnet50(), IMAGENET, 25_557_032),
    "resnet18 imagenet": (resnet18(1000, stem="imagenet"), IMAGENET, 11_689_512),
    "vgg16": (VGG16(1000, batch_norm=False, hidden=4096), IMAGENET, 138_357_544),
    "vgg16 bn": (VGG16(1000, hidden=4096), IMAGENET, 138_365_992),
    # kuangliu/pytorch-cifar, ResNet18.
    "resnet18 cifar": (resnet18(), CIFAR, 11_173_962),
    # 14,714,688 in the convolutions (keras.applications VGG16 without its top), then 512 -> 512 -> 512 -> 10.
    "vgg16 cifar": (VGG16(batch_norm=False), CIFAR, 14_714_688 + 2 * 512 * 513 + 513 * 10),
    # He et al. 2016, table 6: 0.27M; Zagoruyko and Komodakis 2016, table 4: 36.5M; Oliver et al. 2018: 1.5M.
    "resnet20": (resnet20(), CIFAR, resnet20_size()),
    "wrn-28-10": (WideResNet(28, 10), CIFAR, wide_resnet_size(10)),
    "wrn-28-2": (WideResNet(28, 2), CIFAR, wide_resnet_size(2)),
    # The example mnist_mlp of Keras: two hidden layers of 512.
    "mlp 2 x 512": (MLP(hidden=(512, 512)), MNIST, 669_706),
    "mlp": (MLP(), MNIST, 785 * 512 + 2 * 513 * 512 + 5130),
    "small cnn": (SmallCNN(), CIFAR, 28 * 64 + 577 * 128 + 1153 * 256 + 1025 * 128 + 129 * 256 + 2570),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    module, shape, size = PUBLISHED[name]
    params, state = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), shape))
    assert count(params) == size
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((params, state)))
    assert set(state) <= {"batch_stats"}
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits = jax.eval_shape(lambda p, s, x: module.apply({"params": p, **s}, x, train=False), params, state, images)
    assert (logits.shape, logits.dtype) == ((2, module.num_classes), jnp.float32)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((2,), jnp.uint8)}
    losses, aux = jax.eval_shape(classification_loss(module), params, state, batch, jax.random.key(0))
    assert (losses.shape, losses.dtype) == ((2,), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), aux.model_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_sizes_agree_with_the_papers_round_numbers() -> None:
    assert round(wide_resnet_size(10) / 1e6, 1) == 36.5
    assert round(wide_resnet_size(2) / 1e6, 1) == 1.5
    assert round(resnet20_size() / 1e6, 2) == 0.27
    assert round(PUBLISHED["resnet18 cifar"][2] / PUBLISHED["small cnn"][2]) == 21  # RHO-LOSS, section 5.3


def quick_jit(function: Any) -> Any:
    """Compiled in a fifth of the time, to a slower program."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def variables_of(module: Any) -> tuple[Any, Any]:
    return quick_jit(lambda: init_variables(module, jax.random.key(0), (16, 16, 3)))()


@functools.cache
def compiled(module: Any, train: bool = True) -> Any:
    return quick_jit(classification_loss(module, train=train))


def parts(module: Any, rows: int = 6) -> tuple[Any, Any, Any]:
    images = np.random.default_rng(0).normal(size=(rows, 16, 16, 3)).astype(np.float32)
    return *variables_of(module), {"image": jnp.asarray(images), "label": jnp.arange(rows) % 10}


class Plain:
    """The layers written out, with the numbers of a network."""

    def __init__(self, params: Any, state: Any):
        self.params, self.statistics = params, state["batch_stats"]

    def inside(self, name: str) -> "Plain":
        return Plain(self.params[name], {"batch_stats": self.statistics[name]})

    def conv(self, x: Any, name: str, stride: int = 1) -> Any:
        kernel = self.params[name]["kernel"]
        padding = [(kernel.shape[0] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def norm(self, x: Any, name: str) -> Any:
        statistics, own = self.statistics[name], self.params[name]
        return (x - statistics["mean"]) / jnp.sqrt(statistics["var"] + 1e-5) * own["scale"] + own["bias"]

    def classify(self, x: Any) -> Any:
        own = self.params["head"]["classifier"]
        return x.mean((1, 2)) @ own["kernel"] + own["bias"]


def plain_padded(net: Plain, x: Any) -> Any:
    x = jax.nn.relu(net.norm(net.conv(x, "stem"), "stem_norm"))
    for name, stride in (("stage_0_block_0", 1), ("stage_1_block_0", 2)):
        block = net.inside(name)
        h = jax.nn.relu(block.norm(block.conv(x, "conv_0", stride), "norm_0"))
        h = block.norm(block.conv(h, "conv_1"), "norm_1")
        if stride == 2:
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        x = jax.nn.relu(x + h)
    return net.classify(x)


def plain_bottleneck(net: Plain, x: Any) -> Any:
    x = jax.nn.relu(net.norm(net.conv(x, "stem", 2), "stem_norm"))
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)
    block = net.inside("stage_0_block_0")
    h = jax.nn.relu(block.norm(block.conv(x, "conv_0"), "norm_0"))
    h = jax.nn.relu(block.norm(block.conv(h, "conv_1"), "norm_1"))
    h = block.norm(block.conv(h, "conv_2"), "norm_2")
    return net.classify(jax.nn.relu(h + block.norm(block.conv(x, "shortcut"), "shortcut_norm")))


def plain_wide(net: Plain, x: Any) -> Any:
    x = net.conv(x, "stem")
    for name, stride in (("stage_0_block_0", 1), ("stage_1_block_0", 2), ("stage_2_block_0", 2)):
        block = net.inside(name)
        first = jax.nn.relu(block.norm(x, "norm_0"))
        h = jax.nn.relu(block.norm(block.conv(first, "conv_0", stride), "norm_1"))
        x = block.conv(h, "conv_1") + (x if stride == 1 else block.conv(first, "shortcut", 2))
    return net.classify(jax.nn.relu(net.norm(x, "final_norm")))


PLAIN = {"padded shortcut": plain_padded, "bottleneck": plain_bottleneck, "wide": plain_wide}


@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_network_written_out(name: str) -> None:
    params, state, batch = parts(TINY[name])
    generator = np.random.default_rng(1)

    def moved(x: Any) -> Any:
        """Biases, scales, means and variances away from 0 and 1; kernels as they are."""
        return x + 0.3 * np.abs(generator.normal(size=x.shape)).astype(np.float32) if x.ndim == 1 else x

    params, state = jax.tree.map(moved, (params, state))
    found = quick_jit(TINY[name].apply)({"params": params, **state}, batch["image"])
    wanted = quick_jit(lambda x: PLAIN[name](Plain(params, state), x))(batch["image"])
    assert np.ptp(wanted, axis=0).max() > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_statistics_move_exactly_once_a_call(name: str) -> None:
    """Momentum 0.9 from mean 0: the same batch twice gives 0.1 m, then 0.19 m. Two moves a call would give 0.19 and 0.3439."""
    module = TINY[name]
    params, state, batch = parts(module)
    loss, key = compiled(module), jax.random.key(2)
    first = loss(params, state, batch, key)[1].model_state
    second = loss(params, first, batch, key)[1].model_state
    assert jax.tree.structure(first) == jax.tree.structure(state)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b, c: (a, b, c), state, first, second), is_leaf=_is_triple)
    for before, once, twice in moved:
        assert np.abs(once - before).max() > 1e-4
        np.testing.assert_allclose(twice - before, 1.9 * (once - before), rtol=1e-3, atol=1e-5)


def test_evaluation_leaves_the_statistics() -> None:
    params, state, batch = parts(TINY["wide"])
    kept = compiled(TINY["wide"], train=False)(params, state, batch, jax.random.key(0))[1].model_state
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def _is_triple(x: Any) -> bool:
    return isinstance(x, tuple)


def test_evaluation_uses_the_statistics() -> None:
    module = TINY["basic"]
    params, state, batch = parts(module)
    evaluate = compiled(module, train=False)
    whole, aux = evaluate(params, state, batch, jax.random.key(0))
    one, _ = evaluate(params, state, jax.tree.map(lambda x: x[2:3], batch), jax.random.key(0))
    np.testing.assert_allclose(one, whole[2:3], rtol=1e-4)  # no row sees another
    logits = quick_jit(module.apply)({"params": params, **state}, batch["image"])
    np.testing.assert_array_equal(aux.metrics["correct"], np.argmax(logits, 1) == batch["label"])
    wanted = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(batch["label"])[:, None], 1)[:, 0]
    np.testing.assert_allclose(whole, wanted, rtol=1e-4)


@pytest.mark.parametrize("module", [SmallCNN(features=(4,), hidden=(8,)), MLP(hidden=(8,)), TINY["basic"]])
def test_computation_in_bfloat16(module: Any) -> None:
    params, state, batch = parts(module)
    half = module.clone(dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables_of(half)))
    key = jax.random.key(0)
    wanted, found = (compiled(m)(params, state, batch, key) for m in (module, half))
    assert found[0].dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found[1].model_state))
    np.testing.assert_allclose(found[0], wanted[0], rtol=0.1, atol=0.1)
    assert np.abs(found[0] - wanted[0]).max() > 1e-5
    text = str(jax.make_jaxpr(lambda p: classification_loss(half)(p, state, batch, key)[0])(params))
    assert "bf16" in text


def test_dropout_is_a_function_of_the_key() -> None:
    params, state, batch = parts(TINY["wide"])
    loss, evaluate = compiled(TINY["wide"]), compiled(TINY["wide"], train=False)
    first, again, other = (loss(params, state, batch, jax.random.key(k))[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    still = [evaluate(params, state, batch, jax.random.key(k))[0] for k in (1, 2)]
    np.testing.assert_array_equal(*still)


def test_features_are_what_the_classifier_sees() -> None:
    params, state, batch = parts(TINY["basic"])
    apply = quick_jit(lambda x: TINY["basic"].apply({"params": params, **state}, x, mutable=["intermediates"]))
    logits, seen = apply(batch["image"])
    features = seen["intermediates"]["head"]["features"][0]
    classifier = params["head"]["classifier"]
    np.testing.assert_allclose(features @ classifier["kernel"] + classifier["bias"], logits, rtol=1e-4, atol=1e-5)


def weighting(weight_params: Any, batch: Any) -> Any:
    return batch["image"].mean((1, 2)) @ weight_params


def one_step(module: Any, *, spread: bool) -> bilevel.TrainState:
    params, state, generic = parts(module, rows=16)
    specific = jax.tree.map(lambda x: x[::-1], parts(module, rows=8)[2])
    axis = "data" if spread else None
    loss = classification_loss(module, axis_name=axis)
    train = bilevel.make_step(
        loss, weighting, optax.sgd(0.1, momentum=0.9), optax.sgd(1.0), bilevel.dds(), batch_size=16, mode="dense",
        derivatives=bilevel.Forward(), update_every=1, axis_name=axis,
    )  # fmt: skip
    start = train.init(jax.random.key(1), params, jnp.asarray([0.5, -1.0, 2.0]), state)
    if spread:
        rows, same = PartitionSpec("data"), PartitionSpec()
        mesh = sharding.make_mesh(jax.devices()[:4])
        step = jax.shard_map(lambda *a: train.step(*a)[0], mesh=mesh, in_specs=(same, rows, rows), out_specs=same)
    else:
        step = lambda *a: train.step(*a)[0]  # noqa: E731
    return quick_jit(step)(start, generic, specific)


def test_synchronised_statistics_on_several_devices() -> None:
    alone = one_step(TINY["basic"], spread=False)
    together = one_step(TINY["basic"], spread=True)
    found, wanted = ((s.params, s.model_state, s.weight_params) for s in (together, alone))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)  # without synchronising the difference is 1.5e-3


def test_averaged_parameters_include_the_statistics() -> None:
    """DDS, appendix A.4: the statistics of BatchNorm are treated as parameters by the moving average."""
    module = TINY["basic"]
    params, state, generic = parts(module, rows=8)
    train = bilevel.make_step(
        classification_loss(module), None, optax.sgd(0.1), None, bilevel.uniform(), batch_size=4, ema_decay=0.75
    )
    before = train.init(jax.random.key(1), params, {}, state)
    step = quick_jit(train.step)
    after, _ = step(before, generic, generic)
    last, _ = step(after, generic, generic)
    for i, kept in enumerate((lambda s: s.params, lambda s: s.model_state["batch_stats"])):
        averaged = last.ema[1]["batch_stats"] if i else last.ema[0]
        wanted = jax.tree.map(
            lambda a, b, c: 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c, kept(before), kept(after), kept(last)
        )
        for x, y in zip(jax.tree.leaves(averaged), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), kept(before), averaged)
        assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("module", "derivatives"),
    [(SmallCNN(features=(4,), hidden=()), bilevel.Forward()), (TINY["basic"], bilevel.Finite())],
)
def test_second_order_methods_run(module: Any, derivatives: Any) -> None:
    params, state, generic = parts(module, rows=8)
    train = bilevel.make_step(
        classification_loss(module), weighting, optax.sgd(0.1), optax.sgd(1.0), bilevel.soba(optax.sgd(0.1)),
        batch_size=4, derivatives=derivatives, update_every=1,
    )  # fmt: skip
    before = train.init(jax.random.key(1), params, jnp.ones(3), state)
    step = quick_jit(train.step)
    after, metrics = step(step(before, generic, generic)[0], generic, generic)
    assert np.isfinite(metrics["generic_loss"])
    assert np.abs(after.weight_params - before.weight_params).max() > 0


def test_user_errors() -> None:
    floats = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(UserError, match="'imagenett' is not known; it must be 'cifar' or 'imagenet'"):
        resnet18(stem="imagenett")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="depth 27 of a wide ResNet must be 6n"):
        WideResNet(27)
    with pytest.raises(UserError, match="width 0 of a wide ResNet must be at least 1"):
        WideResNet(28, 0)
    with pytest.raises(UserError, match="images are uint8; normalise them first"):
        TINY["basic"].init(jax.random.key(0), floats.astype(jnp.uint8))
    with pytest.raises(UserError, match="16 × 16 pixels, but this network needs at least 32 × 32"):
        VGG16().init(jax.random.key(0), floats)
    with pytest.raises(UserError, match="needs at least 22 × 22"):
        SmallCNN().init(jax.random.key(0), floats)
    with pytest.raises(UserError, match=r"shape \(16, 16, 3\); the network needs"):
        TINY["basic"].init(jax.random.key(0), floats[0])
    jax.eval_shape(lambda: SmallCNN().init(jax.random.key(0), jnp.zeros((1, 22, 22, 3))))
    jax.eval_shape(lambda: SmallCNN(pad=True).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
