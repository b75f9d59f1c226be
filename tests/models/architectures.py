"""Networks as people write them, small: for 1×8×8 images and 10 classes, or any other."""

import torch
from torch import nn
from torch.nn import functional as F


def _conv(inner, outer, size=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
        nn.ReLU(inplace=True),
    )


class BasicBlock(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.one = _conv(inner, outer, stride=stride)
        self.two = nn.Sequential(nn.Conv2d(outer, outer, 3, 1, 1), nn.BatchNorm2d(outer))
        self.downsample = (
            None
            if inner == outer and stride == 1
            else nn.Sequential(nn.Conv2d(inner, outer, 1, stride), nn.BatchNorm2d(outer))
        )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.two(self.one(x))
        out += identity
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        middle = outer // 4
        self.body = nn.Sequential(
            _conv(inner, middle, 1), _conv(middle, middle, 3, stride),
            nn.Conv2d(middle, outer, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride), nn.BatchNorm2d(outer))

    def forward(self, x):
        return F.relu(self.body(x) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, block, shape, classes, layers, width=8):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(shape[0], width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        blocks, inner = [], width
        for stage, count in enumerate(layers):
            for number in range(count):
                outer = width * 2 ** min(stage, 2)
                blocks.append(block(inner, outer, 2 if stage == 1 and not number else 1))
                inner = outer
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inner, classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(shape, classes):
    return ResNet(BasicBlock, shape, classes, (2, 2, 2, 2))


def resnet50(shape, classes):
    return ResNet(Bottleneck, shape, classes, (3, 4, 6, 3))


class InvertedResidual(nn.Module):
    def __init__(self, inner, outer, stride, expand, act):
        super().__init__()
        hidden = inner * expand
        self.use_res = stride == 1 and inner == outer
        self.conv = nn.Sequential(
            nn.Conv2d(inner, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), act(),
            nn.Conv2d(hidden, outer, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.use_res else self.conv(x)


def _inverted(shape, classes, act, dropout):
    return nn.Sequential(
        _conv(shape[0], 8),
        InvertedResidual(8, 8, 1, 2, act),
        InvertedResidual(8, 16, 2, 4, act),
        InvertedResidual(16, 16, 1, 4, act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(16, classes),
    )


def mobilenet_v2(shape, classes):
    return _inverted(shape, classes, nn.ReLU6, 0.2)


def efficientnet_lite(shape, classes):
    return _inverted(shape, classes, nn.Hardswish, 0.3)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dw, self.norm = (
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.LayerNorm(width),
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x):
        out = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(out)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, shape, classes, width=16):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], width, 2, 2)
        self.blocks = nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((-2, -1))))


class DenseNet(nn.Module):
    def __init__(self, shape, classes, growth=4):
        super().__init__()
        self.stem, width = nn.Conv2d(shape[0], 8, 3, padding=1), 8
        self.layers = nn.ModuleList()
        for _ in range(4):
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(width, growth, 3, padding=1, bias=False),
                )
            )
            width += growth
        self.norm, self.classifier = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        out = F.relu(self.norm(torch.cat(features, 1)))
        return self.classifier(F.adaptive_avg_pool2d(out, 1).view(len(x), -1))


