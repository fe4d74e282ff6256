"""The typed schema of a run: every key of every YAML, its type, default and meaning.

Keys are strict: an unknown key or a value of the wrong type is an error (see `configs.loading`). A `Hook` value is a name from a hook
table (`mesokurt hooks`), or `package.module:Class`, or a mapping `{name: NAME, option: value}` whose options are checked against the class.
"""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)


class Section(BaseModel):
    """A strict, frozen group of keys; the string under each field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class HookSpec(BaseModel):
    """A hook's name and its options."""

    model_config = ConfigDict(frozen=True, strict=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they are, when YAML and JSON can both hold them and give them back equal."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                check(key)
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)
        elif not (value is None or isinstance(value, (str, bool, int, float))) or value != value:
            raise ValueError(f"an option is text, a number, true, false, null, a list or a mapping, not {value!r:.80}")

    check(options)
    return options


def _hook_from_yaml(value: Any) -> Any:
    if isinstance(value, str):
        return HookSpec(name=value)
    if isinstance(value, dict):
        if not isinstance(value.get("name"), str):
            raise ValueError("a hook is a NAME or a mapping with a 'name'")
        return HookSpec(name=value["name"], options=_plain_options({k: v for k, v in value.items() if k != "name"}))
    if isinstance(value, HookSpec):
        return value
    raise ValueError("a hook is a NAME or a mapping with a 'name'")


def _hook_to_yaml(spec: HookSpec) -> str | dict[str, Any]:
    return {"name": spec.name, **spec.options} if spec.options else spec.name


_HOOK_JSON_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}]
}
Hook = Annotated[
    HookSpec, BeforeValidator(_hook_from_yaml), PlainSerializer(_hook_to_yaml), WithJsonSchema(_HOOK_JSON_SCHEMA)
]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # no shell sees a path in a YAML or behind section.key=
BitsText = Annotated[str, Field(pattern=r"^([2-8]|16)-([2-8]|16)-([2-8]|16)$")]


def hook(name: str, **options: Any) -> Any:
    """Default value of a hook field."""
    return Field(default_factory=lambda: HookSpec(name=name, options=options))


