"""The models that the benchmarks run on, with inputs, and with weights that make their outputs depend on these.

Sets: ``tv-classification``, ``tv-segmentation``, ``tv-video`` (together every such model of torchvision), ``tv-flow``,
``tv-detection``, ``timm`` (one model for each module of its architectures), ``hf`` (tiny configurations). Nothing is
downloaded: weights are random, then made live.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import hf_models
import torch
from torch import nn

__all__ = ["SETS", "Inputs", "Model", "Run", "select", "torchvision_models"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of forward."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model by name: ``build()`` makes it, ``draw(generator, batch)`` makes inputs for one that was built.

    ``build_for(pixels)`` makes one that is told the size of its images, and raises where there is no such option.
    """

    name: str
    set: str
    build: Callable[[], nn.Module]
    draw: Callable[[nn.Module, torch.Generator, int], Inputs]
    build_for: Callable[[int], nn.Module] | None = None

    def run(self, seed: int = 0, batch: int = 2) -> Run:
        """The model in eval mode, the same one each time, with live weights; batch norms know a batch of that size."""
        torch.manual_seed(seed)
        module = self.build().eval()
        run = Run(self, module)
        enliven(module, run.inputs(seed=100, batch=batch))
        return run


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that was built."""

    model: Model
    module: nn.Module

    def inputs(self, seed: int, batch: int = 1) -> Inputs:
        """Inputs that depend on nothing but ``seed`` and ``batch``."""
        return self.model.draw(self.module, torch.Generator().manual_seed(seed), batch)


# ------------------------------------------------------------------------------------------------------ live weights
@torch.no_grad()
def enliven(module: nn.Module, inputs: Inputs) -> None:
    """Let random weights act like trained ones: no parameter is constant, batch norms know the statistics of a batch.

    As libraries initialise them, some heads and gates are zero, so that outputs are constants and any two graphs agree.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            _fill_constant(parameter, generator)
    norms = [m for m in module.modules() if _has_statistics(m)]
    hooks = [m.register_forward_pre_hook(_take_statistics) for m in norms]
    if hooks:
        module(*inputs[0], **inputs[1])
    for hook in hooks:
        hook.remove()


def _fill_constant(parameter: torch.Tensor, generator: torch.Generator) -> None:
    low, high = float(parameter.min()), float(parameter.max())
    if max(abs(low), abs(high)) < 1e-3:
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.normal_(0, fan_in**-0.5 if fan_in > 1 else 0.1, generator=generator)
    elif low == high and parameter.numel() > 1:
        parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))


def _has_statistics(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in ("running_mean", "running_var"))


def _take_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    x = args[0]
    if x.numel() // x.shape[1] < 8:  # too few values a channel to tell its variance
        norm.running_var.fill_(float(x.pow(2).mean()) + 1e-6)
        return
    others = [d for d in range(x.dim()) if d != 1]
    norm.running_mean.copy_(x.mean(others))
    norm.running_var.copy_(x.var(others) + 1e-6)


