"""A small network for tests of what is around the network."""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class NarrowResNet(ResNet):
    """torchvision's ResNet-18, its blocks and names, with an eighth of the channels and so 1/64 of the weights."""

    def __init__(self, weights=None, num_classes: int = 1000, **options):
        super().__init__(BasicBlock, [2, 2, 2, 2], **options)
        self.fc = nn.Linear(64, num_classes)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes, self.conv1, self.bn1 = 8, nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def is_on() -> bool:
    return torchvision.models.resnet18 is NarrowResNet


def turn_on() -> None:
    """For the rest of this process resnet18 is narrow."""
    torchvision.models.resnet18 = NarrowResNet
