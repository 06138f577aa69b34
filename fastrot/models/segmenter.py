"""A fully convolutional segmenter on a dilated ResNet: FCN R50-D8 with an auxiliary head.

Source: protocol "Segmentation", MMSelfSup's configs (mmsegmentation's FCNHead).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DILATIONS = {"layer3": 2, "layer4": 4}  # output stride 8
AUXILIARY_WEIGHT = 0.4
_DROPOUT = 0.1
_TO_THIRD = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")


def dilate(resnet: nn.Module) -> nn.Module:
    """Make stages 3 and 4 keep their maps' size, in place: stride 1, 3 x 3 convolutions dilated by 2 and 4.

    The first block of a stage is dilated by half of that (contracted dilation); weights stay the same objects.
    """
    for stage, dilation in DILATIONS.items():
        for number, block in enumerate(resnet.get_submodule(stage).children()):
            for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation // 2 if number == 0 else dilation,) * 2
    return resnet


class FcnHead(nn.Module):
    """Maps [n, C, h, w] -> logits [n, classes, h, w]: 3 x 3 convolutions with batch norm, dropout, a 1 x 1.

    concatenate  one more convolution over the input beside what the others made of it.
    """

    def __init__(self, channels: int, width: int, convolutions: int, classes: int, concatenate: bool):
        super().__init__()
        widths = [channels] + [width] * convolutions
        self.convs = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)))
        self.cat = _block(channels + width, width) if concatenate else None
        self.classifier = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)
        if self.cat is not None:
            y = self.cat(torch.cat([x, y], 1))
        logits: Tensor = self.classifier(F.dropout2d(y, _DROPOUT, self.training))
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Segmenter(nn.Module):
    """Images [n, 3, H, W], normalised -> logits [n, classes, H, W]; in training also those of the auxiliary head.

    align_corners  how logits are resized: false for VOC, true for Cityscapes.
    """

    def __init__(self, resnet: nn.Module, classes: int, align_corners: bool):
        super().__init__()
        self.backbone, self._align = dilate(resnet), align_corners
        third, fourth = (_width(resnet.get_submodule(stage)) for stage in ("layer3", "layer4"))
        self.head = FcnHead(fourth, fourth // 4, 2, classes, concatenate=True)
        self.auxiliary = FcnHead(third, third // 4, 1, classes, concatenate=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        third = images
        for name in _TO_THIRD:
            third = self.backbone.get_submodule(name)(third)
        logits = [self.head(self.backbone.get_submodule("layer4")(third))]
        if self.training:
            logits.append(self.auxiliary(third))
        size = images.shape[-2:]
        return tuple(F.interpolate(one, size, mode="bilinear", align_corners=self._align) for one in logits)


def segmentation_loss(logits: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Cross-entropy, mean over all pixels (ignored ones, 255, count in the mean as zeros), the auxiliary's weighted.

    target int64 [n, H, W].
    """
    weights = (1.0, AUXILIARY_WEIGHT)
    each = [F.cross_entropy(one, target, ignore_index=255, reduction="none").mean() for one in logits]
    return torch.stack([w * loss for w, loss in zip(weights, each, strict=False)]).sum()


def _width(stage: nn.Module) -> int:
    return max(module.num_features for module in stage.modules() if isinstance(module, nn.BatchNorm2d))
