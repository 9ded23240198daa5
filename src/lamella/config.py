"""Configuration: YAML files -> strict frozen pydantic models. This file never imports torch.

A run file names one file of each group, `configs/<group>/<NAME>.yaml`, or holds the group's mapping itself:

    name: quickstart
    model: jamba-nano          # configs/model/jamba-nano.yaml
    data: stdlib
    layout: {micro_batch: 4}   # written in place
    train: quickstart

Overrides are `a.b=c` words: `train.steps=10`, `model=NAME`, `model.parts.moe.top_k=1`. The resolved configuration that
`dump` writes into the run's folder is a run file again. The options of a part are checked where the part lives
(`mixers/NAME.py`, `channels/NAME.py`), when the model is resolved.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from lamella.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
GROUPS = ("model", "data", "layout", "train")


class Strict(BaseModel):
    """No conversion ("8" is no number), no unknown key, no change after loading."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class BlockConfig(Strict):
    """Some layers, repeated. A layer is `MIXER/CHANNEL`, two part names, either may be `-`."""

    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    repeat: Positive = 1


class ModelConfig(Strict):
    """A stack of layers over named parts: `parts.NAME` holds `mixer: attention` or `channel: moe`, and its options."""

    d_model: Positive
    vocab_size: Positive  # rows of the embedding; may exceed the tokenizer's pieces
    parts: dict[str, dict[str, Any]]
    stack: Annotated[tuple[BlockConfig, ...], Field(min_length=1)]
    norm: Literal["rms", "layer"] = "rms"  # of the stream: before each branch and before the head
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    embedding_norm: bool = False  # one more, behind the embedding
    tie_embeddings: bool = False
    dropout: Share = 0.0  # on each branch's output
    init_std: Annotated[float, Field(gt=0)] = 0.02
    ends_init: Literal["normal", "rwkv"] = "normal"  # embedding and head; rwkv: uniform within 1e-4, and orthogonal


class SourceConfig(Strict):
    """Where documents come from: one file, row or record is one document."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] | None = None  # None: after its path
    format: Literal["stdlib", "text", "jsonl", "parquet", "arrow", "hub", "megatron"]
    path: str | None = None  # a file, folder or glob; hub: its name; megatron: what stands before .bin; stdlib: nothing
    column: str = "text"  # of records
    split: str = "train"  # hub only
    streaming: bool = False  # hub only: read over the network, nothing is downloaded whole
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the training tokens; None: as they come

    @model_validator(mode="after")
    def _fits_the_format(self) -> "SourceConfig":
        if (self.path is None) != (self.format == "stdlib"):
            raise ValueError("stdlib takes no path, every other format needs one")
        if self.streaming and self.format != "hub":
            raise ValueError("streaming is for hub alone; files are streamed anyhow")
        return self

    @property
    def prepared(self) -> "SourceConfig":
        """What of it decides the prepared files."""
        return self.model_copy(update={"weight": None})


class TokenizerConfig(Strict):
    """The given one, else a sentencepiece model: BPE with byte fallback trained on the sources."""

    model: str | None = None  # a sentencepiece .model, a Hugging Face tokenizer.json, or a folder that holds one
    eod: str | None = None  # the piece that ends a document, instead of the one told beside a tokenizer.json
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    train_megabytes: Positive = 10  # of text, evenly drawn over the documents

    @model_validator(mode="after")
    def _ends_what_is_given(self) -> "TokenizerConfig":
        if self.eod is not None and self.model is None:
            raise ValueError("eod names a piece of a given model; the trained one has its own")
        return self


class DataConfig(Strict):
    path: str  # the folder of prepared files
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    tokenizer: TokenizerConfig = TokenizerConfig()
    heldout: Annotated[float, Field(gt=0, lt=0.5)] = 0.02  # share of the documents that no training row touches
    duplicates: Literal["keep", "drop"] = "keep"  # of exact texts; they are counted in any case

    @model_validator(mode="after")
    def _sources_fit(self) -> "DataConfig":
        bare = [str(s.name or s.path or s.format) for s in self.sources if s.weight is None]
        if 0 < len(bare) < len(self.sources):
            raise ValueError(f"weight is missing of {', '.join(bare)}: give one to every source, or to none")
        given = [s.name for s in self.sources if s.name is not None]
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ValueError(f"two sources are named {', '.join(twice)}: name them apart")
        if self.tokenizer.model is None and any(s.format == "megatron" for s in self.sources):
            raise ValueError("megatron sources hold ids: tokenizer.model must name the tokenizer that made them")
        return self


class LayoutConfig(Strict):
    """Who computes what. It never changes the model: `lamella verify`."""

    tensor: Positive = 1
    sequence_parallel: bool = False  # the residual stream split over the tensor group
    pipeline: Positive = 1  # ranks that the stack's layers are dealt to
    schedule: Literal["gpipe", "1f1b", "interleaved", "zbv"] = "1f1b"
    stages_per_rank: Annotated[int, Field(ge=2)] = 2  # of the interleaved schedule; zbv has 2, the others 1
    cuts: Literal["auto"] | tuple[Positive, ...] = "auto"  # the first layer of each later stage; auto: by cost
    expert: Positive = 1  # ranks that the experts are dealt to, whole; 1: each expert's width is split over tensor
    data: Positive | None = None  # None: the processes that tensor and pipeline leave
    zero: Literal[1, 2, 3] = 1  # split over data: 1 optimizer state, 2 gradients too, 3 parameters too
    offload_optimizer: bool = False  # masters and moments in the CPU's memory
    micro_batch: Positive = 1  # rows a rank computes at once
    deal: Literal["cost", "order"] = (
        "cost"  # which of a step's rows a data rank computes: by what they cost, or in turn
    )
    read_ahead: Count = 4  # micro-batches that are read before they are needed
    recompute: Literal["none", "selective", "full"] = "none"  # in backward: what lies between projections, or layers
    logits: Literal["auto", "whole", "pieces"] = "auto"  # in the loss; some of the vocabulary at a time; auto: on a GPU


class OptimizerConfig(Strict):
    lr: Annotated[float, Field(gt=0)]
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping


class ScheduleConfig(Strict):
    """Learning rate: linear warm-up, then cosine to the end, or stable and a linear decay (WSD), or constant."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    decay_steps: Count = 0  # wsd only
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


