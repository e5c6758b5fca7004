"""Settings for training a draft."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from eagle_core.config_model import ConfigModel

TrainingDtype = Literal["auto", "float32", "bfloat16"]
LossPositions = Literal["eagle3", "predicted"]
LossReduction = Literal["positions", "tokens", "sequence"]
Objective = Literal["cross_entropy", "lk_alpha", "lk_hybrid"]
Sharding = Literal["replicate", "shard"]
Extend = Literal["keep", "restretch"]
BestBy = Literal["joint_prefix", "decoding"]
CheckpointChoice = Literal["best", "newest"]

CLOSED_FORM = "closed_form"
RANDOM = "random"
RATE_OF_DRAWN_WEIGHTS, RATE_OF_GIVEN_WEIGHTS = 1e-3, 3e-4
"""Peak learning rates. Measured on SmolLM2 (docs/lab-log.md)."""

WHOLE_SAMPLES = 2**31 - 1
"""`window_tokens` of a run that divides no sample; those of earlier versions are such."""


def smallest_window(ttt_length: int) -> int:
    """Return the least `window_tokens`: the steps of its last positions take a quarter of it."""
    return 4 * (ttt_length + 1)


class TttConfig(ConfigModel):
    """Settings of one training-time-test step: length, loss and memory."""

    ttt_length: int = Field(
        default=7,
        ge=1,
        le=7,
        description="Training-time-test steps; stores keep the states that 7 steps need.",
    )
    step_decay: float = Field(
        default=0.8, gt=0, le=1, description="Weight of step i: step_decay**i."
    )
    loss_positions: LossPositions = Field(
        default="predicted",
        description="Which token must be the assistant's for a position to count: eagle3: token "
        "t + i of step i, as in EAGLE-3; predicted: the predicted token, as in serving.",
    )
    loss_reduction: LossReduction = Field(
        default="tokens",
        description="Divide the loss by all positions or by the supervised ones (tokens), or "
        "average the means of the sequences; a piece of a sample (window_tokens) is a sequence.",
    )
    objective: Objective = Field(
        default="cross_entropy",
        description="Training loss: cross-entropy, as in EAGLE-3, or an LK loss of arXiv "
        "2602.23881: -log of the acceptance, or a mixture of acceptance and cross-entropy.",
    )
    lk_eta: float = Field(
        default=3.0, gt=0, description="For lk_hybrid: how fast it moves to the acceptance loss."
    )
    max_positions_per_sample: int | None = Field(
        default=None,
        gt=0,
        description="Compute the loss at no more supervised positions of a sample than this, drawn "
        "anew in each epoch and weighted so that the expected gradient is that of all of them. "
        "Less time and memory per sample, more noise in its gradient.",
    )
    compile: bool = Field(
        default=False,
        description="Use torch.compile to fuse the loss's element-wise operations and, on a GPU, "
        "attention (FlexAttention). Needs a compiler, and up to half a minute before the first "
        "step; no gain on a CPU.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Use less memory, for about a tenth more time."
    )


class TrainingConfig(TttConfig):
    """Settings of one training run. A resumed run keeps all but its length, its processes, how
    often it saves, measures, decodes and logs, and how its best checkpoint is chosen.
    """

    former_keys: ClassVar[Mapping[str, str]] = {"start_from": "start"}
    moved_keys: ClassVar[Mapping[str, str]] = {
        "fc_norm": "draft.fc_norm",
        "norm_output": "draft.norm_output",
    }

    draft_vocab_size: int = Field(
        default=32000, gt=0, description="Tokens the draft can propose; at most the target's."
    )
    start: str | None = Field(
        default=CLOSED_FORM,
        min_length=1,
        description="The draft's first weights: closed_form solves them from the target's states; "
        "random draws them; or the folder of an EAGLE-3 draft in any layout that engines load.",
    )
    refit: bool = Field(
        default=False,
        description="Let the draft in the folder `start` read other aux layers than those it was "
        "trained on: solve its fusing matrix, for which the target runs on some samples.",
    )
    fc_norm: SkipJsonSchema[bool] = Field(default=False, exclude=True, description="Moved.")
    norm_output: SkipJsonSchema[bool] = Field(default=False, exclude=True, description="Moved.")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="AdamW, or Muon for the layer's matrices with AdamW for heads and norms.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate; by default 1e-3 for random first weights and 3e-4 for "
        "others, which a higher one soon destroys.",
    )
    warmup_steps: int = Field(default=10, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Decay after the warm-up, down to final_lr_ratio."
    )
    final_lr_ratio: float = Field(default=0.05, ge=0, le=1, description="Last rate / peak rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's betas.")
    max_grad_norm: float = Field(default=0.5, gt=0, description="Clip gradients to this 2-norm.")
    epochs: int = Field(
        default=1, gt=0, description="Passes over the data; ignored if max_steps is set."
    )
    max_steps: int | None = Field(default=None, gt=0, description="Stop exactly after this step.")
    extend: Extend | None = Field(
        default=None,
        description="What the learning rate of a run that resumes with more epochs or max_steps "
        "does; needed then, unless it is constant. keep: the schedule stays as it is, and its "
        "final rate is that of the added steps. restretch: the rate goes on from its present "
        "value, and what is left of the decay is spread over the steps to come. After the end of "
        "the decay both stay at the final rate.",
    )
    batch_tokens: int = Field(
        default=8192, gt=0, description="Tokens per packed batch: samples, and pieces of long ones."
    )
    window_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Longest piece of a sample that is trained on at once. A longer sample is "
        "divided: each piece trains its own positions, and reads tokens before and after them, so "
        "that each counts once. None: batch_tokens. A larger number than the longest sample "
        "divides none, and gives a sample longer than batch_tokens a batch of its own.",
    )
    batches_per_step: int = Field(
        default=1, gt=0, description="Packed batches per process whose gradients form one step."
    )
    dtype: TrainingDtype = Field(
        default="auto",
        description="Dtype of matrix products; weights, norms, sums and losses are float32. auto: "
        "bfloat16 on GPUs and CPUs that support it natively, float32 on others, where bfloat16 "
        "would be a hundred times slower.",
    )
    num_processes: int = Field(
        default=1,
        gt=0,
        description="Processes that train in parallel on this machine, one per GPU.",
    )
    nodes: int = Field(
        default=1,
        gt=0,
        description="Machines that train one draft, each with num_processes processes. Run the "
        "same command on all of them; they share `home` and the store.",
    )
    rendezvous: str | None = Field(
        default=None,
        pattern=r"^[^\s:/]+:[0-9]{1,5}$",
        description="HOST:PORT where the machines meet. The machine with this address is the first "
        "one: it owns the run, writes checkpoints and reports, and opens the port.",
    )
    node_timeout_seconds: int = Field(
        default=600,
        gt=0,
        description="How long a machine waits for the others, before the first step and within a "
        "step, until it ends with an error.",
    )
    sharding: Sharding = Field(
        default="replicate",
        description="With several processes: each holds the full draft (DDP) or a shard (FSDP2).",
    )
    shuffle_window: int = Field(
        default=8, gt=0, description="Shards whose samples are shuffled together and cached."
    )
    seed: int = Field(default=0, ge=0, description="Seed of weights and sample order.")
    checkpoint_every: int = Field(default=200, gt=0, description="Steps between checkpoints.")
    keep_last: int = Field(
        default=2, gt=0, description="Newest checkpoints to keep, besides the best one."
    )
    held_out_every: int = Field(
        default=200, gt=0, description="Steps between measurements on the held-out split."
    )
    held_out_tokens: int = Field(
        default=65536, gt=0, description="Maximum of held-out tokens per measurement."
    )
    decode_every: int = Field(
        default=0,
        ge=0,
        description="Steps between real decodings of some held-out prompts with the draft as it is "
        "then, as `evaluate` decodes them; 0 for none. The target is loaded for them, and must be "
        "one that this machine can decode. Training has the same bits with and without.",
    )
    decode_prompts: int = Field(
        default=8, gt=0, description="Held-out prompts that are decoded each time."
    )
    decode_new_tokens: int = Field(
        default=64, gt=0, description="Maximum of new tokens per prompt of these."
    )
    decode_device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="Where they are decoded. auto: on a GPU that no training process uses, while "
        "training goes on; without such a GPU on the target's own device, while training waits. A "
        "device that is named (cpu, cuda:N) decodes while training goes on.",
    )
    best_by: BestBy = Field(
        default="joint_prefix",
        description="What makes a checkpoint the best one, which evaluate and export use. "
        "joint_prefix: the largest acceptance length on held-out states, of checkpoints that were "
        "measured. decoding: the largest decoded acceptance length; each decoding then has a "
        "checkpoint.",
    )
    log_every: int = Field(default=5, gt=0, description="Steps between logged metrics.")

    @model_validator(mode="after")
    def _window_has_own_positions(self) -> Self:
        least = smallest_window(self.ttt_length)
        if self.window_tokens is not None and self.window_tokens < least:
            raise ValueError(
                f"window_tokens is {self.window_tokens}, but with ttt_length {self.ttt_length} a "
                f"window needs {least} tokens or more: besides its own positions it has those that "
                "they read"
            )
        return self

    @model_validator(mode="after")
    def _refits_a_draft(self) -> Self:
        if self.refit and self.start_folder is None:
            raise ValueError(
                "refit adapts a given draft: set start to its folder, or leave refit out"
            )
        return self

    @model_validator(mode="after")
    def _decodes_what_decides(self) -> Self:
        if self.best_by == "decoding" and not self.decode_every:
            raise ValueError(
                "best_by is decoding, but decode_every is 0: nothing would be decoded; set "
                "decode_every to a number of steps, or best_by to joint_prefix"
            )
        return self

    @model_validator(mode="after")
    def _machines_meet(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(
                f"nodes is {self.nodes}, but rendezvous is not set: the machines would not find "
                "each other. Set it to HOST:PORT of one of them, such as host0:29500, the same on "
                "all"
            )
        if self.rendezvous is not None and not 0 < int(self.rendezvous.split(":")[1]) < 1 << 16:
            raise ValueError(f"rendezvous is {self.rendezvous}: a port is a number from 1 to 65535")
        return self

    @property
    def world_size(self) -> int:
        """The number of processes on all machines."""
        return self.nodes * self.num_processes

    @property
    def start_folder(self) -> Path | None:
        """The folder of the draft to start from, if there is one."""
        return None if self.start in {None, CLOSED_FORM, RANDOM} else Path(str(self.start))

    @property
    def peak_learning_rate(self) -> float:
        """Return `learning_rate`, or its default for these first weights."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE_OF_DRAWN_WEIGHTS if self.start == RANDOM else RATE_OF_GIVEN_WEIGHTS

    @property
    def piece_tokens(self) -> int:
        """Return `window_tokens`, or its default."""
        if self.window_tokens is not None:
            return self.window_tokens
        return max(self.batch_tokens, smallest_window(self.ttt_length))

    @property
    def moved(self) -> Mapping[str, bool]:
        """Return the flags that recipes of older versions set here, for the section `draft`."""
        return {name: getattr(self, name) for name in self.moved_keys}

    @property
    def is_solved(self) -> bool:
        """Return whether the first weights are solved; so they are by default."""
        return self.start in {None, CLOSED_FORM}

    def identity(self) -> dict[str, object]:
        """Return the fields that a resumed run must share with its checkpoint."""
        # A checkpoint does not depend on how its run began.
        free = {"start", "refit", "epochs", "max_steps", "extend", "gradient_checkpointing"}
        free |= {"checkpoint_every", "keep_last", "log_every", "held_out_every", "held_out_tokens"}
        free |= {"decode_every", "decode_prompts", "decode_new_tokens", "decode_device", "best_by"}
        # The number of processes may change between two runs.
        free |= {"num_processes", "sharding", "batches_per_step"}
        free |= {"nodes", "rendezvous", "node_timeout_seconds"}
        fields = self.model_dump(mode="json", exclude=free)
        decided = {"learning_rate": self.peak_learning_rate, "window_tokens": self.piece_tokens}
        return {**fields, **decided}
