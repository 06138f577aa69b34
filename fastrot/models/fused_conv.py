"""A Bottleneck's training step by hand: its 1x1 convolutions take in and give out batch norm, on top of `fused`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from fastrot.models.fused_norm import FusedBottleneck, fuse_norms, maps_of, rows_of
from fastrot.models.over_ranks import Group, merging, summing
from fastrot_kernels import norm, pointwise

# stride, padding, dilation and groups of a convolution
_Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


class _Normed(NamedTuple):
    """A convolution's weight, and its norm's weight, bias and eps."""

    filters: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float

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


class _Ahead:
    """What the next block's backward pass finds out of a block's: the gradient before its last ReLU, bn3's sums."""

    gradient: Tensor | None = None
    sums: Tensor | None = None


class _Tail(NamedTuple):
    """A block's last norm and ReLU, for the backward pass of the block after it: an attribute of its result.

    y  the rows that bn3 takes in; moments and eps of it; mask  where the ReLU lets through, norm.apply_and_mask's.
    """

    y: Tensor
    moments: Tensor
    mask: Tensor
    eps: float
    ahead: _Ahead


class _Step(torch.autograd.Function):
    """(maps, parameters) -> (maps, moments of bn1, bn2, bn3 and, where there is one, the shortcut's norm).

    y are what convolutions give, before their norm. The moments of y1, y3 and the shortcut come with the products
    that make them; bn2 and its ReLU are computed as conv3, and its gradients, read y2: that normalised map is never
    in memory. The gradient of x is summed where the product writes it, not by a pass of its own.
    What norms say to other ranks is on its way while what does not need it is computed: the shortcut's product, and
    the weights' gradients of conv2 and conv3. The shortcut's norm shares a message of bn3's, and of bn2's.

    tail    of the block before, whose result x is: then the product goes on to the gradient before its ReLU, and to
            bn3's sums. That gradient serves for x's, as the ReLU lets no more through a second time.
    ahead   for the block after to fill; then y3 and the mask follow the moments. It counts where the gradient that
            comes is the very one left there: no one else's was added.
    conv2   stride, padding, dilation and groups of the 3x3 convolution.
    stride  of the shortcut, where there is one.
    eps     of each norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tail: _Tail | None,
        ahead: _Ahead | None,
        conv2: _Geometry,
        stride: int,
        eps: tuple[float, ...],
        over_ranks: Group | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        n1, n2, n3, *shortcut = _by_three(parameters, eps)
        w1, w2, w3 = _matrix(n1.filters, x.dtype), n2.filters.to(x.dtype), _matrix(n3.filters, x.dtype)
        rows = rows_of(x)
        y1, m1 = pointwise.forward(rows, w1, None)
        merged1 = merging(over_ranks, m1)
        down: list[Tensor] = []
        md: list[Tensor] = []
        for nd in shortcut:
            wd, thinned = _matrix(nd.filters, x.dtype), rows_of(x[:, :, ::stride, ::stride])
            yd, *md = pointwise.forward(thinned, wd, None)
            down = [thinned, wd, yd]
        [m1] = merged1()
        h1 = maps_of(n1.applied(y1, None, m1, True), x)
        maps2 = F.conv2d(h1, w2, None, *conv2)
        y2 = rows_of(maps2)
        [m2] = merging(over_ranks, norm.moments(y2))()
        a2 = pointwise.affine(m2, n2.gamma, n2.beta, n2.eps)
        y3, m3 = pointwise.forward(y2, w3, a2)
        m3, *md = merging(over_ranks, m3, *md)()
        residual, moments = rows, [m1, m2, m3, *md]
        for nd in shortcut:
            residual = nd.applied(yd, None, md[0], False)
        left = list(moments)
        if ahead is None:
            applied = n3.applied(y3, residual, m3, True)
        else:
            applied, mask = norm.apply_and_mask(y3, residual, m3, n3.gamma, n3.beta, n3.eps)
            left += [y3, mask]
        out = maps_of(applied, maps2)
        before = () if tail is None else (tail.y, tail.moments, tail.mask)
        ctx.save_for_backward(rows, w1, y1, h1, w2, y2, a2, w3, y3, out, *down, *moments, *parameters, *before)
        ctx.conv2, ctx.stride, ctx.eps, ctx.over_ranks, ctx.ahead = conv2, stride, eps, over_ranks, ahead
        ctx.before = None if tail is None else (tail.eps, tail.ahead)
        ctx.mark_non_differentiable(*left)
        ctx.set_materialize_grads(False)  # of what is left there is none: no zeros for them
        return out, *left

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_left: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, y1, h1, w2, y2, a2, w3, y3, out, *rest = ctx.saved_tensors
        rest, before = (rest, []) if ctx.before is None else (rest[:-3], rest[-3:])
        norms, over_ranks = len(ctx.eps), ctx.over_ranks
        down, (m1, m2, m3, *md), parameters = rest[: -4 * norms], rest[-4 * norms : -3 * norms], rest[-3 * norms :]
        n1, n2, n3, *shortcut = _by_three(parameters, ctx.eps)
        dy, done = rows_of(grad), ctx.ahead is not None and grad is ctx.ahead.gradient
        kept = None if done else rows_of(out)
        sums3 = ctx.ahead.sums if done else n3.sums(dy, y3, kept, m3, True)
        [all3] = summing(over_ranks, sums3)()
        dy3, dresidual = n3.gradients(all3, dy, y3, kept, m3, not done)
        dresidual = dy if done else dresidual
        if ctx.ahead is not None:
            ctx.ahead.gradient = ctx.ahead.sums = None
        sumsd = [nd.sums(dresidual, down[2], None, md[0], False) for nd in shortcut]
        g, sums2 = pointwise.data_gradient(dy3, w3, y2, a2)
        summed = summing(over_ranks, sums2, *sumsd)
        dw3 = pointwise.weight_gradient(dy3, y2, a2)
        all2, *alld = summed()
        dy2, _ = n2.gradients(all2, g, y2, None, m2, False)
        back2 = (maps_of(dy2, out), h1, w2, None, *ctx.conv2[:3], False, [0, 0], ctx.conv2[3])
        dh1 = rows_of(torch.ops.aten.convolution_backward(*back2, [True, False, False])[0])
        sums1 = n1.sums(dh1, y1, None, m1, True)
        summed = summing(over_ranks, sums1)
        dw2 = torch.ops.aten.convolution_backward(*back2, [False, True, False])[1]
        [all1] = summed()
        dy1, _ = n1.gradients(all1, dh1, y1, None, m1, True)
        gradients = [pointwise.weight_gradient(dy1, rows, None), *sums1, dw2, *sums2, dw3, *sums3]
        if shortcut:
            thinned, wd, yd = down
            dyd, _ = shortcut[0].gradients(alld[0], dresidual, yd, None, md[0], False)
            gradients += [pointwise.weight_gradient(dyd, thinned, None), *sumsd[0]]
            added = dyd @ wd
        else:
            added = dresidual.clone() if done and not before else dresidual  # a gradient that came is not written to
        stride = ctx.stride if shortcut else 1
        if before:
            y, moments, mask = before
            (eps, ahead), (height, width) = ctx.before, h1.shape[2:]
            g, ahead.sums = pointwise.joined_gradient(dy1, w1, y, moments, eps, mask, added, height, width, stride)
            dx = ahead.gradient = maps_of(g, h1)
        elif shortcut:
            dx = maps_of(dy1 @ w1, h1)
            dx[:, :, ::stride, ::stride].add_(maps_of(added, out))  # += would copy it to itself after
        else:
            dx = maps_of(added.addmm_(dy1, w1), h1)
        mine = (value.view_as(p).to(p.dtype) for value, p in zip(gradients, parameters, strict=True))
        return dx, None, None, None, None, None, None, *mine


def _by_three(parameters: Sequence[Tensor], eps: tuple[float, ...]) -> list[_Normed]:
    """Each convolution with its norm, of filters, gamma and beta in turn."""
    each = zip(parameters[::3], parameters[1::3], parameters[2::3], eps, strict=True)
    return [_Normed(*parts) for parts in each]


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution's weight [N, K, 1, 1] as [N, K]."""
    return weight.flatten(1).to(dtype).contiguous()


