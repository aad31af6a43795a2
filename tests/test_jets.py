"""Jets: each operation proven against two reverse passes in float64, and everything else refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen_optim import jets
from gen_optim.directional import Derivatives, derivatives_along
from tests.oracles import derivatives_by_differences, derivatives_by_double_backward

Case = Callable[[dict[str, Tensor]], Tensor]
aten, F = torch.ops.aten, nn.functional
LABELS = torch.tensor([0, 2, 1])
COLUMNS = torch.tensor([[0, 2, 1, 3], [1, 0, 3, 2], [3, 1, 2, 0]])
WHERE = torch.tensor([[True, False, True, True], [False, True, False, True], [True, True, False, False]])
PLAIN = torch.linspace(-1.3, 1.7, 12, dtype=torch.float64).reshape(3, 4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(x: Tensor) -> Tensor:
    return x * x + 0.5


def unit(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def image(x: Tensor) -> Tensor:
    """A 3 × 4 matrix as two images of three channels of 6 × 6 pixels."""
    scale = torch.linspace(0.5, 2.0, 18, dtype=x.dtype).reshape(18, 1)
    return (scale * x.reshape(1, 12)).reshape(2, 3, 6, 6) + 0.1 * torch.sin(torch.arange(216, dtype=x.dtype)).reshape(
        2, 3, 6, 6
    )


def written(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    y = x * 1.5
    write(y)
    return y


def under_a_view(x: Tensor, y: Tensor) -> Tensor:
    row = x[1]
    x.mul_(y)
    return row


def statistics(x: Tensor, *, training: bool, name: str = "native_batch_norm") -> Tensor:
    inputs, weight, bias = image(x), x[0, :3], x[1, :3]
    mean, variance = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    if name == "cudnn_batch_norm" and isinstance(x, jets.Jet):
        return aten.cudnn_batch_norm(inputs, weight, bias, mean, variance, training, 0.1, 1e-5)[0]
    if name == "_native_batch_norm_legit" and isinstance(x, jets.Jet):
        return aten._native_batch_norm_legit(inputs, weight, bias, mean, variance, training, 0.1, 1e-5)[0]
    if name == "no_stats" and isinstance(x, jets.Jet):
        return aten._native_batch_norm_legit.no_stats(inputs, weight, bias, training, 0.1, 1e-5)[0]
    return F.batch_norm(inputs, mean, variance, weight, bias, training)


def embedding(x: Tensor) -> Tensor:
    return F.embedding(torch.tensor([[0, 2], [2, 1]]), x)


# x is 3 × 4, away from kinks; y is 3 × 4 too.
CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    # elementwise
    "exp": lambda x, y: x.exp(),
    "expm1": lambda x, y: x.expm1(),
    "log": lambda x, y: positive(x).log(),
    "log1p": lambda x, y: positive(x).log1p(),
    "log2": lambda x, y: positive(x).log2() + positive(y).log10(),
    "sqrt": lambda x, y: positive(x).sqrt(),
    "rsqrt": lambda x, y: positive(x).rsqrt(),
    "reciprocal": lambda x, y: positive(x).reciprocal(),
    "tanh": lambda x, y: x.tanh(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "sin": lambda x, y: x.sin() + y.cos() + (0.1 * x).tan(),
    "sinh": lambda x, y: x.sinh() + y.cosh() + x.exp2(),
    "atan": lambda x, y: x.atan(),
    "erf": lambda x, y: x.erf(),
    "abs": lambda x, y: x.abs(),
    "relu": lambda x, y: F.relu(x) + F.relu(y, inplace=False),
    "relu in place": lambda x, y: F.relu(x * y, inplace=True),
    "gelu": lambda x, y: F.gelu(x),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "silu": lambda x, y: F.silu(x),
    "silu in place": lambda x, y: F.silu(x * y, inplace=True),
    "mish": lambda x, y: F.mish(x),
    "softplus": lambda x, y: F.softplus(x) + F.softplus(30 * x, beta=2),
    "elu": lambda x, y: F.elu(x, 0.7) + F.selu(y) + F.celu(x, 2.0),
    "leaky_relu": lambda x, y: F.leaky_relu(x, 0.2),
    "threshold": lambda x, y: F.threshold(x, 0.1, 5.0),
    "hardtanh": lambda x, y: F.hardtanh(x, -0.7, 0.6) + F.relu6(9 * y),
    "hardswish": lambda x, y: F.hardswish(x) + F.hardswish(x + 9) + F.hardswish(y - 9),
    "hardsigmoid": lambda x, y: F.hardsigmoid(x) + F.hardsigmoid(x + 9) + F.hardsigmoid(y - 9),
    "logsigmoid": lambda x, y: F.logsigmoid(x),
    "prelu": lambda x, y: F.prelu(x, y[0, :1]),
    "glu": lambda x, y: F.glu(x),
    "clamp": lambda x, y: x.clamp(-0.7, 0.6) + y.clamp(min=-0.2) + x.clamp(max=0.3) + y.clamp_min(0.1),
    "clamp to tensors": lambda x, y: x.clamp(min=PLAIN - 1, max=PLAIN + 1) + y.clamp_max(0.4),
    "pow": lambda x, y: x**2 + y**3 + positive(x) ** 1.7 + positive(y) ** -0.5 + x**0 + y**1,
    "pow at 0": lambda x, y: (x - x) ** 2 + (x - x) ** 1 + (y - y) ** 3 + (x - x) ** 0,
    "pow of tensors": lambda x, y: positive(x) ** PLAIN,
    "pow of a number": lambda x, y: 2.5**x,
    "floor": lambda x, y: x * (9 * y).floor() + x.round() + y.sign() * x,
    # arithmetic
    "add": lambda x, y: 2 + x + PLAIN - y + torch.add(x, y, alpha=3) + (1 - x) - torch.sub(y, x, alpha=2),
    "mul": lambda x, y: 2 * x * y * PLAIN * x[0],
    "div": lambda x, y: x / positive(y) + PLAIN / positive(x) + x / 3 + 2 / positive(y) + y / positive(PLAIN),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3) + torch.addcdiv(x, y, positive(x), value=0.2),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(PLAIN, y, x),
    "neg": lambda x, y: -x,
    "in place": lambda x, y: (x * y).add_(y).mul_(x).sub_(PLAIN).div_(positive(y)).exp_(),
    "in place on a view": lambda x, y: written(x, lambda z: z.view(-1)[3:].mul_(y.reshape(-1)[3:])),
    "in place under a view": lambda x, y: under_a_view(x * 2, y),
    "in place after a view of a view": lambda x, y: written(x, lambda z: z.t()[1].view(3).copy_(y[:, 2])),
    "fill": lambda x, y: written(x, lambda z: (z[0].fill_(2.0), z[1].fill_(y[0, 0]), z[:, 1].zero_())),
    "write by index": lambda x, y: written(x, lambda z: z.__setitem__((slice(None), 0), y[:, 1])),
    "write by mask": lambda x, y: written(x, lambda z: z.__setitem__(WHERE, y[WHERE])),
    "result not shared": lambda x, y: x * 1.0 * (x * 1.0 + 0.0).mul_(y) + (x + PLAIN).mul_(y) * x,
    # products
    "linear": lambda x, y: F.linear(x, y[:2], y[2, :2]),
    "linear in 3 axes": lambda x, y: F.linear(x.reshape(3, 2, 2), y[:2, :2], y[2, :2]),
    "linear without bias": lambda x, y: F.linear(x, PLAIN) + F.linear(PLAIN, y),
    "matmul": lambda x, y: x @ y.t() @ x + (x @ y[0]).sum() + y[0] @ x[0],
    "bmm": lambda x, y: torch.bmm(x.reshape(3, 2, 2), y.reshape(3, 2, 2)),
    "addmm": lambda x, y: torch.addmm(x, y @ y.t(), x, beta=0.4, alpha=0.7),
    "baddbmm": lambda x, y: torch.baddbmm(x.reshape(3, 2, 2), y.reshape(3, 2, 2), x.reshape(3, 2, 2), alpha=0.5),
    "addmv": lambda x, y: torch.addmv(x[:, 0], y, x[0]),
    "vdot": lambda x, y: torch.vdot(x[0], y[1]) + torch.outer(x[0], y[0]).sum(),
    "einsum": lambda x, y: torch.einsum("ij,kj,kl->il", x, y, x),
    "conv1d": lambda x, y: F.conv1d(x.reshape(1, 3, 4), y[:2, :3].reshape(2, 3, 1), y[2, :2], padding=1),
    "conv2d": lambda x, y: F.conv2d(image(x), y.reshape(1, 3, 2, 2), x[0, :1], stride=2),
    "conv2d of data": lambda x, y: F.conv2d(image(PLAIN), y.reshape(1, 3, 2, 2), dilation=2, padding=1),
    "conv2d in groups": lambda x, y: F.conv2d(image(x), y.reshape(3, 1, 2, 2), x[0, :3], groups=3),
    "transposed conv": lambda x, y: F.conv_transpose2d(image(x), y.reshape(3, 1, 2, 2), x[0, :1], stride=2),
    # shape and choice
    "reshape": lambda x, y: x.reshape(2, 6).t().reshape(4, 3) * y.reshape(4, 3) + x.view(4, 3),
    "permute": lambda x, y: x.reshape(3, 2, 2).permute(2, 0, 1).contiguous() * y.reshape(2, 3, 2),
    "expand": lambda x, y: x[None].expand(2, 3, 4).sum(0) + y.unsqueeze(1).squeeze(1) + x.repeat(2, 1)[:3],
    "cat": lambda x, y: torch.cat([x, PLAIN, y * x]) * torch.cat([PLAIN, x, y]),
    "stack": lambda x, y: torch.stack([x, PLAIN, y * x], 1),
    "split": lambda x, y: x.split(2, 1)[0] * y.chunk(2, 1)[1] + x.unbind(1)[2].unsqueeze(1),
    "unsafe_split": lambda x, y: torch.unsafe_chunk(x * y, 2, 1)[1],
    "index": lambda x, y: x[torch.tensor([0, 2, 2])] * y[1:2] + x[:, [1, 1, 0, 3]] + x[WHERE].sum(),
    "index_select": lambda x, y: x.index_select(0, LABELS) + x.gather(1, COLUMNS) * y,
    "index_put": lambda x, y: x.index_put((LABELS,), y * PLAIN, accumulate=True),
    "scatter": lambda x, y: x.scatter(1, COLUMNS, y) + x.scatter(1, COLUMNS, 2.0),
    "scatter_add": lambda x, y: x.scatter_add(1, COLUMNS, y) + x.index_add(0, LABELS, y * x),
    "slice_scatter": lambda x, y: x.slice_scatter(y[:1], 0, 1, 2) + x.select_scatter(y[0], 0, 2),
    "where": lambda x, y: torch.where(WHERE, x, y * x) + torch.where(WHERE, 1.0, y),
    "masked_fill": lambda x, y: x.masked_fill(WHERE, 3.0) + x.masked_fill(WHERE, y[0, 0]),
    "flip": lambda x, y: x.flip(0) * y.roll(1, 1) + x.tril() * y.triu(),
    "cumsum": lambda x, y: x.cumsum(1),
    "pad": lambda x, y: F.pad(x, (1, 0), value=2.0) + F.pad(x[None], (1, 0), mode="reflect")[0],
    "pad others": lambda x, y: (
        F.pad(image(x), (1, 1, 1, 1), mode="reflect") + F.pad(image(y), (1, 1, 1, 1), mode="replicate")
    ),
    "pad in 1 and 3 axes": lambda x, y: (
        F.pad(x[None], (1, 1), mode="replicate").sum()
        * F.pad(image(y)[None], (1,) * 6, mode="replicate").mean()
        * F.pad(image(x)[None], (1,) * 6, mode="reflect").mean()
    ),
    "diag": lambda x, y: torch.diag_embed(x).sum(0) @ y[0] + x.diagonal().sum(),
    "unfold": lambda x, y: F.fold(F.unfold(image(x), 2), (6, 6), 2) + x.unfold(1, 2, 1).sum(),
    "pixel_shuffle": lambda x, y: (
        F.pixel_shuffle(x.reshape(1, 4, 3, 1), 2).sum((1, 2)) * F.pixel_unshuffle(y.reshape(1, 1, 6, 2), 2).sum()
    ),
    "interpolate": lambda x, y: (
        F.interpolate(image(x), scale_factor=2, mode="bilinear")
        + F.interpolate(image(x), scale_factor=2, mode="nearest")
        + F.interpolate(image(y), scale_factor=2, mode="bicubic")
    ),
    "interpolate lines": lambda x, y: (
        F.interpolate(x[None], scale_factor=2, mode="linear") * F.interpolate(y[None], scale_factor=2, mode="nearest")
    ),
    "cast": lambda x, y: x.to(torch.float64) * y.float().double().detach() + x.clone(),
    "detach": lambda x, y: x * y.detach() + torch.ones_like(x) * y,
    "item": lambda x, y: x * y.sum().item(),
    "comparison": lambda x, y: x * (x > y) + y * (x.argmax() == 2),
    "max": lambda x, y: x.max() * y.min() + x.amax(1)[:, None] * y.amin((0, 1)),
    "max over an axis": lambda x, y: (
        x.max(1).values[:, None] * y.min(0, keepdim=True).values + x.median(1).values.sum()
    ),
    "maximum": lambda x, y: torch.maximum(x, y) + torch.minimum(x, PLAIN),
    "sort": lambda x, y: x.sort(1).values * y.sort(dim=0, descending=True).values,
    "topk": lambda x, y: x.topk(2).values.sum() * y.topk(2, dim=0).values,
    # reductions
    "sum": lambda x, y: x.sum() * y.sum(1, keepdim=True) + x.sum((0, 1)),
    "mean": lambda x, y: x.mean() * y.mean(0) + x.mean((0, 1)),
    "var": lambda x, y: x.var() + y.var(1).sum() + x.var(0, correction=0).sum() + torch.var_mean(x, 1)[0].sum(),
    "std": lambda x, y: x.std() * y.std(1, keepdim=True),
    "norm": lambda x, y: x.norm() * y.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(x, 3, 1, keepdim=True),
    "norms 1 and ∞": lambda x, y: torch.linalg.vector_norm(x, 1) * torch.linalg.vector_norm(y, math.inf),
    "pairwise": lambda x, y: F.triplet_margin_loss(x, y, PLAIN, margin=9.0) + F.pairwise_distance(x, y).sum(),
    "old norm": lambda x, y: aten.norm.Scalar(x, 3) if isinstance(x, jets.Jet) else x.abs().pow(3).sum() ** (1 / 3),
    "normalize": lambda x, y: F.normalize(x) * F.cosine_similarity(x, y)[:, None],
    "logsumexp": lambda x, y: x.logsumexp(1) * y.logsumexp((0, 1)),
    "weight norm": lambda x, y: torch._weight_norm(x, y[:, :1], 0),
    # softmax and losses
    "softmax": lambda x, y: x.softmax(1) + (x * y).softmax(0),
    "log_softmax": lambda x, y: x.log_softmax(1) + (x * y).log_softmax(0),
    "softmin": lambda x, y: F.softmin(x, 0),
    "cross_entropy": lambda x, y: F.cross_entropy(x, LABELS),
    "cross_entropy with options": lambda x, y: F.cross_entropy(
        x, torch.tensor([0, -100, 1]), weight=torch.linspace(1, 2, 4).double(), label_smoothing=0.2, reduction="sum"
    ),
    "cross_entropy of images": lambda x, y: F.cross_entropy(image(x), torch.arange(72).reshape(2, 6, 6) % 3),
    "cross_entropy with probabilities": lambda x, y: F.cross_entropy(x, y.softmax(1)),
    "nll_loss": lambda x, y: F.nll_loss(x, LABELS, reduction="none"),
    "mse_loss": lambda x, y: F.mse_loss(x, y) + F.mse_loss(x, PLAIN, reduction="sum"),
    "mse_loss unreduced": lambda x, y: F.mse_loss(x, PLAIN, reduction="none"),
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": lambda x, y: F.smooth_l1_loss(x, y, beta=0.7) + F.smooth_l1_loss(x, y, beta=0.0),
    "huber_loss": lambda x, y: F.huber_loss(x, y, delta=0.7),
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(unit(x), unit(PLAIN), positive(PLAIN)),
    "binary_cross_entropy_with_logits": lambda x, y: (
        F.binary_cross_entropy_with_logits(x, unit(PLAIN), positive(PLAIN), pos_weight=positive(PLAIN[0]))
        + F.binary_cross_entropy_with_logits(y, unit(PLAIN))
    ),
    "kl_div": lambda x, y: F.kl_div(x.log_softmax(1), PLAIN.softmax(1), reduction="batchmean"),
    "other losses": lambda x, y: F.gaussian_nll_loss(x, PLAIN, positive(y)) + F.poisson_nll_loss(x, positive(PLAIN)),
    # normalisations
    "layer_norm": lambda x, y: F.layer_norm(x, (4,), y[0], y[1]),
    "layer_norm over two axes": lambda x, y: F.layer_norm(x, (3, 4), y, y * x),
    "layer_norm plain": lambda x, y: F.layer_norm(x * y, (4,)),
    "rms_norm": lambda x, y: F.rms_norm(x, (4,), y[0]),
    "group_norm": lambda x, y: F.group_norm(x.reshape(1, 4, 3), 2, y[0], y[1]) + F.group_norm(y.t()[None], 4),
    "instance_norm": lambda x, y: F.instance_norm(image(x), weight=y[0, :3], bias=y[1, :3]),
    "batch_norm in training": lambda x, y: statistics(x * y, training=True),
    "batch_norm in evaluation": lambda x, y: statistics(x * y, training=False),
    "batch_norm of two axes": lambda x, y: F.batch_norm(x, None, None, y[0], training=True),
    "cudnn_batch_norm": lambda x, y: statistics(x * y, training=True, name="cudnn_batch_norm"),
    "legit batch_norm": lambda x, y: statistics(x * y, training=True, name="_native_batch_norm_legit"),
    "batch_norm without statistics": lambda x, y: statistics(x * y, training=True, name="no_stats"),
    # pools, embedding, dropout, attention
    "max_pool1d": lambda x, y: F.max_pool1d(x[None], 2) * F.adaptive_max_pool1d(y[None], 2),
    "max_pool2d": lambda x, y: F.max_pool2d(image(x), 3, 2, padding=1) + F.adaptive_max_pool2d(image(y), 3),
    "max_pool3d": lambda x, y: F.max_pool3d(image(x)[:, None], 2).mean() * F.adaptive_max_pool3d(image(y), 2),
    "avg_pool1d": lambda x, y: F.avg_pool1d(x[None], 2) * F.adaptive_avg_pool1d(y[None], 2),
    "avg_pool2d": lambda x, y: F.avg_pool2d(image(x), 2) * F.adaptive_avg_pool2d(image(y), 3),
    "avg_pool3d": lambda x, y: F.avg_pool3d(image(x)[:, None], 2).mean() * F.adaptive_avg_pool3d(image(y), 2),
    "global pool": lambda x, y: F.adaptive_avg_pool2d(image(x), 1),
    "embedding": lambda x, y: embedding(x) * embedding(y),
    "dropout": lambda x, y: F.dropout(x * y, 0.4) + F.dropout(x, 0.3) + F.dropout1d(x[None], 0.5)[0],
    "dropout in another memory layout": lambda x, y: F.dropout((x * y).t(), 0.4),
    "native_dropout": lambda x, y: torch.native_dropout(x * y, 0.4, True)[0],
    "alpha dropout": lambda x, y: F.alpha_dropout(x * y, 0.4, training=True),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, x * y),
    "causal attention": lambda x, y: F.scaled_dot_product_attention(x, y, x, is_causal=True, dropout_p=0.2),
    "masked attention": lambda x, y: F.scaled_dot_product_attention(x, y, x, attn_mask=WHERE[:, :3]),
    # a loss that differentiates inside
    "backward passes": lambda x, y: (
        aten.tanh_backward(x, y) + aten.sigmoid_backward(x, y) + aten.threshold_backward(x, y, 0.1)
        if isinstance(x, jets.Jet)
        else x * (1 - y * y) + x * y * (1 - y) + torch.where(y > 0.1, x, 0.0)
    ),
}


def loss_of(case: Callable[[Tensor, Tensor], Any]) -> tuple[Case, dict[str, Tensor], dict[str, Tensor]]:
    """A loss where the arguments have a second derivative, and each entry of its result a weight of its own."""

    def loss(p: dict[str, Tensor]) -> Tensor:
        result = case(p["x"] + 0.1 * p["x"] * p["y"], p["y"] - 0.2 * p["y"] * p["y"])
        weights = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).reshape(result.shape)
        return (result * weights).sum() + 0.3 * (result * result).mean()

    params = {"x": randn(3, 4, seed=1), "y": randn(3, 4, seed=2)}
    return loss, params, {"x": randn(3, 4, seed=3), "y": randn(3, 4, seed=4)}


# Reverse mode has no second derivative of the first, and a wrong one of the second (torch 2.13).
NO_SECOND_REVERSE = {"hardsigmoid", "weight norm"}
NO_FORWARD = {"hardsigmoid", "weight norm"}
RANDOM = {"dropout", "dropout in another memory layout", "native_dropout", "alpha dropout", "causal attention"}
JET_ONLY = {"cudnn_batch_norm", "legit batch_norm", "batch_norm without statistics", "old norm"}


def reference(name: str, loss: Case, *args: dict[str, Tensor]) -> tuple[Sequence[float], float]:
    """The expected derivatives, and how far they can be trusted."""
    if name in NO_SECOND_REVERSE:
        return derivatives_by_differences(loss, *args), 1e-6
    return derivatives_by_double_backward(loss, *args), 1e-9


def assert_close(found: Derivatives, expected: Sequence[float], tolerance: float) -> None:
    scale = 1e-3 + max(map(abs, expected))
    assert [each.item() for each in found] == pytest.approx(expected, rel=tolerance, abs=1e-2 * tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_operation_agrees_with_two_reverse_passes(name: str) -> None:
    loss, params, direction = loss_of(CASES[name])
    torch.manual_seed(5)
    found = derivatives_along(loss, params, direction, method="graph_free")
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert_close(found, *reference(name, loss, params, direction))
    if name not in NO_SECOND_REVERSE:
        assert torch.equal(state, torch.get_rng_state())  # it draws what the function itself draws


@pytest.mark.parametrize("moving", ["x", "y"])
@pytest.mark.parametrize("name", CASES)
def test_operation_with_one_constant_argument(name: str, moving: str) -> None:
    loss, params, direction = loss_of(CASES[name])
    direction = {moving: direction[moving]}
    torch.manual_seed(5)
    try:
        found = derivatives_along(loss, params, direction, method="graph_free")
    except NotImplementedError as error:
        pytest.skip(str(error))
    torch.manual_seed(5)
    assert_close(found, *reference(name, loss, params, direction))


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in RANDOM | JET_ONLY | NO_FORWARD | {"backward passes", "item"}]
)
def test_operation_agrees_with_forward_over_reverse(name: str) -> None:
    loss, params, direction = loss_of(CASES[name])
    found = derivatives_along(loss, params, direction, method="graph_free")
    assert_close(found, [each.item() for each in derivatives_along(loss, params, direction)], 1e-9)


def test_every_rule_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    for rule_name, rule in list(jets.RULES.items()):

        def recording(*args: Any, rule_name: str = rule_name, rule: Any = rule, **kwargs: Any) -> Any:
            used.add(rule_name)
            return rule(*args, **kwargs)

        recording.writes_buffers = getattr(rule, "writes_buffers", False)  # type: ignore[attr-defined]
        monkeypatch.setitem(jets.RULES, rule_name, recording)
    for case in CASES.values():
        loss, params, direction = loss_of(case)
        derivatives_along(loss, params, direction, method="graph_free")
    assert set(jets.RULES) - used == set()


def test_plain_nested_jvp_would_be_wrong() -> None:
    """What the rules for normalisations are for; where torch has mended it, they may go."""
    loss, params, direction = loss_of(CASES["layer_norm"])
    names = list(params)

    def slope(*tensors: Tensor) -> Tensor:
        return torch.func.jvp(
            lambda *each: loss(dict(zip(names, each, strict=True))), tensors, tuple(direction[name] for name in names)
        )[1]

    nested = torch.func.jvp(slope, tuple(params.values()), tuple(direction[name] for name in names))[1].item()
    expected = derivatives_by_differences(loss, params, direction)[2]
    found = derivatives_along(loss, params, direction, method="graph_free").curvature.item()
    assert found == pytest.approx(expected, rel=1e-6)
    assert nested != pytest.approx(expected, rel=1e-3)


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0]
        return result


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed, weights = self.inner(x, x, x)
        alone, _ = self.inner(x, x.flip(1), x, need_weights=False)
        return mixed + weights.sum() * alone


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(4, 2, 8, 0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        result: Tensor = self.inner(x, x.flip(0), tgt_mask=mask, tgt_is_causal=True)
        return result


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MultiheadAttention": (Attention, (2, 5, 4)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (2, 5, 4)),
    "TransformerDecoderLayer": (Decoder, (2, 5, 4)),
    "TransformerEncoder in evaluation": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval(),
        (2, 5, 4),
    ),
    "LSTMCell": (lambda: First(nn.LSTMCell(4, 3)), (5, 4)),
    "GRU": (lambda: First(nn.GRU(4, 3, 2)), (5, 2, 4)),
    "LSTM in float64": (lambda: First(nn.LSTM(4, 3, bidirectional=True)), (5, 2, 4)),
    "RNN": (lambda: First(nn.RNN(4, 3)), (5, 2, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_agrees_with_both_references(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model, inputs = make().double(), randn(*shape)
    params = {key: value.detach() for key, value in model.named_parameters()}
    direction = {key: randn(*value.shape, seed=index) for index, (key, value) in enumerate(params.items())}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (inputs,)).sin().square().mean()

    found = [each.item() for each in derivatives_along(loss, params, direction, method="graph_free")]
    assert found == pytest.approx(derivatives_by_double_backward(loss, params, direction), rel=1e-9)
    assert found == pytest.approx([each.item() for each in derivatives_along(loss, params, direction)], rel=1e-9)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "unknown": (lambda x, y: torch.linalg.inv(x[:3, :3]), r"aten\.linalg_inv_ex"),
    "prod": (lambda x, y: x.prod(), r"aten\.prod"),
    "cdist": (torch.cdist, r"aten\._cdist_forward"),
    "embedding_bag": (lambda x, y: F.embedding_bag(LABELS[None], x), r"aten\._embedding_bag"),
    "scaled embedding": (lambda x, y: F.embedding(LABELS, x, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "reducing scatter": (lambda x, y: x.scatter_reduce(1, COLUMNS, y, "prod"), r"aten\.scatter_reduce"),
    "moving bounds": (lambda x, y: x.clamp(min=y), r"aten\.clamp\.Tensor"),
    "rounded division": (lambda x, y: torch.div(x, y, rounding_mode="floor"), "rounding_mode"),
    "memory layout": (lambda x, y: torch.as_strided(x, (2, 2), (1, 1)), "as_strided"),
    "bits": (lambda x, y: x.view(torch.int64).double(), r"aten\.view\.dtype"),
    "write into a constant": (lambda x, y: torch.zeros(3, 4).double().copy_(x), "does not depend on the parameters"),
    "write to out": (lambda x, y: torch.add(x, y, out=torch.empty(3, 4).double()), r"aten\.add\.out"),
    "unknown in place": (lambda x, y: (x * 1).cauchy_(), r"aten\.cauchy"),
    "custom function": (lambda x, y: Straight.apply(x), "Straight"),
    "circular padding": (lambda x, y: F.pad(x[None], (1, 1), mode="circular"), "does not depend on the parameters"),
    "hinge loss": (lambda x, y: F.hinge_embedding_loss(x, torch.sign(PLAIN)), "does not depend on the parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proven_is_refused_by_name(name: str) -> None:
    case, named = REFUSED[name]
    params = {"x": randn(3, 4), "y": randn(3, 4, seed=1)}
    with pytest.raises(NotImplementedError, match=named) as caught:
        derivatives_along(lambda p: case(p["x"], p["y"]).sum(), params, params, method="graph_free")
    assert "probes" in str(caught.value)


def test_fused_lstm_is_refused_by_name() -> None:
    model = nn.LSTM(4, 3)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, p, (torch.ones(5, 2, 4),))[0]
        return result.sum()

    with pytest.raises(NotImplementedError, match="mkldnn_rnn_layer"):
        derivatives_along(loss, params, params, method="graph_free")


def test_custom_functions_are_refused_only_inside_and_only_for_jets() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    params = {"x": randn(3)}
    found = derivatives_along(
        lambda p: (p["x"] * Straight.apply(torch.tensor([1.2, 2.0, 2.9]))).sum(), params, params, method="graph_free"
    )
    assert found.slope.item() == pytest.approx(float((params["x"] * torch.tensor([1.0, 2.0, 3.0])).sum()))
    with pytest.raises(NotImplementedError):
        derivatives_along(lambda p: Straight.apply(p["x"]).sum(), params, params, method="graph_free")
    assert torch.autograd.Function.__dict__["apply"] is before
    assert Straight.apply(torch.tensor(1.2)).item() == 1.0


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
def test_checkpointed_functions_are_seen_through() -> None:
    from torch.utils.checkpoint import checkpoint

    params, direction = {"x": randn(3)}, {"x": randn(3, seed=1)}
    for reentrant in (True, False):
        found = derivatives_along(
            lambda p, reentrant=reentrant: checkpoint(torch.exp, p["x"], use_reentrant=reentrant).sum(),
            params,
            direction,
            method="graph_free",
        )
        assert found.curvature.item() == pytest.approx(float((params["x"].exp() * direction["x"] ** 2).sum()))


def test_loss_with_a_gradient_inside() -> None:
    """A gradient penalty, by torch.func.grad."""

    def loss(p: dict[str, Tensor]) -> Tensor:
        field = torch.func.grad(lambda z: torch.tanh(p["x"] @ z).sum())
        return field(PLAIN[0]).square().sum()

    params, direction = {"x": randn(3, 4)}, {"x": randn(3, 4, seed=1)}
    found = [each.item() for each in derivatives_along(loss, params, direction, method="graph_free")]
    assert found == pytest.approx(derivatives_by_differences(loss, params, direction), rel=1e-6)


def test_running_statistics_are_those_of_the_kernel() -> None:
    for training in (True, False):
        models = [nn.BatchNorm2d(3).double().train(training) for _ in range(2)]
        params = {"x": randn(3, 4)}
        derivatives_along(lambda p, m=models[0]: m(image(p["x"])).sum(), params, params, method="graph_free")
        models[1](image(params["x"]))
        for left, right in zip(models[0].buffers(), models[1].buffers(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    case = CASES["layer_norm"]
    params = {"x": randn(3, 4).to(dtype), "y": randn(3, 4, seed=1).to(dtype)}
    direction = {"x": randn(3, 4, seed=2).to(dtype), "y": randn(3, 4, seed=3).to(dtype)}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return case(p["x"], p["y"]).square().mean()

    found = derivatives_along(loss, params, direction, method="graph_free")
    exact = derivatives_by_double_backward(
        loss, {k: v.double() for k, v in params.items()}, {k: v.double() for k, v in direction.items()}
    )
    assert all(each.dtype == torch.float32 for each in found)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert [each.item() for each in found] == pytest.approx(exact, rel=tolerance)


def test_parameters_are_not_written_by_a_loss_that_writes() -> None:
    params = {"x": randn(3)}
    before = params["x"].clone()
    derivatives_along(lambda p: p["x"].mul_(2).sum(), params, params, method="graph_free")
    assert torch.equal(before, params["x"])
