"""Detectors on a ResNet, composed of torchvision's parts: Faster R-CNN on C4, Mask R-CNN on a feature pyramid.

Source: protocol "Detection", MMSelfSup's two configs (mmdetection 2.x semantics). Where torchvision's part has another
number or rule than the protocol, a subclass here holds the protocol's; everything else is torchvision's as it is.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

Target = dict[str, Tensor]
"""boxes fp32 [n, 4] (x1, y1, x2, y2), labels int64 [n] from 1, and with masks: masks uint8 [n, H, W]."""

SIDES = (32, 64, 128, 256, 512)  # of square anchors, pixels
RATIOS = (0.5, 1.0, 2.0)  # height to width
PYRAMID = 256  # channels of a feature pyramid


class Batched(nn.Module):
    """Images of several sizes as one batch: zero padding at the right and below, to whole multiples of 32."""

    def forward(self, images: list[Tensor], targets: list[Target] | None) -> tuple[ImageList, list[Target] | None]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
        batch = torch.stack([F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in images])
        return ImageList(batch.contiguous(memory_format=torch.channels_last), sizes), targets

    def postprocess(self, result: list[Target], _sizes: object, _original: object) -> list[Target]:
        """Detections are of the images as given: who resized them scales back."""
        return result


class Anchors(AnchorGenerator):
    """Anchors of stated strides around whole multiples of them, not rounded; torchvision derives strides from sizes."""

    def __init__(self, sides: tuple[tuple[int, ...], ...], strides: tuple[int, ...]):
        super().__init__(sides, (RATIOS,) * len(sides))
        self._strides = strides

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        side, ratio = (torch.as_tensor(v, dtype=dtype, device=device) for v in (scales, aspect_ratios))
        tall = ratio.sqrt()
        half_w, half_h = ((one[:, None] * side / 2).flatten() for one in (1 / tall, tall))
        return torch.stack([-half_w, -half_h, half_w, half_h], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(torch.float32, first.device)  # bf16 keeps whole multiples of 8 of a box's thousand pixels
        grids = [[*one.shape[-2:]] for one in feature_maps]
        strides = [[torch.tensor(s, device=first.device)] * 2 for s in self._strides]
        every = torch.cat(self.grid_anchors(grids, strides))
        return [every] * len(image_list.image_sizes)


class FloorMatcher(Matcher):
    """A ground-truth box also takes its best candidate below the threshold, but none under `floor`."""

    def __init__(self, high: float, low: float, floor: float):
        super().__init__(high, low, allow_low_quality_matches=True)
        self._floor = floor

    def set_low_quality_matches_(self, matches: Tensor, _all_matches: Tensor, quality: Tensor) -> None:
        best = quality.max(1).values
        for box in torch.where(best >= self._floor)[0].tolist():  # in order: a later box may take an earlier one's
            matches[quality[box] == best[box]] = box


class FloatHead(RPNHead):
    """torchvision's, but fp32 out under autocast too: what is decoded from it are pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [one.float() for one in scores], [one.float() for one in deltas]


class Proposals(RegionProposalNetwork):
    """The protocol's region proposals: L1 on boxes, and, with `inside`, no target for anchors that cross the border."""

    def __init__(
        self, anchors: Anchors, channels: int, inside: bool, before_nms: tuple[int, int], after: tuple[int, int]
    ):
        head = FloatHead(channels, anchors.num_anchors_per_location()[0])
        numbers = ({"training": train, "testing": test} for train, test in (before_nms, after))
        super().__init__(anchors, head, 0.7, 0.3, 256, 0.5, *numbers, nms_thresh=0.7)
        self.proposal_matcher = FloorMatcher(0.7, 0.3, 0.3)
        self._inside = inside
        self._sizes: list[tuple[int, int]] = []

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        self._sizes = images.image_sizes
        found: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
        return found

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self._inside:
            every: tuple[list[Tensor], list[Tensor]] = super().assign_targets_to_anchors(anchors, targets)
            return every
        within = [
            (one[:, :2] >= 0).all(1) & (one[:, 2] < width) & (one[:, 3] < height)
            for one, (height, width) in zip(anchors, self._sizes, strict=True)
        ]
        labels = [one.new_full((len(one),), -1.0) for one in anchors]  # -1: the sampler passes over it
        boxes = [torch.zeros_like(one) for one in anchors]
        for image, inside in enumerate(within):
            if inside.any():
                found = super().assign_targets_to_anchors([anchors[image][inside]], [targets[image]])
                labels[image][inside], boxes[image][inside] = found[0][0], found[1][0]
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.where(torch.cat(of))[0] for of in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted = torch.cat(regression_targets)[positive]
        box = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / max(1, len(sampled))
        chosen = objectness.flatten()[sampled]
        score = F.binary_cross_entropy_with_logits(chosen, torch.cat(labels)[sampled], reduction="sum")
        return score / max(1, len(sampled)), box


