"""FSDP2: parameters and gradients in shards. HSDP is the same on a 2-D mesh, not a class of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from distaccum import _torch
from distaccum.core.loss import wide
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy, Sync
from distaccum.parallel.ledger import Traffic
from distaccum.parallel.world import World

# Names by which meshes say that the ranks along a dimension work on parts of the same samples.
MODEL_PARALLEL = {"tp", "cp", "pp", "sp", "ep", "tensor", "context", "pipeline", "sequence", "expert"}


def shard_again(model: nn.Module) -> None:
    """Shard what a forward without backward, such as an evaluation's, has left gathered.

    Raises:
        ConfigError: for parameters that were frozen or thawed meanwhile, which FSDP2 would forget.
    """
    if names := _torch.changed_while_gathered(model):
        raise ConfigError(
            f"{len(names)} parameter(s), {names[0]} first, were frozen or thawed while FSDP2 held the model gathered, "
            "as it does after an evaluation. FSDP2 forgets that when it shards the model again. Call requires_grad_() "
            "before the evaluation, or after it and after reshard() of each FSDP2 module."
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class FSDP(Strategy):
    """A module to which `fully_shard` was applied, ours or the user's."""

    sharded = True

    def __init__(self, model: nn.Module, world: World, sync: Sync, dtypes: GradientDtypes, mesh: DeviceMesh) -> None:
        """Refuse what would be wrong in silence; the flags of the policy are set per micro."""
        reason = "the least memory of those that reduce once" if sync is Sync.auto else ""
        sync = Sync.boundary if sync is Sync.auto else sync
        super().__init__(model, world, sync, dtypes, reason)
        assert isinstance(model, FSDPModule)
        self._module: FSDPModule = model
        self.groups = _torch.sharding_groups(model)
        self._replicated = mesh.ndim == 2
        self._shards = mesh.size(-1)
        self.replicas = mesh.size(0) if self._replicated else 1
        kept = (Sync.boundary, Sync.keep, Sync.every) + ((Sync.shard,) if self._replicated else ())
        self.refuse(kept, "a 1-D mesh has no replicas to postpone the all-reduce for")
        if _torch.custom_divide_factor(model) is not None:
            raise ConfigError(
                "set_gradient_divide_factor() was called on this model, so its gradients would be divided twice. "
                "Leave it out: the division by the global weight is done here, once."
            )
        self._refuse_other_dtypes(dtypes)
        # Ranks may use different parameters in a window; all must reduce the same ones, and with a postponed all-reduce
        # a partial sum must not meet another parameter's.
        _torch.reduce_unused_parameters(model)
        if sync is Sync.every and not GradientDtypes(dtypes.accumulate).are_own(model.parameters()):
            # Each micro's reduced shard would be summed in the parameter's dtype.
            self.sums = GradientSums(model.parameters(), dtypes)
        if sync is Sync.keep:
            model.set_reshard_after_forward(False)

    def micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Set the flags that FSDP2 reads in the backward; they stay until the next micro sets its own."""
        if first:  # forwards without backward, such as an evaluation's, would change what this window gathers
            shard_again(self.model)
            _torch.forget_forwards(self.model)
        # The order matters: this one sets the all-reduce flag too.
        self._module.set_requires_gradient_sync(last or self.sync in (Sync.every, Sync.shard))
        if self.sync is Sync.shard:
            self._module.set_requires_all_reduce(last)
        if self.sync is Sync.keep:
            self._module.set_reshard_after_backward(last)
        self._module.set_is_last_backward(True)
        return nullcontext()

    def tail_obstacle(self, blocks: Sequence[nn.Module]) -> str | None:
        """Parameters must be there while one block after the other is computed for several micros."""
        if self.sync is not Sync.keep:
            return f"sync='{self.sync.value}' gathers parameters for each micro-batch; sync='keep' does not"
        if _torch.shared_group(self.model, blocks):
            return "two blocks are in one group of FSDP2"
        return super().tail_obstacle(blocks)

    def tail_micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Nothing is reduced until `completing`; what is on its way is waited for in the last of all backwards."""
        entered = self.micro(first=first, last=False)
        self._module.set_is_last_backward(False)
        return entered

    @contextmanager
    def completing(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """These modules' groups reduce in this backward and give up their parameters; the root's is the last one."""
        parts = [module for module in modules if isinstance(module, FSDPModule)]
        self._module.set_is_last_backward(self._module in parts)
        for reduces in (True, False):
            for part in parts:
                part.set_requires_gradient_sync(reduces, recurse=False)
                part.set_reshard_after_backward(reduces, recurse=False)
            if reduces:
                yield

    def owned(self) -> list[nn.Parameter]:
        """List the sharded parameters; no other one is reduced."""
        return [parameter for parameter in self.model.parameters() if isinstance(parameter, DTensor)]

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Return the local shards, without padding."""
        return [gradient.to_local() for gradient in super().gradients(parameters) if isinstance(gradient, DTensor)]

    def abort(self) -> None:
        """Clear also what lives off the parameters: unsharded sums, HSDP's partial sums, a pass that did not end."""
        super().abort()
        _torch.clear_sharded_gradients(self.model)

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Counted over FSDP2's groups: gathered once or twice a micro, reduced as the policy says."""
        gathers = 1 if self.sync is Sync.keep else num_rounds
        scatters = num_rounds if self.sync in (Sync.every, Sync.shard) else 1
        reduces = num_rounds if self.sync is Sync.every else 1
        entries: list[tuple[str, int]] = []
        for group in _torch.sharded_groups(self.model):
            if group.gather_bytes and self._shards > 1:
                per_micro = 1 if self.sync is Sync.keep or not group.reshards else 2
                entries += [("all_gather", group.gather_bytes)] * (gathers * per_micro)
            if group.scatter_bytes and self._shards > 1:
                entries += [("reduce_scatter", group.scatter_bytes)] * scatters
            if group.reduce_bytes and self._replicated:
                entries += [("all_reduce", group.reduce_bytes)] * reduces
        return Traffic.of(entries)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """As for all strategies; afterwards parameters are in shards again, whatever the policy kept."""
        with super().evaluating() as model:
            yield model
        shard_again(self.model)

    def _refuse_other_dtypes(self, dtypes: GradientDtypes) -> None:
        """The module's own policy decides in which dtype it reduces, and sums over micros that it does not reduce."""
        for group in _torch.sharded_groups(self.model):
            found, asked = group.reduce_dtype, dtypes.reduce or wide(group.reduce_dtype)
            if group.scatter_bytes and found is not asked:
                raise ConfigError(
                    f"This FSDP2 module reduces gradients in {found}, and {asked} is asked for"
                    f"{'' if dtypes.reduce else ': sums over many micro-batches stall in narrow dtypes'}. Use "
                    f"fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=..., reduce_dtype={asked})), or "
                    f"reduce_dtype={found} where that is meant."
                )
            accumulated = dtypes.accumulate or wide(found)
            if group.scatter_bytes and self.sync is not Sync.every and found is not accumulated:
                raise ConfigError(
                    f"FSDP2 sums the gradients that it has not reduced yet in the dtype in which it reduces ({found}), "
                    f"and a sum in {accumulated} is asked for. Use one dtype for both (accum.dtype and "
                    "parallel.reduce_dtype on the command line), or sync='every'."
                )


def recognise_sharded(model: FSDPModule, world: World, sync: Sync, dtypes: GradientDtypes) -> FSDP:
    """The strategy for an FSDP2 module.

    Raises:
        ConfigError: for trained parameters that are not sharded, and for other meshes than (replicate, shard).
    """
    assert isinstance(model, nn.Module)
    named = list(model.named_parameters())
    sharded = [(name, parameter) for name, parameter in named if isinstance(parameter, DTensor)]
    outside = [name for name, parameter in named if parameter.requires_grad and not isinstance(parameter, DTensor)]
    if outside:
        raise ConfigError(
            f"{len(outside)} trained parameter(s) are not sharded ({outside[0]}, ...), so their gradients would differ "
            "between ranks. Shard them too, or freeze them."
        )
    if not sharded:
        raise ConfigError(
            "fully_shard() was applied to this model and none of its parameters is sharded. Apply it to the modules "
            "that have parameters, or to the whole model."
        )
    (_, first), *_ = sharded
    for name, parameter in sharded:
        _refuse_other_meshes(name, parameter, first, world)
    if _torch.offloads(model):
        raise ConfigError(
            "This FSDP2 model uses CPUOffloadPolicy, which is not supported: its parameters are on the CPU and "
            "micro-batches are on the GPU. Call fully_shard() without offload_policy; to save memory use "
            "nn.checkpoint, smaller micro-batches or more ranks."
        )
    return FSDP(model, world, sync, dtypes, first.device_mesh)


def _refuse_other_meshes(name: str, parameter: DTensor, first: DTensor, world: World) -> None:
    """Refuse parameters that are not sharded over all ranks, with or without replicas, on one mesh."""
    mesh, placements = parameter.device_mesh, parameter.placements
    wanted = (Replicate,) * (mesh.ndim - 1) + (Shard,)
    shared = sorted(MODEL_PARALLEL.intersection(mesh.mesh_dim_names or ()))
    reasons = {
        f"it is on another mesh than the first parameter, which is on {first.device_mesh}": mesh != first.device_mesh,
        "the ranks of a dimension that neither replicates nor shards whole parameters share samples": (
            mesh.ndim > 2 or tuple(map(type, placements)) != wanted
        ),
        f"ranks along {', '.join(shared)} share samples, as the mesh's names say": bool(shared),
        f"the model is sharded over {mesh.size()} of {world.size} ranks": mesh.size() != world.size,
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is not None:
        raise ConfigError(
            f"The parameter {name} is on the mesh {mesh} with the placements {placements}: {reason}. All ranks must "
            "have samples of their own in the effective batch, or losses, counts and norms would be wrong: use one 1-D "
            "mesh over all ranks, or one 2-D mesh (replicate, shard)."
        )
