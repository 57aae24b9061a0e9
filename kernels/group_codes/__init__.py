"""Group-wise integer codes for saved tensors: b bits an element and one scale a group along the last dimension."""

from lowmem_compile.kernels.group_codes.codec import CODECS, Codec, codec_named, group_size, pack_codes, planes, unpack_codes
from lowmem_compile.kernels.group_codes.in_memory import in_memory
from lowmem_compile.kernels.group_codes.many import decode_many, encode_many
from lowmem_compile.kernels.group_codes.op import encode_groups
from lowmem_compile.kernels.group_codes.prologue import in_prologue
from lowmem_compile.kernels.group_codes.runs import behind, encode_runs

__all__ = [
    "CODECS",
    "Codec",
    "behind",
    "codec_named",
    "decode_many",
    "encode_groups",
    "encode_many",
    "encode_runs",
    "group_size",
    "in_memory",
    "in_prologue",
    "pack_codes",
    "planes",
    "unpack_codes",
]