class AlignedPool(nn.Module):
    """RoIAlign, aligned, with as many samples as pixels; on a pyramid a box of side s is read at level log2(s / 56)."""

    def __init__(self, maps: tuple[str, ...], side: int, strides: tuple[int, ...]):
        super().__init__()
        self._maps, self.side, self._strides = maps, side, strides

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _sizes: object) -> Tensor:
        """Maps [N, C, side, side] of all boxes, image after image."""
        every = torch.cat(boxes)
        image = torch.repeat_interleave(
            torch.arange(len(boxes), device=every.device), torch.tensor([len(b) for b in boxes], device=every.device)
        )
        regions = torch.cat([image[:, None].to(every), every], 1)
        area = (every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])
        level = (area.sqrt() / 56 + 1e-6).log2().floor().clamp(0, len(self._maps) - 1)
        out = features[self._maps[0]].new_zeros(len(every), features[self._maps[0]].shape[1], self.side, self.side)
        for number, (name, stride) in enumerate(zip(self._maps, self._strides, strict=True)):
            here = torch.where(level == number)[0]
            maps = features[name]
            read = roi_align(maps.float(), regions[here], self.side, 1 / stride, -1, aligned=True)
            out = out.index_copy(0, here, read.to(maps.dtype))
        return out


class Predictor(nn.Module):
    """Features [n, D] -> class logits [n, 1 + classes], box deltas [n, 4 * (1 + classes)], zero for the background; fp32."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(features, classes + 1), nn.Linear(features, 4 * classes)
        for layer, spread in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, 0.0, spread)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), F.pad(self.bbox_pred(x).float(), (4, 0))


class MaskPredictor(nn.Module):
    """Maps [n, 256, 14, 14] -> mask logits fp32 [n, 1 + classes, 28, 28], zero for the background."""

    def __init__(self, classes: int):
        super().__init__()
        self.up, self.logits = nn.ConvTranspose2d(PYRAMID, PYRAMID, 2, 2), nn.Conv2d(PYRAMID, classes, 1)
        for layer in (self.up, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.logits(F.relu(self.up(x))).float(), (0, 0, 0, 0, 1, 0))


class Heads(RoIHeads):
    """The protocol's heads in training: L1 on boxes, masks read by aligned RoIAlign; torchvision's when it detects."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        if not self.training:
            found: tuple[list[Target], dict[str, Tensor]] = super().forward(features, proposals, image_shapes)
            return found
        assert targets is not None
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        logits, boxes = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        losses = box_losses(logits, boxes, torch.cat(labels), torch.cat(deltas))
        if self.has_mask():
            positive = [torch.where(of > 0)[0] for of in labels]
            regions = [of[at] for of, at in zip(proposals, positive, strict=True)]
            which = [of[at] for of, at in zip(matched, positive, strict=True)]
            maps = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, image_shapes)))
            wanted = torch.cat([of[at] for of, at in zip(labels, positive, strict=True)])
            masks = [target["masks"] for target in targets]
            losses["loss_mask"] = mask_loss(maps, wanted, mask_targets(masks, regions, which, maps.shape[-1]))
        return [], losses


def box_losses(logits: Tensor, boxes: Tensor, labels: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over all sampled regions; L1 of the true class's deltas, over as many."""
    positive = torch.where(labels > 0)[0]
    mine = boxes.unflatten(1, (-1, 4))[positive, labels[positive]]
    box = F.l1_loss(mine, deltas[positive], reduction="sum") / max(1, len(labels))
    return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box}


def mask_targets(masks: list[Tensor], regions: list[Tensor], which: list[Tensor], side: int) -> Tensor:
    """What lies of each region's own object in it, {0, 1} fp32 [N, side, side]; masks uint8 [n, H, W] an image."""
    read = [
        roi_align(of[:, None].to(boxes), torch.cat([at[:, None].to(boxes), boxes], 1), side, 1.0, -1, aligned=True)
        for of, boxes, at in zip(masks, regions, which, strict=True)
    ]
    return (torch.cat(read)[:, 0] >= 0.5).to(read[0])


def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy of the true class's mask, mean over regions and pixels; 0 where there is no region."""
    if len(labels) == 0:
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], wanted)


