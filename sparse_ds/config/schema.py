"""The configuration of one run: what every section holds, in which unit and range.

One JSON file is one run. `sparse_ds.config.load.load_config` reads it; this file says what it may contain. Each field
is documented by the text below it, and that text is what an error message quotes. All values are read strictly: `"8"`
is no integer and `true` is no number, so that a slip in a file is seen before anything starts.

Checks that need more than one field are in `conflicts.py`; the DeepSpeed section is checked by `deepspeed_section.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparse_ds.config.conflicts import find_conflicts, find_idle_task_keys, find_warnings, idle_keys
from sparse_ds.config.data_conflicts import find_idle_data_keys
from sparse_ds.config.errors import UserError
from sparse_ds.config.methods import all_methods
from sparse_ds.config.tasks import Task

PositiveInt = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Tracker = Literal[
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]


class BatchPlan(NamedTuple):
    """How one optimizer step is made of micro batches: `global = micro * accumulation * world_size`."""

    micro_batch_size: int
    """Samples of one forward and backward on one rank."""
    gradient_accumulation_steps: int
    """Micro batches per rank and optimizer step."""
    global_batch_size: int
    """Samples of one optimizer step over all ranks."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(_Section):
    """The base model: which, from where, and how its frozen weights are kept."""

    name_or_path: Text = "embedded"
    """A folder, a name on the model hub, or `embedded`: the small Llama that comes with this package. A relative path
    is relative to the working directory."""
    revision: Text | None = None
    """Branch, tag or commit of a model on the hub; null: its default branch."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the frozen weights of the target linears are kept: 4-bit NF4 in blocks of 64, or in `model.dtype`. A
    checkpoint that is in NF4 already is read as it is, or dequantized."""
    double_quantization: bool = False
    """Quantize the NF4 statistics too (0.37 bits less per weight)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype in which the model computes and in which everything that is not quantized is kept."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation of transformers; `auto`: `sdpa` where the architecture has it, else `eager`
    (Gemma-2); `flash_attention_2` needs the flash-attn package and a GPU."""
    liger_kernels: bool = False
    """Compute norms, rotary embedding, the MLP's activation and the loss with the Triton kernels of the package
    liger-kernel; the logits of a micro batch then never exist as a whole. Needs a GPU; decoders only."""
    unused_tensors: list[Text] = []
    """Names (or patterns with * and ?) of tensors that the checkpoint holds and the architecture in its config.json
    does not have. Any other such tensor is refused: without it the model would be another one."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """`causal_lm`: the next token; `sequence_classification`: one label per text, by the head of transformers' own
    classifiers, which trains as a whole: a linear layer on the last token, in place of the vocabulary; of BERT the
    pooler and a linear layer, of RoBERTa two linear layers, on the first token."""
    head_initialization: Literal["normal", "label_words"] = "normal"
    """The head before training: `normal` with mean 0 and standard deviation 0.06 / sqrt(hidden size) (encoders: the
    `initializer_range` of config.json), or `label_words`: row i is the vocabulary's row of the first token of word i
    (decoders only); `sequence_classification` only."""
    label_words: Annotated[list[Text], Field(min_length=2)] | None = None
    """One word per label, in the order of the labels, for `model.head_initialization` label_words; else null."""


class DataPart(_Section):
    """One source of a mixture. With neither `weight` nor `num_samples` every sample is used once an epoch."""

    source: Text
    """As `data.train` names one source."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often each sample is used an epoch, above 0: 0.5 is a random half, 2.5 all twice and a random half again.
    With `data.streaming` it is the source's share of the samples, relative to the other weights; null: 1."""
    num_samples: PositiveInt | None = None
    """Instead of a weight: so many samples an epoch, drawn at random; all are used before one is used again."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text"] | None = None
    """How one record of this source is laid out; null: `data.format`."""


class DataConfig(_Section):
    """What is learned and what is held out."""

    train: Text | Annotated[list[DataPart], Field(min_length=1)] = "embedded:train"
    """A file (JSONL, JSON, CSV, Parquet, text), a folder of such files, a saved dataset folder, `owner/name` on the
    hub, or `embedded:train`; or a list of {"source", "weight" or "num_samples", "format"}: a mixture. A relative path
    is relative to the working directory."""
    eval: Text | None = "embedded:eval"
    """The held-out data, named like `data.train`; null: no evaluation."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification"] = "auto"
    """How one record is laid out; `auto` tells it by the names of its fields."""
    template: Text = "auto"
    """The text around a sample. `auto`: Alpaca's prompt for `alpaca`, none for `prompt_completion`, the tokenizer's
    chat template for conversations. `tokenizer`: its chat template for all of them. `alpaca`, `chatml`, `llama-2`,
    `mistral` or the path of a Jinja file: that chat template for all of them, and in the exported tokenizer."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The labels of a classification in the order of the head's rows; null: those of the training data, sorted. Of two
    labels the second is the positive one (F1)."""
    instruction: Text | None = None
    """Of a classification: a text around every sample, with {text} in its place, and perhaps {text_pair} in that of the
    second text of a pair; null: the sample alone."""
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    """The longest sample, in tokens."""
    truncate: bool = True
    """Samples above `data.sequence_length` lose their end, and those that lose all that could be learned are left out
    and counted; false: samples above it are bad rows (`data.on_bad_row`)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used (broken, without a field, refused by the template, nothing to learn): `error` ends the
    run before training, `skip` leaves such rows out, counts them and names the first. With `data.streaming` a row is
    found bad when it is read, in the middle of the run."""
    streaming: bool = False
    """Read and tokenize the training data while training, in the order of the source but for `data.shuffle_buffer`,
    instead of before; needs `train.max_steps`. The end of a source is followed by its beginning."""
    shuffle_buffer: PositiveInt = 10_000
    """With `data.streaming`: each sample is drawn from the next so many rows of its source; 1: its order stays."""
    num_eval_samples: PositiveInt | None = None
    """At most so many samples of `data.eval` are used; null: all."""
    packing: bool = False
    """Put several training samples into one row of `data.sequence_length` tokens; no sample is cut, and none sees
    another. Batch sizes then count rows. `causal_lm` only."""
    cache: bool = True
    """Keep the tokenized data on disk: one process of each machine makes it, the others and later runs read it. false:
    every process tokenizes for itself, in memory."""
    cache_dir: Text | None = None
    """The folder for tokenized data, about 8 bytes a token; null: `sparse_ds` in the cache folder of `datasets`
    (HF_DATASETS_CACHE). A relative path is relative to the working directory."""
    tasks: list[Task] = []
    """Questions that the model answers whenever it is evaluated, before and after the run: files, or objects with the
    fields of `sparse_ds/config/tasks.py`; `model.task` causal_lm only."""