class EvaluateConfig(Strict):
    every: Positive
    rows: Positive | None = None  # on the way; None, and the last evaluation: all of the held-out split


class CheckpointConfig(Strict):
    every: Positive  # steps
    keep: Positive = 2  # the newest that stay
    keep_every: Positive | None = None  # those of every so many steps stay too
    keep_best: Count = 0  # so many of the lowest held-out loss, of those saved at a step that was evaluated, stay too
    background: bool = True  # training waits for a copy in memory, not for the disk
    mirror: str | None = None  # a second place, as fsspec names it: s3://bucket/path, gs://..., file:///mnt/other


class HangConfig(Strict):
    """When a process that takes no step writes down its stacks and ends."""

    times: Annotated[float, Field(ge=2)] = 20.0  # the median of the last steps
    at_least: Annotated[float, Field(gt=0)] = 600.0  # seconds


class RowCostConfig(Strict):
    """What a document of n tokens costs, in any unit: token * n + pair * n * n."""

    token: Annotated[float, Field(ge=0)]
    pair: Annotated[float, Field(ge=0)]


class RowsConfig(Strict):
    """How the data's rows become steps."""

    window: Positive = 1  # steps whose rows are sorted by cost among them, so that a step's rows cost about the same
    cost: RowCostConfig | None = None  # as measured by `lamella data inspect --measure`; None: counted from the model
    damaged: Literal["stop", "replace"] = "stop"  # replace: pieces in damaged blocks give way to others of their length


class TrainConfig(Strict):
    steps: Positive
    sequence_length: Positive
    global_batch_size: Positive  # rows a step, all ranks together
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    rows: RowsConfig = RowsConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Count = 0
    hang: HangConfig | None = HangConfig()  # None: a process waits for ever
    init_from: str | None = None  # whose weights a new run begins with: a checkpoint, a run's folder, or hf:DIR


class ClusterConfig(Strict):
    """How a job on a cluster runs."""

    launcher: Literal["srun", "torchrun"] = "srun"  # one process a GPU by srun, or torchrun on each node
    stop_before: Positive = 300  # seconds before the time limit in which the running step ends and is saved
    attempts: Positive = 3  # in a row that get no further than the one before


class TrackingConfig(Strict):
    """Where the run is shown in MLflow; `metrics.jsonl` is the truth, MLflow is told from it."""

    enabled: bool = True
    uri: str | None = None  # None: the file mlflow.db beside the runs
    experiment: str = "lamella"


