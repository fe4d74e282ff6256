"""Hook table of number formats."""

from __future__ import annotations

from modeling.hooks import HookKind

QUANTIZERS = {
    "integer": "quant.quantizers:Integer",
    "nf4": "quant.quantizers:NF4",
    "fp4": "quant.quantizers:FP4",
    "mxfp4": "quant.quantizers:MXFP4",
    "nvfp4": "quant.quantizers:NVFP4",
}

QUANTIZER = HookKind(
    "quantizer",
    QUANTIZERS,
    (),
    "quantize([..., N]) -> codes and scales with dequantize(dtype)",
    base="quant.quantizers:Quantizer",
)
KINDS = {QUANTIZER.name: QUANTIZER}
