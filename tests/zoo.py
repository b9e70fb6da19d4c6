"""Named networks: the families that people compress, at toy size, with random weights and without a download."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import Inputs, Network, settle

__all__ = ["HUGGING_FACE", "NETS", "PLAIN"]

TOKENS = 16


class BasicBlock(nn.Module):
    """ResNet's: two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, two stages, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """A stem and inverted residuals; the mean is the pooling."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        residuals = [InvertedResidual(4, 4, 1), InvertedResidual(4, 8, 2), InvertedResidual(8, 8, 1)]
        self.features = nn.Sequential(stem, *residuals)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class DenseLayer(nn.Module):
    """DenseNet's: norm and ReLU stand before the convolution, the output joins a growing list."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(x)))


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList(DenseLayer(4 + 4 * i, 4) for i in range(2))
        self.transition = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.AvgPool2d(2))
        self.block2 = nn.ModuleList(DenseLayer(6 + 4 * i, 4) for i in range(2))
        self.norm = nn.BatchNorm2d(14)
        self.classifier = nn.Linear(14, 5)

    @staticmethod
    def grow(layers: nn.ModuleList, x: Tensor) -> Tensor:
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grow(self.block1, self.stem(x))
        x = self.norm(self.grow(self.block2, self.transition(x)))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(x, inplace=True), 1).flatten(1))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's: half goes through, all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        x = torch.cat((x1, self.branch(x2)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width)
        return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleNet(nn.Module):
    """A stem and three units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.units = nn.Sequential(*(ShuffleUnit(8) for _ in range(3)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean([2, 3]))


class EncoderBlock(nn.Module):
    """torchvision's ViT block around ``nn.MultiheadAttention``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, two blocks."""

    def __init__(self, encoder: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.encoder = encoder()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.patches(x).reshape(batch, 8, -1).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(batch, -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.encoder(x))[:, 0])


def _blocks() -> nn.Module:
    return nn.Sequential(EncoderBlock(8), EncoderBlock(8))


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class UNet(nn.Module):
    """Down and up again with skips: one transposed convolution, one interpolation to a size read off a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.twice(3, 4), self.twice(4, 8), self.twice(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.up_norm = nn.BatchNorm2d(8)
        self.merge2, self.merge1 = self.twice(16, 4), self.twice(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        bottom = self.bottom(F.max_pool2d(two, 2))
        up = self.merge2(torch.cat([self.up_norm(self.up(bottom)), two], dim=1))
        up = F.interpolate(up, size=one.shape[2:], mode="bilinear", align_corners=False)
        mask = self.head(self.merge1(torch.cat([up, one], dim=1)))
        return {"out": F.interpolate(mask, size=x.shape[2:]), "bottom": bottom}


class Recurrent(nn.Module):
    """Token ids, a two-layer LSTM, the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.1)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        output, (hidden, _) = self.lstm(self.embedding(ids))
        return self.head(self.norm(output[:, -1] + hidden[-1]))


