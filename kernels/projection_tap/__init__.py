"""The projected gradient of a linear's weight as the gradient of an input that is zero."""

from lowmem_compile.kernels.projection_tap.op import projection_tap
from lowmem_compile.kernels.projection_tap.reference import projected_gradient_reference
from lowmem_compile.kernels.projection_tap.refresh import Refresher, fresh_factors, refresh_basis, refresh_tap

__all__ = ["Refresher", "fresh_factors", "projected_gradient_reference", "projection_tap", "refresh_basis", "refresh_tap"]