class MethodConfig(_Section):
    """Which weights train."""

    name: Annotated[str, Field(json_schema_extra={"enum": list(all_methods())})] = "sft_ma"
    """One of the files in sparse_ds/selection/methods (`sft_ag`, `sft_ma`, `sparta`, `fisher`,
    `accumulated_gradient`), each of which says what it does; or `full`: every weight, trained by AdamW."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.025
    """Trained share of each target matrix, a fraction above 0 up to 1; of N weights floor(density * N) train."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """`all-linear`: every linear layer inside the transformer blocks; or a list of ends of module names, like
    ["q_proj", "mlp.down_proj"]."""
    block_size: PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = 1
    """What is trained or not as one: [rows, columns] of a block of neighbouring weights of a matrix, which it must
    divide, or n for [n, n]; 1: single weights. Blocks are chosen by the sum of their weights' scores, and of the blocks
    floor(density * number) train. Of biases and norms single weights train."""
    index_storage: Literal["int32", "compact"] = "int32"
    """How the positions of the trained weights of the target matrices are stored and sent: `int32`, 4 bytes a weight;
    `compact`, about 1.15 at a density of 2.3 % and 1.61 at 0.1 %, decoded at every use; not for `sft_ma`, whose
    optimizer reads them in every step, nor with blocks. Files hold them as ever, and a run may go on with the other."""
    interval_steps: Annotated[int, Field(ge=2)] = 20
    """S: optimizer steps from one drop-and-grow event to the next; above `method.estimation_steps`."""
    estimation_steps: PositiveInt = 5
    """gamma: optimizer steps of estimation before each event; the first event is at step gamma."""
    initial_drop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """alpha, a fraction above 0 up to 1: the event at step t of T drops floor(alpha * (1 - t / T) * K) of K weights,
    the first event all K, and grows as many; a weight that is dropped and grown stays as it is."""
    first_drop_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the weights that the first event replaces, 0 to 1; in the paper all. In short runs less may be better:
    all new weights at once take their first steps at the full learning rate."""
    drop_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the dropped share falls over the run: alpha * (1 - t / T), alpha * (1 + cos(pi * t / T)) / 2, or alpha."""
    drop_criterion: Literal["magnitude", "change"] = "magnitude"
    """Dropped are the weights of smallest |value|, or of smallest |change since the last event| (4 more bytes a trained
    weight)."""
    redistribution_factor: Annotated[float, Field(gt=1)] | None = None
    """Let events move trained weights between matrices, to where their growth scores are largest; the total stays. A
    matrix may come to hold up to this many times its first number, above 1, and needs memory for as many; null: every
    matrix keeps its number."""
    candidate_source: Literal["micro_batch", "step"] = "micro_batch"
    """The gradient by which candidates are found: of the first micro batch of an estimation phase (over all ranks), or
    of its whole first step, which for that step takes 4 bytes per weight of the target matrices / ranks."""
    gradient_tile_mib: PositiveInt = 32
    """Bound on the transient memory in which dense gradients are looked through piece by piece, in MiB."""
    gradient_accumulator_limit_gib: Annotated[float, Field(gt=0)] = 4.0
    """The most that a dense gradient accumulator may take per rank, in GiB (`method.candidate_source` step, `fisher`,
    `accumulated_gradient`); a run that needs more is refused at its start."""
    random_growth_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the grown weights that is drawn at random, 0 to 1: keeps SFT-MA's active weights from gathering in few
    rows and columns."""
    sampling: Literal["exact", "bernoulli"] = "exact"
    """How the random weights of `sparta` are drawn: exactly floor(density * N) of them, or each with probability
    `density`."""
    train_biases: bool = False
    """Train entries of the biases of the target linears too: the same share, at least one of each; `sparta` only."""
    train_norms: bool = False
    """Train entries of the weights of all norms too: the same share, at least one of each; `sparta` only."""

    @property
    def block_shape(self) -> tuple[int, int]:
        """(rows, columns) of `block_size`."""
        return (self.block_size, self.block_size) if isinstance(self.block_size, int) else self.block_size

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in all_methods():
            raise ValueError("unknown method")
        return name