class Conv1D(nn.Module):
    """GPT-2's linear layer: ``addmm`` with a transposed weight."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.size()[:-1], self.outputs)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Decoder(nn.Module):
    """One GPT-2 block with a causal mask in a buffer and the embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, 8), nn.Embedding(12, 8)
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.attn_proj = Conv1D(24, 8), Conv1D(8, 8)
        self.fc, self.fc_proj = Conv1D(16, 8), Conv1D(8, 16)
        self.drop = nn.Dropout(0.1)
        self.lm_head = nn.Linear(8, TOKENS, bias=False)
        self.lm_head.weight = self.tokens.weight
        self.register_buffer("causal", torch.ones(12, 12, dtype=torch.bool).tril(), persistent=False)

    def attention(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        query, key, value = (
            part.view(x.shape[0], length, 2, 4).transpose(1, 2) for part in self.attn(x).split(8, dim=2)
        )
        scores = query @ key.transpose(-1, -2) / 2.0
        scores = torch.where(self.causal[:length, :length], scores, torch.finfo(scores.dtype).min)
        y = self.drop(F.softmax(scores, dim=-1)) @ value
        return self.attn_proj(y.transpose(1, 2).contiguous().view(x.shape))

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(0, input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.tokens(input_ids) + self.positions(places)
        x = x + self.attention(self.ln_1(x))
        x = x + self.drop(self.fc_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")))
        return self.lm_head(x)


def _images(size: int, generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
    return (torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype),), {}


def _ids(generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
    return (torch.randint(TOKENS, (batch, 6), generator=generator),), {}


def _padded(generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
    """Ids with an attention mask that hides some of the last tokens, as a tokenizer pads them."""
    lengths = torch.randint(3, 7, (batch, 1), generator=generator)
    (ids,), _ = _ids(generator, batch, dtype)
    return (), {"input_ids": ids, "attention_mask": (torch.arange(6) < lengths).long()}


def _pixels(generator: torch.Generator, batch: int, dtype: torch.dtype) -> Inputs:
    (pixels,), _ = _images(8, generator, batch, dtype)
    return (), {"pixel_values": pixels}


def _finish(name: str, module: nn.Module, sample: Any, tolerance: float = 1e-10) -> Network:
    network = Network(module, sample, name, tolerance=tolerance)
    assert settle(network, seed=0), f"{name} does not answer to its inputs"
    return network


def _plain(name: str, make: Callable[[], nn.Module], sample: Any) -> Network:
    with torch.random.fork_rng(devices=[]):
        module = make()
    return _finish(name, module, sample)


# Architecture, the class of transformers to build, what to feed it, and options of its config beside the common ones.
_TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
         "vocab_size": TOKENS, "max_position_embeddings": 16}  # fmt: skip
_HUGGING_FACE: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "Bert": ("BertForSequenceClassification", _padded, {**_TINY, "num_labels": 3}),
    "GPT2": ("GPT2LMHeadModel", _padded, {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16,
                                          "vocab_size": TOKENS, "use_cache": False}),
    "Llama": ("LlamaForCausalLM", _padded, {**_TINY, "num_key_value_heads": 1, "use_cache": False}),
    "ViT": ("ViTForImageClassification", _pixels, {**_TINY, "image_size": 8, "patch_size": 4, "num_labels": 3}),
    "T5": ("T5EncoderModel", _padded, {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2,
                                       "vocab_size": TOKENS, "use_cache": False}),
}  # fmt: skip


def _hugging_face(name: str) -> Network:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("tests.torchvision_shim")  # transformers imports it where it is installed
    import transformers  # here, because its import takes seconds that most tests need not pay

    model, sample, options = _HUGGING_FACE[name]
    with torch.random.fork_rng(devices=[]):
        module = getattr(transformers, model)(getattr(transformers, f"{name}Config")(**options))
    # Llama's and T5's norms and T5's and GPT-2's softmax run in float32 whatever the model's dtype.
    tolerance = 1e-10 if name in ("Bert", "ViT") else 1e-5
    return _finish(name, module, sample, tolerance)


PLAIN: dict[str, Callable[[], Network]] = {
    "resnet": partial(_plain, "resnet", ResNet, partial(_images, 8)),
    "mobilenet": partial(_plain, "mobilenet", MobileNet, partial(_images, 8)),
    "densenet": partial(_plain, "densenet", DenseNet, partial(_images, 6)),
    "shufflenet": partial(_plain, "shufflenet", ShuffleNet, partial(_images, 8)),
    "vit-attention": partial(_plain, "vit-attention", partial(VisionTransformer, _blocks), partial(_images, 8)),
    "vit-encoder": partial(
        _plain, "vit-encoder", partial(VisionTransformer, _transformer_encoder), partial(_images, 8)
    ),
    "unet": partial(_plain, "unet", UNet, partial(_images, 8)),
    "lstm": partial(_plain, "lstm", Recurrent, _ids),
    "decoder": partial(_plain, "decoder", Decoder, _ids),
}
HUGGING_FACE: dict[str, Callable[[], Network]] = {f"hf-{n.lower()}": partial(_hugging_face, n) for n in _HUGGING_FACE}
NETS: dict[str, Callable[[], Network]] = PLAIN | HUGGING_FACE
