"""torchvision's ResNets as the protocol initialises them, and their taps."""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet

TURNS = 4


def build_model(arch: str, classes: int, seed: int) -> ResNet:
    """A torchvision ResNet with a linear head of `classes`, fp32, on the CPU.

    Convolutions Kaiming normal (fan out, ReLU), batch norm 1 and 0, head N(0, 0.01^2) and 0.
    The same seed gives the same weights. Source: protocol "Rotation pretraining", Init and Head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: ResNet = getattr(torchvision.models, arch)(weights=None, num_classes=classes, zero_init_residual=False)
        nn.init.normal_(model.fc.weight, 0.0, 0.01)
        nn.init.zeros_(model.fc.bias)
    return model


class PaddedStem(nn.Conv2d):
    """A first convolution that also takes views with further channels of zeros; its weights stay as they are."""

    def forward(self, views: Tensor) -> Tensor:
        more = views.shape[1] - self.in_channels
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, more)) if more else self.weight
        out: Tensor = self._conv_forward(views, weight, self.bias)
        return out


def pad_stem(model: ResNet) -> ResNet:
    """Make a ResNet's first convolution a PaddedStem, in place; its parameter stays the same object."""
    model.conv1.__class__ = PaddedStem
    return model


def tap_maps(model: ResNet, images: Tensor) -> list[Tensor]:
    """The five maps probes read: stem after ReLU and before max-pooling, then layer1 .. layer4.

    images [n, 3, H, W]; at 224 the maps are 64x112, 256x56, 512x28, 1024x14, 2048x7 (ResNet-50).
    Source: protocol "Feature taps".
    """
    maps = [model.relu(model.bn1(model.conv1(images)))]
    x = model.maxpool(maps[0])
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def backbone_state(model: ResNet) -> dict[str, Tensor]:
    """Everything but the head, by torchvision's key names."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
