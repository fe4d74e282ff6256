"""Hook table of probes."""

from __future__ import annotations

from modeling.hooks import HookKind

PROBES = {
    "kurtosis": "analysis.probes.kurtosis:Kurtosis",
    "router": "analysis.probes.router:RouterTelemetry",
    "activation_histogram": "analysis.probes.histogram:ActivationHistogram",
    "activation_sparsity": "analysis.probes.activation_sparsity:ActivationSparsity",
    "mask_mass": "analysis.probes.mask_mass:MaskMass",
    "width_pruning": "analysis.probes.pruning:WidthPruning",
    "depth_pruning": "analysis.probes.pruning:DepthPruning",
}

PROBE = HookKind("probe", PROBES, (), "torchmetrics.Metric over tapped activations", base="analysis.probes.base:Probe")
KINDS = {PROBE.name: PROBE}
