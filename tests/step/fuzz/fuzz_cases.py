"""Loops composed at random: what a case consists of, how a seed draws it, and what of it may be
refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

DDP = (
    "ddp",
    "ddp_find_unused",
    "ddp_static_graph",
    "ddp_bucket_view",
    "ddp_of_compiled",
    "compiled_ddp",
)
FSDP = ("fsdp", "fsdp_layers")
ALONE = ("plain", "compiled")
OPTIMIZERS = ("sgd", "momentum", "adamw", "groups", "part")
MICRO_BATCHES = (
    "tensor",
    "dict",
    "tuple",
    "list",
    "named_tuple",
    "user_dict",
    "class_with_to",
    "dataclass",
)
LOADERS = (
    "list",
    "reiterable",
    "generator",
    "drawn",
    "dataloader",
    "shuffled",
    "augmented",
    "by_hand",
)
ONE_SHOT = ("generator", "drawn")
SCHEDULERS = ("none", "none", "lambda", "cosine", "one_cycle")


@dataclass(frozen=True)
class Case:
    """A training loop in words. Everything else about it is a function of these fields."""

    seed: int
    ranks: int
    wrapper: str
    optimizer: str
    micro_batch: str  # the class of a micro-batch
    loader: str
    terms: int  # of the objective
    extra: str  # which micro-batches use the layer `extra`: "always", "some", "never"
    mask: str  # what counts: "all", "some", "hollow_window"
    uneven_sizes: bool
    lengths: tuple[int, ...]  # micro-batches in an epoch by rank
    sizes: tuple[int, ...]  # micro-batches per rank in a full window, by window
    break_after: int | None  # windows, after which a new pass over the same windows begins
    scheduler: str
    sync: str
    contexts: tuple[str, ...]
    mistake: str | None = None

    @property
    def num_windows(self) -> int:
        """The most windows that the loop makes."""
        return len(self.sizes)

    def has(self, context: str) -> bool:
        """Whether this context surrounds the loop."""
        return context in self.contexts

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        words = [
            f"{self.wrapper} on {ranks}",
            self.optimizer,
            f"{self.micro_batch} from {self.loader} {self.lengths}",
        ]
        words += [
            f"windows of {self.sizes}",
            f"{self.terms} term(s)",
            f"extra {self.extra}",
            f"mask {self.mask}",
        ]
        words += ["uneven sizes"] * self.uneven_sizes + [f"break after {self.break_after}"] * bool(
            self.break_after
        )
        words += [f"scheduler {self.scheduler}"] * (self.scheduler != "none")
        words += [f"sync={self.sync}"] * (self.sync != "auto") + list(self.contexts)
        return ", ".join(words) + (f", MISTAKE {self.mistake}" if self.mistake else "")


def draw(seed: int) -> Case:
    """Compose the case of this seed."""
    dice = random.Random(seed)
    ranks = dice.choice([1, 2, 2, 2, 3])
    wrapper = dice.choice(
        (*ALONE[:1] * 3, *ALONE, *DDP[:4], *FSDP) if ranks == 1 else (*DDP, *DDP[:2], *FSDP, *FSDP)
    )
    loader = dice.choice(LOADERS)
    sizes = _draw_sizes(dice)
    break_after = dice.choice([1, 2]) if loader != "by_hand" and dice.random() < 0.25 else None
    case = Case(
        seed=seed,
        ranks=ranks,
        wrapper=wrapper,
        optimizer=dice.choice(OPTIMIZERS),
        micro_batch=dice.choice(MICRO_BATCHES),
        loader=loader,
        terms=dice.choice([1, 1, 2]),
        # All ranks of per-layer FSDP2 gather each layer that any of them computes.
        extra=dice.choice(["always"] * 4 + ["never"] + ["some"] * (wrapper != "fsdp_layers")),
        mask=dice.choice(["all", "some", "some", "hollow_window"]),
        uneven_sizes=dice.random() < 0.5,
        lengths=_draw_lengths(dice, ranks, sizes, loader),
        sizes=sizes,
        break_after=break_after,
        scheduler=dice.choice(SCHEDULERS),
        sync=dice.choice(["auto", "auto", "every", *(["gather_once"] if wrapper in FSDP else [])]),
        contexts=(),
    )
    case = replace(case, contexts=_draw_contexts(dice, case))
    if dice.random() < 0.45:
        case = replace(
            case, mistake=dice.choice([name for name, fits in MISTAKES.items() if fits(case)])
        )
    return case


def _draw_sizes(dice: random.Random) -> tuple[int, ...]:
    windows = dice.choice([3, 4])
    if dice.random() < 0.3:
        return tuple(dice.randint(1, 3) for _ in range(windows))
    return (dice.randint(1, 3),) * windows


def _draw_lengths(
    dice: random.Random, ranks: int, sizes: tuple[int, ...], loader: str
) -> tuple[int, ...]:
    """At least one rank has micro-batches for the last window; "drawn" has no end."""
    most = sum(sizes) - dice.randint(0, sizes[-1] - 1)
    lengths = [most] * ranks
    kind = dice.choice(["even", "even", "uneven", "empty_rank"])
    if loader != "drawn" and ranks > 1 and kind != "even":
        short = dice.randrange(ranks)
        lengths[short] = 0 if kind == "empty_rank" else dice.randint(1, most)
    return tuple(lengths)


def _draw_contexts(dice: random.Random, case: Case) -> tuple[str, ...]:
    shares = {
        "seed": 0.4,
        "clip_norm": 0.4,
        "evaluation": 0.3,
        "audit": 0.25,
        "frozen": 0.15,
        "agree_on_oom": 0.06,
    }
    shares |= {"autocast": 0.06, "no_grad": 0.03, "inference_mode": 0.03}
    if case.wrapper in DDP[:-1]:
        shares["no_sync"] = 0.08
    # torch's schedulers know the groups that were there when they were made
    if case.scheduler == "none":
        shares["group_added"] = 0.12
    plain_ddp = case.wrapper in ("ddp", "ddp_bucket_view") and case.sync == "auto"
    if plain_ddp or (case.wrapper == "fsdp_layers" and case.sync == "gather_once"):
        shares["overlap"] = 0.3
    drawn = [name for name, share in shares.items() if dice.random() < share]
    exclusive = {"group_added": "frozen", "overlap": "agree_on_oom"}
    return tuple(name for name in drawn if exclusive.get(name) not in drawn)


def _wrapped(case: Case) -> bool:
    return case.wrapper not in ALONE


def _layer_may_change(case: Case) -> bool:
    """Tell whether `extra` may be thawed or frozen in mid-run: it is used, and nothing else decides
    it."""
    return case.extra == "always" and not case.has("frozen") and not case.has("group_added")


# What users get wrong, and where it can be got wrong.
MISTAKES: dict[str, Callable[[Case], bool]] = {
    "criterion_parameter": lambda case: True,
    "thawed": _layer_may_change,
    "thawed_later": _layer_may_change,
    "frozen_after_wrapping": _layer_may_change,
    "frozen_later": _layer_may_change,
    "optimizer_before_wrapping": _wrapped,
    "optimizer_of_a_copy": lambda case: True,
    "past_the_wrapper": lambda case: case.wrapper in DDP[:-1],
    "ignored_by_ddp": lambda case: case.wrapper in DDP[:4] and not case.has("frozen"),
    "layer_replaced": lambda case: _wrapped(case) and not case.has("frozen"),
    "part_wrapped": _wrapped,
    "not_wrapped": lambda case: case.ranks > 1,
    "mean_for_sum": lambda case: case.mask == "all" and not case.uneven_sizes,
    "vector_for_sum": lambda case: True,
    "sum_without_graph": lambda case: True,
    "other_terms": lambda case: True,
    "generator_as_window": lambda case: True,
    "list_of_optimizers": lambda case: True,
    "plateau_scheduler": lambda case: not case.has("group_added"),
    "lbfgs": lambda case: case.scheduler != "one_cycle" and not case.has("group_added"),
    "one_cycle_past_its_end": (
        lambda case: case.mask != "hollow_window" and not case.has("group_added")
    ),
    "denominator_none": lambda case: True,
    "denominator_nan": lambda case: True,
    "denominator_vector": lambda case: True,
    "denominator_negative": lambda case: True,
    "denominator_nan_on_one_rank": lambda case: case.ranks > 1 and min(case.lengths) > 0,
}

# What an accumulator need not keep, with the reason; everything else must be exact.
MAY_REFUSE: dict[str, str] = {
    "criterion_parameter": "no wrapper reduces a parameter outside the model",
    "thawed": "the wrapper was made for other parameters",
    "thawed_later": "the wrapper was made for other parameters",
    "frozen_after_wrapping": "the wrapper waits for a gradient that never comes",
    "frozen_later": "the wrapper waits for a gradient that never comes",
    "optimizer_before_sharding": "sharding replaced the parameters that the optimizer has",
    "optimizer_of_a_copy": "the model's parameters are not the optimizer's",
    "past_the_wrapper": "a backward without the wrapper's forward reduces nothing",
    "ignored_by_ddp": "DDP was told to reduce other parameters only",
    "layer_replaced": "the wrapper does not know the new layer",
    "part_wrapped": "the parameters outside the wrapped part are reduced by nobody",
    "not_wrapped": "ranks would train apart",
    "mean_for_sum": "a mean cannot be added up",
    "vector_for_sum": "a loss is one number",
    "sum_without_graph": "there is nothing to train",
    "other_terms": "a sum without its denominator",
    "generator_as_window": "its length is not known",
    "list_of_optimizers": "an accumulator has one optimizer",
    "plateau_scheduler": "it needs a metric",
    "lbfgs": "it wants a closure",
    "one_cycle_past_its_end": "the schedule has no more steps",
    "denominator_none": "not a count",
    "denominator_nan": "not a count",
    "denominator_vector": "not one count",
    "denominator_negative": "not a count",
    "denominator_nan_on_one_rank": "not a count",
    "no_grad": "there is no backward",
    "inference_mode": "there is no backward",
    "autocast": "autocast keeps the first weights' copies as long as it is open",
    "static_graph_changes": "static_graph=True promises the first micro-batch's graph",
    "static_graph_apart": "static_graph=True needs DDP's own reduction, which is not atomic",
}


def reasons_to_refuse(case: Case) -> list[str]:
    """What in this case may be refused."""
    found = {case.mistake, *case.contexts, case.wrapper}
    if case.mistake == "optimizer_before_wrapping" and case.wrapper in FSDP:
        found.add("optimizer_before_sharding")
    # nothing is wrapped: these are no mistakes
    if case.wrapper in ALONE and case.mistake != "layer_replaced":
        found -= {
            "criterion_parameter",
            "thawed",
            "thawed_later",
            "frozen_after_wrapping",
            "frozen_later",
        }
    if case.wrapper in DDP and case.extra != "always" and not case.has("frozen"):
        found |= {"ddp_find_unused": set(), "ddp_static_graph": {"static_graph_changes"}}.get(
            case.wrapper, set()
        )
    if case.wrapper == "ddp_static_graph" and case.has("agree_on_oom"):
        found.add("static_graph_apart")
    return [MAY_REFUSE[name] for name in MAY_REFUSE if name in found]