class Stem(nn.Module):
    """A ResNet up to stage 3 or 4; its parts keep torchvision's names, so a backbone's weights lie where they lay.

    forward: images [n, 3, H, W] -> the maps of the last `maps` stages, by their numbers.
    """

    def __init__(self, resnet: nn.Module, stages: int, maps: int):
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", *(f"layer{n}" for n in range(1, stages + 1)))
        self.body = nn.ModuleDict({name: getattr(resnet, name) for name in names})
        self._names, self._from = names, len(names) - maps
        self.widths = [_width(getattr(resnet, name)) for name in names[self._from :]]
        self.out_channels = self.widths[-1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, out = images, OrderedDict[str, Tensor]()
        for number, name in enumerate(self._names):
            x = self.body[name](x)
            if number >= self._from:
                out[name] = x
        return out


class Pyramid(nn.Module):
    """Stages 1 to 4 and a feature pyramid of five levels, 256 channels each, with batch norm."""

    out_channels = PYRAMID

    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.stem = Stem(resnet, 4, 4)
        self.fpn = FeaturePyramidNetwork(self.stem.widths, PYRAMID, LastLevelMaxPool(), nn.BatchNorm2d)
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = self.fpn(self.stem(images))
        return levels


class Stage4Head(nn.Module):
    """Stage 4 of the backbone as the box head, one more batch norm, global average: [N, C, 14, 14] -> [N, D]."""

    def __init__(self, layer4: nn.Module):
        super().__init__()
        self.layer4, self.norm = layer4, nn.BatchNorm2d(_width(layer4))

    def forward(self, x: Tensor) -> Tensor:
        averages: Tensor = self.norm(self.layer4(x)).mean((2, 3))
        return averages


def faster_rcnn_c4(resnet: nn.Module, classes: int, regions: int = 512) -> GeneralizedRCNN:
    """Faster R-CNN R50-C4 on a torchvision ResNet, which it takes apart; stage 4 is the box head.

    classes  without the background.  regions  sampled an image in training.
    The model takes a list of normalised fp32 images [3, H, W] and, in training, a list of Target.
    """
    stem = Stem(resnet, 3, 1)
    width, levels = stem.out_channels, ("layer3",)
    rpn = Proposals(Anchors((SIDES,), (16,)), width, True, (12000, 6000), (2000, 1000))
    head = Stage4Head(resnet.get_submodule("layer4"))
    pool, predictor = AlignedPool(levels, 14, (16,)), Predictor(_width(head.layer4), classes)
    return GeneralizedRCNN(stem, rpn, _heads(pool, head, predictor, regions), Batched())


def mask_rcnn_fpn(resnet: nn.Module, classes: int, regions: int = 512) -> GeneralizedRCNN:
    """Mask R-CNN R50-FPN on a torchvision ResNet, which it takes apart; batch norm in pyramid and heads.

    Arguments and use as of faster_rcnn_c4; a Target has masks.
    """
    pyramid, levels = Pyramid(resnet), ("layer1", "layer2", "layer3", "layer4")
    strides = (4, 8, 16, 32)
    anchors = Anchors(tuple((side,) for side in SIDES), (*strides, 64))
    rpn = Proposals(anchors, PYRAMID, False, (2000, 1000), (1000, 1000))
    head = FastRCNNConvFCHead((PYRAMID, 7, 7), [PYRAMID] * 4, [1024], nn.BatchNorm2d)
    heads = _heads(AlignedPool(levels, 7, strides), head, Predictor(1024, classes), regions)
    heads.proposal_matcher = FloorMatcher(0.5, 0.5, 0.5)
    heads.mask_roi_pool = AlignedPool(levels, 14, strides)
    heads.mask_head = MaskRCNNHeads(PYRAMID, [PYRAMID] * 4, 1, nn.BatchNorm2d)
    heads.mask_predictor = MaskPredictor(classes)
    for module in (*head.modules(), *heads.mask_head.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return GeneralizedRCNN(pyramid, rpn, heads, Batched())


class WithRegions(nn.Module):
    """A detector's maps, and its heads' of as many regions an image as it samples, wherever they lie: what the estimate
    of memory traces."""

    def __init__(self, network: GeneralizedRCNN):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        heads, sampler = self.network.roi_heads, self.network.roi_heads.fg_bg_sampler
        maps: list[Tensor] = [*self.network.backbone(images).values()]

        def of(pool: AlignedPool, regions: int) -> Tensor:
            boxes = maps[0].new_zeros(len(images) * regions, 5)
            read: Tensor = roi_align(maps[0], boxes, pool.side, 1.0, -1, aligned=True)
            return read

        regions = sampler.batch_size_per_image
        of_regions = [*heads.box_predictor(heads.box_head(of(heads.box_roi_pool, regions)))]
        if heads.has_mask():
            positive = max(1, int(regions * sampler.positive_fraction))
            masks = heads.mask_predictor(heads.mask_head(of(heads.mask_roi_pool, positive)))
            of_regions.append(masks.mean((2, 3)))
        scores, deltas = self.network.rpn.head(maps)
        return *maps, *scores, *deltas, *(one.unflatten(0, (len(images), -1)).mT[..., None] for one in of_regions)


def _heads(pool: nn.Module, head: nn.Module, predictor: nn.Module, regions: int) -> Heads:
    return Heads(pool, head, predictor, 0.5, 0.5, regions, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100)


def _width(stage: nn.Module) -> int:
    """Channels that a stage gives: those of its widest norm."""
    return max(module.num_features for module in stage.modules() if isinstance(module, nn.BatchNorm2d))