class RunConfig(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: ModelConfig
    data: DataConfig
    layout: LayoutConfig = LayoutConfig()
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    runs: str = "runs"  # the folder that holds one folder a run

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


Model = TypeVar("Model", bound=BaseModel)


def load_run(file: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a run file with its groups, applies the overrides, checks everything but the parts' own options.

    Raises UserError: missing or unreadable file, unknown key (with the nearest known one), wrong type or size.
    """
    file = Path(file)
    tree = _read(file)
    # Apart: in one tree model.key=... would replace model=NAME.
    names = [word for word in overrides if word.split("=")[0] in GROUPS]
    chosen, changes = _parse(names), _parse([word for word in overrides if word not in names])
    for group in GROUPS:
        if isinstance(chosen.get(group), str):
            tree[group] = chosen.pop(group)
    changes = _merge(chosen, changes)
    for group in GROUPS:
        if isinstance(tree.get(group), str):
            tree[group] = _read(_group_file(file, group, tree[group]))
    return _validate(RunConfig, _merge(tree, changes), file)


def load_data(file: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> DataConfig:
    """Reads one file of the data group. Raises UserError as `load_run` does."""
    return _validate(DataConfig, _merge(_read(Path(file)), _parse(overrides)), Path(file))


def load_model(file: Path | str) -> ModelConfig:
    """Reads one file of the model group, its parts' options unchecked. Raises UserError as `load_run` does."""
    return _validate(ModelConfig, _read(Path(file)), Path(file))


def is_run(file: Path | str) -> bool:
    """Whether a file is a run's rather than one of a group. Raises UserError where it cannot be read."""
    return "train" in _read(Path(file))


def change(config: Model, **values: Any) -> Model:
    """A checked copy with some fields changed."""
    return type(config).model_validate_json(json.dumps(config.model_dump(mode="json") | values))


def parse_layout(words: str) -> LayoutConfig:
    """`tensor=2,pipeline=2,cuts=[3]` -> LayoutConfig. Raises UserError."""
    tree = _parse([w for w in re.split(r",(?![^\[]*\])", words) if w])
    return _validate(LayoutConfig, tree, "--layout")


def check_options(kind: type[Model], options: dict[str, Any], where: str) -> Model:
    """The options of one part against its own model. Raises UserError that names the key."""
    return _validate(kind, options, where)


def dump(config: BaseModel, file: Path) -> None:
    """Writes the resolved configuration as YAML that `load_run` reads back."""
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _read(file: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file{_nearest_file(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({_line(error)})") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: not valid YAML ({_line(error)})") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{file}: holds no mapping of keys to values")
    return tree


def _group_file(run: Path, group: str, name: str) -> Path:
    """`configs/<group>/<name>.yaml`, beside the run file's folder, else in the current folder."""
    homes = [run.absolute().parent.parent, Path("configs")]
    files = [home / group / f"{name}.yaml" for home in homes]
    for file in files:
        if file.is_file():
            return file
    known = sorted({f.stem for home in homes for f in (home / group).glob("*.yaml")})
    hint = difflib.get_close_matches(name, known, 1) or known
    raise UserError(f"{run}: {group}: no file {files[0]}" + (f"; there is {', '.join(hint)}" if hint else ""))


def _parse(words: list[str] | tuple[str, ...]) -> DictConfig:
    for word in words:
        if "=" not in word or word.startswith("="):
            raise UserError(f"{word}: an override reads a.b=c, for example train.steps=10")
    try:
        return OmegaConf.from_dotlist(list(words))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{' '.join(words)}: cannot be read as overrides ({_line(error)})") from None


def _merge(tree: DictConfig, changes: DictConfig) -> DictConfig:
    try:
        return OmegaConf.merge(tree, changes)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"overrides do not fit the file ({_line(error)})") from None


def _validate(kind: type[Model], tree: DictConfig | dict[str, Any], where: Path | str) -> Model:
    try:
        plain = OmegaConf.to_container(tree, resolve=True) if isinstance(tree, DictConfig) else tree
        # Through JSON: strict there still turns lists into tuples.
        return kind.model_validate_json(json.dumps(plain))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_line(error)}") from None
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(f"{where}: {_line(error)}") from None
        lines = [_explain(kind, e) for e in error.errors()]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"{where}: {lines[0]}{more}") from None


def _explain(kind: type[BaseModel], error: Any) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path) or kind.__name__
    if error["type"] == "extra_forbidden":
        known = _keys(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, 1)
        cure = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {cure}"
    if error["type"] == "missing":
        return f"{key}: missing; the file must set it"
    message = error["msg"].removeprefix("Value error, ")
    given = json.dumps(error["input"], default=str)
    quote = "; in YAML, put it in quotes" if error["type"] == "string_type" else ""
    return f"{key}: {message[0].lower()}{message[1:]}" + (f", got {given}{quote}" if len(given) < 60 else "")


def _keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the model at `path` inside `kind`."""
    schema = kind.model_json_schema()
    node = schema
    for step in path:
        node = _follow(schema, node)
        node = node.get("items", {}) if step.isdigit() else node.get("properties", {}).get(step, {})
    return list(_follow(schema, node).get("properties", {}))


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for option in [node, *node.get("anyOf", []), *node.get("allOf", [])]:
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
    return node


def _nearest_file(file: Path) -> str:
    try:
        names = [f.name for f in file.parent.glob("*.yaml")]
    except OSError:
        return ""
    near = difflib.get_close_matches(file.name, names, 1)
    return f"; did you mean {file.parent / near[0]}?" if near else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
