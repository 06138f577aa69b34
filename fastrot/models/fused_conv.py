"""A Bottleneck's training step by hand: its 1x1 convolutions take in and give out batch norm, on top of `fused`."""

from collections.abc import Callable, Sequence
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from fastrot.models.fused_norm import FusedBottleneck, FusedNorm2d, fuse_norms, maps_of, rows_of
from fastrot.models.over_ranks import Group, merging, summing
from fastrot_kernels import norm, pointwise

T = TypeVar("T")


class Unjoined(NamedTuple):
    """A block's result before its last norms, addition and ReLU, which the next block's first product does; or maps.

    residual  maps: the block's input, or what its shortcut's convolution gives, and the second norm takes. Its gradient
              is that of the sum before the ReLU.
    y         maps that conv3 gives, and the first norm takes.
    backward  [norms, 4, C] of no value, whose gradient is each norm's pointwise.backward_affine: with the residual's,
              the gradient of y, which the block makes as its product reads it.
    moments   of each norm.
    """

    residual: Tensor
    y: Tensor | None = None
    backward: Tensor | None = None
    moments: Sequence[Tensor] = ()
    norms: Sequence[FusedNorm2d] = ()


class _Normed(NamedTuple):
    """A norm's weight, bias and eps."""

    gamma: Tensor
    beta: Tensor
    eps: float

    def affine(self, moments: Tensor) -> Tensor:
        return pointwise.affine(moments, self.gamma, self.beta, self.eps)

    def backward_affine(self, sums: Tensor, moments: Tensor) -> Tensor:
        return pointwise.backward_affine(sums, moments, self.gamma, self.eps)

    def applied(self, y: Tensor, residual: Tensor | None, moments: Tensor, relu: bool) -> Tensor:
        return norm.apply(y, residual, moments, self.gamma, self.beta, self.eps, relu)

    def sums(self, dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, relu: bool) -> Tensor:
        """This rank's gradients of gamma and beta [2, C]."""
        return norm.gradient_sums(dy, x, y, moments, self.gamma, self.beta, self.eps, relu)

    def gradients(
        self, sums: Tensor, dy: Tensor, x: Tensor, y: Tensor | None, moments: Tensor, relu: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the residual, by all ranks' of gamma and beta."""
        return norm.gradients(dy, x, y, moments, self.gamma, self.beta, sums, self.eps, relu)


class _Way(NamedTuple):
    """How a block is computed.

    conv2       stride, padding, dilation and groups of the 3x3 convolution.
    stride      of the shortcut.
    filters     how many convolutions: the shortcut's is the fourth.
    before      how many norms the block before left to this one.
    eps         of each norm: bn1, bn2; bn3 and the shortcut's where the next block does not do them; those before.
    over_ranks  whose views the norms see together.
    """

    conv2: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
    stride: int
    filters: int
    before: int
    eps: tuple[float, ...]
    over_ranks: Group | None

    def norms(self, parameters: Sequence[Tensor]) -> list[list[_Normed]]:
        """bn1 and bn2; bn3 and the shortcut's; those before."""
        weights = parameters[self.filters :]
        each = [_Normed(*parts) for parts in zip(weights[::2], weights[1::2], self.eps, strict=True)]
        return _cut(each, (2, len(each) - 2 - self.before, self.before))


class _Step(torch.autograd.Function):
    """(maps, parameters) -> (maps, moments of bn1, bn2, bn3 and, where there is one, the shortcut's norm).

    y are what convolutions give, before their norm. The moments of y1, y3 and the shortcut come with the products
    that make them; bn2 and its ReLU are computed as conv3, and its gradients, read y2: that normalised map is never
    in memory. The gradient of x is summed where the product writes it, not by a pass of its own.
    What norms say to other ranks is on its way while what does not need it is computed: the shortcut's product, and
    the weights' gradients. The shortcut's norm shares a message of bn3's, and of bn2's or bn3's.

    x, y, backward, moments  of an Unjoined. Where it has norms, the first product makes its own input of them, and the
                             one that makes that input's gradient goes on to before its ReLU and to the norms' sums.
    Where the next block does bn3, the result is not maps but three of an Unjoined.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        _backward: Tensor | None,
        moments: Sequence[Tensor],
        way: _Way,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        (f1, f2, f3, *fd), over_ranks = parameters[: way.filters], way.over_ranks
        (n1, n2), last, before = way.norms(parameters)
        w1, w3, *wd = (_matrix(each, x.dtype) for each in (f1, f3, *fd))
        w2 = f2.to(x.dtype)
        rows, y1, m1, joined = _first_product(x, y, moments, before, w1)
        merged1 = merging(over_ranks, m1)
        down: list[Tensor] = []
        md: list[Tensor] = []
        if wd:
            thinned = rows_of(maps_of(rows, x)[:, :, :: way.stride, :: way.stride])
            yd, *md = pointwise.forward(thinned, wd[0], None)
            down = [thinned, *wd, yd]
        [m1] = merged1()
        h1 = maps_of(n1.applied(y1, None, m1, True), x)
        maps2 = F.conv2d(h1, w2, None, *way.conv2)
        y2 = rows_of(maps2)
        [m2] = merging(over_ranks, norm.moments(y2))()
        a2 = n2.affine(m2)
        y3, m3 = pointwise.forward(y2, w3, a2)
        m3, *md = merging(over_ranks, m3, *md)()
        own, shortcut = [m1, m2, m3, *md], yd if wd else rows
        if last:
            n3, *nd = last
            residual = nd[0].applied(yd, None, md[0], False) if nd else rows
            result = [maps_of(n3.applied(y3, residual, m3, True), maps2)]
        else:
            backward = m3.new_empty(way.filters - 2, 4, y3.shape[1])
            result = [maps_of(shortcut, maps2), maps_of(y3, maps2), backward]
        kept = (parameters, down, own, joined, result if last else [])
        ctx.save_for_backward(rows, w1, y1, h1, w2, y2, a2, w3, y3, *chain(*kept))
        ctx.way, ctx.kept = way, [len(some) for some in kept]
        ctx.mark_non_differentiable(*own, *result[1:2])
        ctx.set_materialize_grads(False)  # of moments there is none: no zeros for them
        return *result, *own

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *more: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, y1, h1, w2, y2, a2, w3, y3, *rest = ctx.saved_tensors
        parameters, down, (m1, m2, *m3), joined, out = _cut(rest, ctx.kept)
        way, over_ranks = ctx.way, ctx.way.over_ranks
        (n1, n2), last, before = way.norms(parameters)
        added = rows_of(grad)
        sums3: list[Tensor] = []
        if last:
            dy3, added, sums3 = _through_last(last, over_ranks, added, rows_of(*out), [y3, *down[2:]], m3)
            g, sums2 = pointwise.data_gradient(dy3, w3, y2, a2)
        else:
            dy3, g, sums2 = pointwise.normed_gradient(added, w3, y3, more[1][0], y2, a2)
        summed = summing(over_ranks, sums2, *sums3[1:])
        dw3 = pointwise.weight_gradient(dy3, y2, a2)
        all2, *alld = summed()
        dy2, _ = n2.gradients(all2, g, y2, None, m2, False)
        back2 = (maps_of(dy2, grad), h1, w2, None, *way.conv2[:3], False, [0, 0], way.conv2[3])
        dh1 = rows_of(torch.ops.aten.convolution_backward(*back2, [True, False, False])[0])
        sums1 = n1.sums(dh1, y1, None, m1, True)
        summed = summing(over_ranks, sums1)
        dw2 = torch.ops.aten.convolution_backward(*back2, [False, True, False])[1]
        [all1] = summed()
        dy1, _ = n1.gradients(all1, dh1, y1, None, m1, True)
        dwd = []
        if down:
            thinned, wd, yd = down
            if last:
                dyd, _ = last[1].gradients(alld[0], added, yd, None, m3[1], False)
                added = dyd @ wd
            else:
                dyd, added, _ = pointwise.normed_gradient(added, wd, yd, more[1][1], None, None)
            dwd = [pointwise.weight_gradient(dyd, thinned, None)]
        elif not last and not before:
            added = added.clone()  # a gradient that came is not written to
        sums0: Sequence[Tensor] = ()
        if before:
            stride = way.stride if down else 1
            dx, sums0, arrive = _through_joined(before, over_ranks, joined, dy1, w1, added, h1, stride)
        else:
            dx = _input_gradient(way, dy1, w1, added, h1, grad)
        dws = [pointwise.weight_gradient(dy1, rows, None), dw2, dw3, *dwd]
        each = zip([*dws, *chain(sums1, sums2, *sums3, *sums0)], parameters, strict=True)
        mine = (value.view_as(p).to(p.dtype) for value, p in each)
        return dx, None, arrive() if before else None, None, None, *mine


def _first_product(
    x: Tensor, y: Tensor | None, moments: Sequence[Tensor], norms: list[_Normed], w1: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(a block's input as rows, y1, its moments, what `_through_joined` needs) of what the block before gave."""
    rows = rows_of(x)
    if y is None:
        return rows, *pointwise.forward(rows, w1, None), []
    ys, affines = [rows_of(y), rows], [each.affine(m) for each, m in zip(norms, moments, strict=True)]
    normed = affines[1] if len(affines) > 1 else None
    made, mask, y1, m1 = pointwise.joined_forward(ys[0], w1, affines[0], rows, normed)
    return made, y1, m1, [mask, *ys[: len(norms)], *affines, *moments]


def _through_last(
    norms: list[_Normed], over_ranks: Group | None, dy: Tensor, out: Tensor, ys: list[Tensor], moments: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of a block that ends in maps: gradients of y3 and of the residual; this rank's sums of bn3 and the shortcut's norm."""
    (n3, *nd), (y3, *yd), (m3, *md) = norms, ys, moments
    sums3 = n3.sums(dy, y3, out, m3, True)
    [all3] = summing(over_ranks, sums3)()
    dy3, dresidual = n3.gradients(all3, dy, y3, out, m3, True)
    return dy3, dresidual, [sums3, *(n.sums(dresidual, y, None, m, False) for n, y, m in zip(nd, yd, md, strict=True))]


def _through_joined(
    norms: list[_Normed],
    over_ranks: Group | None,
    joined: list[Tensor],
    dy1: Tensor,
    w1: Tensor,
    added: Tensor,
    like: Tensor,
    stride: int,
) -> tuple[Tensor, Sequence[Tensor], Callable[[], Tensor]]:
    """(the gradient before the ReLU through which the first product made its input, this rank's sums of the norms
    there, what waits for all ranks' and gives an Unjoined's `backward`)."""
    ([mask], ys, affines, moments), (height, width) = _cut(joined, (1, *3 * [len(norms)])), like.shape[2:]
    g, sums = pointwise.joined_gradient(dy1, w1, ys, affines, mask, added, height, width, stride)
    arrive = summing(over_ranks, *sums)

    def backward() -> Tensor:
        each = zip(norms, arrive(), moments, strict=True)
        return torch.stack([n.backward_affine(all_ranks, m) for n, all_ranks, m in each])

    return maps_of(g, like), sums.unbind(), backward


def _input_gradient(way: _Way, dy1: Tensor, w1: Tensor, added: Tensor, like: Tensor, low: Tensor) -> Tensor:
    """Of maps that a block was given; added: the residual's, written to where the residual is those maps."""
    if way.filters == 3:
        return maps_of(added.addmm_(dy1, w1), like)
    dx = maps_of(dy1 @ w1, like)
    dx[:, :, :: way.stride, :: way.stride].add_(maps_of(added, low))  # += would copy it to itself after
    return dx


def _cut(each: Sequence[T], lengths: Sequence[int]) -> list[list[T]]:
    """One after the other, so many."""
    left = iter(each)
    return [list(islice(left, length)) for length in lengths]


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution's weight [N, K, 1, 1] as [N, K]."""
    return weight.flatten(1).to(dtype).contiguous()


class _FusedConvBottleneck(FusedBottleneck):
    joined = False  # whether its last norms are left to the block after it

    def forward(self, x: Any) -> Any:
        """Of maps, or what a block before left; maps, or what it leaves."""
        if not self.training:
            return super().forward(x)
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        if self.downsample is not None:
            pairs.append(tuple(self.downsample))
        given = x if isinstance(x, Unjoined) else Unjoined(_autocast(x))
        norms = [bn for _, bn in pairs]
        # a compiler traces no such results
        left = norms[2:] if self.joined and not torch.compiler.is_compiling() else []
        used = [*norms[: len(norms) - len(left)], *given.norms]
        parameters = [conv.weight for conv, _ in pairs] + [p for bn in used for p in (bn.weight, bn.bias)]
        c = self.conv2
        way = _Way(
            (c.stride, c.padding, c.dilation, c.groups), self.stride, len(pairs), len(given.norms),
            tuple(bn.eps for bn in used), self.bn1.over_ranks,
        )  # fmt: skip
        parts: tuple[Tensor, ...] = _Step.apply(  # type: ignore[no-untyped-call]  # torch's apply
            *given[:4], way, *parameters
        )
        result, moments = _cut(parts, (len(parts) - len(pairs), len(pairs)))
        for bn, each in zip(norms, moments, strict=True):
            bn.track(each)
        return Unjoined(result[0], result[1], result[2], moments[2:], left) if left else result[0]


class _JoinedBottleneck(_FusedConvBottleneck):
    joined = True


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):  # torch knows none on the meta device
        return x
    return x.to(torch.get_autocast_dtype(kind))


def fuse_convs(model: ResNet, over_ranks: Group | None) -> ResNet:
    """fuse_norms, and every Bottleneck's 1x1 convolutions fused with the norms around them, in place.

    Other blocks have none but their shortcut's: they stay as fuse_norms leaves them.
    """
    fuse_norms(model, over_ranks)
    for module in model.modules():
        if type(module) is FusedBottleneck:
            module.__class__ = _FusedConvBottleneck
    return model


def chain_blocks(model: ResNet, over_ranks: Group | None) -> ResNet:
    """fuse_convs, and a Bottleneck's last norms, addition and ReLU done by the Bottleneck that follows, both ways."""
    fuse_convs(model, over_ranks)
    layers = (model.layer1, model.layer2, model.layer3, model.layer4)
    blocks = chain(*(each if isinstance(each, nn.Sequential) else [each] for each in layers))
    for block, following in pairwise(blocks):
        if type(block) is type(following) is _FusedConvBottleneck:
            block.__class__ = _JoinedBottleneck
    return model


# What engine.norm names beside torch's own modules.
FUSED = {"fused": fuse_norms, "fused_conv": fuse_convs, "fused_chain": chain_blocks}
