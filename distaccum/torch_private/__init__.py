"""All uses of names that torch keeps private, in one place. Tested with torch 2.11, 2.13 and 2.15.

Each function says why no public name serves.
"""

from distaccum.torch_private.groups import Withheld as Withheld
from distaccum.torch_private.groups import issued as issued
from distaccum.torch_private.groups import silence as silence
from distaccum.torch_private.groups import silent_group as silent_group
from distaccum.torch_private.modules import composed as composed
from distaccum.torch_private.modules import seen_through as seen_through
from distaccum.torch_private.oom import is_out_of_memory as is_out_of_memory
from distaccum.torch_private.replicated import ddp_buckets as ddp_buckets
from distaccum.torch_private.replicated import ddp_complete as ddp_complete
from distaccum.torch_private.replicated import ddp_obstacle as ddp_obstacle
from distaccum.torch_private.replicated import ddp_parameters as ddp_parameters
from distaccum.torch_private.replicated import ddp_synchronises as ddp_synchronises
from distaccum.torch_private.replicated import reset_ddp as reset_ddp
from distaccum.torch_private.sharded import ShardedGroup as ShardedGroup
from distaccum.torch_private.sharded import changed_while_gathered as changed_while_gathered
from distaccum.torch_private.sharded import clear_sharded_gradients as clear_sharded_gradients
from distaccum.torch_private.sharded import custom_divide_factor as custom_divide_factor
from distaccum.torch_private.sharded import forget_forwards as forget_forwards
from distaccum.torch_private.sharded import offloads as offloads
from distaccum.torch_private.sharded import reduce_unused_parameters as reduce_unused_parameters
from distaccum.torch_private.sharded import sharded_groups as sharded_groups
from distaccum.torch_private.sharded import sharding_groups as sharding_groups
from distaccum.torch_private.sharded import shared_group as shared_group
from distaccum.torch_private.tensors import backward as backward
from distaccum.torch_private.tensors import has_hooks as has_hooks
from distaccum.torch_private.tensors import storage_resizes as storage_resizes
from distaccum.torch_private.tensors import weightless as weightless
