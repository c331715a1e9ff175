"""How the model is computed: one object that travels from the run's config down to the kernels.

None of it changes a result beyond rounding: it says what the backward pass recomputes, whose attention kernels run, whether
layers are scanned or unrolled, and whether they multiply in 8 bits, which rounds coarsely.
"""

import dataclasses
from dataclasses import dataclass

from voxcpm2_jax import chips, sharding
from voxcpm2_jax.config.run import PRODUCTS, REMAT_POLICIES, BackboneRun
from voxcpm2_jax.models.product import check_installed


@dataclass(frozen=True)
class Compute:
    """Options of the computation; hashable, so that jit can take it as a static argument.

    Attributes:
        remat: what the backward pass of the language models recomputes: a name in REMAT_POLICIES.
        remat_local: the same for LocEnc and LocDiT; None: as `remat`.
        remat_locdit: LocDiT's own; None: as `remat_local`.
        locdit_at_once: most patches that LocDiT computes at once on a device (chunks.py); None: all.
        max_segments: most clips in a packed row; the loss of a row with more is NaN. None: as many as fit.
        clip_slots: most slots of a clip in a packed row; the loss of a row with a longer one is NaN. None: all of a row.
        platform: whose attention kernels run: "cpu", "gpu" or "tpu". None: the platform of the mesh in `jax.set_mesh`, or
            without one that of JAX's default device.
        is_unrolled: layers one by one with fused matrices (`transformer.unstack`), as generation wants them.
        products: how layers multiply in training: a name in PRODUCTS; None: in the model's dtype.
    """

    remat: str = "full"
    remat_local: str | None = None
    remat_locdit: str | None = None
    locdit_at_once: int | None = None
    max_segments: int | None = None
    clip_slots: int | None = None
    platform: str | None = None
    is_unrolled: bool = False
    products: str | None = None

    def __post_init__(self):
        assert {self.remat, self.remat_local or self.remat, self.remat_locdit or self.remat} <= REMAT_POLICIES.keys(), self
        assert self.products in (None, *PRODUCTS), self.products
        assert self.platform in (None, "cpu", "gpu", "tpu"), self.platform

    @classmethod
    def of(cls, run: BackboneRun, mesh=None) -> "Compute":
        """The options of a training run on a mesh; without a mesh the platform is derived where a kernel is chosen.

        Raises:
            UserError: the devices of the mesh do not multiply in 8 bits as the run wants, or qwix is not installed.
        """
        platform = None if mesh is None else sharding.platform(mesh)
        check_installed(run.products)
        if platform in ("tpu", "gpu"):
            kind = mesh.devices.flat[0].device_kind
            chips.check_products(run.products, chips.of_kind(kind), kind)
        limits = run.batch.segments, run.batch.clip_slots
        remat = run.remat, run.remat_local, run.remat_locdit
        return cls(*remat, run.locdit_at_once, *limits, platform, products=run.products)

    @property
    def is_flat(self) -> bool:
        """Activations lie as TPU kernels want them: heads side by side, in LocEnc and LocDiT also patches."""
        return (self.platform or sharding.current_platform()) == "tpu"

    @property
    def of_locenc(self) -> "Compute":
        """The options with LocEnc's remat policy."""
        return dataclasses.replace(self, remat=self.remat_local or self.remat)

    @property
    def of_locdit(self) -> "Compute":
        """The options with LocDiT's remat policy."""
        return dataclasses.replace(self, remat=self.remat_locdit or self.of_locenc.remat)