class OptimizerConfig(_Section):
    """SM3 for `sft_ma`, AdamW for all other methods, and the learning rate over the run."""

    learning_rate: Annotated[float, Field(gt=0)]
    """The highest learning rate, reached after the warm-up; above 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, 0 or more: of the deltas, towards the base model, or of the weights (`full`)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of SM3, from 0 (none, no state) to below 1; `sft_ma` only."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.999)
    """Decay rates of AdamW's two moments, each from 0 to below 1."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How AdamW's two moments of the sparse values are kept: 8, 4 or about 2 bytes per trained weight."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Keeps the step of a weight with tiny gradients finite, above 0; null: 1e-8. AdamW adds it to the root of the
    second moment, SM3 to the accumulated squares inside the root."""
    age_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate of each sparse value rises over the first so many steps of its age, 0 or more; a weight that
    SFT-AG grows begins with the age `method.estimation_steps`. Softens the shock of many grown weights at once."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """The gradient is scaled down to this global 2-norm; 0: no clipping."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after the warm-up: to 0 in a line or a half cosine, or constant."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all optimizer steps in which the learning rate rises from 0, a fraction from 0 to below 1."""


Crossover = Annotated[float, Field(gt=0, le=1)]
Shape = Annotated[str, Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$")]


class TrainConfig(_Section):
    """Length, batches and place of the run."""

    output_dir: Text
    """The folder for everything that the run writes. A relative path is relative to the working directory."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, 1 or more; null: as `train.num_epochs` says."""
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data, above 0; the alternative to `train.max_steps`."""
    micro_batch_size: PositiveInt = 1
    """Samples of one forward and backward on one rank, 1 or more."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro batches per rank and optimizer step, 1 or more; null: from `train.global_batch_size`, else 1."""
    global_batch_size: PositiveInt | None = None
    """Samples of one optimizer step over all ranks, 1 or more; the alternative to `train.gradient_accumulation_steps`:
    it keeps the run the same on any number of ranks."""
    eval_micro_batch_size: PositiveInt | None = None
    """Samples of one forward of evaluation on one rank, 1 or more; null: `train.micro_batch_size`."""
    eval_interval_steps: PositiveInt | None = None
    """Evaluate after every so many optimizer steps, 1 or more; null: only before and after."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial indices, the order of the data and everything else, from 0 to 2^32 - 1."""
    overwrite: bool = False
    """Begin anew in an output folder that already holds a run."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in backward: less memory, about a third more work."""
    compile: bool = False
    """Let torch compile what lies between the linear layers: norms, rotary embedding, the MLP's activation, the loss.
    Takes half a minute or so at the start, and needs a C++ compiler (CPU) or triton (GPU); decoders only. The
    alternative to `model.liger_kernels`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto`: on GPUs where there are any."""
    cpu_threads: PositiveInt | None = None
    """Threads of one rank on the CPU, 1 or more; null: the machine's cores shared by its ranks."""
    values_gradient: Literal["auto", "sampled", "dense"] = "auto"
    """How the gradient of the trained weights is computed: `sampled`, each by itself; `dense`, in blocks of whole rows
    out of which they are taken; `auto`: sampled where the density is low enough (`train.values_gradient_crossover`)."""
    values_gradient_crossover: Crossover | dict[Shape, Crossover] | None = None
    """Of `train.values_gradient` auto: the density up to which it is sampled, above 0 up to 1, or such densities by the
    shape of the matrix (`{"4096x11008": 0.03}`, output x input); null, and for other shapes: what was measured for this
    kind of device. `scripts/bench_kernels.py --crossover` measures it."""
    early_stopping_patience: PositiveInt | None = None
    """End the training after so many evaluations in a row, 1 or more, without a held-out loss below all earlier ones;
    null: never. Needs `train.eval_interval_steps`."""
    max_skipped_steps: PositiveInt = 10
    """A step whose loss or gradient is not finite is skipped on all ranks; after so many in a row, 1 or more, the run
    ends and names the rows of the last one."""
    stall_timeout_s: Annotated[float, Field(ge=5)] | None = 600.0
    """In seconds, 5 or more: how long a rank may be silent (stopped, cut off), or all ranks of a training run without
    a collective, until all ranks end. A rank that was killed ends the run at once; null: only that."""


