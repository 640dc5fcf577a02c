"""Holds all uses of private names of torch, tested with torch 2.11, 2.13 and 2.15.

Each function says why no public name serves.
"""

from distaccum._torch.groups import fake_process_group as fake_process_group
from distaccum._torch.groups import no_communication as no_communication
from distaccum._torch.modules import composed as composed
from distaccum._torch.modules import seen_through as seen_through
from distaccum._torch.oom import is_out_of_memory as is_out_of_memory
from distaccum._torch.replicated import ddp_buckets as ddp_buckets
from distaccum._torch.replicated import ddp_complete as ddp_complete
from distaccum._torch.replicated import ddp_obstacle as ddp_obstacle
from distaccum._torch.replicated import ddp_parameters as ddp_parameters
from distaccum._torch.replicated import ddp_synchronises as ddp_synchronises
from distaccum._torch.replicated import reset_ddp as reset_ddp
from distaccum._torch.sharded import ShardedGroup as ShardedGroup
from distaccum._torch.sharded import changed_while_gathered as changed_while_gathered
from distaccum._torch.sharded import clear_sharded_gradients as clear_sharded_gradients
from distaccum._torch.sharded import forget_forwards as forget_forwards
from distaccum._torch.sharded import offloads as offloads
from distaccum._torch.sharded import reduce_unused_parameters as reduce_unused_parameters
from distaccum._torch.sharded import sharded_groups as sharded_groups
from distaccum._torch.sharded import shared_group as shared_group
from distaccum._torch.tensors import backward as backward
from distaccum._torch.tensors import fake_tensors as fake_tensors
from distaccum._torch.tensors import has_hooks as has_hooks
from distaccum._torch.tensors import storage_resizes as storage_resizes
