"""Everything that runs a network on 8-bit integers, and what it is compared with, made ready from one model and one set
of calibration data.

:data:`VARIANTS` has a function for each; it takes a :class:`Workbench` and gives what computes the output from the
input. What several of them need is made once. All run on the CPU with the same number of threads; what is not quantised
is computed in float32, but for ``openvino-bf16``, which does as OpenVINO does by itself where the processor knows
bfloat16. Quantisers work as their documentation recommends for this kind of processor and model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import Run
from torch import Tensor, fx

import fxcompress
from fxcompress.passes.quantization import Quantize

__all__ = ["COLUMNS", "INTEGERS", "VARIANTS", "Call", "Workbench"]

Call = Callable[[Tensor], Any]
"""From the input to the output, a tensor or an array."""
_CALIBRATION, _SAMPLES = 4, 8
"""Batches, and samples in each."""
_TRANSFORMERS = ("vit", "swin", "bert")


class Workbench:
    """A model, the data that it is calibrated and tried on, and what several variants are made from.

    Args:
        run: the model.
        batch: of the inputs.
        threads: for each runtime.

    Attributes:
        x: the input that times are measured with.
        calibration: batches of eight; the peers, whose graphs are of one batch size, get the same samples in batches of
            ``batch``.
    """

    def __init__(self, run: Run, batch: int, threads: int) -> None:
        self.name, self.module, self.batch, self.threads = run.model.name, run.module, batch, threads
        self.x: Tensor = run.inputs(seed=0, batch=batch)[0][0]
        self.calibration: list[Tensor] = [run.inputs(seed=1000 + i, batch=_SAMPLES)[0][0] for i in range(_CALIBRATION)]
        self._held_out: list[Tensor] = list(run.inputs(seed=1, batch=_SAMPLES)[0][0].split(batch))
        self._folder = tempfile.TemporaryDirectory()

    @property
    def samples(self) -> list[Tensor]:
        """The calibration data in batches of ``batch``."""
        return [part for x in self.calibration for part in x.split(self.batch)]

    def outputs(self, call: Call) -> Tensor:
        """For inputs that no calibration has seen."""
        with torch.no_grad():
            return torch.cat([torch.as_tensor(call(x)).clone() for x in self._held_out])

    @functools.cached_property
    def expected(self) -> Tensor:
        """The model's own outputs for them."""
        return self.outputs(self.module)

    @functools.cached_property
    def folded(self) -> fx.GraphModule:
        """Without batch norms, in float32."""
        return fxcompress.compile(self.module, ["remove-identity", "fold-batch-norm"], (self.x,))

    @functools.cached_property
    def reference(self) -> fx.GraphModule:
        """Our quantised graph."""
        return fxcompress.compile(self.folded, [Quantize()], (self.x,), calibration=[(x,) for x in self.calibration])

    @functools.cached_property
    def lowered(self) -> fx.GraphModule:
        """The same on int8 kernels."""
        return fxcompress.compile(self.reference, ["lower-int8"], (self.x,), calibration=[(self.calibration[0],)])

    # ---------------------------------------------------------------------------------------------------- peers
    @functools.cached_property
    def openvino_model(self) -> Any:
        """Converted, of a fixed shape, in float32."""
        import openvino

        try:
            model = openvino.convert_model(self.module, example_input=(self.x,))
        except RuntimeError:  # torch.jit cannot trace it, as the fused attention of torchvision's ViT
            model = openvino.convert_model(torch.export.export(self.module, (self.x,)))
        model.reshape(list(self.x.shape))
        return model

    @functools.cached_property
    def openvino_integers(self) -> Any:
        """What NNCF makes of it."""
        import nncf

        nncf.set_log_level(logging.ERROR)
        data = [x.numpy() for x in self.samples]
        kind = nncf.ModelType.TRANSFORMER if self.name.startswith(_TRANSFORMERS) else None
        options = {"target_device": nncf.TargetDevice.CPU, "model_type": kind, "subset_size": len(data)}
        return nncf.quantize(self.openvino_model, nncf.Dataset(data), **options)

    def openvino_compiled(self, model: Any, precision: str, **options: Any) -> Any:
        """For this machine; ``precision`` is that of what is not quantised."""
        import openvino

        options |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}
        return openvino.Core().compile_model(model, "CPU", {**options, "INFERENCE_PRECISION_HINT": precision})

    def openvino_call(self, model: Any, precision: str = "f32") -> Call:
        """Without copies of inputs and outputs."""
        compiled = self.openvino_compiled(model, precision)
        return lambda x: compiled([x.numpy()], share_inputs=True, share_outputs=True)[0]

    @functools.cached_property
    def onnx_path(self) -> Path:
        """Exported, optimised and with all shapes, as ONNX Runtime's quantiser wants it."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        exported, path = (Path(self._folder.name) / name for name in ("exported.onnx", "prepared.onnx"))
        torch.onnx.export(self.module, (self.x,), exported, dynamo=True, external_data=False, verbose=False)
        quant_pre_process(exported, path)
        return path

    def onnx_call(self, path: Path) -> Call:
        """A session of ONNX Runtime."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = self.threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x.numpy()})[0]

    def onnx_integers(self) -> Path:
        """What ONNX Runtime's static quantiser makes of it."""
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        name, path = self._onnx_input(), Path(self._folder.name) / "integers.onnx"
        samples = iter([{name: x.numpy()} for x in self.samples])

        class Reader(CalibrationDataReader):
            def get_next(self) -> Any:
                return next(samples, None)

        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(self.onnx_path, path, Reader(), per_channel=True, **types)
        return path

    def _onnx_input(self) -> str:
        import onnx

        return onnx.load(self.onnx_path).graph.input[0].name


