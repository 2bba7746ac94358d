"""How a model of the hub computes: on real tokens alone, with losses, attention and dropout that fit the machine."""

from toolkit.compute.compiled import compile_blocks as compile_blocks
from toolkit.compute.compiled import compile_seconds as compile_seconds
from toolkit.compute.cross_entropy import fuse_loss as fuse_loss
from toolkit.compute.cross_entropy import linear_cross_entropy as linear_cross_entropy
from toolkit.compute.dropout import replace_dropout as replace_dropout
from toolkit.compute.fp8 import check_fp8 as check_fp8
from toolkit.compute.fp8 import multiply_in_fp8 as multiply_in_fp8
from toolkit.compute.lean import keep_less as keep_less
from toolkit.compute.padding_free import remove_padding as remove_padding
from toolkit.compute.ready import make_ready as make_ready
from toolkit.compute.recompute import check_checkpointing as check_checkpointing
from toolkit.compute.recompute import checkpoint_activations as checkpoint_activations
