"""A policy of training: what is a vector."""

from owlfuse.model.adapters import Frozen, Part


class Vectors:
    """Norms and biases are trained, matrices and kernels are not (BitFit, arXiv 2106.10199, with
    the norms)."""

    def apply(self, part: Part) -> None:
        """See `owlfuse.model.adapters.Policy`.

        Raises:
            ValueError: a part without vectors.
        """
        Frozen().apply(part)
        vectors = [parameter for parameter in part.parameters.values() if parameter.ndim == 1]
        if not vectors:
            raise ValueError(f"{part.name} has neither norms nor biases")
        for parameter in vectors:
            parameter.requires_grad_(True)