# ------------------------------------------------------------------------------------------------------- torchvision
@functools.cache
def torchvision_models() -> Any:
    """``torchvision.models``. Beside a CPU-only torch it imports only after its operators' schemas are declared; its
    compiled kernels are missing then, and ``nms`` is computed in Python."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    missing = not hasattr(torch.ops.torchvision, "nms")
    for name in ("nms", "qnms"):
        if missing:
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    if missing:
        torchvision.ops.boxes._assert_has_ops = lambda: None
        library.impl("nms", _nms, "CPU")
    torchvision_models.library = library  # what it registers lasts as long as it does
    return torchvision.models


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Keep the best box, drop what overlaps it too much, go on with the rest."""
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True, stable=True), []
    overlaps = box_iou(boxes, boxes)
    while order.numel():
        kept.append(order[0])
        order = order[1:][overlaps[order[0], order[1:]] <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


def _torchvision(name: str, set_: str, sizes: tuple[int, ...], **options: Any) -> Model:
    def build() -> nn.Module:
        return torchvision_models().get_model(name, weights=None, **options)

    def build_for(pixels: int) -> nn.Module:
        return torchvision_models().get_model(name, weights=None, image_size=pixels, **options)

    return Model(name, set_, build, _images(*sizes), build_for if name.startswith("vit_") else None)


def _images(*sizes: int) -> Callable[[nn.Module, torch.Generator, int], Inputs]:
    return lambda module, generator, batch: ((torch.randn(batch, *sizes, generator=generator),), {})


def _classification() -> Iterable[Model]:
    for name in torchvision_models().list_models(module=torchvision_models()):
        # as they are used for classification: without the heads that only help training
        options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = 299 if name == "inception_v3" else 224
        yield _torchvision(name, "tv-classification", (3, size, size), **options)


def _segmentation() -> Iterable[Model]:
    for name in torchvision_models().list_models(module=torchvision_models().segmentation):
        yield _torchvision(name, "tv-segmentation", (3, 224, 224), weights_backbone=None)


def _video() -> Iterable[Model]:
    for name in torchvision_models().list_models(module=torchvision_models().video):
        # mvit has tables of positions for one size, s3d pools 7 x 7 at the end
        size = 224 if name.startswith(("mvit", "s3d")) else 112
        yield _torchvision(name, "tv-video", (3, 16, size, size))


def _flow() -> Iterable[Model]:
    def draw(module: nn.Module, generator: torch.Generator, batch: int) -> Inputs:
        return tuple(torch.rand(2, batch, 3, 128, 128, generator=generator) * 2 - 1), {}

    for name in torchvision_models().list_models(module=torchvision_models().optical_flow):
        yield dataclasses.replace(_torchvision(name, "tv-flow", ()), draw=draw)


def _detection() -> Iterable[Model]:
    """Small images and few detections, none of them thrown away for a low score, so that outputs are never empty."""

    def draw(module: nn.Module, generator: torch.Generator, batch: int) -> Inputs:
        sizes = [(224, 224), (224, 192)] * batch
        return ([torch.rand(3, *size, generator=generator) for size in sizes],), {}

    for name in torchvision_models().list_models(module=torchvision_models().detection):
        options: dict[str, Any] = {"weights_backbone": None}
        if "rcnn" in name:
            options |= {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30}
            options |= {"box_score_thresh": 0.0, "box_detections_per_img": 20}
        else:
            options |= {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 60}
        if not name.startswith("ssd"):
            options |= {"min_size": 256, "max_size": 256, "trainable_backbone_layers": 5}
        yield dataclasses.replace(_torchvision(name, "tv-detection", (), **options), draw=draw)


# -------------------------------------------------------------------------------------------------------------- timm
_TIMM = """
beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
mobilenetv2_035 efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 mambaout_femto maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base
mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t
resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p
xcit_nano_12_p8_224
""".split()
"""A small model of each module of timm 1.0.31 that defines architectures."""


def _timm() -> Iterable[Model]:
    torchvision_models()  # timm imports it
    importlib.import_module("timm")  # once, before the processes of the models part

    def build(name: str, pixels: int | None = None) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **({} if pixels is None else {"img_size": pixels}))

    def draw(module: nn.Module, generator: torch.Generator, batch: int) -> Inputs:
        return (torch.randn(batch, *module.default_cfg["input_size"], generator=generator),), {}

    for name in _TIMM:
        make = functools.partial(build, name)
        yield Model(name, "timm", make, draw, make)


# ------------------------------------------------------------------------------------------------------ Hugging Face
def _huggingface() -> Iterable[Model]:
    torchvision_models()  # transformers imports it
    importlib.import_module("transformers.modeling_utils")
    for name, (model_class, config_class, options, part, draw) in hf_models.TINY.items():

        def build(m: str = model_class, c: str = config_class, o: Any = options, part: str = part) -> nn.Module:
            return hf_models.build(m, c, o, part)

        def inputs(module: nn.Module, generator: torch.Generator, batch: int, draw: Any = draw) -> Inputs:
            return (), draw(generator, batch)

        yield Model(name, "hf", build, inputs)


SETS: dict[str, Callable[[], Iterable[Model]]] = {
    "tv-classification": _classification,
    "tv-segmentation": _segmentation,
    "tv-video": _video,
    "tv-flow": _flow,
    "tv-detection": _detection,
    "timm": _timm,
    "hf": _huggingface,
}


def select(sets: Iterable[str], pattern: str = "") -> list[Model]:
    """The models of ``sets`` whose name the regular expression matches somewhere."""
    return [m for s in sets for m in SETS[s]() if re.search(pattern, m.name)]