# --------------------------------------------------------------------------------------------------------- variants
def _eager(bench: Workbench) -> Call:
    return bench.module


def _compiled(bench: Workbench) -> Call:
    return _once(bench, torch.compile(bench.module))


def _frozen(bench: Workbench) -> Call:
    with _freezing():
        return _once(bench, torch.compile(bench.module, options={"freezing": True}))


def _ours(bench: Workbench) -> Call:
    return bench.lowered


def _ours_compiled(bench: Workbench) -> Call:
    with _freezing():
        return _once(bench, torch.compile(bench.reference))


def _torchao(bench: Workbench) -> Call:
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(bench.module, (bench.x,), strict=True).module()
    prepared = quantize_pt2e.prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for x in bench.samples:
            prepared(x)
    converted = quantize_pt2e.convert_pt2e(prepared)
    with _freezing():
        return _once(bench, torch.compile(converted))


def _once(bench: Workbench, call: Call) -> Call:
    """``call`` after a first run, in which it is compiled."""
    with torch.no_grad():
        call(bench.x)
    return call


@contextlib.contextmanager
def _freezing() -> Iterator[None]:
    """Weights are constants to what is compiled, so that they are laid out, and here quantised, once."""
    with torch._inductor.config.patch(freezing=True):
        yield


VARIANTS: dict[str, Callable[[Workbench], Call]] = {
    "eager": _eager,
    "ours": _ours,
    "openvino-float32": lambda bench: bench.openvino_call(bench.openvino_model),
    "openvino": lambda bench: bench.openvino_call(bench.openvino_integers),
    "openvino-bf16": lambda bench: bench.openvino_call(bench.openvino_integers, "bf16"),
    "onnxruntime-float32": lambda bench: bench.onnx_call(bench.onnx_path),
    "onnxruntime": lambda bench: bench.onnx_call(bench.onnx_integers()),
    "torchao": _torchao,
    "compiled": _compiled,
    "frozen": _frozen,
    "ours-compiled": _ours_compiled,
}
"""By name, in the order in which to make them: ``torch.export`` throws away what ``torch.compile`` has made."""
COLUMNS = (
    *("eager", "compiled", "frozen", "ours", "ours-compiled", "torchao"),
    *("openvino-float32", "openvino", "openvino-bf16", "onnxruntime-float32", "onnxruntime"),
)
"""The same in the order of tables."""
INTEGERS = ("ours", "ours-compiled", "torchao", "openvino", "openvino-bf16", "onnxruntime")
"""Those that are quantised."""
