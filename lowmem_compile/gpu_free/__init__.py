"""What can be known of GPU code on a machine without a GPU.

| question | answered by |
| --- | --- |
| Which Triton kernels does Inductor generate for a model on a GPU? | :mod:`.generate`, for a stubbed device |
| Do they compile, with how many registers and spills? | :mod:`.resources`: Triton's own compilers, ahead of time |
| Do they compute the right thing? | :mod:`.interpret`: Inductor's own wrapper, Triton's interpreter, CPU tensors |
| How many bytes do they move? | the same run: every load and store is counted |

Needs ``triton`` (the extra ``gpu``). Says nothing about time.
"""
