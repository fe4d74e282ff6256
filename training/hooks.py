"""Hook tables of training: optimizers, schedules, objectives, samplers."""

from __future__ import annotations

from modeling.hooks import HookKind

OPTIMIZERS = {
    "muon": "training.optim.muon:Muon",
    "adamw": "training.optim.adamw:AdamW",
}
SCHEDULES = {
    "wsd": "training.optim.schedules:WSD",
    "cosine": "training.optim.schedules:Cosine",
    "constant": "training.optim.schedules:Constant",
}
SAMPLERS = {
    "shuffled": "training.data.samplers:Shuffled",
    "sequential": "training.data.samplers:Sequential",
}
OBJECTIVES = {
    "next_token": "training.objectives.next_token:NextToken",
}

OPTIMIZER = HookKind(
    "optimizer",
    OPTIMIZERS,
    ("routes", "lr", "weight_decay", "adam"),
    "torch.optim.Optimizer over routed parameters; works on whole tensors and on ZeRO's shards",
    base="training.optim.routed:RoutedOptimizer",
)
SCHEDULE = HookKind(
    "schedule", SCHEDULES, ("steps", "warmup"), "step -> factor on the peak learning rate", base="builtins:object"
)
SAMPLER = HookKind(
    "sampler",
    SAMPLERS,
    ("num_rows", "seed"),
    "(step, global batch) -> row numbers; any world size",
    base="builtins:object",
)
OBJECTIVE = HookKind(
    "objective", OBJECTIVES, (), "(model, batch) -> Loss.of(own loss, output.auxiliary)", base="builtins:object"
)
KINDS = {kind.name: kind for kind in (OPTIMIZER, SCHEDULE, SAMPLER, OBJECTIVE)}