class _FusedConvBottleneck(FusedBottleneck):
    chained = False  # whether a block's backward pass begins that of the block before

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        kind, conv2 = x.device.type, self.conv2
        pairs = [(self.conv1, self.bn1), (conv2, self.bn2), (self.conv3, self.bn3)]
        if self.downsample is not None:
            pairs.append(tuple(self.downsample))
        parameters = [p for conv, bn in pairs for p in (conv.weight, bn.weight, bn.bias)]
        if not x.is_meta and torch.is_autocast_enabled(kind):  # torch knows none on the meta device
            x = x.to(torch.get_autocast_dtype(kind))
        geometry, eps = (conv2.stride, conv2.padding, conv2.dilation, conv2.groups), tuple(bn.eps for _, bn in pairs)
        # a compiler traces one block's backward pass without the other's, and no attributes
        chained = self.chained and not torch.compiler.is_compiling()
        tail, ahead = (getattr(x, "tail", None), _Ahead()) if chained else (None, None)
        parts: tuple[Tensor, ...] = _Step.apply(  # type: ignore[no-untyped-call]  # torch's apply
            x, tail, ahead, geometry, self.stride, eps, self.bn1.over_ranks, *parameters
        )
        out, moments, left = parts[0], parts[1 : 1 + len(pairs)], parts[1 + len(pairs) :]
        for (_, bn), each in zip(pairs, moments, strict=True):
            bn.track(each)
        if ahead is not None and out.requires_grad:
            y, mask = left
            out.tail = _Tail(y, moments[2], mask, self.bn3.eps, ahead)  # type: ignore[attr-defined]
        return out


class _ChainedBottleneck(_FusedConvBottleneck):
    chained = True


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
    """fuse_convs, and a Bottleneck's backward pass goes on into the block before: its last ReLU and bn3's sums."""
    fuse_convs(model, over_ranks)
    for module in model.modules():
        if type(module) is _FusedConvBottleneck:
            module.__class__ = _ChainedBottleneck
    return model


# What engine.norm names beside torch's own modules.
FUSED = {"fused": fuse_norms, "fused_conv": fuse_convs, "fused_chain": chain_blocks}