class RunSection(Section):
    """Where the run lives and what makes it reproducible."""

    dir: PathText = "runs/default"
    """Run directory: config, metrics, checkpoints, export and report, relative to the working directory (`~` is the home directory, in
    every path). A YAML that does not say gets runs/ and its own name, with the overrides behind it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # NumPy's generator takes no more
    """Seed of weights (with the parameter's name), data order and held-out probes."""
    name: str = "run"
    """Human name, shown in logs, reports and model cards."""


class ModelSection(Section):
    """The decoder. Widths are in channels, context in tokens."""

    layers: Positive = 4
    width: Positive = 128
    heads: Positive = 4
    kv_heads: Positive | None = None
    """Key/value heads; `heads` when null (multi-head attention), fewer for grouped-query attention."""
    ffn_width: Positive | None = None
    """Hidden width of the feed-forward layer; ceil(8 width / 3 / 128) * 128 when null (sheet of the OSP paper)."""
    context: Positive = 256
    """Training sequence length T."""
    vocab_size: Positive = 4096
    tie_embeddings: bool = False
    """Share input and output embeddings. Must be false with `emb_proj`, whose merge unties them."""
    rope_theta: Annotated[float, Field(gt=0.0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    norm: Hook = hook("ssnorm")
    embedding: Hook = hook("emb_proj")
    activation: Hook = hook("silu")
    ffn: Hook = hook("swiglu")
    block: Hook = hook("prenorm")
    initializer: Hook = hook("lecun_normal")

    @property
    def resolved_kv_heads(self) -> int:
        """Key/value heads after the default."""
        return self.kv_heads or self.heads

    @property
    def resolved_ffn_width(self) -> int:
        """Feed-forward width after the default."""
        return self.ffn_width or -(-8 * self.width // (3 * 128)) * 128

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"head size {self.width // self.heads} (width / heads) is odd; rotary embeddings need it even"
            )
        if self.heads % self.resolved_kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.resolved_kv_heads}")
        if self.tie_embeddings and self.embedding.name == "emb_proj":
            raise ValueError(
                "tie_embeddings must be false with embedding emb_proj (merging it unties them); set model.tie_embeddings: false"
            )
        return self


class Source(Section):
    """One source of documents."""

    kind: Literal["stdlib", "text", "jsonl", "parquet", "hub"] = "stdlib"
    """`stdlib`: the running interpreter's standard-library sources; `text`: a file is a document (a single file is cut into
    parts, at blank lines if it has any); `jsonl`, `parquet`: a row is one; `hub`: a Hugging Face dataset, streamed."""
    path: PathText | None = None
    """File, folder or glob (text, jsonl, parquet), or the dataset's repository (hub)."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit or tag of a hub dataset; pins what the token store holds."""
    text_key: str = "text"
    """Column that holds the text (jsonl, parquet, hub)."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of the mixture, in documents' tokens, relative to the other sources' weights, until a source runs out: set data.max_tokens."""
    packages: bool = False
    """stdlib only: also the installed packages' sources."""
    on_bad_bytes: Literal["error", "replace", "skip"] = "error"
    """What to do with text that is not UTF-8: stop and name the file, put U+FFFD, or leave the document out (counted)."""

    @model_validator(mode="after")
    def _path_given(self) -> Source:
        if self.kind != "stdlib" and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path")
        return self


class TokenizerSection(Section):
    """How text becomes token ids."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """`sentencepiece`: trained here on the sources, to model.vocab_size; `huggingface`: loaded from `path`."""
    path: PathText | None = None
    """huggingface: folder or Hub name. sentencepiece: an existing .model file instead of training one."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """sentencepiece algorithm."""
    train_bytes: Positive = 8_000_000
    """How much text (bytes) the sentencepiece training reads."""

    @model_validator(mode="after")
    def _path_given(self) -> TokenizerSection:
        if self.kind == "huggingface" and not self.path:
            raise ValueError("a huggingface tokenizer needs a path (folder or Hub name)")
        return self


class DataSection(Section):
    """What the network reads."""

    sources: list[Source] = Field(default_factory=lambda: [Source()], min_length=1)
    tokenizer: TokenizerSection = TokenizerSection()
    store: PathText = "runs/store"
    """Folder of token stores; each is built once under a name derived from sources, tokenizer and context."""
    held_out: Fraction = 0.02
    """Share of documents (chosen by content hash, so duplicates stay on one side) kept for validation."""
    max_tokens: Positive | None = None
    """Stop building the store after this many training tokens (null: all of the sources; required in effect for endless hub streams)."""
    document_mask: bool = False
    """Forbid attention across documents packed into one row, in training and wherever rows of the token store are measured."""
    sampler: Hook = hook("shuffled")


class AdamSection(Section):
    """AdamW for embeddings, head, vectors and scalars (and everything when optim.name is adamw)."""

    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate; optim.lr when null."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """Decoupled decay of matrices; optim.weight_decay when null. Vectors and scalars are never decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8


class FreezeSection(Section):
    """Parameters that stay as they are for the first steps of a run."""

    parameters: str
    """Pattern of names (`*` matches anything), e.g. `*.mlp.experts.*`; the receipt lists the names."""
    until: Positive | None = None
    """They train from this step on; null: never."""


class OptimSection(Section):
    """Optimizer, learning rate and its schedule."""

    name: str = "muon"
    """Optimizer hook: `muon` (matrices by Muon, the rest by AdamW), `adamw`, or package.module:Class."""
    options: Annotated[dict[str, Any], AfterValidator(_plain_options)] = Field(default_factory=dict)
    """Options of the optimizer hook, checked against its signature (`mesokurt hooks`)."""
    lr: Annotated[float, Field(gt=0.0)] = 5e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    adam: AdamSection = AdamSection()
    schedule: Hook = hook("wsd")
    warmup: NonNegative = 0
    """Linear warm-up, in steps; a run shorter than that ends on the way up."""
    freeze: list[FreezeSection] = Field(default_factory=list)
    """Stages of adaptation: what waits, and until when. Gradients flow through frozen parameters and count in `train.clip_norm`."""


class GuardSection(Section):
    """Protection against leaps of the loss; off unless `spike` is set. Gradients that are not finite never move anything."""

    spike: Annotated[float, Field(gt=0.0)] | None = None
    """Skip an update whose loss lies this many robust standard deviations above the median of recent good ones; null: never."""
    window: Annotated[int, Field(ge=8)] = 64
    """Good losses that count as recent; before there are so many, only a loss that is not finite is a leap."""
    patience: Positive = 5
    """Skipped updates in a row after which the run returns to its newest valid checkpoint, with the data behind the last batch."""
    max_rollbacks: NonNegative = 3
    """Returns after which the run ends with an error."""


class TrainSection(Section):
    """The loop. Batches are in sequences of model.context tokens."""

    steps: Positive = 100
    """Optimizer steps."""
    global_batch: Positive = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch: Positive = 8
    """Sequences per forward on one rank; accumulation = global_batch / (micro_batch * ranks)."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of matrix products. Parameters, gradients and optimizer states are float32 in both."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Clip the raw gradient's global norm before any momentum sees it; null: never. Updates are never clipped."""
    compile: bool = False
    """torch.compile the decoder."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    objective: Hook = hook("next_token")
    log_every: Positive = 1
    """Steps between rows of metrics.jsonl."""
    guard: GuardSection = GuardSection()


class ParallelSection(Section):
    """How ranks share the work; read only when there are several."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """0: plain data parallel; 1, 2, 3: DeepSpeed ZeRO (partitioned optimizer, + gradients, + parameters)."""
    sequence: Positive = 1
    """Ranks that share the tokens of each row, context / this many on each, by all-to-all around attention (DeepSpeed-Ulysses). Divides
    heads, kv_heads and context."""
    tensor: Positive = 1
    """Ranks that share each matrix. Only 1: docs/scaling.md says why, and what to use instead."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO keeps in host memory between uses: the optimizer's states, float32 weights and gradients; with `parameters` (stage 3) also
    the weights that the forward reads."""
    expert: Positive = 1
    """Ranks that share the experts of a `moe` network, experts / this many on each; tokens travel to them. Needs zero_stage 0, 1 or 2."""
    timeout_seconds: Positive = 600
    """How long a collective, of any process group, may wait for a peer that is alive."""
    heartbeat_seconds: Positive = 30
    """A rank of which nothing was heard for so long is dead: the others exit, for a restart."""
    hang_seconds: Positive = 600
    """A run in which no step, evaluation or checkpoint ends for so long hangs: all ranks write their stacks and exit, for a restart."""

    @model_validator(mode="after")
    def _expert_fits(self) -> ParallelSection:
        if self.expert > 1 and self.zero_stage == 3:
            raise ValueError(
                f"expert {self.expert} does not work with zero_stage 3, which cuts every expert over all ranks; use zero_stage 2"
            )
        if self.expert > 1 and self.offload != "none":
            raise ValueError(
                f"expert {self.expert} does not work with offload; each rank keeps its own experts on its device"
            )
        return self

    @model_validator(mode="after")
    def _tensor_is_one(self) -> ParallelSection:
        if self.tensor > 1:
            raise ValueError(
                f"tensor {self.tensor} is not supported (Muon needs whole matrices; see docs/scaling.md); use zero_stage 3 or sequence"
            )
        if self.sequence > 1 and self.expert > 1:
            raise ValueError(
                f"sequence {self.sequence} and expert {self.expert} do not work together; set one of them to 1"
            )
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> ParallelSection:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload {self.offload!r} needs zero_stage 1, 2 or 3; plain data parallel offloads nothing"
            )
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(
                f"offload 'parameters' needs zero_stage 3 (stage {self.zero_stage} keeps whole parameters); use 'optimizer'"
            )
        return self


class CheckpointSection(Section):
    """When to save, and how many to keep."""

    every: Positive | None = None
    """Steps between checkpoints (the last step is always saved); null: only the last."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Keep for good, besides, the checkpoints of every so many steps (a multiple of `every`)."""
    overlap: bool = True
    """Write while training goes on, from a copy of weights and optimizer states in rank 0's host memory; false: no copy, training waits."""

    @model_validator(mode="after")
    def _keep_every_happens(self) -> CheckpointSection:
        if self.keep_every is not None and (self.every is None or self.keep_every % self.every):
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of every {self.every}")
        return self


class EvalSection(Section):
    """Held-out loss during training and the 4-bit table at its end."""

    every: Positive | None = None
    """Steps between held-out evaluations; null: only at the end."""
    rows: Positive = 64
    """Held-out rows (of model.context tokens) per evaluation."""
    quantized_every: Positive | None = 250
    """Steps between held-out evaluations in few bits (round to nearest without clip search); null: only in the final table."""
    quantized_bits: list[BitsText] = Field(default_factory=lambda: ["4-4-4"])
    """W-A-KV settings measured every `quantized_every` steps; each is logged as eval/loss@W-A-KV beside eval/loss."""
    bits: list[BitsText] = Field(default_factory=lambda: ["16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4"])
    """W-A-KV settings of the final table."""
    methods: list[str] = Field(default_factory=lambda: ["rtn", "rtn+hadamard"], min_length=1)
    """How weights get to each setting in the final table (`docs/quantization.md`); those that calibrate use training rows."""


ExportFormat = Literal["hf", "bnb-nf4", "compressed-tensors", "remote-code"]


def _default_formats() -> list[ExportFormat]:
    return ["hf", "bnb-nf4"]


class ExportSection(Section):
    """What the run writes at its end, each into a folder of its name under `run.dir/export`."""

    formats: list[ExportFormat] = Field(default_factory=_default_formats)
    """`hf`: merged to a stock architecture; `bnb-nf4`: the same in 4 bits; `compressed-tensors`: the same with packed INT4 weights;
    `remote-code`: the network's own files, for what no stock architecture expresses."""
    method: Literal["rtn", "gptq"] = "rtn"
    """How `compressed-tensors` rounds; gptq calibrates on training rows."""
    license: str = "unknown"
    """Licence that the model card names (an identifier of the Hub, such as apache-2.0)."""


class ProbeSpec(HookSpec):
    """A probe's name, options and cadence."""

    every: Positive | None = None


def _probe_from_yaml(value: Any) -> Any:
    if isinstance(value, ProbeSpec):
        return value
    spec = _hook_from_yaml(value)
    options = dict(spec.options)
    every = options.pop("every", None)
    return ProbeSpec(name=spec.name, options=options, every=every)


def _probe_to_yaml(spec: ProbeSpec) -> str | dict[str, Any]:
    every = {} if spec.every is None else {"every": spec.every}
    return {"name": spec.name, **every, **spec.options} if every or spec.options else spec.name


Probe = Annotated[
    ProbeSpec, BeforeValidator(_probe_from_yaml), PlainSerializer(_probe_to_yaml), WithJsonSchema(_HOOK_JSON_SCHEMA)
]


def _with_extends(schema: dict[str, Any]) -> None:
    """Files may also name the one that they change; it is gone when a config is loaded."""
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "The config that this file changes.",
    }


class RunConfig(Section):
    """One run, whole: validated, frozen, saved beside its results."""

    model_config = ConfigDict(json_schema_extra=_with_extends)

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()
    probes: list[Probe] = Field(default_factory=list)
    """Diagnostics: NAME or {name: NAME, every: N, option: value}."""

    @model_validator(mode="after")
    def _batches_divide(self) -> RunConfig:
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is not a multiple of train.micro_batch {self.train.micro_batch}"
            )
        share = self.parallel.sequence
        m = self.model
        for name, value in (("heads", m.heads), ("kv_heads", m.resolved_kv_heads), ("context", m.context)):
            if value % share:
                raise ValueError(f"parallel.sequence {share} does not divide model.{name} {value}; change one of them")
        if self.train.compile and share > 1:
            raise ValueError("train.compile does not work with parallel.sequence above 1; turn one off")
        if self.train.compile and self.parallel.zero_stage == 3:
            raise ValueError(
                "train.compile does not work with parallel.zero_stage 3 (parameters come and go); turn one off"
            )
        return self