class VGG(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.flat = 16 * (shape[1] // 4) * (shape[2] // 4)
        self.classifier = nn.Sequential(
            nn.Linear(self.flat, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, classes)
        )

    def forward(self, x):
        return self.classifier(self.features(x).view(-1, self.flat))


class LeNetView(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(shape[0], 6, 3), nn.Conv2d(6, 16, 3)
        self.flat = 16 * ((shape[1] - 4) // 2) * ((shape[2] - 4) // 2)
        self.fc1, self.fc2 = nn.Linear(self.flat, 32), nn.Linear(32, classes)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(torch.relu(self.fc1(x)))


class PatchTransformer(nn.Module):
    """A small vision transformer, or any encoder over patches."""

    def __init__(self, shape, classes, width=16, patch=4):
        super().__init__()
        self.embed = nn.Conv2d(shape[0], width, patch, patch)
        count = (shape[1] // patch) * (shape[2] // patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, count + 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.encoder(x)[:, 0])


class Attention(nn.Module):
    """Masked self-attention over rows, its mask a buffer of -inf."""

    def __init__(self, shape, classes, width=16):
        super().__init__()
        self.embed = nn.Linear(shape[0] * shape[2], width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        mask = torch.full((shape[1], shape[1]), float("-inf")).triu(1)
        self.register_buffer("mask", mask)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(x.transpose(1, 2).flatten(2))
        x, _ = self.attention(x, x, x, attn_mask=self.mask)
        return self.head(x.mean(1))


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, 16), nn.GELU(), nn.Linear(16, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x):
        x = x + self.mix(self.one(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.two(x))


class Mixer(nn.Module):
    def __init__(self, shape, classes, width=16, patch=2):
        super().__init__()
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.embed = nn.Conv2d(shape[0], width, patch, patch)
        self.blocks = nn.Sequential(MixerBlock(tokens, width), MixerBlock(tokens, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind, shape, classes):
        super().__init__()
        self.rnn = kind(shape[0] * shape[2], 16, num_layers=2, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        out, _ = self.rnn(x.transpose(1, 2).flatten(2))
        return self.fc(out[:, -1])


def gru(shape, classes):
    return Recurrent(nn.GRU, shape, classes)


def lstm(shape, classes):
    return Recurrent(nn.LSTM, shape, classes)


class Siamese(nn.Module):
    """Both halves of an image through towers that share their weights."""

    def __init__(self, shape, classes):
        super().__init__()
        half = shape[0] * (shape[1] // 2) * shape[2]
        self.left, self.right = nn.Linear(half, 16), nn.Linear(half, 16)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        top, bottom = torch.chunk(x, 2, dim=2)
        left, right = self.left(top.flatten(1)), self.right(bottom.flatten(1))
        return self.head(torch.relu(torch.cat([left, right], 1)))


class Fire(nn.Module):
    def __init__(self, inner, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inner, squeeze, 1)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x), inplace=True)
        return F.relu(torch.cat([self.one(x), self.three(x)], 1), inplace=True)


def squeezenet(shape, classes):
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        Fire(8, 4, 8), Fire(16, 4, 8), nn.Dropout(0.5),
        nn.Conv2d(16, classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            _conv(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half),
            nn.BatchNorm2d(half), _conv(half, half, 1),
        )  # fmt: skip

    def forward(self, x):
        one, two = x.chunk(2, 1)
        n, c, h, w = x.shape
        out = torch.cat([one, self.branch(two)], 1)
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shufflenet(shape, classes):
    return nn.Sequential(
        _conv(shape[0], 16, stride=2), ShuffleUnit(16), ShuffleUnit(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


class Inception(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.stem = _conv(shape[0], 8)
        self.b1, self.b3, self.b5 = _conv(8, 4, 1), _conv(8, 4, 3), _conv(8, 4, 5)
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(8, 4, 1))
        self.fc = nn.Linear(16, classes)
        self.aux = nn.Linear(8, classes)  # of training alone, as in the paper; here never used

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.b1(x), self.b3(x), self.b5(x), self.pool(x)], 1)
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.down1, self.down2 = _conv(shape[0], 8), _conv(8, 16, stride=2)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), _conv(16, 8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        one = self.down1(x)
        two = self.up(self.down2(one))
        return self.fc(self.out(torch.cat([one, two], 1)).mean((2, 3)))


class Solid(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, (shape[0], 3, 3), padding=(0, 1, 1))
        self.norm, self.fc = nn.BatchNorm3d(4), nn.Linear(4 * shape[1] * shape[2], classes)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x.unsqueeze(1)))).flatten(1))


class Capsules(nn.Module):
    """One routing by agreement; logits are the capsules' lengths, no layer's output."""

    def __init__(self, shape, classes):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 16, 3, stride=2, padding=1)
        count = 4 * ((shape[1] + 1) // 2) * ((shape[2] + 1) // 2)
        self.route = nn.Parameter(0.1 * torch.randn(count, classes, 4, 4))

    def forward(self, x):
        primary = self.conv(x)
        primary = primary.reshape(len(x), -1, 4)
        votes = torch.einsum("nij,icjk->nick", primary, self.route)
        agreement = torch.softmax((votes * votes.mean(1, keepdim=True)).sum(-1), 2)
        return (agreement.unsqueeze(-1) * votes).sum(1).norm(dim=-1)


class Coder(nn.Module):
    """An autoencoder with a head; its decoder is of no use to the classifier."""

    def __init__(self, shape, classes):
        super().__init__()
        pixels = shape[0] * shape[1] * shape[2]
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(32, pixels), nn.Sigmoid())
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.encoder(x))


ARCHITECTURES = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-Lite": efficientnet_lite,
    "ConvNeXt": ConvNeXt,
    "DenseNet": DenseNet,
    "VGG with view": VGG,
    "LeNet with view": LeNetView,
    "ViT (TransformerEncoder)": PatchTransformer,
    "attention with a mask of -inf": Attention,
    "MLP-Mixer": Mixer,
    "GRU over rows": gru,
    "LSTM over rows": lstm,
    "Siamese, tied": Siamese,
    "SqueezeNet": squeezenet,
    "ShuffleNet": shufflenet,
    "Inception, unused head": Inception,
    "U-Net-like": UNet,
    "Conv3d": Solid,
    "capsules": Capsules,
    "autoencoder and head": Coder,
}