class CheckpointConfig(_Section):
    """Saving the run so that it can go on."""

    interval_steps: PositiveInt | None = None
    """Save after every so many optimizer steps, 1 or more; null: never."""
    keep: PositiveInt = 2
    """How many of the latest checkpoints stay, 1 or more."""
    best: bool = False
    """The checkpoint with the lowest held-out loss stays too; for checkpoints at whose step the run evaluates."""
    background: bool = False
    """Write while training goes on, from a copy in the host's memory (about 20 bytes per active weight / ranks)."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full): `stop` the run, or `continue` without it. Older ones stay."""
    resume: Text | None = None
    """`auto`: go on from the latest checkpoint of `train.output_dir`, or begin if there is none yet; a path: go on from
    that one; null: begin anew."""


PEFT_FORMATS = ("supertuning", "shira")


class ExportConfig(_Section):
    """What the run leaves besides the adapter."""

    merged: bool = True
    """Write the merged dense model, which plain transformers loads."""
    merged_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of the merged model."""
    adapters: list[Literal["supertuning", "shira"]] = []
    """Also write the adapter as PEFT reads it, as adapter_<format>/: `supertuning` over a 16-bit base, `shira` over a
    4-bit one."""
    base_weights: Literal["dequantized", "original"] = "dequantized"
    """Of a training over NF4: merge into the 4-bit weights that were trained on, which gives the trained model exactly,
    or into the original ones, which gives another model."""
    verify: bool = False
    """Run adapter and merged model on the same tokens and compare; takes the memory of the whole model on rank 0."""
    index_encoding: Literal["plain", "delta"] = "plain"
    """The indices in the adapter as int32, or as gaps of about one byte."""
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")] = "5GB"
    """The largest file of the merged model: a whole number followed by KB, MB or GB (powers of 1000)."""


class MonitorConfig(_Section):
    """What can be seen while it runs."""

    log_interval_steps: PositiveInt = 1
    """Write a `step` line to metrics.jsonl after every so many optimizer steps, 1 or more."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """What one rank's device can do at best, in 10^12 operations a second, above 0: of it `mfu` and `hfu` are shares.
    null: from a table of data sheets (A100, H100, H200 and some more, by `model.dtype`); they are left out where the
    device is not in it, as no CPU is."""
    report_to: list[Tracker] = []
    """Trackers of transformers to report to; each needs its package."""
    num_sample_prompts: Annotated[int, Field(ge=0)] = 1
    """Held-out prompts answered before and after the run, 0 or more."""
    sample_max_tokens: PositiveInt = 48
    """The longest sample answer, in tokens, 1 or more."""


class RunConfig(_Section):
    """One run."""

    model: ModelConfig = ModelConfig()
    """The base model."""
    data: DataConfig = DataConfig()
    """Training and held-out data."""
    method: MethodConfig = MethodConfig()
    """Which weights train."""
    optimizer: OptimizerConfig
    """Optimizer and learning rate."""
    train: TrainConfig
    """Length, batches and place of the run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and going on."""
    export: ExportConfig = ExportConfig()
    """What the run leaves."""
    monitor: MonitorConfig = MonitorConfig()
    """What can be seen while it runs."""
    deepspeed: dict[str, Any] = {}
    """Settings of DeepSpeed that no other section owns, in DeepSpeed's own words (`zero_optimization`, ...)."""

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> RunConfig:
        conflicts = find_conflicts(dict(self))
        if conflicts:
            raise UserError("\n".join(conflicts))
        return self

    def batch_plan(self, world_size: int) -> BatchPlan:
        """The batch numbers for this many ranks.

        Args:
            world_size: number of ranks, 1 or more.

        Returns:
            The plan, with `global_batch_size = micro_batch_size * gradient_accumulation_steps * world_size`.

        Raises:
            UserError: `train.global_batch_size` cannot be reached with `train.micro_batch_size` on so many ranks, or
                does not fit to a `train.gradient_accumulation_steps` that is given as well.
        """
        if world_size < 1:
            raise ValueError(f"world_size: got {world_size}, expected 1 or more ranks")
        micro, accumulation = self.train.micro_batch_size, self.train.gradient_accumulation_steps
        global_size = self.train.global_batch_size
        if global_size is None:
            accumulation = accumulation or 1
            return BatchPlan(micro, accumulation, micro * accumulation * world_size)
        if accumulation is not None and micro * accumulation * world_size != global_size:
            raise UserError(
                f"train.global_batch_size: got {global_size}, but train.micro_batch_size ({micro}) x "
                f"train.gradient_accumulation_steps ({accumulation}) x ranks ({world_size}) = "
                f"{micro * accumulation * world_size}. Give only one of train.global_batch_size and "
                "train.gradient_accumulation_steps."
            )
        if global_size % (micro * world_size) != 0:
            raise UserError(_explain_global_batch(global_size, micro, world_size))
        return BatchPlan(micro, global_size // (micro * world_size), global_size)

    def to_dict(self) -> dict[str, Any]:
        """Every value of the run in plain JSON types, such that loading it again gives this configuration.

        Values without effect on this run (the epochs of a run counted in steps, settings of another method) are left
        out: given explicitly they would be refused.
        """
        sections: dict[str, Any] = self.model_dump(mode="json")
        for section, keys in _find_idle_keys(self).items():
            for key in keys:
                sections[section].pop(key, None)
        return sections

    def warnings(self) -> list[str]:
        """What is given but has no effect, one sentence each, for rank 0 to say once."""
        return find_warnings(dict(self))


def _find_idle_keys(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Section -> keys that this run does not use because another key chose their alternative."""
    idle = {**idle_keys(config.method.name), **find_idle_task_keys(config.model)}
    idle["data"] = (*idle.get("data", ()), *find_idle_data_keys(config.data, config.model))
    if config.train.max_steps is not None:
        idle["train"] = (*idle.get("train", ()), "num_epochs")
    return idle


def _explain_global_batch(global_size: int, micro: int, world_size: int) -> str:
    unit = micro * world_size
    below, above = global_size // unit * unit, (global_size // unit + 1) * unit
    fitting_global = [str(size) for size in (below, above) if size > 0]
    message = (
        f"train.global_batch_size: got {global_size}, expected a multiple of train.micro_batch_size ({micro}) x ranks "
        f"({world_size}) = {unit}, for example {' or '.join(fitting_global)}"
    )
    if global_size % world_size == 0:
        per_rank = global_size // world_size
        fitting_micro = [size for size in range(1, min(per_rank, 4096) + 1) if per_rank % size == 0]
        nearest = sorted(sorted(fitting_micro, key=lambda size: abs(size - micro))[:3])
        return f"{message}; or train.micro_batch_size {', '.join(map(str, nearest))} with the global batch as it is."
    fitting_ranks = [ranks for ranks in range(1, 65) if global_size % (micro * ranks) == 0]
    if fitting_ranks:
        return f"{message}; or start {', '.join(map(str, fitting_ranks[-4:]))} ranks."
    return f"{message}."
